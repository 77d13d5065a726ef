"""Under peft's adapters: what was trained answers alike when it is saved and loaded again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_with
from peft import LoraConfig, PeftModel, get_peft_model

EXPERTS = {"num_experts": 4, "expert_capacity": 0.7}


@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize("causal_router", ["predictor", "auxiliary_loss", "threshold"])
@pytest.mark.parametrize(
    "adapters",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["router"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["router.proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    ],
)
def test_a_loaded_adapter_answers_as_the_trained_one_did(
    tmp_path: Path, causal_router: Any, experts: dict[str, Any], adapters: dict[str, Any]
) -> None:
    base = model_with(threshold_decay=0.5, causal_router=causal_router, **experts)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **adapters)).train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(4):
        input_ids = torch.randint(0, 31, (4, 32))
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any((weight != before[name]).any() for name, weight in trained.items())
    if adapters.get("modules_to_save") == ["router"]:
        thresholds = [buffer for name, buffer in model.named_buffers() if ".modules_to_save.default.threshold" in name]
        assert any(threshold.any() for threshold in thresholds)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    input_ids = torch.randint(0, 31, (2, 40))
    assert torch.equal(loaded(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


def test_a_threshold_moves_with_its_router_and_stays_with_a_frozen_one() -> None:
    model = model_with().train()
    model.model.layers[1].router.requires_grad_(False)
    model(torch.randint(0, 31, (2, 32)))
    assert model.model.layers[1].router.threshold == 0
    assert model.model.layers[3].router.threshold != 0
