"""Documents: every reader of text, from files, folders, globs, the standard library and the hub; and their split."""

import gzip
import hashlib
import json
import sysconfig
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow.parquet as parquet

from mixture_of_depths.options import BUILTIN, DataOptions
from mixture_of_depths.text.conversations import Conversation, conversation_of

# What a data set of the Hugging Face hub is named with.
HUB = "hub:"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")


@dataclass
class Skipped:
    """Counts of what was read but not used."""

    not_utf8: int = 0
    empty: int = 0
    not_json: int = 0
    no_text: int = 0

    def __str__(self) -> str:
        return f"{self.not_utf8} not UTF-8, {self.empty} empty, {self.not_json} not JSON, {self.no_text} without text"


def read_documents(options: DataOptions, skipped: Skipped) -> Iterator[str]:
    """Yields the texts of `options.data` in a fixed order, and counts in `skipped` what is none, conversations, too."""
    for document in read_all(options, skipped):
        if isinstance(document, str):
            yield document
        else:
            skipped.no_text += 1


def read_all(options: DataOptions, skipped: Skipped) -> Iterator[str | Conversation]:
    """As `read_documents`, with the conversations among the texts; `max_characters` is of the texts alone."""
    remaining = options.max_characters
    for source in options.data:
        for text in _read_source(source, options, skipped):
            if isinstance(text, Conversation):
                yield text
                continue
            if not text.strip():
                skipped.empty += 1
                continue
            if remaining is not None:
                text = text[:remaining]
                remaining -= len(text)
            yield text
            if remaining == 0:
                return


def _read_source(source: str, options: DataOptions, skipped: Skipped) -> Iterator[str | Conversation]:
    if source == BUILTIN:
        yield from _read_files(builtin_files(), options, skipped)
    elif source.startswith(HUB):
        yield from _read_hub(source.removeprefix(HUB), options, skipped)
    else:
        yield from _read_files(find_files(source), options, skipped)


def builtin_files() -> list[Path]:
    """The Python standard library's own modules, without their tests."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    modules = (path for path in library.rglob("*.py") if not left_out & set(path.relative_to(library).parts[:-1]))
    return sorted(modules, key=lambda path: path.relative_to(library).as_posix())


def find_files(source: str) -> list[Path]:
    """The text files that a path, folder or glob names.

    Raises:
        ValueError: when there is none.
    """
    if not source:
        # As a path it would be the working directory.
        raise ValueError(f"data={source!r} names no text; give a file, folder, glob, hub:NAME or {BUILTIN}")
    path = Path(source)
    if path.is_file():
        if not _kind(path):
            raise ValueError(f"data={source} is not one of {' '.join(SUFFIXES)} (or these with .gz); rename or convert")
        return [path]
    if path.is_dir():
        paths = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    elif has_magic(source):
        paths = sorted(Path(p) for p in glob(source, recursive=True) if Path(p).is_file() and _kind(Path(p)))
    else:
        raise ValueError(f"data={source} does not exist; give a file, folder, glob, hub:NAME or {BUILTIN}")
    if not paths:
        raise ValueError(f"data={source} holds no file that ends in {' '.join(SUFFIXES)} (or these with .gz)")
    return paths


def _kind(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def _read_files(paths: Iterable[Path], options: DataOptions, skipped: Skipped) -> Iterator[str | Conversation]:
    for path in paths:
        kind = _kind(path)
        try:
            raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else None
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"data={path} is not a whole gzip file ({error}); compress it again") from error
        if kind == ".parquet":
            # Left on the disk where it can be: it is read in parts.
            yield from _read_parquet(path, path if raw is None else BytesIO(raw), options.text_column, skipped)
            continue
        content = (path.read_bytes() if raw is None else raw).removeprefix(BOM_UTF8)
        if kind == ".jsonl":
            yield from _read_jsonl(path, content, options.text_column, skipped)
        elif (text := _decoded(content, skipped)) is not None:
            yield text


def _decoded(content: bytes, skipped: Skipped) -> str | None:
    """The text of UTF-8; None where it is not, which is counted."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        skipped.not_utf8 += 1
        return None


def _read_jsonl(path: Path, content: bytes, column: str, skipped: Skipped) -> Iterator[str | Conversation]:
    """The texts and conversations of a file's records; those without are counted, and refused where none has any."""
    is_there, without = False, ""
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = _decoded(raw, skipped)
        if line is None or not line.strip():
            continue
        try:
            record = json.loads(line)
        # A number of very many digits is refused by a plain ValueError.
        except (ValueError, RecursionError):
            skipped.not_json += 1
            continue
        has_column = isinstance(record, dict) and column in record
        value = record[column] if has_column else record
        if has_column and isinstance(value, str | None):
            is_there = True
            yield from _texts([value], column, path, skipped)
            continue
        if isinstance(record, dict) and (conversation := conversation_of(record.get("messages"))):
            is_there = True
            yield conversation
            continue
        skipped.no_text += 1
        names = ", ".join(value) if isinstance(value, dict) and not has_column else type(value).__name__
        without = without or f"line {number} has: {names}"
    if without and not is_there:
        raise ValueError(f"text_column={column} holds text in no line of {path}; {without}")


def _read_parquet(path: Path, file: Path | BytesIO, column: str, skipped: Skipped) -> Iterator[str]:
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"data={path} is not a Parquet file: {error}") from error
    names = table.schema_arrow.names
    if column not in names:
        raise ValueError(f"text_column={column} is missing in {path}, which has: {', '.join(names)}")
    for batch in table.iter_batches(columns=[column]):
        yield from _texts(batch.column(0).to_pylist(), column, path, skipped)


def _read_hub(name: str, options: DataOptions, skipped: Skipped) -> Iterator[str]:
    name, _, config = name.partition(":")
    if not name:
        raise ValueError("data=hub: names no data set; give hub:NAME or hub:NAME:CONFIGURATION")
    for record in _records_of_hub(name, config, options.split):
        if options.text_column not in record:
            names = ", ".join(record)
            raise ValueError(f"text_column={options.text_column} is missing in hub:{name}, which has: {names}")
        yield from _texts([record[options.text_column]], options.text_column, name, skipped)


def _records_of_hub(name: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        yield from cast(Iterable[dict[str, Any]], stream)
    except Exception as error:
        # Network, archive and format each have errors of their own, before the first record and after.
        raise ValueError(f"data=hub:{name} with split={split} cannot be read: {error}") from error


def _texts(values: Iterable[object], column: str, source: object, skipped: Skipped) -> Iterator[str]:
    """The texts of a column of one kind; those that are null are counted."""
    for value in values:
        if value is None:
            skipped.no_text += 1
        elif isinstance(value, str):
            # JSON can spell half a surrogate pair, which is no text.
            yield value.encode("utf-8", "replace").decode("utf-8")
        else:
            raise ValueError(f"text_column={column} of {source} holds {type(value).__name__}, not text")


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str], str]:
    """Splits by document into train and validation; a document's content decides, so the split outlives reordering.

    Where that leaves one side empty, as with a single file, the tail of every document is held out instead.

    Returns:
        The training documents, the validation documents, and "documents" or "tails".
    """
    threshold = int(validation_fraction * 2**64)
    is_held_out = [int.from_bytes(digest(text)[:8]) < threshold for text in documents]
    train = [text for text, held_out in zip(documents, is_held_out, strict=True) if not held_out]
    validation = [text for text, held_out in zip(documents, is_held_out, strict=True) if held_out]
    if train and validation:
        return train, validation, "documents"
    cuts = [int(len(text) * (1 - validation_fraction)) for text in documents]
    train = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
    return train, [text[cut:] for text, cut in zip(documents, cuts, strict=True)], "tails"


def split_conversations(
    conversations: list[Conversation], validation_fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits into train and validation, which gets one at least; their content decides, whatever the order.

    Raises:
        ValueError: when there is one alone.
    """
    if len(conversations) == 1:
        raise ValueError("data holds a single conversation, and none is left to hold out; give more")
    count = min(max(1, round(validation_fraction * len(conversations))), len(conversations) - 1)
    order = sorted(range(len(conversations)), key=lambda i: digest(conversations[i]))
    held_out = set(order[:count])
    train = [one for i, one in enumerate(conversations) if i not in held_out]
    return train, [one for i, one in enumerate(conversations) if i in held_out]


def digest(document: str | Conversation) -> bytes:
    text = document if isinstance(document, str) else document.json
    return hashlib.sha256(text.encode("utf-8")).digest()
