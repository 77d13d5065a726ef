"""The order of a run is a function of the seed and the place, and takes every sequence once an epoch."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_depths.text.order import Order, permuted
from mixture_of_depths.text.packing import Joined
from mixture_of_depths.text.sources import BLOCK, shares_of, weighted


class Numbers:
    """Sequences that say their number, from a first one on."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": [self.first + number]}

    def __iter__(self) -> Any:
        return (self[number] for number in range(self.count))

    def select(self, indices: Any) -> Any:
        raise NotImplementedError


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_every_number_has_one_place(count: int, key: int) -> None:
    assert sorted(permuted(number, count, key) for number in range(count)) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own_that_spread_over_all() -> None:
    order = Order(Numbers(1000), None, 1, 3000)
    epochs = [[order[place]["sequence"] for place in range(start, start + 1000)] for start in (0, 1000, 2000)]
    assert all(sorted(epoch) == list(range(1000)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = Order(Numbers(1000), None, 2, 3000)
    assert [other[place]["sequence"] for place in range(1000)] not in epochs
    # Neighbours in the text are none in the run, nor a fixed way apart.
    steps = Counter(b - a for epoch in epochs for a, b in pairwise(epoch))
    assert max(steps.values()) < 20
    # Every tenth of the run has of every tenth of the text.
    for start in range(0, 1000, 100):
        assert min(Counter(number // 100 for number in epochs[0][start : start + 100]).values()) >= 2
    assert order[1234] == Order(Numbers(1000), None, 1, 5000)[1234]


def test_weighted_sources_have_their_shares_everywhere_and_each_its_own_epochs() -> None:
    joined = Joined([Numbers(5000), Numbers(100, 5000), Numbers(300, 5100)])
    order = Order(joined, [0.7, 0.2, 0.1], 0, 2 * BLOCK)
    numbers = [order[place]["sequence"] for place in range(2 * BLOCK)]
    assert [order[place]["input_ids"] for place in range(50)] == [[number] for number in numbers[:50]]
    sources = ["abc"[(number >= 5000) + (number >= 5100)] for number in numbers]
    for start in range(0, 2 * BLOCK, 1024):
        found = Counter(sources[start : start + 1024])
        assert abs(found["a"] / 1024 - 0.7) < 0.06
        assert abs(found["b"] / 1024 - 0.2) < 0.06
    assert Counter(sources)["a"] == 2 * round(0.7 * BLOCK)
    of_b = [number for number in numbers if 5000 <= number < 5100]
    for start in range(0, len(of_b) - 100, 100):
        assert sorted(of_b[start : start + 100]) == list(range(5000, 5100))


def test_shares_fill_a_block_and_a_weight_without_one_is_refused() -> None:
    assert sum(shares_of([1 / 3, 1 / 3, 1 / 3])) == BLOCK
    assert shares_of([0.75, 0.25]) == [BLOCK * 3 // 4, BLOCK // 4]
    with pytest.raises(ValueError, match=r"data=b:0\.00001 has less than one sequence in 4,096 by its weight; raise"):
        weighted(["a:1.0", "b:0.00001"])
