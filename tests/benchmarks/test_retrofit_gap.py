"""Who enters where the loss of a retrofit is taken apart."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import tiny
from retrofit_gap import all_entering, choosing_by_missed, gap_by_step

from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.retrofitting.measure import routers_of

ROUTED: dict[str, Any] = {
    "capacity": 0.25,
    "routed_parts": "block_keep_keys",
    "bypass_rank": 2,
    "causal_router": "threshold",
    "router_activation": "straight_through",
}


def test_the_tokens_that_enter_are_those_that_would_miss_most() -> None:
    torch.manual_seed(0)
    model = tiny(routed_layers=[1], **ROUTED).double().eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 16))
    layer = cast(DecoderLayer, model.model.layers[1])
    assert layer.bypass is not None
    deltas: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: deltas.append(output[0] - args[0]))
    with torch.no_grad(), all_entering(model):
        states = model.model(tokens, use_cache=False, routing="top_k", output_hidden_states=True).hidden_states
    hook.remove()
    with torch.no_grad(), choosing_by_missed(model):
        entered_BT = model.model(tokens, use_cache=False, routing="top_k").routing[1].entered
    map_BTD = layer.input_layernorm(states[1]) @ layer.bypass.down.weight.T @ layer.bypass.up.weight.T
    missed_BT = (deltas[0] - map_BTD).norm(dim=-1)
    for row in range(2):
        assert entered_BT[row].nonzero().flatten().tolist() == sorted(missed_BT[row].topk(4).indices.tolist())


def test_routers_are_as_before_once_the_loss_is_taken_apart() -> None:
    model = tiny(routed_layers=[0, 2], **ROUTED).eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False, routing="top_k").logits
        with all_entering(model):
            model(tokens, use_cache=False, routing="top_k")
        with choosing_by_missed(model):
            model(tokens, use_cache=False, routing="top_k")
        assert torch.equal(model(tokens, use_cache=False, routing="top_k").logits, before)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert [router.capacity for router in routers_of(model).values()] == [0.25, 0.25]


def test_the_gap_by_step_is_the_mean_difference_in_each_eighth_of_the_run(tmp_path: Path) -> None:
    for name, rise in (("side", 0.5), ("tuned", 0.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 1.0 + rise * (1 + (step >= 8))} for step in range(16)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 16, "eval_loss": 1.0}])
        (tmp_path / name / "metrics.jsonl").write_text(text)
    assert gap_by_step(tmp_path / "side", tmp_path / "tuned") == pytest.approx([0.5] * 4 + [1.0] * 4)
