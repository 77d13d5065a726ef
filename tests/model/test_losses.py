"""The loss is the sum of its parts, each with its weight, whatever decides causally and whoever takes the tokens."""

from typing import Any

import pytest
import torch
from models import tiny

WEIGHTS = {"predictor_loss_weight": 0.3, "auxiliary_loss_weight": 0.7}
EXPERTS = {"num_experts": 4, "load_balance_loss_weight": 0.11, "expert_z_loss_weight": 0.13}


@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize(("causal_router", "weight"), [("predictor", 0.3), ("auxiliary_loss", 0.7), ("threshold", 0.0)])
def test_the_loss_is_the_sum_of_its_weighted_parts(causal_router: str, weight: float, experts: dict[str, Any]) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids = torch.randint(0, 31, (3, 12))
    output = model(input_ids, labels=input_ids)
    assert (output.router_loss is None) == (causal_router == "threshold")
    total = output.lm_loss
    if output.router_loss is not None:
        assert output.router_loss > 0
        total = total + weight * output.router_loss
    if experts:
        assert output.balance_loss > 0
        assert output.expert_z_loss > 0
        total = total + 0.11 * output.balance_loss + 0.13 * output.expert_z_loss
    assert output.loss.item() == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.parametrize("causal_router", ["predictor", "auxiliary_loss"])
def test_what_decides_causally_learns_from_its_own_part_of_the_loss(causal_router: str) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS).train()
    input_ids = torch.randint(0, 31, (3, 12))
    output = model(input_ids, labels=input_ids)
    weights = [weight for name, weight in model.named_parameters() if ".router." in name]
    whole = torch.autograd.grad(output.loss, weights, retain_graph=True)
    of_text = torch.autograd.grad(output.lm_loss, weights, retain_graph=True, allow_unused=True)
    of_routers = torch.autograd.grad(output.router_loss, weights, allow_unused=True)
    factor = WEIGHTS["predictor_loss_weight" if causal_router == "predictor" else "auxiliary_loss_weight"]
    for all_of_it, text, own in zip(whole, of_text, of_routers, strict=True):
        assert own is not None or text is not None
        parts = (0 if text is None else text) + (0 if own is None else factor * own)
        assert torch.allclose(all_of_it, torch.as_tensor(parts, dtype=all_of_it.dtype), atol=1e-12)
    assert any(own is not None and own.abs().max() > 0 for own in of_routers)
