"""Texts and conversations cut into sequences, in memory."""

from typing import NamedTuple

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.text.batches import as_text, pack, with_positions
from mixture_of_depths.text.conversations import Conversation, positions_in_sequences, rendered, tokens_of
from mixture_of_depths.text.tokenizer import end_of_text, tokenize


class Sequenced(NamedTuple):
    """Documents cut into sequences.

    Attributes:
        sequences: with the column `input_ids`; with conversations among them, see `cut_documents`.
        tokens: number of tokens, those of the rest that fills no sequence, too.
        bytes: their text in UTF-8.
    """

    sequences: datasets.Dataset
    tokens: int
    bytes: int


def by_kind(documents: list[str | Conversation]) -> tuple[list[str], list[Conversation]]:
    """The texts, and the conversations."""
    texts = [document for document in documents if isinstance(document, str)]
    return texts, [document for document in documents if isinstance(document, Conversation)]


def cut_documents(
    documents: list[str | Conversation], tokenizer: PreTrainedTokenizerBase, sequence_length: int, name: str
) -> Sequenced:
    """Texts and conversations as sequences of tokens, each kind by itself, texts first.

    With conversations among them, sequences have `position_ids`, since the end of a turn is no end of a conversation,
    and `is_conversation`.

    Raises:
        ValueError: when one of the kinds is shorter than a sequence, or the tokenizer has no chat template.
    """
    texts, conversations = by_kind(documents)
    cuts: list[Sequenced] = []
    if texts or not conversations:
        tokens = tokenize(texts, tokenizer)
        sequences = pack(tokens, sequence_length, name)
        if conversations:
            sequences = as_text(sequences, end_of_text(tokenizer))
        cuts.append(Sequenced(sequences, len(tokens), sum(len(text.encode("utf-8")) for text in texts)))
    if conversations:
        chats = rendered([conversation.messages for conversation in conversations], tokenizer)
        rows = tokens_of(chats, tokenizer)
        tokens = np.array([token for row in rows for token in row], dtype=np.int32)
        sequences = pack(tokens, sequence_length, f"{name} conversations'")
        positions_ST = positions_in_sequences([len(row) for row in rows], sequence_length)
        sequences = with_positions(sequences, positions_ST, True)
        cuts.append(Sequenced(sequences, len(tokens), sum(len(chat.encode("utf-8")) for chat in chats)))
    whole = cuts[0].sequences if len(cuts) == 1 else datasets.concatenate_datasets([cut.sequences for cut in cuts])
    return Sequenced(whole, sum(cut.tokens for cut in cuts), sum(cut.bytes for cut in cuts))
