"""Documents: every reader of text, from files, folders, globs, the standard library and the hub; and their split.

All of them stream: they hold one document at a time, and a file's blocks or rows around it.
"""

import gzip
import hashlib
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO, RawIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.compute
import pyarrow.parquet as parquet

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.conversations import Conversation, conversation_of
from mixture_of_depths.text.sources import COMPRESSIONS, JSON, find_files, hub_name, is_prepared, is_tokens, kind_of

# Bytes of a line of JSON: a document. Longer ones are no text, and would fill the memory.
LONGEST_LINE = 1 << 30
# Bytes in which a place to cut a text is looked for.
WINDOW = 1 << 20
# Bytes in which a file that is one text is cut into documents where only the beginning of all text is read.
LONGEST_TEXT = 1 << 26
# Rows of a Parquet file that are decoded together.
ROWS = 512
# Bytes of a table that are read at a time, unless one row has more.
BATCH = 16e6


@dataclass
class Skipped:
    """Counts of what was read but not used."""

    not_utf8: int = 0
    empty: int = 0
    not_json: int = 0
    no_text: int = 0

    def __str__(self) -> str:
        return (
            f"{self.not_utf8} not UTF-8, {self.empty} empty, {self.not_json} not JSON, {self.no_text} without text or "
            "usable messages"
        )


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes of text, lines that begin there, or row groups; `end` None for all the rest."""

    begin: int = 0
    end: int | None = None


WHOLE = Span()


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
    name = hub_name(source)
    if name is not None:
        # Loaded where it is needed: it takes as long as all else that a process of the preparation loads.
        from mixture_of_depths.text.hub import read_hub

        yield from read_hub(name, options, skipped)
        return
    longest = None if options.max_characters is None else LONGEST_TEXT
    for path in find_files(source):
        yield from read_file(path, options.text_column, skipped, longest=longest)


def read_file(
    path: Path, column: str, skipped: Skipped, span: Span = WHOLE, longest: int | None = None
) -> Iterator[str | Conversation]:
    """The documents of a file, or those that belong to a span of it.

    Args:
        path: the file.
        column: field or column that holds the text of records.
        skipped: where what is no text is counted.
        span: the part to read.
        longest: bytes in which a file that is one text is cut into documents; None for not at all.

    Raises:
        ValueError: for a file that is not what its name says, or holds no such column.
    """
    if is_tokens(path):
        raise ValueError(f"data={path} holds tokens, not text; only training and mod prepare read them")
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, column, skipped, span)
    elif kind in (".jsonl", JSON):
        yield from _read_lines(path, column, skipped, span, whole=kind == JSON)
    else:
        yield from _read_text(path, skipped, span, longest)


def _not_empty(paths: list[Path]) -> list[Path]:
    """Files with something in them; all, where none has."""
    return [path for path in paths if path.stat().st_size > 0] or paths


def holds_conversations(source: str, column: str) -> bool:
    """Whether all files of a source begin with a conversation; those of other kinds than JSON hold none."""
    if is_prepared(source) or hub_name(source) is not None:
        return False
    return all(
        kind_of(path) in (".jsonl", JSON) and isinstance(next(read_file(path, column, Skipped()), None), Conversation)
        for path in _not_empty(find_files(source))
    )


class _Decompressed(RawIOBase):
    """A compressed file's content."""

    def __init__(self, path: Path, file: BinaryIO, compression: str) -> None:
        self.path, self.compression = path, compression
        # Of gzip's readers the library's knows no zeros after the end, as tapes and blocks are filled up with.
        self.stream: Any = (
            gzip.GzipFile(fileobj=file) if compression == "gzip" else pyarrow.CompressedInputStream(file, compression)
        )
        # What the library takes for one that holds nothing.
        if path.stat().st_size == 0:
            raise self._broken("it has no bytes")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self.stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise self._broken(error) from error
        buffer[: len(block)] = block
        return len(block)

    def _broken(self, why: object) -> ValueError:
        return ValueError(f"data={self.path} is not a whole {self.compression} file ({why}); compress it again")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, whether it is compressed or not."""
    compression = COMPRESSIONS.get(path.suffix)
    with path.open("rb") as file:
        yield (
            file
            if compression is None
            else cast(BinaryIO, BufferedReader(_Decompressed(path, file, compression), WINDOW))
        )


def _decoded(content: bytes, skipped: Skipped) -> str | None:
    """The text of UTF-8; None where it is not, which is counted."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        skipped.not_utf8 += 1
        return None


def _read_text(path: Path, skipped: Skipped, span: Span, longest: int | None) -> Iterator[str]:
    with _opened(path) as file:
        if longest is None:
            contents: Iterable[bytes] = [file.read()]
        elif span == WHOLE:
            contents = _blocks(file, longest)
        else:
            begin, end = snap(file, span.begin), None if span.end is None else snap(file, span.end)
            file.seek(begin)
            contents = [] if begin == end else [file.read() if end is None else file.read(end - begin)]
        for number, content in enumerate(contents):
            is_first = number == 0 and span.begin == 0
            if (text := _decoded(content.removeprefix(BOM_UTF8) if is_first else content, skipped)) is not None:
                yield text


def _blocks(file: BinaryIO, longest: int) -> Iterator[bytes]:
    """A stream in blocks of about `longest` bytes, cut as a file is."""
    block = file.read(longest + WINDOW)
    while len(block) > longest:
        cut = longest + _place_to_cut(block[longest : longest + WINDOW])
        yield block[:cut]
        block = block[cut:] + file.read(longest + WINDOW - (len(block) - cut))
    yield block


def snap(file: BinaryIO, place: int) -> int:
    """The place from this one on at which a text is best cut: a line's beginning, else a word's, else a character's."""
    if place == 0:
        return 0
    file.seek(place)
    return place + _place_to_cut(file.read(WINDOW))


def _place_to_cut(window: bytes) -> int:
    line, word = window.find(b"\n"), window.find(b" ")
    if line >= 0:
        return line + 1
    if word >= 0:
        return word
    return next((place for place, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), len(window[:4]))


def _lines(path: Path, file: BinaryIO, span: Span) -> Iterator[bytes]:
    """The lines that begin in a span."""
    place = span.begin
    if place:
        # The line that the byte before belongs to begins before the span, and ends with that byte at the earliest.
        place -= 1
        file.seek(place)
        while rest := file.readline(WINDOW):
            place += len(rest)
            if rest.endswith(b"\n"):
                break
    while span.end is None or place < span.end:
        line = file.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise ValueError(
                f"data={path} has a line of {LONGEST_LINE / 1e9:.1f} GB or more, which is no record; cut it"
            )
        yield line.removeprefix(BOM_UTF8) if place == 0 else line
        place += len(line)


def _read_lines(path: Path, column: str, skipped: Skipped, span: Span, whole: bool) -> Iterator[str | Conversation]:
    """The texts and conversations of a file's records; those without are counted, and refused where none has any.

    Args:
        path: the file.
        column: the field.
        skipped: where what is no text is counted.
        span: the part to read.
        whole: whether the file may be one list of records instead of one a line.
    """
    is_there, without = False, ""
    with _opened(path) as file:
        records = (
            _records(path, file, skipped, span) if span != WHOLE or not whole else _any_records(path, file, skipped)
        )
        for number, record in records:
            has_column, value = value_of(record, column)
            if has_column and isinstance(value, str | None):
                is_there = True
                yield from texts_of([value], column, path, skipped)
                continue
            if isinstance(record, dict) and (conversation := conversation_of(record.get("messages"))):
                is_there = True
                yield conversation
                continue
            skipped.no_text += 1
            names = ", ".join(record) if isinstance(record, dict) and not has_column else type(value).__name__
            without = without or f"line {number} has: {names}"
    # Of other parts of the file another process reads.
    if without and not is_there and span.begin == 0:
        raise ValueError(f"text_column={column} holds text in no line of {path}; {without}")


def _records(path: Path, file: BinaryIO, skipped: Skipped, span: Span) -> Iterator[tuple[int, Any]]:
    """The JSON values of lines, with the lines' numbers."""
    for number, raw in enumerate(_lines(path, file, span), start=1):
        line = _decoded(raw, skipped)
        if line is None or not line.strip():
            continue
        try:
            yield number, json.loads(line)
        # A number of very many digits is refused by a plain ValueError.
        except (ValueError, RecursionError):
            skipped.not_json += 1


def _any_records(path: Path, file: BinaryIO, skipped: Skipped) -> Iterator[tuple[int, Any]]:
    """The records of a file that is one list, or has one a line."""
    buffered = cast(BufferedReader, file)
    beginning = buffered.peek(1)
    while beginning and not beginning.removeprefix(BOM_UTF8).strip():
        buffered.read(len(beginning))
        beginning = buffered.peek(1)
    if not beginning.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
        return _records(path, file, skipped, WHOLE)
    content = file.read(LONGEST_LINE)
    if len(content) == LONGEST_LINE:
        raise ValueError(f"data={path} is one list of {LONGEST_LINE / 1e9:.1f} GB or more; write one record a line")
    try:
        return enumerate(json.loads(content), start=1)
    except (ValueError, RecursionError):
        return _records(path, cast(BinaryIO, BytesIO(content)), skipped, WHOLE)


def value_of(record: Any, column: str) -> tuple[bool, Any]:
    """Whether a record has a field, and what it holds; dots lead into fields of fields, as in `meta.text`.

    Of a record without it, what stands where the name leads no further.
    """
    if isinstance(record, dict) and column in record:
        return True, record[column]
    value = record
    for part in column.split("."):
        if value is None and record is not None:
            return True, None
        if not isinstance(value, dict) or part not in value:
            return False, value
        value = value[part]
    return True, value


def _read_parquet(path: Path, column: str, skipped: Skipped, span: Span) -> Iterator[str]:
    # The library opens no file whose name is not UTF-8.
    with _opened(path) as file:
        # What is read from its end cannot be streamed.
        content = BytesIO(file.read()) if path.suffix in COMPRESSIONS else file
        try:
            with parquet.ParquetFile(content) as table:
                check_column(path, table.schema_arrow, column)
                groups = range(span.begin, table.num_row_groups if span.end is None else span.end)
                for group in groups:
                    described = table.metadata.row_group(group)
                    size = described.total_byte_size / max(1, described.num_rows)
                    rows = max(1, min(ROWS, int(BATCH / max(1, size))))
                    for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[column]):
                        yield from texts_of(_values(_nested(batch, column), skipped), column, path, skipped)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"data={path} is not a Parquet file: {error}") from error


def check_column(path: Path, schema: pyarrow.Schema, column: str) -> None:
    """Raises ValueError where a table has no such column, whose name may lead into others by dots."""
    fields: Any = schema
    for part in [column] if column in schema.names else column.split("."):
        if not isinstance(fields, pyarrow.Schema | pyarrow.StructType):
            raise ValueError(
                f"text_column={column} is missing in {path}: before {part} it leads to {fields}, no fields"
            )
        names = [field.name for field in fields]
        if part not in names:
            raise ValueError(f"text_column={column} is missing in {path}, which has: {', '.join(names)}")
        if names.count(part) > 1:
            raise ValueError(f"text_column={column} is the name of {names.count(part)} columns of {path}; rename one")
        fields = fields.field(part).type
    if pyarrow.types.is_temporal(fields):
        # Before one is read, whose time zone may not be known here.
        raise ValueError(f"text_column={column} of {path} holds {fields}, not text")


def _nested(batch: pyarrow.RecordBatch, column: str) -> Any:
    """A column of a batch, which may hold others whose names begin alike."""
    first, *others = [column] if column in batch.schema.names else column.split(".")
    values: Any = batch.column(first)
    for part in others:
        values = pyarrow.compute.call_function("struct_field", [values], pyarrow.compute.StructFieldOptions([part]))
    return values


def _values(values: Any, skipped: Skipped) -> Iterator[object]:
    """The values of a column; those that are not UTF-8 are counted."""
    for value in values:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            skipped.not_utf8 += 1


def texts_of(values: Iterable[object], column: str, source: object, skipped: Skipped) -> Iterator[str]:
    """The texts of a column of one kind; those that are null are counted."""
    for value in values:
        if value is None:
            skipped.no_text += 1
        elif isinstance(value, str):
            # JSON can spell half a surrogate pair, which is no text.
            yield value.encode("utf-8", "replace").decode("utf-8")
        else:
            raise ValueError(f"text_column={column} of {source} holds {type(value).__name__}, not text")


def is_held_out(digest_of_text: bytes, validation_fraction: float) -> bool:
    """Whether a document is held out, by what it holds."""
    return int.from_bytes(digest_of_text[:8]) < int(validation_fraction * 2**64)


def cut_tail(length: int, validation_fraction: float) -> int:
    """Where the tail of a document that is held out begins."""
    return int(length * (1 - validation_fraction))


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str], str]:
    """Splits by document into train and validation; a document's content decides, so the split outlives reordering.

    Where that leaves one side empty, as with a single file, the tail of every document is held out instead.

    Returns:
        The training documents, the validation documents, and "documents" or "tails".
    """
    held_out = [is_held_out(digest(text), validation_fraction) for text in documents]
    train = [text for text, out in zip(documents, held_out, strict=True) if not out]
    validation = [text for text, out in zip(documents, held_out, strict=True) if out]
    if train and validation:
        return train, validation, "documents"
    cuts = [cut_tail(len(text), validation_fraction) for text in documents]
    tails = [text[cut:] for text, cut in zip(documents, cuts, strict=True) if cut < len(text)]
    if not tails:
        raise ValueError(
            f"validation_fraction={validation_fraction:g} holds out nothing of {len(documents):,} documents; raise it"
        )
    return [text[:cut] for text, cut in zip(documents, cuts, strict=True)], tails, "tails"


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
