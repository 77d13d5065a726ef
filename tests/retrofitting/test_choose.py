"""One budget is spread over the blocks so that least is lost, and is used in full."""

from dataclasses import replace
from itertools import product

import pytest
from runs import ROUTING, dense_for

from mixture_of_depths import MoDConfig
from mixture_of_depths.options import RetrofitOptions
from mixture_of_depths.retrofitting import choose
from mixture_of_depths.retrofitting.choose import decode_share, routed_kind, share_of, spread_budget
from mixture_of_depths.retrofitting.measure import BlockImportance, routed_config
from mixture_of_depths.text.corpus import Corpus

MEASURED = replace(ROUTING, routed_layers=None, routed_parts="block_keep_keys", bypass_rank=2)
LENGTH = 64


def costing(*losses: float) -> list[BlockImportance]:
    """Blocks of which ever less is missed the more enters: each step lets in what matters less than the one before."""
    return [BlockImportance(loss, tuple((1 - c / 8) ** (2 + i) for c in range(9))) for i, loss in enumerate(losses)]


def rise(importance: list[BlockImportance], capacities: dict[int, float]) -> float:
    return sum(importance[block].expected_loss(capacity) for block, capacity in capacities.items())


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7])
@pytest.mark.parametrize("name", ["flops_share", "decode_share"])
def test_no_other_choice_within_the_share_loses_clearly_less(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    monkeypatch.setattr(choose, "STEPS", 16)
    dense, options = dense_for(corpus).config, replace(MEASURED, **{name: share})
    importance = costing(0.4, 0.1, 0.3, 0.12)
    chosen = spread_budget(importance, dense, options, LENGTH)
    assert share_of(dense, chosen, options, LENGTH) <= share
    losses, steps = [], [step / 16 for step in range(4, 17)]
    # Blocks are alike in what they take.
    prices = {step: share_of(dense, {0: step}, options, LENGTH) - 1 for step in steps[:-1]} | {1.0: 0.0}
    rises = [{step: block.expected_loss(step) for step in steps} for block in importance]
    for every in product(steps, repeat=4):
        if 1 + sum(prices[capacity] for capacity in every) <= share:
            losses.append(sum(of[capacity] for of, capacity in zip(rises, every, strict=True)))
    assert rise(importance, chosen) <= min(losses) + 0.01


@pytest.mark.parametrize("share", [0.99, 0.97, 0.95, 0.9, 0.8])
def test_no_block_is_routed_that_would_cost_less_dense(corpus: Corpus, share: float) -> None:
    dense, options = dense_for(corpus).config, replace(MEASURED, bypass_rank=6, flops_share=share)
    # The map is dear, so that at a high capacity a routed block takes more than a dense one.
    assert share_of(dense, {0: 63 / 64}, options, LENGTH) > 1
    for importance in (costing(0.4, 0.1, 0.3, 0.12), [BlockImportance(0.0, (0.0,) * 9)] * 4):
        chosen = spread_budget(importance, dense, options, LENGTH)
        for block, capacity in chosen.items():
            assert share_of(dense, {block: capacity}, options, LENGTH) < 1


def test_the_cheapest_blocks_give_most_and_the_share_is_used_in_full(corpus: Corpus) -> None:
    dense, options = dense_for(corpus).config, replace(MEASURED, flops_share=0.9)
    same = [replace(block, missed=costing(1)[0].missed) for block in costing(0.4, 0.2, 0.3, 0.14)]
    chosen = spread_budget(same, dense, options, LENGTH)
    capacities = [chosen.get(block, 1.0) for block in range(4)]
    assert capacities[3] <= capacities[1] <= capacities[2] <= capacities[0]
    assert capacities[3] < capacities[0]
    assert 0.9 - 0.01 < share_of(dense, chosen, options, LENGTH) <= 0.9


def test_a_block_that_seems_to_cost_nothing_is_not_emptied_for_the_others(corpus: Corpus) -> None:
    dense, options = dense_for(corpus).config, replace(MEASURED, flops_share=0.9)
    same = [replace(block, missed=costing(1)[0].missed) for block in costing(0.1, 0.1, 0.1, -0.01)]
    chosen = spread_budget(same, dense, options, LENGTH)
    assert chosen == spread_budget([*same[:3], replace(same[3], loss=0.05)], dense, options, LENGTH)
    assert chosen[3] > 0.25


def test_blocks_that_cost_nothing_to_skip_keep_to_the_share_all_the_same(corpus: Corpus) -> None:
    dense, options = dense_for(corpus).config, replace(MEASURED, flops_share=0.8)
    chosen = spread_budget([BlockImportance(-0.1, (0.0,) * 9)] * 4, dense, options, LENGTH)
    assert 0.79 < share_of(dense, chosen, options, LENGTH) <= 0.8


def test_a_share_that_cannot_be_reached_is_refused_by_its_name(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    for name in ("flops_share", "decode_share"):
        with pytest.raises(ValueError, match=rf"{name}=0\.01 cannot be reached with capacity=0\.25: .* share is 0\."):
            spread_budget(costing(1, 1, 1, 1), dense, replace(MEASURED, **{name: 0.01}), LENGTH)


def test_keeping_keys_and_a_map_cost_bytes_of_a_decoded_token(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    shares = [
        decode_share(
            routed_config(dense, routed_layers=[1, 2], capacity=0.25, routed_parts=part, bypass_rank=rank),
            dense,
            LENGTH,
        )
        for part, rank in (("block", 0), ("block_keep_keys", 0), ("block_keep_keys", 2))
    ]
    assert shares == sorted(set(shares))
    assert shares[-1] < 1


def test_the_options_refuse_what_contradicts_itself() -> None:
    for options, message in (
        ({"decode_share": 0.8, "flops_share": 0.7}, "flops_share=0.7 has no use with decode_share"),
        ({"decode_share": 0.8, "routed_layers": (1,)}, "decode_share=0.8 has no use with routed_layers"),
        ({"capacity": (0.2, 0.3)}, r"capacity=\(0.2, 0.3\) has 2 entries; give one number"),
        ({"capacity": (0.2, 0.3), "routed_layers": (1, 2, 3)}, r"capacity=\(0.2, 0.3\) has 2 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            RetrofitOptions(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("width", "rank"), [(64, 16), (512, 128), (576, 128), (2048, 128)])
def test_maps_have_by_default_a_quarter_of_the_width_as_rank_and_at_most_128(width: int, rank: int) -> None:
    dense = MoDConfig(hidden_size=width, num_attention_heads=4)
    assert routed_kind(dense, RetrofitOptions())["bypass_rank"] == rank
    assert routed_kind(dense, RetrofitOptions(bypass_rank=0))["bypass_rank"] == 0
