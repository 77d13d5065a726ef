"""The horizon, the records, and that an interrupted run goes on as if nothing had happened."""

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import QUIET, config_for
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.evaluation.loss import evaluate
from mixture_of_depths.model.flops import training_flops_per_token
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.batches import document_positions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training import run as run_module
from mixture_of_depths.training.checkpoint import latest_checkpoint
from mixture_of_depths.training.horizon import horizon
from mixture_of_depths.training.run import train
from mixture_of_depths.training.trainer import DivergenceError, MoDTrainer


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [({"max_steps": 7}, 7), ({"max_tokens": 5 * 64 + 63}, 5), ({"max_flops": 3.5}, 3)],
)
def test_the_horizon_is_whole_steps_of_what_was_given(arguments: dict[str, float], steps: int) -> None:
    config = MoDConfig(vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    per_step = training_flops_per_token(config, 16) * 64
    if "max_flops" in arguments:
        arguments = {"max_flops": arguments["max_flops"] * per_step}
    length = horizon(TrainOptions(batch_size=4, **arguments), config, 16)  # pyright: ignore[reportArgumentType]
    assert length.steps == steps
    assert length.tokens == steps * 64
    assert length.flops == pytest.approx(steps * per_step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of max_steps, max_tokens and max_flops; given: none"),
        ({"max_steps": 5, "max_flops": 1e12}, "given: max_steps, max_flops"),
        ({"max_steps": 0}, "max_steps=0 is out of range: it must be greater than or equal to 1"),
        ({"max_flops": math.inf}, "max_flops=inf"),
        ({"max_tokens": 63}, "max_tokens=63 is less than one step, which takes 64"),
    ],
)
def test_an_impossible_horizon_is_refused(arguments: dict[str, Any], message: str) -> None:
    config = MoDConfig(vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
    with pytest.raises(ValueError, match=message):
        horizon(TrainOptions(batch_size=4, **arguments), config, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3 must divide batch_size=4"),
        ({"warmup_fraction": 1.0}, "warmup_fraction=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"save_every": 0}, "save_every=0"),
        ({"batch_size": 100_000}, "batch_size=100000 is more than the"),
    ],
)
def test_impossible_training_options_are_refused(
    corpus: Corpus, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(config_for(corpus), corpus, TrainOptions(max_steps=2, **{"batch_size": 4, **arguments}), tmp_path / "run")


class Stop(TrainerCallback):
    """Sends this process a signal after some step, as Ctrl-C would."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    "changes", [{}, {"router_type": "random"}, {"num_experts": 3, "num_noop_experts": 1, "expert_capacity": 0.7}]
)
@pytest.mark.parametrize(("accumulation", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_resuming_gives_bit_for_bit_the_run_that_was_not_interrupted(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    accumulation: int,
    number: signal.Signals,
) -> None:
    # An epoch has 4 * n sequences, so that step 7 lies in the middle of the second epoch.
    few = replace(corpus, train=corpus.train.select(range(18)))
    config = config_for(corpus, **changes)
    opts = TrainOptions(max_steps=13, batch_size=4, gradient_accumulation_steps=accumulation, eval_every=5)
    _, whole = train(config, few, opts, tmp_path / "whole", console=QUIET)

    original, before = run_module.StopOnSignal, signal.getsignal(number)
    monkeypatch.setattr(run_module, "StopOnSignal", lambda: _with(original(), Stop(7, number)))
    _, stopped = train(config, few, opts, tmp_path / "parts", console=QUIET)
    monkeypatch.setattr(run_module, "StopOnSignal", original)
    assert not stopped.finished
    assert stopped.steps == 7
    assert signal.getsignal(number) == before

    torch.manual_seed(999)
    _, resumed = train(config, few, opts, tmp_path / "parts", resume=True, console=QUIET)
    assert resumed.finished
    assert resumed.evaluation == whole.evaluation
    for name in ("model.safetensors", "checkpoint-13/optimizer.safetensors"):
        a, b = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def _with(callback: Any, other: TrainerCallback) -> Any:
    """`callback`, with the other's start of a step."""
    callback.on_step_begin = other.on_step_begin
    return callback


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss_causal", "eval_loss_top_k")
    return [tuple(r.get(key) for key in keys) for r in records(folder)]


def test_a_run_leaves_its_model_records_and_curve(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=10, batch_size=4, learning_rate=1e-2)
    _, result = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    assert result.evaluation is not None
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "curve.png", "run.json"} <= names
    forbidden = {".bin", ".pt", ".pth", ".pkl"}
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix in forbidden]
    assert list((tmp_path / "run" / "runs").rglob("events.out.tfevents.*"))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert {"tokens_per_second", "flops_per_second", "grad_norm", "learning_rate"} <= steps[0].keys()
    assert steps[-1]["flops"] == pytest.approx(result.flops)
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluation = [r for r in records(tmp_path / "run") if "eval_loss" in r][-1]
    assert {"eval_loss_top_k", "eval_loss_causal", "eval_causal_accuracy", "eval_share_entering_1"} <= evaluation.keys()
    loaded = MoDForCausalLM.from_pretrained(tmp_path / "run")
    again = evaluate(loaded, corpus.validation, corpus.end_of_text, corpus.facts.validation_bytes_per_token)
    assert again == result.evaluation
    described = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"git_commit", "command", "versions", "machine"} <= described.keys()


def test_the_learning_rate_warms_up_and_falls_to_a_tenth_over_the_horizon(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=40, batch_size=4, learning_rate=1e-3, warmup_fraction=0.1, eval_sequences=1)
    train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if "loss" in r]
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.02)


def test_a_folder_is_never_overwritten_and_resuming_needs_the_same_run(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=2, batch_size=4)
    config = config_for(corpus)
    train(config, corpus, opts, tmp_path / "run", console=QUIET)
    with pytest.raises(ValueError, match="is not empty"):
        train(config, corpus, opts, tmp_path / "run")
    with pytest.raises(ValueError, match=r"learning_rate=0\.5 differs from 0\.002"):
        train(config, corpus, replace(opts, learning_rate=0.5), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"capacity=0\.5 differs from 0\.25"):
        train(config_for(corpus, capacity=(0.5,)), corpus, opts, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(config, corpus, opts, tmp_path / "other", resume=True)


def test_accumulated_parts_of_a_batch_train_as_the_whole_batch(corpus: Corpus, tmp_path: Path) -> None:
    found = []
    for parts in (1, 4):
        opts = TrainOptions(max_steps=3, batch_size=8, gradient_accumulation_steps=parts)
        train(config_for(corpus), corpus, opts, tmp_path / str(parts), console=QUIET)
        found.append([r["loss"] for r in records(tmp_path / str(parts)) if "loss" in r])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_routers_norms_and_biases_do_not_decay(corpus: Corpus, tmp_path: Path) -> None:
    model = MoDForCausalLM(config_for(corpus))
    names = MoDTrainer.get_decay_parameter_names(None, model)  # pyright: ignore[reportArgumentType]
    assert "model.layers.1.mlp.up_proj.weight" in names
    assert "model.embed_tokens.weight" in names
    assert not any("router" in name or "norm" in name or "bias" in name for name in names)


def test_evaluation_counts_what_enters_and_agrees_with_the_model(corpus: Corpus) -> None:
    model = MoDForCausalLM(config_for(corpus, capacity=(0.25,), num_hidden_layers=4)).train()
    found = evaluate(model, corpus.validation, corpus.end_of_text, 2.0, max_sequences=5, batch_size=2)
    assert model.training
    assert found.tokens == 5 * 15
    assert list(found.causal_routers) == ["predictor", "threshold"]
    for causal in found.causal_routers.values():
        assert causal.share_entering.keys() == {1, 3}
        assert 0 <= causal.accuracy <= 1
    assert found.causal_routers["predictor"].loss == found.loss_causal
    # The same by hand.
    ids = torch.tensor(
        corpus.validation[np.linspace(0, len(corpus.validation) - 1, 5).round().astype(int)]["input_ids"]
    )
    positions = document_positions(ids, corpus.end_of_text)
    model.eval()
    top_k = model(ids, position_ids=positions, routing="top_k", output_routing=True).routing
    causal = model(ids, position_ids=positions, routing="causal", output_routing=True).routing
    agreed = [((top_k[i].causal_logits > 0) == top_k[i].entered).float().mean().item() for i in (1, 3)]
    assert found.causal_routers["predictor"].accuracy == pytest.approx(sum(agreed) / 2)
    for i in (1, 3):
        share = causal[i].entered.float().mean().item()
        assert found.causal_routers["predictor"].share_entering[i] == pytest.approx(share)
    assert found.bits_per_byte == pytest.approx(found.loss_causal / math.log(2) / 2)
    dense = MoDForCausalLM(config_for(corpus, routed=False))
    without = evaluate(dense, corpus.validation, corpus.end_of_text, 2.0, max_sequences=5)
    assert without.loss_causal == without.loss_top_k
    assert without.causal_routers == {}


def test_evaluation_computes_4096_tokens_at_a_time_at_most(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoDForCausalLM(config_for(corpus))
    sizes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, given: sizes.append(given["input_ids"].shape), with_kwargs=True)
    for length, batch_size in ((15, 16), (1000, 4), (5000, 1)):
        monkeypatch.setattr(model.config, "max_position_embeddings", length)
        sequences = datasets.Dataset.from_dict({"input_ids": [list(range(1, 6)) * (length // 5)] * 20})
        sizes.clear()
        evaluate(model, sequences, 0, 1.0, all_causal_routers=False)
        assert max(sizes) == (batch_size, length)
        assert sum(rows for rows, _ in sizes) == 2 * 20


def test_resuming_a_finished_run_only_evaluates_it_again(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=4, batch_size=4)
    _, first = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "result.json").unlink()
    _, again = train(config_for(corpus), corpus, opts, tmp_path / "run", resume=True, console=QUIET)
    assert again == first
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "run" / "result.json").exists()


def test_resuming_with_other_text_is_refused_and_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=4, batch_size=4)
    train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="the text, its tokenizer or sequence_length differs"):
        train(config_for(corpus), replace(corpus, key="other"), opts, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_a_run_without_a_later_field_is_resumed_at_its_default(corpus: Corpus, tmp_path: Path) -> None:
    opts, path = TrainOptions(max_steps=2, batch_size=4), tmp_path / "run.json"
    train(config_for(corpus), corpus, opts, tmp_path, console=QUIET)
    before = json.loads(path.read_text())
    del before["model"]["expert_routing"], before["train"]["precision"]
    path.write_text(json.dumps(before))
    assert train(config_for(corpus), corpus, opts, tmp_path, resume=True, console=QUIET)[1].finished
    for change in ({"num_experts": 2}, {"capacity": (0.5,)}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* differs from"):
            train(config_for(corpus, **change), corpus, opts, tmp_path, resume=True, console=QUIET)


def test_resuming_passes_over_a_damaged_checkpoint_and_a_cut_off_record(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=6, batch_size=4, save_every=2)
    _, whole = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    (tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    _, again = train(config_for(corpus), corpus, opts, tmp_path / "run", resume=True, console=QUIET)
    assert again.evaluation == whole.evaluation


def test_a_loss_that_is_no_number_stops_the_run_and_gives_signals_back(corpus: Corpus, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    opts = TrainOptions(max_steps=20, batch_size=4, learning_rate=1e30, save_every=1, eval_every=100)
    with pytest.raises(ValueError, match=r"(loss|grad_norm)=nan at step \d+ is no number"):
        train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_no_number_is_told_with_its_step_and_batch_and_keeps_the_checkpoint_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    few = replace(corpus, train=corpus.train.select(range(18)))
    opts = TrainOptions(max_steps=9, batch_size=4, gradient_accumulation_steps=accumulation, save_every=2)
    _, whole = train(config_for(corpus), few, opts, tmp_path / "whole", console=QUIET)
    seen: list[list[list[int]]] = []

    def poisoned(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 6:
            seen.append(inputs["input_ids"].tolist())
            return model(**inputs).loss * math.nan
        return original(self, model, inputs, *args, **kwargs)

    original = MoDTrainer.compute_loss
    monkeypatch.setattr(MoDTrainer, "compute_loss", poisoned)
    with pytest.raises(DivergenceError, match=r"loss=nan at step 7 .* in epoch 1\.75") as stopped:
        train(config_for(corpus), few, opts, tmp_path / "run", console=QUIET)
    named = re.search(r"its batch was sequences ([\d, ]+) of", str(stopped.value))
    assert named
    sequences = [few.train[int(number)]["input_ids"] for number in named.group(1).split(", ")]
    assert sequences == [row for part in seen for row in part]
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-6", 6)
    _, resumed = train(config_for(corpus), few, opts, tmp_path / "run", resume=True, console=QUIET)
    assert resumed.evaluation == whole.evaluation


def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(corpus: Corpus, tmp_path: Path) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        opts = TrainOptions(max_steps=3, batch_size=4, precision=precision)  # pyright: ignore[reportArgumentType]
        model, _ = train(config_for(corpus), corpus, opts, tmp_path / precision, console=QUIET)
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        found[precision] = [r["loss"] for r in records(tmp_path / precision) if "loss" in r]
    assert found["fp32"] == pytest.approx(found["bf16"], rel=1e-2)
    assert found["fp32"] != found["bf16"]


@pytest.mark.slow
def test_compiled_bf16_training_with_checkpointing_reaches_a_like_loss(corpus: Corpus, tmp_path: Path) -> None:
    found = []
    for name, changes in (
        ("plain", {}),
        ("fast", {"compile": True, "precision": "bf16", "gradient_checkpointing": True}),
    ):
        opts = TrainOptions(max_steps=30, batch_size=4, learning_rate=1e-2, **changes)
        _, result = train(config_for(corpus), corpus, opts, tmp_path / name, console=QUIET)
        assert result.evaluation is not None
        found.append(result.evaluation.loss_top_k)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_one_process_can_train_many_compiled_models(corpus: Corpus, tmp_path: Path) -> None:
    torch.compiler.reset()
    for width in (16, 24):
        config = config_for(corpus, hidden_size=width, num_hidden_layers=2)
        opts = TrainOptions(max_steps=1, batch_size=4, compile=True)
        with torch._dynamo.config.patch(recompile_limit=2):
            assert train(config, corpus, opts, tmp_path / str(width), console=QUIET)[1].finished


def test_tensorboard_shows_losses_shares_weights_and_the_routing_map(corpus: Corpus, tmp_path: Path) -> None:
    train(config_for(corpus), corpus, TrainOptions(max_steps=4, batch_size=4, eval_every=2), tmp_path, console=QUIET)
    seen = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    seen.Reload()
    scalars = ("train/loss", "eval/loss_causal", "eval/loss_top_k", "eval/causal_accuracy", "eval/share_entering_1")
    assert set(scalars) <= set(seen.Tags()["scalars"])
    assert seen.Tags()["histograms"] == ["router_weight/1"]
    assert [image.step for image in seen.Images("routing")] == [2, 4]
    assert (seen.Images("routing")[0].width, seen.Images("routing")[0].height) == (16, 8)
