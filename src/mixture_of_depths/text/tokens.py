"""Readers of files that hold tokens already: nanoGPT's and llm.c's `.bin`, and Megatron's `.bin` beside its `.idx`."""

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# The first of llm.c's 256 whole numbers of 32 bits, and how it stores the tokens that follow them.
LLM_C = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
LLM_C_HEADER = 256 * 4
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = len(MEGATRON) + 8 + 1 + 8 + 8
MEGATRON_KINDS = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Tokens of a document; a longer one is cut, for it is held in memory.
LONGEST_DOCUMENT = 1 << 24
# Numbers of an index that are in memory at once.
SLICE = 1 << 20


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer the reading of tokens needs: its largest token, and those at the ends of documents."""

    last: int
    end_of_text: int
    start_of_text: int | None


@dataclass(frozen=True)
class Starts:
    """Where Megatron's documents begin, and the last ends, looked up in its index, which is mapped into memory.

    Of each document `firsts` holds the first sequence, of each sequence `pointers` the first byte; a token has
    `itemsize` of them.
    """

    firsts: np.ndarray
    pointers: np.ndarray
    itemsize: int
    count: int

    def __len__(self) -> int:
        return len(self.firsts)

    def __getitem__(self, document: int, /) -> int:
        first = self.firsts[document]
        return self.count if first == len(self.pointers) else int(self.pointers[first]) // self.itemsize


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens: how many there are, how they are stored, and from which byte on.

    `starts` are where Megatron's documents begin; elsewhere the tokens say it.
    """

    path: Path
    dtype: np.dtype[Any]
    offset: int
    count: int
    starts: Starts | None = None

    def tokens(self) -> np.ndarray:
        """All of them, mapped into memory."""
        return np.memmap(self.path, self.dtype, "r", self.offset, (self.count,))


def open_tokens(path: Path, vocabulary: Vocabulary) -> TokenFile:
    """What a file of tokens says of itself. Without a header it has 16 bits a token if the vocabulary fits, else 32.

    Raises:
        ValueError: when it is empty, or its size or header contradicts another.
    """
    size = path.stat().st_size
    if path.with_suffix(".idx").is_file():
        return _megatron(path, size)
    with path.open("rb") as file:
        head = file.read(12)
    magic = struct.unpack("<iii", head) if len(head) == 12 else (0, 0, 0)
    if magic[0] in LLM_C:
        dtype, offset, count = LLM_C[magic[0]], LLM_C_HEADER, magic[2]
        if size != offset + count * dtype.itemsize or count < 1:
            raise ValueError(
                f"data={path} has llm.c's header for {count:,} tokens of {8 * dtype.itemsize} bits and {size:,} bytes; "
                "it is cut off or damaged"
            )
        return TokenFile(path, dtype, offset, count)
    dtype = np.dtype("<u2" if vocabulary.last < 1 << 16 else "<u4")
    if size == 0 or size % dtype.itemsize:
        raise ValueError(
            f"data={path} has {size:,} bytes, which is no number of tokens of {8 * dtype.itemsize} bits, as the "
            f"tokenizer's {vocabulary.last + 1:,} need"
        )
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _megatron(path: Path, size: int) -> TokenFile:
    index = path.with_suffix(".idx")
    length = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(MEGATRON_HEADER)
    if len(head) < MEGATRON_HEADER or not head.startswith(MEGATRON):
        raise ValueError(f"data={index} has not the header of Megatron's index; move it away, or write it again")
    version, kind, sequences, documents = struct.unpack("<QBQQ", head[len(MEGATRON) :])
    expected = MEGATRON_HEADER + 12 * sequences + 8 * documents
    # With a mode a sequence, which some write and which says nothing of text.
    if version != 1 or kind not in MEGATRON_KINDS or length not in (expected, expected + sequences) or documents < 2:
        raise ValueError(
            f"data={index} is damaged, or of a kind that holds no tokens: version {version}, kind {kind}, "
            f"{sequences:,} sequences, {documents:,} ends of documents, {length:,} bytes"
        )
    dtype = np.dtype(MEGATRON_KINDS[kind])
    lengths = np.memmap(index, "<i4", "r", MEGATRON_HEADER, (sequences,))
    pointers = np.memmap(index, "<i8", "r", MEGATRON_HEADER + 4 * sequences, (sequences,))
    firsts = np.memmap(index, "<i8", "r", MEGATRON_HEADER + 12 * sequences, (documents,))
    count, whole = 0, True
    for begin in range(0, sequences, SLICE):
        some = lengths[begin : begin + SLICE]
        ends = count + np.cumsum(some, dtype=np.int64)
        whole &= bool((pointers[begin : begin + SLICE] == (ends - some) * dtype.itemsize).all() and some.min() >= 0)
        count = int(ends[-1])
    ordered = firsts[0] == 0 and firsts[-1] == sequences
    for begin in range(0, documents, SLICE):
        # With the first of the next slice.
        ordered &= bool((np.diff(firsts[begin : begin + SLICE + 1]) >= 0).all())
    if not whole or not ordered or count * dtype.itemsize != size or size == 0:
        raise ValueError(
            f"data={path} and {index.name} do not belong together: lengths, places and {size:,} bytes differ"
        )
    return TokenFile(path, dtype, 0, count, Starts(firsts, pointers, dtype.itemsize, count))


def read_token_documents(file: TokenFile, vocabulary: Vocabulary, begin: int, end: int) -> Iterator[np.ndarray]:
    """The documents that begin among the tokens from `begin` to `end`, each without the token that ends it.

    Raises:
        ValueError: for a token that the tokenizer has not.
    """
    tokens = file.tokens()
    place = begin if begin == 0 else _next_start(file, tokens, vocabulary, begin - 1)
    while place < min(end, file.count):
        stop = _next_start(file, tokens, vocabulary, place)
        document = np.array(tokens[place:stop])
        bad = np.flatnonzero((document < 0) | (document > vocabulary.last))
        if len(bad):
            raise ValueError(
                f"data={file.path} has the token {document[bad[0]]} at {place + bad[0]:,}; the tokenizer's last is "
                f"{vocabulary.last}: give the tokenizer that the tokens were made with"
            )
        place = stop
        while len(document) and document[-1] == vocabulary.end_of_text:
            document = document[:-1]
        if len(document):
            yield document


def _next_start(file: TokenFile, tokens: np.ndarray, vocabulary: Vocabulary, place: int) -> int:
    """Where the first document after `place` begins, or is cut: at every `LONGEST_DOCUMENT` tokens of the file."""
    furthest = min((place // LONGEST_DOCUMENT + 1) * LONGEST_DOCUMENT, file.count)
    if file.starts is not None:
        number = bisect_right(file.starts, place)
        return min(furthest, file.starts[number]) if number < len(file.starts) else furthest
    for start in range(place, furthest, 1 << 16):
        block = tokens[start : min(start + (1 << 16) + 1, furthest)]
        is_start = block[:-1] == vocabulary.end_of_text
        if vocabulary.start_of_text is not None:
            is_start |= block[1:] == vocabulary.start_of_text
        places = np.flatnonzero(is_start)
        if len(places):
            return start + int(places[0]) + 1
    return furthest
