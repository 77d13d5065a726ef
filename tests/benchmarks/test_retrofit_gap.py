"""How the loss of a retrofit is taken apart."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import tiny, with_parts
from retrofit_gap import all_entering, check_side, choosing_by_norm, gap_by_step, main

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.retrofitting.measure import routers_of

# As retrofits are routed.
ROUTED: dict[str, Any] = {
    "capacity": 0.25,
    "causal_router": "threshold",
    "router_activation": "straight_through",
    "router_norm": True,
    "first_token_enters": True,
}


def test_the_tokens_that_enter_are_first_ones_and_those_that_would_miss_most() -> None:
    torch.manual_seed(0)
    model = with_parts("block_keep_keys", 4, routed_layers=[1], **ROUTED).eval()
    tokens = torch.randint(0, model.config.vocab_size, (4, 16))
    layer = cast(DecoderLayer, model.model.layers[1])
    assert layer.bypass is not None
    deltas: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: deltas.append(output[0] - args[0]))
    with torch.no_grad(), all_entering(model):
        states = model.model(tokens, use_cache=False, routing="top_k", output_hidden_states=True).hidden_states
    hook.remove()
    with torch.no_grad(), choosing_by_norm(model):
        entered_BT = model.model(tokens, use_cache=False, routing="top_k").routing[1].entered
    map_BTD = layer.input_layernorm(states[1]) @ layer.bypass.down.weight.T @ layer.bypass.up.weight.T
    missed_BT, delta_BT = (deltas[0] - map_BTD).norm(dim=-1), deltas[0].norm(dim=-1)
    expected = [sorted([0, *(1 + missed_BT[row, 1:].topk(3).indices).tolist()]) for row in range(4)]
    assert [row.nonzero().flatten().tolist() for row in entered_BT] == expected
    # The maps decide: by what the block adds alone, others would enter.
    assert expected != [sorted([0, *(1 + delta_BT[row, 1:].topk(3).indices).tolist()]) for row in range(4)]


def test_where_all_enter_the_model_is_the_dense_one() -> None:
    model = with_parts("block_keep_keys", 4, **ROUTED).eval()
    dense = tiny(routed_layers=[]).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    tokens = torch.arange(16)[None]
    with torch.no_grad(), all_entering(model):
        logits = model(tokens, use_cache=False, routing="top_k").logits
    torch.testing.assert_close(logits, dense(tokens, use_cache=False).logits)


@pytest.mark.parametrize("taken_apart", [all_entering, choosing_by_norm])
def test_a_model_is_as_before_once_it_was_taken_apart(taken_apart: Any) -> None:
    model = with_parts("block_keep_keys", 4, **ROUTED).eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False, routing="top_k").logits
        with taken_apart(model):
            assert not torch.equal(model(tokens, use_cache=False, routing="top_k").logits, before)
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


def finished(folder: Path, model: MoDForCausalLM, key: str = "text", **train: Any) -> Path:
    """A folder as tuning leaves it, without weights."""
    folder.mkdir(parents=True)
    model.config.save_pretrained(folder)
    for name in ("result.json", "metrics.jsonl"):
        (folder / name).write_text("{}")
    record = {"train": {"max_steps": 8, "seed": 0, **train}, "text": {"key": key}}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_side_that_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path) -> None:
    kept, dense = with_parts("block_keep_keys", 4, **ROUTED), tiny(routed_layers=[])
    side, tuned = finished(tmp_path / "ours-0.8-0", kept), finished(tmp_path / "tuned-0", dense)
    assert check_side(side, tuned)["train"]["max_steps"] == 8
    with pytest.raises(ValueError, match=r"side=ours-0.8-0 needs .*tuned-1.result.json, which is not there"):
        check_side(side, tmp_path / "tuned-1")
    former = finished(tmp_path / "former-0.8-0", with_parts("block", 0, **ROUTED))
    random = finished(tmp_path / "random-0.8-0", with_parts("block_keep_keys", 4, router_type="random"))
    linear = with_parts("block_keep_keys", 4, **ROUTED, training_routing="threshold")
    for other in (former, random, tuned, finished(tmp_path / "linear-0.8-0", linear)):
        with pytest.raises(ValueError, match="has no learned routers of blocks whose keys are kept"):
            check_side(other, tuned)
    for number, change in enumerate(({"key": "other"}, {"seed": 1})):
        with pytest.raises(ValueError, match="was not tuned as tuned-0 was"):
            check_side(finished(tmp_path / f"other-{number}", kept, **change), tuned)
    short = [finished(tmp_path / name, model, max_steps=7) for name, model in (("short-0", kept), ("tuned-7", dense))]
    with pytest.raises(ValueError, match="fewer than 8 steps"):
        check_side(*short)


def test_the_command_refuses_with_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    parts = [
        "ours-0.8-0",
        "--tune",
        str(text),
        "--test",
        f"words={text}",
        "--runs",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["retrofit_gap.py", *parts])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "tune ours-0.8-0 first" in capsys.readouterr().err
