"""A corpus: text read, split, tokenised and packed, kept in a cache under a name made from its content."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixture_of_depths.fields import refuse_without_use, validate_fields
from mixture_of_depths.files import is_whole, locked, seal, sync_folder
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.batches import document_positions, pack, with_positions
from mixture_of_depths.text.conversations import Conversation, positions_in_sequences, rendered, tokens_of
from mixture_of_depths.text.documents import Skipped, digest, read_all, split_conversations, split_documents
from mixture_of_depths.text.sources import HUB, NAMES, hub_name
from mixture_of_depths.text.tokenizer import end_of_text, load_tokenizer, start_of_text, tokenize, train_tokenizer

# Raised when the prepared form changes, so that older cache entries are not read.
CACHE_VERSION = 1
# Entries of a tokenizer that is trained, where the options name no number.
VOCABULARY = 4096


@dataclass(frozen=True)
class CorpusFacts:
    """What the prepared text consists of."""

    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    split: str
    skipped: Skipped = field(default_factory=Skipped)

    def __str__(self) -> str:
        return (
            f"{self.train_documents} documents, {self.train_tokens:,} tokens to train on; held out "
            f"{self.validation_documents} ({self.split}), {self.validation_tokens:,} tokens; skipped: {self.skipped}"
        )

    @property
    def validation_bytes_per_token(self) -> float:
        return self.validation_bytes / self.validation_tokens


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, packed into sequences of one length; each data set has the column `input_ids`.

    `key` names its content: text, split, tokenizer and length of the sequences.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    facts: CorpusFacts
    options: DataOptions
    key: str

    @property
    def end_of_text(self) -> int:
        """The token after every document."""
        return end_of_text(self.tokenizer)


def prepare(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None) -> Corpus:
    """Reads, splits, tokenises and packs text, or takes the result from the cache.

    Args:
        options: the text, and how it is cut.
        tokenizer: one to use in the place of that which the options name.

    Raises:
        ValueError: when there is no text, a path or column is missing, or the text is shorter than one sequence.
    """
    corpus = load_prepared(options, *prepare_cache(options, tokenizer))
    # The cache's copy cuts text alike, but a chat template may differ.
    return corpus if tokenizer is None else replace(corpus, tokenizer=tokenizer)


def prepare_cache(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[str, Skipped]:
    """Puts prepared text into the cache if it is not there; returns its key, and what was left out; see `prepare`."""
    _check(options, tokenizer)
    skipped = Skipped()
    documents = list(read_all(options, skipped))
    if not documents:
        raise ValueError(
            f"data={' '.join(options.data)} holds no text (skipped: {skipped}); give other files, folders or globs of "
            f"{NAMES}"
        )
    own_tokenizer = tokenizer or (load_tokenizer(options.tokenizer) if options.tokenizer else None)
    if own_tokenizer is None and any(isinstance(document, Conversation) for document in documents):
        raise ValueError(
            f"data={' '.join(options.data)} holds conversations, and a tokenizer that is trained has no chat template "
            "to make text of them; give a tokenizer that has one"
        )
    folder = options.cache_dir / _cache_key(options, documents, own_tokenizer)
    if not is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            # Another process may have written it meanwhile.
            if not is_whole(folder):
                _write_cache(folder, options, documents, own_tokenizer, skipped)
    return folder.name, skipped


def load_prepared(options: DataOptions, key: str, skipped: Skipped | None = None) -> Corpus:
    """The text under a key of the cache; the text itself is not read again.

    Args:
        options: the text, and how it is cut.
        key: its key.
        skipped: what was left out, where this text was read from others than the files that the entry was made of.
    """
    folder = options.cache_dir / key
    facts = json.loads((folder / "facts.json").read_text())
    return Corpus(
        datasets.Dataset.load_from_disk(str(folder / "train")),
        datasets.Dataset.load_from_disk(str(folder / "validation")),
        load_tokenizer(str(folder / "tokenizer")),
        CorpusFacts(**{**facts, "skipped": skipped or Skipped(**facts["skipped"])}),
        options,
        key,
    )


class Cut(NamedTuple):
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
) -> Cut:
    """Texts and conversations as sequences of tokens, each kind by itself, texts first.

    With conversations among them, sequences have `position_ids`, since the end of a turn is no end of a conversation,
    and `is_conversation`.

    Raises:
        ValueError: when one of the kinds is shorter than a sequence, or the tokenizer has no chat template.
    """
    texts, conversations = by_kind(documents)
    cuts: list[Cut] = []
    if texts or not conversations:
        tokens = tokenize(texts, tokenizer)
        sequences = pack(tokens, sequence_length, name)
        if conversations:
            ids = torch.tensor(np.array(sequences["input_ids"]))
            sequences = with_positions(sequences, document_positions(ids, end_of_text(tokenizer)).numpy(), False)
        cuts.append(Cut(sequences, len(tokens), sum(len(text.encode("utf-8")) for text in texts)))
    if conversations:
        chats = rendered([conversation.messages for conversation in conversations], tokenizer)
        rows = tokens_of(chats, tokenizer)
        tokens = np.array([token for row in rows for token in row], dtype=np.int32)
        sequences = pack(tokens, sequence_length, f"{name} conversations'")
        positions_ST = positions_in_sequences([len(row) for row in rows], sequence_length)
        sequences = with_positions(sequences, positions_ST, True)
        cuts.append(Cut(sequences, len(tokens), sum(len(chat.encode("utf-8")) for chat in chats)))
    whole = cuts[0].sequences if len(cuts) == 1 else datasets.concatenate_datasets([cut.sequences for cut in cuts])
    return Cut(whole, sum(cut.tokens for cut in cuts), sum(cut.bytes for cut in cuts))


def _check(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> None:
    validate_fields(options)
    if not any(hub_name(source) is not None for source in options.data):
        refuse_without_use(options, f"without a data set of the hub, {HUB}NAME, in data", "split")
    if tokenizer is None and options.tokenizer is not None:
        refuse_without_use(options, f"with tokenizer={options.tokenizer}, which is not trained", "vocab_size")
    elif options.vocab_size is not None and options.vocab_size < 257:
        raise ValueError(f"vocab_size={options.vocab_size} must be at least 257: every byte and the end of text")


def _entries(options: DataOptions) -> int:
    return VOCABULARY if options.vocab_size is None else options.vocab_size


def _cache_key(
    options: DataOptions, documents: list[str | Conversation], tokenizer: PreTrainedTokenizerFast | None
) -> str:
    name = hashlib.sha256()
    tokenizer_key = f"bpe-{_entries(options)}"
    if tokenizer is not None:
        beginning = tokenizer.convert_ids_to_tokens(start_of_text(tokenizer))
        tokenizer_key = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, *beginning])
        if any(isinstance(document, Conversation) for document in documents):
            tokenizer_key += json.dumps(tokenizer.chat_template)
    name.update(f"{CACHE_VERSION} {options.sequence_length} {options.validation_fraction} {tokenizer_key}".encode())
    for text in documents:
        name.update(digest(text))
    return name.hexdigest()[:32]


def _write_cache(
    folder: Path,
    options: DataOptions,
    documents: list[str | Conversation],
    tokenizer: PreTrainedTokenizerFast | None,
    skipped: Skipped,
) -> None:
    texts, conversations = by_kind(documents)
    train, validation, split = split_documents(texts, options.validation_fraction) if texts else ([], [], "documents")
    chats, held_out_chats = split_conversations(conversations, options.validation_fraction)
    tokenizer = tokenizer or train_tokenizer(train, _entries(options))
    length = options.sequence_length
    to_train = cut_documents([*train, *chats], tokenizer, length, "training")
    held_out = cut_documents([*validation, *held_out_chats], tokenizer, length, "validation")
    facts = CorpusFacts(
        train_documents=len(train) + len(chats),
        validation_documents=len(validation) + len(held_out_chats),
        train_tokens=to_train.tokens,
        validation_tokens=held_out.tokens,
        validation_bytes=held_out.bytes,
        split=split,
        skipped=skipped,
    )
    # Written aside and renamed, so that a run that is stopped leaves no half entry behind; what a killed one left aside
    # makes way.
    aside = folder.with_name(f".preparing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        to_train.sequences.save_to_disk(str(aside / "train"))
        held_out.sequences.save_to_disk(str(aside / "validation"))
        tokenizer.save_pretrained(str(aside / "tokenizer"))
        (aside / "facts.json").write_text(json.dumps(asdict(facts)))
        seal(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
