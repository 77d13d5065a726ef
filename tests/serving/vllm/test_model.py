"""Rows of the chosen tokens: whose they are, which of them a token takes, and how many there are."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_depths.serving.vllm import model
from mixture_of_depths.serving.vllm.model import rounded_up, rows
from mixture_of_depths.serving.vllm.places import Step


def rows_of(entered: list[bool], step: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    monkeypatch.setattr(model, "block_of", lambda name: SimpleNamespace(step=lambda: step))
    return rows(torch.tensor(entered, dtype=torch.bool), "block")


@given(entered=st.lists(st.booleans(), min_size=1, max_size=60))
def test_every_token_takes_its_own_row_or_the_one_behind_all(entered: list[bool]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        index_R, row_N = rows_of(entered, "metadata of other attention", monkeypatch)
    assert len(index_R) == rounded_up(sum(entered))
    for token, row in enumerate(row_N.tolist()):
        assert index_R[row] == token if entered[token] else row == len(index_R)


def test_what_fills_up_a_step_behind_its_tokens_never_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(cast(Any, SimpleNamespace(num_actual_tokens=3)), lambda common: common, 32, {})
    index_R, row_N = rows_of([True, False, True, True, True], step, monkeypatch)
    assert index_R.tolist() == [0, 2]
    assert row_N.tolist() == [0, 2, 1, 2, 2]


def test_all_tokens_enter_when_memory_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    index_R, row_N = rows_of([False, True, False], None, monkeypatch)
    assert index_R.tolist() == row_N.tolist() == [0, 1, 2]


@given(st.integers(1, 100_000))
def test_at_most_one_row_in_eight_is_for_nothing(count: int) -> None:
    assert count <= rounded_up(count) <= count * 8 / 7


def test_there_are_few_numbers_of_rows() -> None:
    assert len({rounded_up(count) for count in range(1, 8193)}) < 100
    assert [rounded_up(count) for count in range(17)] == list(range(17))
