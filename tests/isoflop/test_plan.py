"""Study files and the runs they stand for."""

from pathlib import Path
from typing import Any

import pytest
from studies import RECIPE, study_file

from mixture_of_depths.isoflop.plan import (
    Ladder,
    capacities,
    load_study,
    plan,
    resolved_difference,
    runs,
    seeds_to_resolve,
)
from mixture_of_depths.text.corpus import prepare


def test_the_whole_study_of_the_recipe_can_be_planned() -> None:
    study = load_study(RECIPE)
    planned = plan(study, prepare(study.data))
    assert len({item.run.name for item in planned}) == len(planned) == len(runs(study))
    for budget in (1e13, 3e13, 1e14):
        for family in ("baseline", "mod"):
            found = [item for item in planned if item.run.family == family and item.run.budget == budget]
            assert len(found) >= 5
            for item in found:
                # A run ends with the last whole step within its budget.
                assert 0.99 * budget < item.length.flops <= budget
    shapes = {(item.config.hidden_size, item.config.num_hidden_layers) for item in planned}
    assert (80, 8) in shapes


def test_families_that_differ_in_capacity_alone_are_a_sweep_of_it() -> None:
    expected = {"mod": 0.125, "mod-25": 0.25, "mod-50": 0.5, "mod-95": 0.95}
    assert capacities(load_study(RECIPE), "mod") == expected


def test_a_run_of_two_sweeps_is_made_once(tmp_path: Path) -> None:
    sweep = {"budgets": [3e7], "families": ["mod"], "depths": [2]}
    assert len(runs(load_study(study_file(tmp_path, sweeps=[sweep, {**sweep, "seeds": [0, 1]}])))) == 2


def test_a_sweep_may_have_a_batch_of_its_own(tmp_path: Path) -> None:
    sweep = {"budgets": [3e7], "families": ["mod"], "depths": [2]}
    larger = {**sweep, "budgets": [6e7], "batch_size": 8}
    study = load_study(study_file(tmp_path, sweeps=[sweep, larger], training={"batch_size": 4}))
    assert [run.training.batch_size for run in runs(study)] == [4, 8]
    # Twice the budget, in steps that cost twice as much.
    assert len({item.length.steps for item in plan(study, prepare(study.data))}) == 1


def test_what_all_families_share_is_said_once(tmp_path: Path) -> None:
    mod = {"capacity": [0.25], "rope_theta": 70.0}
    families = {"baseline": {"routed": False}, "mod": mod, "half": {**mod, "capacity": [0.5]}}
    rates = dict.fromkeys(families, 1e-2)
    sweep = {"budgets": [3e7], "families": [*families], "depths": [2]}
    shared = {"query_key_norm": True, "rope_theta": 50.0}
    study = load_study(study_file(tmp_path, families=families, learning_rates=rates, sweeps=[sweep], model=shared))
    each = {name: {**shared, **changes} for name, changes in families.items()}
    repeated = load_study(study_file(tmp_path, families=each, learning_rates=rates, sweeps=[sweep]))
    corpus = prepare(study.data)
    assert plan(study, corpus) == plan(repeated, corpus)
    assert capacities(study, "mod") == {"mod": 0.25, "half": 0.5}


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    sweep = {"budgets": [3e7], "families": ["mod"], "depths": [2]}
    for other in ({"batch_size": 8}, {"budgets": [3e7 * (1 + 1e-9)]}):
        study = load_study(study_file(tmp_path, sweeps=[sweep, {**sweep, **other}]))
        with pytest.raises(ValueError, match="two runs are called mod-3e07-depth2-seed0: round budgets"):
            runs(study)


def test_wider_models_start_from_smaller_weights(tmp_path: Path) -> None:
    ladder = {"width_per_block": 8, "width_offset": 0, "head_dim": 8, "initializer_scale": 0.5}
    sweep = {"budgets": [3e9], "families": ["mod"], "depths": [2, 8]}
    study = load_study(study_file(tmp_path, sweeps=[sweep], ladder=ladder))
    ranges = [item.config.initializer_range for item in plan(study, prepare(study.data))]
    assert ranges == [pytest.approx(0.125), pytest.approx(0.0625)]


def test_wider_models_learn_at_a_lower_rate(tmp_path: Path) -> None:
    sweep = {"budgets": [3e7], "families": ["mod"], "depths": [2, 8]}
    study = load_study(study_file(tmp_path, sweeps=[sweep], learning_rate_width=16))
    assert [run.training.learning_rate for run in runs(study)] == [pytest.approx(1e-2), pytest.approx(5e-3)]


def test_the_definition_of_a_run_changes_with_what_decides_its_result(tmp_path: Path) -> None:
    def definitions(**changes: Any) -> list[str]:
        study = load_study(study_file(tmp_path, **changes))
        return [item.definition for item in plan(study, prepare(study.data))]

    first = definitions()
    assert definitions() == first
    changed = definitions(families={"baseline": {"routed": False}, "mod": {"capacity": [0.5], "route_every": 2}})
    assert [old == new for old, new in zip(first, changed, strict=True)] == [True, False]
    assert not set(definitions(learning_rates={"baseline": 2e-2, "mod": 2e-2})) & set(first)
    assert definitions(training={"batch_size": 4, "save_every": 7, "eval_every": 9, "eval_sequences": 3}) == first


def test_families_may_route_parts_of_a_block_and_have_a_bypass(tmp_path: Path) -> None:
    mod = {"capacity": [0.25], "route_every": 2}
    families = {
        "baseline": {"routed": False},
        "mod": mod,
        "keys": {**mod, "routed_parts": ["block_keep_keys"]},
        "mlp": {**mod, "routed_parts": ["mlp"]},
        "bypass": {**mod, "bypass_rank": 2},
    }
    rates = dict.fromkeys(families, 1e-2)
    sweep = {"budgets": [3e7], "families": [*families], "depths": [2]}
    study = load_study(study_file(tmp_path, families=families, learning_rates=rates, sweeps=[sweep]))
    planned = {item.run.family: item for item in plan(study, prepare(study.data))}
    flops = {name: item.flops_per_token for name, item in planned.items()}
    # A token that skips computes its key and value under "keys", all of attention under "mlp".
    assert flops["mod"] < flops["keys"] < flops["mlp"] < flops["baseline"]
    # The map of one block, computed for all: twice width times rank, a multiplication and an addition each.
    assert flops["bypass"] - flops["mod"] == 2 * 2 * 16 * 2
    assert planned["bypass"].parameters - planned["mod"].parameters == 2 * 16 * 2
    assert len({item.definition for item in planned.values()}) == len(families)


def test_the_seeds_that_show_a_difference_follow_from_the_deviation() -> None:
    # Tables of the test of two means, power 80 %, have 17 for an effect of one deviation and 64 for half of one.
    assert [seeds_to_resolve(deviation) for deviation in (0.005, 0.01, 0.001)] == [17, 64, 3]
    assert seeds_to_resolve(0.01, difference=0.01) == 17
    assert resolved_difference(0.01, 17) < 0.01 < resolved_difference(0.01, 16)
    # Student's quantiles for four degrees of freedom.
    assert resolved_difference(0.01, 3) == pytest.approx((2.776445 + 0.940965) * 0.01 * (2 / 3) ** 0.5)


def test_a_model_is_as_wide_as_its_whole_heads() -> None:
    assert Ladder(16, 32, 32).size(6) == {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 4}
    assert Ladder(16, 32, 32).size(3) == {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="depth=1 makes models too narrow for a head of head_dim=64"):
        Ladder(16, 32, 64).size(1)


SWEEP = {"budgets": [3e7], "families": ["mod"], "depths": [2]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 3}, "budget is no field; there are"),
        ({"sweeps": [{**SWEEP, "depth": [2]}]}, r"sweeps\[0\]: depth is no field"),
        ({"sweeps": [{**SWEEP, "budgets": "x"}]}, "budgets='x'"),
        ({"sweeps": [{**SWEEP, "families": ["dense"]}]}, "dense is none of the families"),
        ({"families": {"baseline": {"routed": False}, "mod": {"capacities": [1]}}}, "capacities is no field"),
        ({"families": {"baseline": {}, "mod": {"hidden_size": 64}}}, "hidden_size comes from the ladder"),
        ({"model": {"capacities": [1]}}, "model: capacities is no field"),
        ({"model": {"hidden_size": 64}}, "model: hidden_size comes from the ladder"),
        ({"model": [3]}, r"model=\[3\]"),
        ({"learning_rates": {"baseline": 1e-2}}, "learning_rates needs a rate above 0 for mod"),
        ({"baseline": "dense"}, "baseline=dense is none"),
        ({"training": {"max_steps": 3}}, "max_steps comes from the study"),
        # At its default, too: it would not be heeded.
        ({"training": {"seed": 0}}, "seed comes from the study"),
        ({"learning_rates": {"baseline": 1e-2, "mod": 1e-2, "mud": 1e-2}}, "learning_rates: mud is none"),
        ({"training": {"calibrate": True}}, "calibrate is the same in every study"),
        ({"training": {"batch_size": "many"}}, "training.batch_size='many'"),
        ({"sweeps": [{**SWEEP, "batch_size": 0}]}, "sweeps.0.batch_size=0"),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(study_file(tmp_path, **changes))


def test_impossible_runs_are_refused_by_name(tmp_path: Path) -> None:
    for changes, message in (
        ({"sweeps": [{**SWEEP, "budgets": [10.0]}]}, "run mod-10-depth2-seed0: max_flops=10 is less than one step"),
        ({"families": {"baseline": {}, "mod": {"capacity": [2.0]}}}, "run mod-3e07-depth2-seed0: capacity"),
    ):
        study = load_study(study_file(tmp_path, **changes))
        with pytest.raises(ValueError, match=message):
            plan(study, prepare(study.data))
