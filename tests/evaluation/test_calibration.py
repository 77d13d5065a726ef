"""Calibration makes the capacity's share of the tokens enter, and the threshold follows the top-k choice."""

from typing import Any

import datasets
import pytest
import torch
from models import TINY

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.evaluation.calibration import calibrate, using_causal_router
from mixture_of_depths.evaluation.loss import evaluate
from mixture_of_depths.model.routing import membership, select_top_k, top_k_boundary


def some_sequences(count: int = 12, length: int = 64) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": torch.randint(1, 31, (count, length)).tolist()})


def model_with(**changes: Any) -> MoDForCausalLM:
    return MoDForCausalLM(MoDConfig(**{**TINY, "routed_layers": [0, 2], "capacity": [0.25, 0.125], **changes}))


@pytest.mark.parametrize("causal_router", ["predictor", "threshold", "auxiliary_loss"])
def test_after_calibration_the_capacity_enters_every_block(causal_router: str) -> None:
    model, sequences = model_with(causal_router=causal_router), some_sequences()
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
    model = model_with(causal_router=causal_router, first_token_enters=True)
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
        model_with(causal_router="auxiliary_loss", num_experts=4, expert_routing="expert_choice"),
        some_sequences(),
    )
    calibrate(model, sequences, end_of_text=0)
    model.config.causal_router = "threshold"
    for figures in evaluate(model, sequences, 0, 1.0, batch_size=12).experts["causal"].values():
        assert sum(figures.share) == pytest.approx(1.0, abs=0.05)


def test_evaluation_tells_capacities_under_top_k_from_thresholds() -> None:
    model, sequences = model_with(routed_layers=[], capacity=0.5, num_experts=4, expert_capacity=0.5), some_sequences()
    found = evaluate(model, sequences, 0, 1.0)
    assert found.loss_top_k != found.loss_causal
    assert found.experts["top_k"][0].dropped > 0
    assert found.experts["causal"][0].dropped == 0


@pytest.mark.parametrize("routed", [[], [0, 2]])
@pytest.mark.parametrize(
    "experts",
    [
        {"expert_routing": "expert_choice", "expert_capacity": 0.6},
        {"num_experts_per_tok": 2, "expert_capacity": 0.5},
    ],
)
def test_after_calibration_experts_take_at_most_their_capacity(routed: list[int], experts: dict[str, Any]) -> None:
    model, sequences = model_with(routed_layers=routed, capacity=0.5, num_experts=4, **experts), some_sequences()
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
    model, sequences = model_with(), some_sequences()
    calibrate(model, sequences, end_of_text=0)
    model.save_pretrained(tmp_path)
    loaded = MoDForCausalLM.from_pretrained(tmp_path)
    assert evaluate(loaded, sequences, 0, 1.0) == evaluate(model, sequences, 0, 1.0)
    assert loaded.model.layers[0].router.threshold.item() != 0


def test_the_boundary_lies_between_the_least_chosen_and_the_greatest_other() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0], [0.0, -4.0, 9.0, 8.0]])
    entered = membership(select_top_k(logits, 2), 4)
    assert top_k_boundary(logits, entered, None).item() == ((3 + 2) / 2 + (8 + 0) / 2) / 2
    real = torch.tensor([[True, True, True, False], [False] * 4])
    entered = membership(select_top_k(logits, 2, real), 4)
    assert top_k_boundary(logits, entered, real).item() == (3 + 1) / 2
    whole = torch.ones_like(entered)
    assert top_k_boundary(logits, whole, None).item() == (1 + -4) / 2


def test_the_threshold_is_a_running_average_over_training_steps_only() -> None:
    model = model_with(causal_router="threshold", threshold_decay=0.5, capacity=0.25)
    router = model.model.layers[0].router
    input_ids = torch.randint(0, 31, (2, 16))

    def boundary() -> torch.Tensor:
        layer = model.eval()(input_ids, routing="top_k", output_routing=True).routing[0]
        return top_k_boundary(layer.router_logits, layer.entered, None)

    model.eval()(input_ids, routing="top_k")
    model(input_ids)
    assert router.threshold.item() == 0
    for _ in range(2):
        model.train()(input_ids)
    assert router.threshold.item() == pytest.approx(0.75 * boundary().item(), rel=1e-5)


def test_a_threshold_router_has_no_loss_and_no_predictor() -> None:
    model = model_with(causal_router="threshold").train()
    input_ids = torch.randint(0, 31, (2, 16))
    output = model(input_ids, labels=input_ids)
    assert output.router_loss is None
    assert torch.equal(output.loss, output.lm_loss)
    assert not any("predictor" in name for name, _ in model.named_parameters())


def test_a_router_the_model_was_not_trained_for_is_refused() -> None:
    model = model_with(causal_router="threshold")
    with (
        pytest.raises(ValueError, match="causal_router=predictor is not among"),
        using_causal_router(model, "predictor"),
    ):
        pass
    assert model_with(router_type="random").config.causal_routers == ()
