"""Sequences from shards: every token once, and few documents cut where they are packed."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_depths.text.packing import best_fit


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 16))
def test_packed_sequences_are_full_of_pieces_of_documents_each_token_once(sizes: list[int], length: int) -> None:
    ends = np.cumsum(sizes)
    pieces, stops, cut = best_fit(ends, length)
    used = np.zeros(ends[-1], dtype=int)
    bounds = [0, *stops.tolist()]
    for first, stop in pairwise(bounds):
        assert sum(size for _, size in pieces[first:stop]) == length
        # All but the last end their document, so that the next begins after an end of text.
        assert all(start + size in ends for start, size in pieces[first : stop - 1].tolist())
    for start, size in pieces.tolist():
        used[start : start + size] += 1
        document = int(np.searchsorted(ends, start, side="right"))
        assert start + size <= ends[document]
    assert used.max(initial=0) <= 1
    assert cut.dropped_tokens == int((used == 0).sum()) < length
    assert cut.longer == sum(size > length for size in sizes)
    whole = sum(
        size <= length and [start, size] in pieces.tolist() for start, size in zip(ends - sizes, sizes, strict=True)
    )
    assert cut.documents == len(sizes) - whole


def test_best_fit_cuts_far_fewer_documents_than_cutting_one_after_another() -> None:
    sizes = np.random.default_rng(0).integers(5, 300, 5000)
    ends = np.cumsum(sizes)
    _, stops, cut = best_fit(ends, 256)
    starts = ends - sizes
    cut_plainly = int((starts // 256 != (ends - 1) // 256).sum())
    assert cut.documents - cut.longer < 0.05 * (cut_plainly - cut.longer)
    assert len(stops) == ends[-1] // 256
