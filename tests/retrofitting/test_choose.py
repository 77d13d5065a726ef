"""The fewest of the cheapest blocks are routed, at the capacity that uses the share of the FLOPs in full."""

from dataclasses import replace

import pytest
from runs import ROUTING, dense_for

from mixture_of_depths.retrofitting.choose import choose_blocks, flops_share, full_capacity
from mixture_of_depths.retrofitting.measure import BlockImportance
from mixture_of_depths.text.corpus import Corpus

MEASURED = replace(ROUTING, routed_layers=None)


def test_the_fewest_of_the_cheapest_blocks_are_chosen(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    importance = [BlockImportance(0, cost) for cost in (0.4, 0.1, 0.3, 0.2)]
    both = flops_share(dense, [1, 3], MEASURED, 16)
    assert choose_blocks(importance, dense, replace(MEASURED, flops_share=both), 16) == [1, 3]
    assert choose_blocks(importance, dense, replace(MEASURED, flops_share=both - 1e-6), 16) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"flops_share=0\.01 cannot be reached with capacity=0\.25: .* share is 0\."):
        choose_blocks(importance, dense, replace(MEASURED, flops_share=0.01), 16)


@pytest.mark.parametrize("entering", [4, 5, 11, 15])
def test_the_capacity_is_raised_until_the_share_is_used_in_full(corpus: Corpus, entering: int) -> None:
    dense = dense_for(corpus).config
    share = flops_share(dense, [1, 3], replace(MEASURED, capacity=entering / 16), 16)
    assert full_capacity(dense, [1, 3], replace(MEASURED, flops_share=share), 16) == entering / 16
    assert full_capacity(dense, [1, 3], replace(MEASURED, flops_share=share + 1e-6), 16) == entering / 16


def test_a_capacity_that_fills_the_share_is_kept(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    exact = replace(MEASURED, capacity=0.27)
    routing = replace(exact, flops_share=flops_share(dense, [1, 3], exact, 16))
    assert full_capacity(dense, [1, 3], routing, 16) == 0.27
