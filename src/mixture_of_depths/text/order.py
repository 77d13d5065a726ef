"""Which sequence is trained on when: a function of the seed and the place in the run, without a list of all of them."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mixture_of_depths.text.packing import Joined, Sequences
from mixture_of_depths.text.sources import BLOCK, shares_of

MASK = (1 << 64) - 1
ROUNDS = 4


def mixed(value: int, key: int) -> int:
    """A number of 64 bits that a value and a key decide, in no visible way (splitmix64)."""
    value = (value + (key + 1) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def permuted(number: int, count: int, key: int) -> int:
    """The place of a number among `count` in the order that a key names: every place is taken once.

    A Feistel network over the numbers of twice so many bits as hold `count`, entered again until it leads below it.
    """
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    half = (1 << bits) - 1
    while True:
        left, right = number >> bits, number & half
        for turn in range(ROUNDS):
            left, right = right, left ^ (mixed(right, key + turn * 0x632BE59BD9B4E019) & half)
        number = left << bits | right
        if number < count:
            return number


class Order:
    """The sequences of a run, from its first to its last; an epoch of a source has each of its sequences once.

    Args:
        sequences: of one text, or of the sources in turn.
        weights: each source's share; None for one text.
        seed: decides the order.
        length: sequences of the run.

    An item is the sequence's own dictionary, and its number among all as `sequence`.
    """

    def __init__(self, sequences: Sequences, weights: Sequence[float] | None, seed: int, length: int) -> None:
        self.sequences, self.seed, self.length = sequences, seed, length
        self.firsts = sequences.firsts if isinstance(sequences, Joined) else [0, len(sequences)]
        if weights is None:
            self.firsts, weights = [0, len(sequences)], [1.0]
        self.shares = shares_of(weights)
        self._block = lru_cache(maxsize=4)(self._shuffled_block)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int, /) -> dict[str, Any]:
        number = self.number(place)
        return {**self.sequences[number], "sequence": number}

    def number(self, place: int) -> int:
        """The number of the sequence at a place of the run."""
        source, rank = self._source(place)
        first, count = self.firsts[source], self.firsts[source + 1] - self.firsts[source]
        epoch, number = divmod(rank, count)
        return first + permuted(number, count, mixed(epoch * 1024 + source, self.seed))

    def _source(self, place: int) -> tuple[int, int]:
        """The source at a place, and how many sequences were of it before."""
        if len(self.shares) == 1:
            return 0, place
        block, within = divmod(place, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[within])
        return source, block * self.shares[source] + int(ranks[within])

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        sources = np.repeat(np.arange(len(self.shares)), self.shares)
        order = np.argsort([mixed(block * BLOCK + place, ~self.seed & MASK) for place in range(BLOCK)], kind="stable")
        sources = sources[order]
        ranks = np.empty_like(sources)
        for source, share in enumerate(self.shares):
            ranks[sources == source] = np.arange(share)
        return sources, ranks
