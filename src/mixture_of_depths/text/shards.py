"""Prepared text on the disk: rows of tokens in files that are mapped into memory, and a JSON file that describes them.

A shard is a `.bin` of 16 or 32 bits a token, lowest byte first, and an `.ends` of 64-bit numbers: after which of its
tokens each document ends.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from mixture_of_depths.files import read_json, sync_folder, write_aside
from mixture_of_depths.text.documents import Skipped
from mixture_of_depths.text.sources import PREPARED, sample_hash

# Raised when what is written changes, so that older folders are refused by name.
VERSION = 1
ENDS = np.dtype("<u8")
# Read of each file when a folder is opened: at its beginning, in its middle and at its end.
SAMPLE = 1 << 12

Side = Literal["train", "validation"]
SIDES: tuple[Side, ...] = ("train", "validation")


@dataclass(frozen=True)
class Shard:
    """One row of tokens: the names of its files without their suffixes, what it holds, and hashes of its files.

    `bytes` are those of the text in UTF-8; of text that came tokenised they are counted where it is held out.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    sample: str = ""


@dataclass(frozen=True)
class Part:
    """What was written of a piece: how many of its documents are read now, and whether these are all."""

    documents_read: int
    is_last: bool
    skipped: Skipped
    shards: dict[Side, Shard]


@dataclass(frozen=True)
class MadeFrom:
    """What of the options decides what is written, and the facts of the files, as JSON has them."""

    options: dict[str, Any]
    files: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """What a folder of prepared text holds.

    Attributes:
        version: of the files' form.
        key: names the content: the tokens and their tokenizer, wherever they lie.
        dtype: how a token is stored.
        last_token: largest token of the tokenizer.
        end_of_text: token after every document.
        split: whether some documents are held out, or the tails of all.
        tokenizer_sample: documents and bytes that the tokenizer was trained on; 0 and 0 for one that was there.
        skipped: what was read but not used.
        made_from: options and files of the text.
        shards: the shards of each side.
    """

    version: int
    key: str
    dtype: Literal["<u2", "<u4"]
    last_token: int
    end_of_text: int
    split: Literal["documents", "tails"]
    tokenizer_sample: tuple[int, int]
    skipped: Skipped
    made_from: MadeFrom
    shards: Annotated[dict[Side, list[Shard]], Field(min_length=len(SIDES))]

    def total(self, side: Side, what: Literal["tokens", "documents", "bytes"]) -> int:
        """How many a side holds in all its shards."""
        return sum(getattr(shard, what) for shard in self.shards[side])

    def __str__(self) -> str:
        documents, size = self.tokenizer_sample
        sample = f"; the tokenizer was trained on {documents:,} documents, {size / 1e6:.1f} MB" if documents else ""
        train, held_out = (
            f"{self.total(side, 'documents'):,} documents, {self.total(side, 'tokens'):,} tokens" for side in SIDES
        )
        return (
            f"{train} to train on; held out {held_out} ({self.split}); {len(self.shards['train'])} shards of "
            f"{8 * np.dtype(self.dtype).itemsize} bits a token; skipped: {self.skipped}{sample}"
        )


class _Row:
    """The files of one side of a part, while they are written."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.ends: list[int] = []
        self.tokens = self.bytes = 0
        self.hash = hashlib.sha256()
        self.file: BinaryIO = aside(folder / f"{name}.bin").open("wb")

    def add(self, document: np.ndarray, size: int) -> None:
        content = document.astype(self.dtype).tobytes()
        self.file.write(content)
        self.hash.update(content)
        self.tokens, self.bytes = self.tokens + len(document), self.bytes + size
        self.ends.append(self.tokens)

    def finish(self) -> Shard:
        """Brings the files to the disk and to their names."""
        ends = np.array(self.ends, dtype=ENDS).tobytes()
        self.hash.update(ends)
        with aside(self.folder / f"{self.name}.ends").open("wb") as file:
            file.write(ends)
            file.flush()
            os.fsync(file.fileno())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        for suffix in ("bin", "ends"):
            path = self.folder / f"{self.name}.{suffix}"
            aside(path).replace(path)
        return Shard(self.name, self.tokens, len(self.ends), self.bytes, self.hash.hexdigest())


class PartWriter:
    """Writes one part of a piece; it is there once it is finished, and not before."""

    def __init__(self, folder: Path, piece: int, part: int, dtype: np.dtype[Any]) -> None:
        self.folder, self.name, self.dtype = folder, f"{piece:06}-{part:04}", dtype
        self.rows: dict[Side, _Row] = {}

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows.values())

    def add(self, side: Side, document: np.ndarray, size: int) -> None:
        """Appends a document's tokens, which were so many bytes of text."""
        if side not in self.rows:
            self.rows[side] = _Row(self.folder, f"{side}-{self.name}", self.dtype)
        self.rows[side].add(document, size)

    def finish(self, documents_read: int, is_last: bool, skipped: Skipped) -> None:
        """Brings the part to the disk; its record comes last."""
        shards: dict[Side, Shard] = {side: row.finish() for side, row in self.rows.items()}
        sync_folder(self.folder)
        part = Part(documents_read, is_last, skipped, shards)
        write_aside(self.folder / f"part-{self.name}.json", json.dumps(asdict(part)))

    def close(self) -> None:
        """Lets go of the files of a part that is not finished."""
        for row in self.rows.values():
            row.file.close()


def aside(path: Path) -> Path:
    """Where a file is written before it has its name; no other process writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def parts_of(folder: Path, piece: int) -> list[Part]:
    """What is there of a piece, in order."""
    parts: list[Part] = []
    while (path := folder / f"part-{piece:06}-{len(parts):04}.json").exists():
        parts.append(read_record(Part, path))
    return parts


def with_samples(folder: Path, shards: Sequence[Shard]) -> list[Shard]:
    """The shards with the hashes that tell them from changed ones."""
    return [Shard(**{**asdict(shard), "sample": _sample(folder, shard)}) for shard in shards]


def _sample(folder: Path, shard: Shard) -> str:
    paths = [folder / f"{shard.name}.{suffix}" for suffix in ("bin", "ends")]
    return "".join(sample_hash(path, path.stat().st_size, SAMPLE)[:16] for path in paths)


def key_of(tokenizer: str, end_of_text: int, shards: dict[Side, list[Shard]]) -> str:
    """The name of what shards hold."""
    name = hashlib.sha256(json.dumps([VERSION, tokenizer, end_of_text]).encode())
    for side in SIDES:
        for shard in shards[side]:
            name.update(f"{shard.name} {shard.sha256}".encode())
    return name.hexdigest()[:32]


def open_prepared(folder: Path) -> Prepared:
    """What a folder of prepared text holds; sizes and hashes of pieces are held against the files.

    Raises:
        ValueError: when it holds none, or a file was changed since.
    """
    if not (folder / PREPARED).is_file():
        raise ValueError(f"data={folder} holds no whole prepared text; give the command that prepared it again")
    prepared = read_record(Prepared, folder / PREPARED)
    if prepared.version != VERSION:
        raise ValueError(
            f"data={folder} was prepared by another version of this package, in form {prepared.version}, and this one "
            f"reads form {VERSION}; prepare the text again"
        )
    itemsize = np.dtype(prepared.dtype).itemsize
    for shard in (shard for side in SIDES for shard in prepared.shards[side]):
        for suffix, size in (("bin", shard.tokens * itemsize), ("ends", shard.documents * ENDS.itemsize)):
            path = folder / f"{shard.name}.{suffix}"
            if path.parent != folder or not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"data={folder} is damaged: {path.name} is not the file of {size:,} bytes it was")
        if _sample(folder, shard) != shard.sample:
            raise ValueError(f"data={folder} is damaged: {shard.name} has changed since; prepare the text again")
    return prepared


def changed_file(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> str | None:
    """The first file whose facts are not what they were, or there is one more or less; None where all are."""
    there = {facts["path"]: facts for facts in now}
    for old in before:
        if there.pop(old["path"], None) != old:
            return str(old["path"])
    return next(iter(there), None)


def read_record(kind: Any, path: Path) -> Any:
    """What a JSON file holds, of the kind that belongs there.

    Raises:
        ValueError: naming the file, when it holds something else.
    """
    remedy = f"move {path.parent} away or name another folder, and prepare the text again"
    try:
        return TypeAdapter(kind).validate_python(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        what = f"{where}: {problem['msg']}" if where else problem["msg"]
        raise ValueError(f"{path} is damaged: {what}; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
