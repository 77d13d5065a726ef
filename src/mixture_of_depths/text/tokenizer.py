"""Between text and tokens: training a byte-level BPE, loading one, tokenising documents."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixture_of_depths.text.encoder import Encoder, cut

END_OF_TEXT = "<|endoftext|>"
# Entries of a tokenizer that is trained, where the options name no number.
VOCABULARY = 4096
# Training a tokenizer takes time with the square of a word's length; longer words, data rather than language, teach it
# nothing more.
LONGEST_WORD = 1000
WORD_OR_SPACES = re.compile(r"\S+|\s{2,}")
# How the tokenizers library names what the system refused.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after every document."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def start_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before every document: the token that the tokenizer itself puts before a text, as Llama's does."""
    token = tokenizer.bos_token_id
    if token == tokenizer.eos_token_id:
        # The end of the document before is the beginning of the next.
        return []
    beginning = cast(list[int], tokenizer("")["input_ids"])
    return beginning[:1] if token in beginning[:1] else []


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer makes of a text: two of one identity give it the same tokens, its start and end among them."""
    beginning = tokenizer.convert_ids_to_tokens(start_of_text(tokenizer))
    backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    return json.dumps([backend.to_str(), tokenizer.eos_token, *beginning])


def encoding(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes documents into tokens: two tokenizers of one encoding write the same shards."""
    backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    return json.dumps([backend.to_str(), start_of_text(tokenizer)])


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most `vocab_size` entries; no text is outside it.

    Of a run of more than `LONGEST_WORD` characters without a space, or of spaces alone, it sees the beginning.
    """
    shortened = (
        WORD_OR_SPACES.sub(lambda run: run[0][:LONGEST_WORD], piece)
        for document in documents
        for piece in cut(document)
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(shortened, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, padding_side="left"
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder.

    Raises:
        ValueError: when there is none, or it has no end-of-text token.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer={folder} is not a folder; give one that holds tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # What libraries raise about a damaged file has no common kind; the tokenizers' reader raises Exception itself.
        raise ValueError(f"tokenizer={folder} cannot be read; copy it anew, or give another: {error}") from error
    return checked(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer into a folder.

    Raises:
        OSError: when that cannot be written, as to a disk that is full.
    """
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        # The tokenizers' writer raises Exception itself.
        number = SYSTEM_ERROR.search(str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def checked(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerFast:
    """The tokenizer that comes from `source`.

    Raises:
        ValueError: when it is not a fast one, has no end-of-text token or no vocabulary, a longest text that is no
            number, or parts that contradict one another.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer={source} has no tokenizer.json; save it as a fast tokenizer")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ValueError(
            f"tokenizer={source} has model_max_length={tokenizer.model_max_length!r} in its tokenizer_config.json; "
            "give a number"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer={source} has no end-of-text token; set eos_token in its tokenizer_config.json")
    if not set(tokenizer.get_vocab()).difference(tokenizer.all_special_tokens):
        raise ValueError(f"tokenizer={source} has no vocabulary but special tokens; give a folder with tokenizer.json")
    try:
        # A file with one number for two tokens is read, but not what is made of it again.
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:
        # The tokenizers' reader raises Exception itself.
        raise ValueError(f"tokenizer={source} has a damaged tokenizer.json: {error}; save it anew") from error
    # State of an earlier use, which each use sets anew: without it the tokenizer is the same before and after one.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def entries(tokenizer: PreTrainedTokenizerBase) -> int:
    """The entries that a model needs for a tokenizer, which may leave out numbers between its tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: str) -> None:
    """Raises ValueError when the tokenizer of `source` has tokens that a model of this vocabulary does not."""
    if (needed := entries(tokenizer)) > vocab_size:
        raise ValueError(f"{source}: its tokenizer has a token {needed - 1}; the model has vocab_size={vocab_size}")


def encoder_of(tokenizer: PreTrainedTokenizerBase, longest: int | None = None) -> Encoder:
    """What turns documents into the tokens of a tokenizer."""
    backend = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    return Encoder(backend.to_str(), start_of_text(tokenizer), end_of_text(tokenizer), longest)


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All documents as one row of tokens, each after its start, if it has one, and before the end-of-text token."""
    return np.concatenate(encoder_of(tokenizer).encode(documents))
