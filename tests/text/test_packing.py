"""Sequences from shards: every token once, few documents cut where they are packed, and packed once."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import options, write_numbers

from mixture_of_depths.text import packing as packing_module
from mixture_of_depths.text.packing import ShardSequences, best_fit
from mixture_of_depths.text.preparation import prepare_shards


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


def test_runs_that_begin_at_once_pack_prepared_text_once_and_write_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, packed = tmp_path / "prepared", list[int]()
    write_numbers(tmp_path)
    prepared = prepare_shards(options(tmp_path, str(tmp_path / "*.txt")), folder, processes=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def slowly(ends: np.ndarray, length: int) -> Any:
        packed.append(length)
        time.sleep(0.3)
        return best_fit(ends, length)

    def rows() -> list[Any]:
        sequences = ShardSequences(folder, prepared, "train", 16, "best_fit", tmp_path / "cache")
        return [row["input_ids"].tolist() for row in sequences]

    monkeypatch.setattr(packing_module, "best_fit", slowly)
    with ThreadPoolExecutor() as pool:
        first, *others = (run.result() for run in [pool.submit(rows) for _ in range(3)])
    assert packed == [16]
    assert first
    assert others == [first, first]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        (".pieces", lambda path: path.unlink()),
        (".pieces", lambda path: path.write_bytes(path.read_bytes()[:-16])),
        (".pieces", lambda path: path.write_bytes(path.read_bytes()[:8] + b"\7" + path.read_bytes()[9:])),
        (".stops", lambda path: path.write_bytes(b"")),
        (".json", lambda path: path.write_text("{}")),
        (".json", lambda path: path.write_text("x")),
    ],
)
def test_a_damaged_layout_is_made_anew(tmp_path: Path, suffix: str, damage: Any) -> None:
    folder = tmp_path / "prepared"
    write_numbers(tmp_path)
    prepared = prepare_shards(options(tmp_path, str(tmp_path / "*.txt")), folder, processes=1)

    def rows() -> list[Any]:
        sequences = ShardSequences(folder, prepared, "train", 16, "best_fit", tmp_path / "cache")
        return [row["input_ids"].tolist() for row in sequences]

    def layout() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    first, whole = rows(), layout()
    damage(next((tmp_path / "cache").glob(f"packed-*/*{suffix}")))
    assert rows() == first
    assert layout() == whole
