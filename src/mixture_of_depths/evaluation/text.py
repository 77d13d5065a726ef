"""The text that a model is judged on: what its training held out, or other text, read for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.files import is_whole
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.batches import halves
from mixture_of_depths.text.corpus import Corpus, Source, load_prepared, prepare
from mixture_of_depths.text.documents import Skipped, read_all
from mixture_of_depths.text.sequences import cut_documents
from mixture_of_depths.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Judged:
    """Sequences of tokens of one length, in the column `input_ids`, and what was left out of their text.

    A model is evaluated on those of each source, and calibrated on `sequences` of all.
    """

    sequences: datasets.Dataset
    sources: tuple[Source, ...]
    sequence_length: int
    skipped: Skipped


def held_out_of(corpus: Corpus) -> tuple[Source, ...]:
    """What each source of a text holds out; one where the text is one."""
    name, size = " ".join(corpus.options.data), corpus.facts.validation_bytes_per_token
    return corpus.sources or (Source(name, None, corpus.validation, size, 1.0),)


def without_calibrating(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sequences of each source that do not calibrate; of a source of a single one that."""
    return tuple(
        replace(source, validation=halves(source.validation)[1]) if len(source.validation) > 1 else source
        for source in sources
    )


def text_to_judge(
    checkpoint: Path,
    described: dict[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[str, ...],
    text_column: str | None,
    sequence_length: int | None,
) -> Judged:
    """The text of `data`, or without it what a model's training held out.

    Args:
        checkpoint: the model's folder.
        described: what the description of its training says of the text, `key` and `options`; None without one.
        tokenizer: the model's.
        data: text and conversations to read: files, folders, globs, hub:NAME or "builtin".
        text_column: field or column that holds it; by default "text".
        sequence_length: tokens of a sequence; by default as in training.

    Raises:
        ValueError: when there is no such text, or its length is out of range.
    """
    if described is None and not (data and sequence_length):
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training; give data and sequence_length")
    if sequence_length is not None and sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2")
    if text_column is not None and not data:
        raise ValueError(f"text_column={text_column} needs data; the held-out text is already read")
    if not data:
        assert described is not None
        corpus = _held_out(checkpoint, described)
        length, facts = corpus.options.sequence_length, corpus.facts
        if sequence_length not in (None, length):
            raise ValueError(f"sequence_length={sequence_length} needs data; the held-out text is cut to {length}")
        return Judged(corpus.validation, held_out_of(corpus), length, facts.skipped)
    if sequence_length is None:
        assert described is not None
        length: int = described["options"]["sequence_length"]
    else:
        length = sequence_length
    skipped = Skipped()
    column = "text" if text_column is None else text_column
    documents = list(read_all(DataOptions(data=data, text_column=column), skipped))
    if not documents:
        raise ValueError(f"data={' '.join(data)} holds no text (skipped: {skipped})")
    cut = cut_documents(documents, tokenizer, length, "given")
    source = Source(" ".join(data), None, cut.sequences, cut.bytes / cut.tokens, 1.0)
    return Judged(cut.sequences, (source,), length, skipped)


def _held_out(checkpoint: Path, described: dict[str, Any]) -> Corpus:
    """The text that a model's training held out: from the cache, or prepared again where it is not whole there.

    Raises:
        ValueError: when it is in neither place.
    """
    try:
        options = TypeAdapter(DataOptions).validate_python(described["options"])
    except ValidationError as error:
        raise ValueError(
            f"{checkpoint / 'run.json'} is damaged: the text's options: {error.errors()[0]['msg']}"
        ) from error
    entry = options.cache_dir / str(described["key"])
    if is_whole(entry):
        return load_prepared(options, entry.name)
    absent = f"the text that the training held out is not whole in the cache, as {entry},"
    # The model's own copy: the one it was trained with may have moved.
    tokenizer = load_tokenizer(str(checkpoint)) if options.tokenizer else None
    try:
        corpus = prepare(options, tokenizer)
    except ValueError as error:
        raise ValueError(f"{absent} and cannot be prepared again; give other data: {error}") from error
    if corpus.key != described["key"]:
        raise ValueError(
            f"{absent} and data={' '.join(options.data)} has changed since the training; bring one of them back, or "
            "give other data"
        )
    return corpus
