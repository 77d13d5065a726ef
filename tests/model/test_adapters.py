"""Under peft's adapters: what was trained answers alike when it is saved and loaded again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import model_with, routed_model
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)

from mixture_of_depths import MoDForCausalLM

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


@torch.no_grad()
def adapted(config: PeftConfig) -> PeftModel:
    """A small model under an adapter that changes what it answers."""
    model = get_peft_model(routed_model(), config).eval()
    for name, weight in model.named_parameters():
        if weight.requires_grad and ".modules_to_save." not in name:
            weight.add_(torch.rand_like(weight) / 8)
        elif weight.requires_grad:
            weight.mul_(2)
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(24)[None], use_cache=False).logits


ATTENTION: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
ROUTERS: dict[str, Any] = {"modules_to_save": ["router"]}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, **ATTENTION, **ROUTERS),
        LoraConfig(r=2, use_dora=True, **ATTENTION, **ROUTERS),
        AdaLoraConfig(r=2, total_step=10, **ATTENTION, **ROUTERS),
        LoHaConfig(r=2, **ATTENTION),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LNTuningConfig(target_modules=["input_layernorm"]),
    ],
    ids=["LoRA and routers", "DoRA and routers", "AdaLoRA and routers", "LoHa", "IA3", "LNTuning"],
)
def test_an_adapter_that_is_merged_and_saved_answers_as_before(tmp_path: Path, config: PeftConfig) -> None:
    model = adapted(config)
    expected = logits_of(model)
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.1
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(MoDForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [LoHaConfig(r=2, **ATTENTION, **ROUTERS), IA3Config(target_modules=["k_proj"], feedforward_modules=[], **ROUTERS)],
    ids=["LoHa", "IA3"],
)
def test_of_other_adapters_routers_do_not_merge(config: PeftConfig) -> None:
    with pytest.raises(AttributeError, match="'Router' object has no attribute 'weight'"):
        adapted(config).merge_and_unload()


def test_what_is_left_of_norms_that_are_merged_with_routers_is_wrapped() -> None:
    merged = adapted(LNTuningConfig(target_modules=["input_layernorm"], **ROUTERS)).merge_and_unload()
    assert any(".router.modules_to_save." in name for name in merged.state_dict())


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("training_routing", ["top_k", "causal"])
def test_prefix_tuning_is_refused_with_its_name(is_training: bool, training_routing: str) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(routed_model(training_routing=training_routing), config).train(is_training)
    with pytest.raises(ValueError, match=r"cache=DynamicCache has routed layers \[\].* which prefix tuning cannot"):
        model(input_ids=torch.arange(8)[None])
