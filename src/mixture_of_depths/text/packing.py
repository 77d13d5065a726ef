"""Sequences of one length out of shards: cut one after another, or packed so that few documents are cut."""

import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixture_of_depths.files import checksum, locked, sync_folder, write_aside
from mixture_of_depths.options import Packing
from mixture_of_depths.text.shards import ENDS, Prepared, Shard, Side, read_record

# Of pieces in a shard, and after which of them sequences end.
PLACES = np.dtype("<i8")
PIECES, STOPS = ".pieces", ".stops"


class Sequences(Protocol):
    """Rows with the column `input_ids`: a data set of the library, or text on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...

    def select(self, indices: Iterable[int], /) -> Any:
        """Some of them, by their numbers."""


@dataclass(frozen=True)
class Cut:
    """What became of documents in sequences of one length.

    Attributes:
        documents: how many are cut by the end of a sequence.
        longer: how many of them are longer than a sequence.
        dropped_tokens: tokens at the ends of shards, which fill no sequence.
    """

    documents: int
    longer: int
    dropped_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents cut, {self.longer:,} of them longer than a sequence; "
            f"{self.dropped_tokens:,} tokens left over"
        )


@dataclass(frozen=True)
class Layout:
    """What became of a shard's documents, and the checksums of the files that say where its sequences lie."""

    cut: Cut
    pieces: str
    stops: str


def cut_of(folder: Path, shard: Shard, length: int) -> tuple[int, Cut]:
    """How many sequences a shard gives that is cut every `length` tokens, and what that does to its documents."""
    ends = np.fromfile(folder / f"{shard.name}.ends", ENDS).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    # Its last token stands in another sequence than its first.
    is_cut = starts // length != (ends - 1) // length
    return shard.tokens // length, Cut(int(is_cut.sum()), int((ends - starts > length).sum()), shard.tokens % length)


def best_fit(ends: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, Cut]:
    """Packs documents into whole sequences, and cuts as few of them as that takes.

    Longer documents are cut to sequences first. What is left of them and the others go, the longest first, each where
    the least room is left after it. Then the emptiest sequences are taken apart, and fill the others.

    Args:
        ends: after which tokens the documents end.
        length: of a sequence.

    Returns:
        The pieces of all sequences, as rows of a first token and a length; the number of the piece after each
        sequence's last; and what was cut.
    """
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    whole: list[list[tuple[int, int]]] = []
    rest: list[tuple[int, int]] = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        for place in range(start, start + size - length + 1, length):
            whole.append([(place, length)])
        if size % length:
            rest.append((start + size - size % length, size % length))
    rest.sort(key=lambda piece: -piece[1])
    # Of each room the sequences that have it left; a binary search over rooms that any has finds the tightest.
    by_room: list[list[list[tuple[int, int]]]] = [[] for _ in range(length + 1)]
    rooms: list[int] = []
    for piece in rest:
        size = piece[1]
        number = bisect_right(rooms, size - 1)
        if number < len(rooms):
            room = rooms[number]
            bin_ = by_room[room].pop()
            if not by_room[room]:
                del rooms[number]
        else:
            room, bin_ = length, []
        bin_.append(piece)
        left = room - size
        if not by_room[left] and left:
            rooms.insert(bisect_right(rooms, left), left)
        by_room[left].append(bin_)
    full = [*whole, *by_room[0]]
    # Those with the least room first.
    open_bins = [(room, bin_) for room in range(1, length + 1) for bin_ in by_room[room]]
    loose: list[tuple[int, int]] = []
    first, last = 0, len(open_bins) - 1
    while first <= last:
        room, bin_ = open_bins[first]
        while room and (loose or first < last):
            if not loose:
                loose = open_bins[last][1]
                last -= 1
            place, size = loose.pop()
            taken = min(room, size)
            bin_.append((place, taken))
            room -= taken
            if taken < size:
                loose.append((place + taken, size - taken))
        if room:
            break
        full.append(bin_)
        first += 1
    pieces = np.array([piece for bin_ in full for piece in bin_], dtype=np.int64).reshape(-1, 2)
    stops = np.cumsum([len(bin_) for bin_ in full], dtype=np.int64)
    documents = np.searchsorted(ends, pieces[:, 0], side="right")
    in_one = np.zeros(len(ends), dtype=bool)
    in_one[documents[pieces[:, 1] == sizes[documents]]] = True
    return pieces, stops, Cut(int((~in_one).sum()), int((sizes > length).sum()), int(sizes.sum() - pieces[:, 1].sum()))


class Lazy(ABC):
    """Sequences that are read when they are asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int, /) -> dict[str, Any]: ...

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def select(self, indices: Iterable[int], /) -> "Selected":
        """Some of them, by their numbers."""
        return Selected(self, indices)


def part_of(firsts: list[int], number: int) -> tuple[int, int]:
    """Which part holds a number, and its place there; `firsts` has the first number of each part, and their total.

    Raises:
        IndexError: for a number that none holds.
    """
    if not 0 <= number < firsts[-1]:
        raise IndexError(number)
    part = bisect_right(firsts, number) - 1
    return part, number - firsts[part]


class ShardSequences(Lazy):
    """The sequences of one side of prepared text; nothing of them is in memory but what is being read.

    Each is a dictionary with `input_ids`. In all of them a document begins at the beginning or after an end of text:
    what a packed sequence has of a document that is cut stands last in it, or is its end.

    Where packed sequences lie in the shards is kept in `cache`, once for all folders that hold the same.
    """

    def __init__(
        self, folder: Path, prepared: Prepared, side: Side, length: int, packing: Packing, cache: Path
    ) -> None:
        self.folder, self.length, self.packing = folder, length, packing
        self.layouts = cache / f"packed-{prepared.key}-{length}"
        self.dtype = np.dtype(prepared.dtype)
        self.shards = prepared.shards[side]
        counts, cuts = [], []
        for shard in self.shards:
            count, cut = cut_of(folder, shard, length) if packing == "cut" else self._packed(shard)
            counts.append(count)
            cuts.append(cut)
        self.cut = Cut(*(sum(getattr(cut, name) for cut in cuts) for name in ("documents", "longer", "dropped_tokens")))
        self.firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).tolist()
        self._mapped: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        place, row = part_of(self.firsts, number)
        shard = self.shards[place]
        tokens = self._map(self.folder / f"{shard.name}.bin", self.dtype)
        if self.packing == "cut":
            return {"input_ids": tokens[row * self.length : (row + 1) * self.length].astype(np.int64)}
        stops = self._map(self.layouts / f"{shard.name}{STOPS}", PLACES)
        pieces = self._map(self.layouts / f"{shard.name}{PIECES}", PLACES).reshape(-1, 2)
        chosen = pieces[stops[row - 1] if row else 0 : stops[row]].tolist()
        parts = [tokens[start : start + size].astype(np.int64) for start, size in chosen]
        return {"input_ids": np.concatenate(parts)}

    def _map(self, path: Path, dtype: np.dtype[Any]) -> np.ndarray:
        if path not in self._mapped:
            self._mapped[path] = np.memmap(path, dtype, "r")
        return self._mapped[path]

    def _packed(self, shard: Shard) -> tuple[int, Cut]:
        """How many sequences a shard gives that is packed, once, and what that does to its documents."""
        record = self.layouts / f"{shard.name}.json"
        if (layout := _layout(record)) is None:
            self.layouts.mkdir(parents=True, exist_ok=True)
            with locked(self.layouts / ".lock"):
                # Another process may have packed it meanwhile.
                layout = _layout(record) or self._pack(shard, record)
        return record.with_suffix(STOPS).stat().st_size // PLACES.itemsize, layout.cut

    def _pack(self, shard: Shard, record: Path) -> Layout:
        ends = np.fromfile(self.folder / f"{shard.name}.ends", ENDS).astype(np.int64)
        pieces, stops, cut = best_fit(ends, self.length)
        for suffix, numbers in ((PIECES, pieces), (STOPS, stops)):
            # Damaged ones may be mapped by another process, which they must not be cut off under.
            aside = record.with_suffix(f"{suffix}.part")
            with aside.open("wb") as file:
                file.write(numbers.astype(PLACES).tobytes())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(record.with_suffix(suffix))
        sync_folder(self.layouts)
        layout = Layout(cut, *(checksum(record.with_suffix(suffix)) for suffix in (PIECES, STOPS)))
        write_aside(record, json.dumps(asdict(layout)))
        return layout


def _layout(record: Path) -> Layout | None:
    """What was made of a shard; None where it is not there, or not what it was."""
    try:
        layout: Layout = read_record(Layout, record)
        sums = [checksum(record.with_suffix(suffix)) for suffix in (PIECES, STOPS)]
    except (FileNotFoundError, ValueError):
        return None
    return layout if sums == [layout.pieces, layout.stops] else None


class Selected(Lazy):
    """Some sequences of others, by their numbers."""

    def __init__(self, sequences: Sequences, indices: Iterable[int]) -> None:
        self.sequences = sequences
        self.indices: Sequence[int] = indices if isinstance(indices, range) else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        return self.sequences[self.indices[number]]

    def select(self, indices: Iterable[int], /) -> "Selected":
        """Some of these, by their numbers among them."""
        return Selected(self.sequences, [self.indices[number] for number in indices])


class Joined(Lazy):
    """The sequences of several sources, one source after another."""

    def __init__(self, parts: Sequence[Sequences]) -> None:
        self.parts = list(parts)
        self.firsts: list[int] = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).tolist()

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, number: int, /) -> dict[str, Any]:
        place, within = part_of(self.firsts, number)
        return self.parts[place][within]
