"""Calibration makes the capacity's share of the tokens enter, and the threshold follows the top-k choice."""

from typing import Any

import datasets
import pytest
from models import routed_model, some_sequences

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.evaluation.calibration import calibrate, using_causal_router
from mixture_of_depths.evaluation.loss import evaluate


@pytest.mark.parametrize("causal_router", ["predictor", "threshold", "auxiliary_loss"])
def test_after_calibration_the_capacity_enters_every_block(causal_router: str) -> None:
    model, sequences = routed_model(causal_router=causal_router), some_sequences()
    calibrate(model, sequences, end_of_text=0)
    found = evaluate(model, sequences, 0, 1.0).causal_routers
    assert list(found) == list(model.config.causal_routers)
    for name, figures in found.items():
        if name != "auxiliary_loss":
            assert figures.share_entering[2] == pytest.approx(0.125, abs=2e-3)
            # Equal tokens have equal weights in the first block, so its share moves in steps of their frequency.
            assert figures.share_entering[0] == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("causal_router", ["predictor", "threshold"])
def test_first_tokens_that_enter_anyway_count_in_the_capacity(causal_router: str) -> None:
    model = routed_model(causal_router=causal_router, first_token_enters=True)
    # Three documents a row, and at last as many as there are places.
    sequences = [[0 if token % 20 == 19 else 1 + (7 * token * row) % 30 for token in range(64)] for row in range(1, 13)]
    calibrate(model, datasets.Dataset.from_dict({"input_ids": sequences}), end_of_text=0)
    found = evaluate(model, datasets.Dataset.from_dict({"input_ids": sequences}), 0, 1.0).causal_routers[causal_router]
    assert found.share_entering[2] == pytest.approx(0.125, abs=2e-3)
    crowded = datasets.Dataset.from_dict({"input_ids": [[3, 5, 7, 0] * 16] * 4})
    calibrate(model, crowded, end_of_text=0)
    assert evaluate(model, crowded, 0, 1.0).causal_routers[causal_router].share_entering == {0: 0.25, 2: 0.25}


def test_experts_are_calibrated_for_the_router_that_decides_in_sampling() -> None:
    model, sequences = (
        routed_model(causal_router="auxiliary_loss", num_experts=4, expert_routing="expert_choice"),
        some_sequences(),
    )
    calibrate(model, sequences, end_of_text=0)
    model.config.causal_router = "threshold"
    for figures in evaluate(model, sequences, 0, 1.0, batch_size=12).experts["causal"].values():
        assert sum(figures.share) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("routed", [[], [0, 2]])
@pytest.mark.parametrize(
    "experts",
    [
        {"expert_routing": "expert_choice", "expert_capacity": 0.6},
        {"num_experts_per_tok": 2, "expert_capacity": 0.5},
    ],
)
def test_after_calibration_experts_take_at_most_their_capacity(routed: list[int], experts: dict[str, Any]) -> None:
    model, sequences = routed_model(routed_layers=routed, capacity=0.5, num_experts=4, **experts), some_sequences()
    per_token = model.config.num_experts_per_tok
    calibrate(model, sequences, end_of_text=0)
    found = evaluate(model, sequences, 0, 1.0, batch_size=12).experts
    assert set(found) == {"top_k", "causal"}
    for figures in found["causal"].values():
        limit = model.config.expert_capacity * per_token / 4 / per_token
        assert all(share <= limit + 0.02 for share in figures.share)
        assert sum(figures.share) > 0.25
        if "expert_routing" in experts:
            assert sum(figures.share) == pytest.approx(0.6, abs=0.03)


def test_calibration_is_stored_in_the_checkpoint(tmp_path: Any) -> None:
    model, sequences = routed_model(), some_sequences()
    calibrate(model, sequences, end_of_text=0)
    model.save_pretrained(tmp_path)
    loaded = MoDForCausalLM.from_pretrained(tmp_path)
    assert evaluate(loaded, sequences, 0, 1.0) == evaluate(model, sequences, 0, 1.0)
    assert loaded.model.layers[0].router.threshold.item() != 0


def test_a_router_the_model_was_not_trained_for_is_refused() -> None:
    model = routed_model(causal_router="threshold")
    with (
        pytest.raises(ValueError, match="causal_router=predictor is not among"),
        using_causal_router(model, "predictor"),
    ):
        pass
    assert routed_model(router_type="random").config.causal_routers == ()
