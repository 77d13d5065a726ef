"""Optima and comparisons, on curves whose optimum is known."""

import math
import random
from typing import Any

import numpy as np
import pytest

from mixture_of_depths.isoflop.fit import (
    at_each_size,
    comparisons,
    curve,
    optima,
    ratio_interval,
    seed_deviation,
    smallest_as_good,
    summarise,
)


def record(family: str, depth: int, loss: float, seed: int = 0, flops: float | None = None) -> dict[str, Any]:
    return {
        "name": f"{family}-{depth}-{seed}",
        "family": family,
        "depth": depth,
        "budget": 1e13,
        "seed": seed,
        "parameters": 2**depth,
        "flops_per_token": flops if flops is not None else float(depth),
        "train_seconds": 10.0 * depth,
        "evaluation": {"loss_causal": loss, "loss_top_k": loss - 0.01},
    }


def parabola(family: str, bottom: float, height: float, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    shifts = [noise * ((3 * depth + 7 * seed) % 5 - 2) for depth in range(2, 7)]
    return [
        record(family, depth, height + (depth * math.log(2) - bottom) ** 2 + shift, seed)
        for depth, shift in zip(range(2, 7), shifts, strict=True)
    ]


def test_the_optimum_of_an_exact_parabola_is_found() -> None:
    found = curve(parabola("mod", math.log(18), 4.0), "loss_causal")
    assert found.optimum == pytest.approx((18.0, 4.0))
    assert found.optimum is not None
    assert found.optimum[1] < found.best.loss


def test_a_parabola_that_misses_a_size_by_more_than_a_hundredth_is_none() -> None:
    def runs(off: float) -> list[dict[str, Any]]:
        found = parabola("mod", math.log(18), 4.0)
        return [*found[:3], record("mod", 5, found[3]["evaluation"]["loss_causal"] + off), found[4]]

    assert curve(runs(0.04), "loss_causal").optimum is not None
    # Most of that is left between the size and the parabola; the bottom itself moves by less than a hundredth.
    assert curve(runs(0.14), "loss_causal").optimum is None


def test_a_size_weighs_as_many_times_as_it_has_seeds() -> None:
    def found(count: int) -> float:
        runs = parabola("mod", math.log(18), 4.0)
        # One size is off, whose runs are repeated.
        off = [record("mod", 5, runs[3]["evaluation"]["loss_causal"] + 0.04, seed) for seed in range(count)]
        optimum = curve([*runs[:3], *off, runs[4]], "loss_causal").optimum
        assert optimum is not None
        return optimum[1]

    sizes = np.log([2**depth for depth in range(2, 7)]) - math.log(18)
    losses = 4 + sizes**2 + np.array([0, 0, 0, 0.04, 0])
    for count in (1, 9):
        repeated = np.repeat(np.arange(5), [1, 1, 1, count, 1])
        bend, slope, height = np.polyfit(sizes[repeated], losses[repeated], 2)
        assert found(count) == pytest.approx(height - slope**2 / (4 * bend))
    assert found(1) < found(9)


def test_a_curve_that_only_falls_has_no_optimum_inside() -> None:
    steep = [record("mod", 2, 5.0), record("mod", 3, 4.0), record("mod", 7, 4.001), record("mod", 9, 5.0)]
    assert curve(steep, "loss_causal").optimum is None
    found = curve([record("mod", depth, 5.0 - depth / 10) for depth in range(2, 7)], "loss_causal")
    assert found.optimum is None
    assert found.best.loss == pytest.approx(4.4)
    # A point is not held against a parabola's bottom.
    inside = curve(parabola("baseline", math.log(18), 4.0), "loss_causal")
    assert optima(found, inside) == (found.best.loss, inside.best.loss)
    assert optima(inside, inside) == pytest.approx((4.0, 4.0))
    assert curve([record("mod", 2, 5.0)], "loss_causal").optimum is None


def test_the_smallest_model_as_good_is_the_cheapest_per_token() -> None:
    found = curve([record("mod", 2, 5.0), record("mod", 3, 4.0), record("mod", 4, 3.9)], "loss_causal")
    point = smallest_as_good(found, 4.2)
    assert point is not None
    assert point.flops_per_token == 3.0
    assert smallest_as_good(found, 3.0) is None


def test_the_interval_holds_the_ratio_and_needs_several_seeds() -> None:
    seeds = range(3)
    mod = [r for seed in seeds for r in parabola("mod", math.log(18), 4.0, seed, 0.01)]
    baseline = [r for seed in seeds for r in parabola("baseline", math.log(18), 5.0, seed, 0.01)]
    interval = ratio_interval(mod, baseline, "loss_causal")
    assert interval is not None
    assert interval[0] < 0.8 < interval[1]
    assert interval[1] - interval[0] < 0.05
    assert ratio_interval(mod[:5], baseline[:5], "loss_causal") is None


def test_what_a_seed_does_to_both_families_does_not_widen_the_interval() -> None:
    def runs(family: str, height: float, effects: list[float]) -> list[dict[str, Any]]:
        return [
            record(family, depth, height * (1 + effect) + abs(depth - 4), seed)
            for depth in (3, 4, 5)
            for seed, effect in enumerate(effects)
        ]

    alike = ratio_interval(runs("mod", 2, [0, 0.1, -0.1]), runs("baseline", 4, [0, 0.1, -0.1]), "loss_causal")
    apart = ratio_interval(runs("mod", 2, [0, 0.1, -0.1]), runs("baseline", 4, [0, -0.1, 0.1]), "loss_causal")
    assert alike == pytest.approx((0.5, 0.5))
    assert apart is not None
    assert apart[1] - apart[0] > 0.1
    # Seeds that the families do not share pair nothing.
    others = [{**run, "seed": run["seed"] + 3} for run in runs("baseline", 4, [0, 0.1, -0.1])]
    assert ratio_interval(runs("mod", 2, [0, 0.1, -0.1]), others, "loss_causal") is None


def test_seeds_that_one_family_or_size_lacks_leave_the_interval_around_the_ratio() -> None:
    mod = [record("mod", 3, 2.0, seed) for seed in range(3)]
    baseline = [record("baseline", 3, loss, seed) for seed, loss in enumerate((3.9, 3.9, 3.9, 4.3))]
    interval = ratio_interval(mod, baseline, "loss_causal")
    assert interval is not None
    assert interval[0] <= 0.5 <= interval[1]
    sides = []
    for family, height in (("mod", 2.0), ("baseline", 4.0)):
        sizes = {3: (0.0, 0.0, 0.6), 4: (1.0, 1.1)}
        sides.append([record(family, d, height * (1 + x), s) for d, xs in sizes.items() for s, x in enumerate(xs)])
    interval = ratio_interval(sides[0], sides[1], "loss_causal")
    assert interval is not None
    assert interval[0] <= 0.5 <= interval[1]


def test_the_interval_of_a_known_noise_is_as_wide_as_its_deviation_says() -> None:
    generator = random.Random(0)
    sides = [
        [
            record(name, depth, height + abs(depth - 4) + generator.gauss(0, 0.05), seed)
            for depth in (3, 4, 5)
            for seed in range(40)
        ]
        for name, height in (("mod", 2.0), ("baseline", 4.0))
    ]
    interval = ratio_interval(sides[0], sides[1], "loss_causal")
    assert interval is not None
    # The ratio of 2 to 4, each the mean of 40 runs of deviation 0.05, by the sum of squares of both errors.
    expected = 0.5 * math.hypot(0.05 / 2, 0.05 / 4) / 40**0.5
    assert (interval[1] - interval[0]) / 3.92 == pytest.approx(expected, rel=0.15)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says_with_three_seeds() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(300):
        sides = [
            [record(name, 3, height + generator.gauss(0, 0.05), seed) for seed in range(3)]
            for name, height in (("mod", 2.0), ("baseline", 4.0))
        ]
        interval = ratio_interval(sides[0], sides[1], "loss_causal", draws=400)
        assert interval is not None
        held += interval[0] <= 0.5 <= interval[1]
    assert held / 300 == pytest.approx(0.95, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("bend", "noise"), [(0.02, (0.01, 0.01)), (0.005, (0.03, 0.03)), (0.005, (0.06, 0.02))])
def test_the_interval_holds_the_true_ratio_as_often_where_the_best_of_five_sizes_is_chosen(
    bend: float, noise: tuple[float, float]
) -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(200):
        sides = [
            [
                record(name, depth, height + bend * (depth - 4) ** 2 + generator.gauss(0, deviation), seed)
                for depth, count in ((2, 1), (3, 3), (4, 3), (5, 3), (6, 1))
                for seed in range(count)
            ]
            for name, height, deviation in zip(("mod", "baseline"), (1.98, 2.0), noise, strict=True)
        ]
        interval = ratio_interval(sides[0], sides[1], "loss_causal", draws=300)
        assert interval is not None
        held += interval[0] <= 0.99 <= interval[1]
    assert held / 200 >= 0.92


def test_families_are_compared_at_each_size_by_the_seeds_that_both_have() -> None:
    mod = [record("mod", 3, loss, seed) for seed, loss in enumerate((1.98, 2.97, 3.96))] + [record("mod", 4, 1.0)]
    baseline = [record("baseline", 3, loss, seed) for seed, loss in ((0, 2.0), (2, 4.0), (1, 3.0), (7, 9.0))]
    baseline += [record("baseline", 4, 2.0), record("baseline", 5, 2.0)]
    three, four = at_each_size(mod, baseline, "loss_causal")
    # What a seed does to both leaves no noise.
    assert (three["depth"], three["seeds"], three["ratio"]) == (3, [0, 1, 2], pytest.approx(0.99))
    assert three["interval"] == pytest.approx([0.99, 0.99])
    assert four == {"depth": 4, "seeds": [0], "ratio": pytest.approx(0.5), "interval": None}
    noisy = [record("mod", 3, 2.0 * math.exp(shift), seed) for seed, shift in enumerate((-0.01, 0.0, 0.04))]
    (found,) = at_each_size(noisy, [record("baseline", 3, 2.0, seed) for seed in range(3)], "loss_causal")
    # Student's factor for two degrees of freedom, and the deviation of the three shifts over the root of 3.
    half = 4.302653 * (7 / 3 * 3e-4) ** 0.5 / 3**0.5
    assert found["ratio"] == pytest.approx(math.exp(0.01))
    assert found["interval"] == pytest.approx([math.exp(0.01 - half), math.exp(0.01 + half)])


def test_the_deviation_between_seeds_is_pooled_over_sizes() -> None:
    records = [record("mod", 2, 4.0, 0), record("mod", 2, 4.2, 1), record("mod", 3, 3.0, 0), record("mod", 3, 3.4, 1)]
    # Of the losses over their means, 4.1 and 3.2.
    squares = 2 * (0.1 / 4.1) ** 2 + 2 * (0.2 / 3.2) ** 2
    assert seed_deviation(records, "loss_causal") == pytest.approx((squares / 2) ** 0.5)
    assert seed_deviation(records[::2], "loss_causal") is None


def test_the_summary_compares_the_optima_under_both_routings() -> None:
    records = [*parabola("baseline", math.log(18), 5.0), *parabola("mod", math.log(18), 4.0), record("other", 3, 6.0)]
    row = summarise(records, "baseline", "mod", "other", {})["1e13"]
    assert row["loss_ratio"] == pytest.approx(0.8)
    assert row["loss_ratio_top_k"] == pytest.approx(3.99 / 4.99)
    at_best = 4.0 + (4 * math.log(2) - math.log(18)) ** 2
    assert row["causal_gap"] == pytest.approx(at_best / (at_best - 0.01) - 1)
    assert row["loss_ratio_of_points"] == pytest.approx(at_best / (at_best + 1))
    assert row["loss_ratio_is_of"] == "parabolas"
    assert row["equal_loss_mod_flops_ratio"] == pytest.approx(3 / 4)
    assert row["families"]["other"]["best_loss"] == 6.0
    # The other family has one size: points are compared.
    assert row["families"]["other"]["ratio_to_baseline"] == pytest.approx(6 / (at_best + 1))
    assert row["families"]["other"]["flops_per_token"] == 3
    assert row["stochastic_loss_ratio"] == row["families"]["other"]["ratio_to_baseline"]
    assert row["equal_loss_sampling_speedup"] is None
    assert summarise(records, "baseline", "mod", "absent", {})["1e13"]["stochastic_loss_ratio"] is None
    assert summarise(records, "baseline", "absent", "other", {}) == {}


def test_what_was_measured_counts_only_for_the_models_that_are_compared() -> None:
    records = [*parabola("baseline", math.log(18), 5.0), *parabola("mod", math.log(18), 4.0)]
    models = {"baseline": "baseline-4-0", "mod": "mod-4-0", "equal": "mod-3-0"}
    measured = {
        "1e13": {
            "models": models,
            "sampling_speedup": 1.5,
            "sampling_speedup_bf16": 1.4,
            "train_wall_ratio": 1.1,
            "gain_from_later_tokens": 0.01,
        }
    }
    names = (
        "equal_loss_sampling_speedup",
        "equal_loss_sampling_speedup_bf16",
        "train_wall_ratio",
        "gain_from_later_tokens",
    )
    row = summarise(records, "baseline", "mod", "absent", measured)["1e13"]
    assert [row[name] for name in names] == [1.5, 1.4, 1.1, 0.01]
    measured["1e13"]["models"] = {**models, "equal": "mod-2-0"}
    row = summarise(records, "baseline", "mod", "absent", measured)["1e13"]
    assert [row[name] for name in names] == [None, None, None, None]


def test_runs_that_diverged_are_named_and_left_out() -> None:
    records = [*parabola("baseline", math.log(18), 5.0), *parabola("mod", math.log(18), 4.0)]
    lost = {**record("mod", 7, 1.0), "evaluation": None}
    found = summarise([*records, lost], "baseline", "mod", "absent", {})
    assert found["1e13"].pop("diverged") == ["mod-7-0"]
    expected = summarise(records, "baseline", "mod", "absent", {})
    assert expected["1e13"].pop("diverged") == []
    assert found == expected


def test_lost_runs_are_named_and_count() -> None:
    records = [*parabola("baseline", math.log(18), 5.0), *parabola("mod", math.log(18), 4.0)]
    expected = summarise(records, "baseline", "mod", "absent", {})["1e13"]
    assert (expected["lost"], expected["not_known_whether_lost"]) == ([], len(records))
    told = [{**record, "loss_rise": 0.5 * (number == 3)} for number, record in enumerate(records)]
    found = summarise(told, "baseline", "mod", "absent", {})["1e13"]
    assert (found.pop("lost"), found.pop("not_known_whether_lost")) == ([told[3]["name"]], 0)
    assert found == {name: value for name, value in expected.items() if "lost" not in name}


def test_without_a_model_as_good_nothing_is_equal() -> None:
    records = [*parabola("baseline", math.log(18), 3.0), *parabola("mod", math.log(18), 4.0)]
    assert comparisons(records, "baseline", "mod")["1e13"].equal is None
    row = summarise(records, "baseline", "mod", "absent", {})["1e13"]
    assert (row["equal_loss_mod_flops_ratio"], row["equal_loss_mod_parameters"]) == (None, None)
