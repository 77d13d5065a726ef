"""The horizon, the records, and that an interrupted run goes on as if nothing had happened."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from models import options, write_numbers
from rich.console import Console
from runs import QUIET, config_for, records
from safetensors.torch import load_file
from transformers import TrainerCallback

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.evaluation.loss import evaluate
from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.sampling.stream import require_known_layers
from mixture_of_depths.text.batches import halves
from mixture_of_depths.text.corpus import Corpus, prepare
from mixture_of_depths.training import run as run_module
from mixture_of_depths.training.run import Tuning, in_order, train
from mixture_of_depths.training.trainer import MoDTrainer


class Stop(TrainerCallback):
    """Sends this process a signal after some step, as Ctrl-C would."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


RANDOM: dict[str, Any] = {"router_type": "random"}
KEYS: dict[str, Any] = {"routed_parts": ("block_keep_keys",), "bypass_rank": 4, "router_activation": "straight_through"}
EXPERTS: dict[str, Any] = {"num_experts": 3, "num_noop_experts": 1, "expert_capacity": 0.7}


@pytest.mark.parametrize(
    ("changes", "accumulation", "number", "optimizer"),
    [
        (KEYS, 1, signal.SIGINT, "adamw"),
        (RANDOM, 2, signal.SIGTERM, "adamw"),
        (EXPERTS, 1, signal.SIGTERM, "muon"),
        pytest.param({}, 1, signal.SIGINT, "adamw", marks=pytest.mark.slow),
        pytest.param({}, 2, signal.SIGTERM, "adamw", marks=pytest.mark.slow),
        pytest.param(RANDOM, 1, signal.SIGINT, "adamw", marks=pytest.mark.slow),
        pytest.param(EXPERTS, 2, signal.SIGINT, "adamw", marks=pytest.mark.slow),
    ],
)
def test_resuming_gives_bit_for_bit_the_run_that_was_not_interrupted(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    accumulation: int,
    number: signal.Signals,
    optimizer: Any,
) -> None:
    # An epoch has 4 * n sequences, so that step 7 lies in the middle of the second epoch.
    few = replace(corpus, train=corpus.train.select(range(18)))
    config = config_for(corpus, **changes)
    opts = TrainOptions(
        max_steps=13, batch_size=4, gradient_accumulation_steps=accumulation, eval_every=5, optimizer=optimizer
    )
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
    _, others = halves(corpus.validation)
    assert evaluate(loaded, others, corpus.end_of_text, corpus.facts.validation_bytes_per_token) == result.evaluation
    described = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"git_commit", "command", "versions", "machine"} <= described.keys()


def test_resuming_a_finished_run_only_evaluates_it_again(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=4, batch_size=4)
    _, first = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "result.json").unlink()
    _, again = train(config_for(corpus), corpus, opts, tmp_path / "run", resume=True, console=QUIET)
    assert again == first
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "run" / "result.json").exists()


OPTIONS = TrainOptions(max_steps=4, batch_size=4, learning_rate=1e-2, eval_sequences=2)


@pytest.mark.parametrize("causal_router", ["predictor", "threshold", "auxiliary_loss"])
def test_a_run_ends_with_the_capacity_entering_and_says_so(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], causal_router: Any
) -> None:
    config = config_for(corpus, causal_router=causal_router)
    _, result = train(config, corpus, OPTIONS, tmp_path / "run", console=Console(width=200))
    said, described = capsys.readouterr().out, json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.evaluation is not None
    assert described["calibrated"] is result.calibrated is True
    model = MoDForCausalLM.from_pretrained(tmp_path / "run")
    assert model.config.causal_router == causal_router
    calibration, others = halves(corpus.validation)
    found = evaluate(model, calibration, corpus.end_of_text, 1.0).causal_routers
    for name, figures in found.items():
        if name != "auxiliary_loss":
            assert figures.share_entering[1] == pytest.approx(0.25, abs=0.005)
    assert result.evaluation.tokens == len(others) * 15
    share = result.evaluation.causal_routers[causal_router].share_entering[1]
    assert f"{100 * share:.1f} % of the tokens enter the routed blocks (capacity 25.0 %)" in said
    assert ("`mod calibrate` lets it decide" in said) == (causal_router == "auxiliary_loss")


def test_a_run_that_does_not_calibrate_is_left_as_trained_and_evaluated_on_all_text(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(OPTIONS, calibrate=False)
    _, plain = train(config_for(corpus), corpus, options, tmp_path / "run", console=Console(width=200))
    assert "of the tokens enter the routed blocks (capacity 25.0 %)" in capsys.readouterr().out
    saved = [load_file(path / "model.safetensors") for path in (tmp_path / "run", tmp_path / "run" / "checkpoint-4")]
    assert all(torch.equal(weight, saved[1][name]) for name, weight in saved[0].items())
    assert plain.evaluation is not None
    assert (plain.calibrated, plain.evaluation.tokens) == (False, len(corpus.validation) * 15)
    # The end of a finished run may be made anew, either way, and from the weights as trained.
    for calibrate in (True, True, False):
        again = replace(OPTIONS, calibrate=calibrate)
        _, result = train(config_for(corpus), corpus, again, tmp_path / "run", resume=True, console=QUIET)
        assert result.calibrated is calibrate
        assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["calibrate"] is calibrate
        assert (result == plain) is not calibrate
    assert all(
        torch.equal(weight, saved[0][name])
        for name, weight in load_file(tmp_path / "run" / "model.safetensors").items()
    )


@pytest.mark.parametrize(
    ("changes", "calibrated"),
    [
        ({"routed": False}, False),
        ({"router_type": "random"}, False),
        ({"routed": False, "num_experts": 3, "expert_capacity": 0.7}, True),
        ({"router_type": "random", "num_experts": 3, "expert_capacity": 0.7}, True),
    ],
)
def test_models_without_learned_routers_are_evaluated_on_the_same_half(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], calibrated: bool
) -> None:
    _, result = train(config_for(corpus, **changes), corpus, OPTIONS, tmp_path / "run", console=QUIET)
    assert result.evaluation is not None
    assert (result.calibrated, result.evaluation.tokens) == (calibrated, len(corpus.validation) // 2 * 15)
    saved = [load_file(path / "model.safetensors") for path in (tmp_path / "run", tmp_path / "run" / "checkpoint-4")]
    moved = {name for name, weight in saved[0].items() if not torch.equal(weight, saved[1][name])}
    assert bool(moved) is calibrated
    assert all(name.endswith("mlp.router.threshold") for name in moved)


@pytest.mark.parametrize(("precision", "is_bf16"), [("fp32", False), ("bf16", True)])
def test_a_run_is_calibrated_in_the_precision_of_its_training(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, is_bf16: bool
) -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    calibrate = run_module.calibrate

    def watched(*arguments: Any) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        calibrate(*arguments)

    monkeypatch.setattr(run_module, "calibrate", watched)
    train(config_for(corpus), corpus, replace(OPTIONS, max_steps=1, precision=precision), tmp_path, console=QUIET)
    assert seen == [(is_bf16, torch.bfloat16)]


def test_held_out_text_of_one_sequence_calibrates_nothing_and_the_run_says_so(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = replace(corpus, validation=corpus.validation.select([0]))
    _, result = train(config_for(corpus), single, OPTIONS, tmp_path / "run", console=Console(width=200))
    said = capsys.readouterr().out
    assert "the held-out text is one sequence, which cannot be halved: the model is not calibrated" in said
    assert result.evaluation is not None
    assert (result.calibrated, result.evaluation.tokens) == (False, 15)


def test_what_is_saved_is_configured_as_the_model_was(corpus: Corpus, tmp_path: Path) -> None:
    config = config_for(corpus)
    MoDForCausalLM(config_for(corpus)).save_pretrained(tmp_path / "plain")
    options = replace(OPTIONS, gradient_checkpointing=True, precision="bf16")
    trained, _ = train(config, corpus, options, tmp_path / "run", console=QUIET)
    assert trained.config.use_cache
    for name in ("config.json", "generation_config.json"):
        expected = json.loads((tmp_path / "plain" / name).read_text())
        assert json.loads((tmp_path / "run" / name).read_text()) == expected
        assert json.loads((tmp_path / "run" / "checkpoint-4" / name).read_text()) == expected
    config.use_cache = False
    train(config, corpus, OPTIONS, tmp_path / "other", console=QUIET)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["use_cache"] is False


def test_resuming_passes_over_a_damaged_checkpoint_and_a_cut_off_record(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=6, batch_size=4, save_every=2)
    _, whole = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    (tmp_path / "run" / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    _, again = train(config_for(corpus), corpus, opts, tmp_path / "run", resume=True, console=QUIET)
    assert again.evaluation == whole.evaluation


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


def test_the_fast_step_takes_a_model_that_was_trained_with_checkpointing_in_bf16(
    corpus: Corpus, tmp_path: Path
) -> None:
    opts = TrainOptions(max_steps=1, batch_size=4, precision="bf16", gradient_checkpointing=True)
    model, _ = train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    require_known_layers(model)


@pytest.mark.slow
def test_one_process_can_train_many_compiled_models(corpus: Corpus, tmp_path: Path) -> None:
    torch.compiler.reset()
    for width in (16, 24):
        config = config_for(corpus, hidden_size=width, num_hidden_layers=2)
        opts = TrainOptions(max_steps=1, batch_size=4, compile=True)
        with torch._dynamo.config.patch(recompile_limit=2):
            assert train(config, corpus, opts, tmp_path / str(width), console=QUIET)[1].finished


def sharded(tmp_path: Path, *weights: float, **changes: Any) -> Corpus:
    """Text of two sources, in shards, with weights or as one."""
    for name, numbers in (("a", range(40)), ("b", range(100, 120))):
        (tmp_path / name).mkdir()
        write_numbers(tmp_path / name, numbers)
    ends = [f":{weight}" for weight in weights] or ["", ""]
    data = [f"{tmp_path}/{name}{end}" for name, end in zip("ab", ends, strict=True)]
    return prepare(options(tmp_path, *data, **changes))


@pytest.mark.parametrize(
    ("weights", "packing", "accumulation"),
    [
        pytest.param((), "best_fit", 2, marks=pytest.mark.slow),
        pytest.param((0.3, 0.7), "cut", 1, marks=pytest.mark.slow),
        ((0.5, 0.5), "best_fit", 1),
    ],
)
def test_a_run_on_shards_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: tuple[float, ...], packing: str, accumulation: int
) -> None:
    corpus = sharded(tmp_path, *weights, packing=packing)
    config = config_for(corpus)
    opts = TrainOptions(max_steps=9, batch_size=4, gradient_accumulation_steps=accumulation, eval_every=4)
    _, whole = train(config, corpus, opts, tmp_path / "whole", console=QUIET)
    original = run_module.StopOnSignal
    monkeypatch.setattr(run_module, "StopOnSignal", lambda: _with(original(), Stop(6, signal.SIGTERM)))
    train(config, corpus, opts, tmp_path / "parts", console=QUIET)
    monkeypatch.setattr(run_module, "StopOnSignal", original)
    torch.manual_seed(999)
    _, resumed = train(config, corpus, opts, tmp_path / "parts", resume=True, console=QUIET)
    assert resumed.evaluation == whole.evaluation
    assert resumed.evaluation_by_source == whole.evaluation_by_source
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_every_source_has_its_own_line_in_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = sharded(tmp_path, 0.3, 0.7)
    _, result = train(config_for(corpus), corpus, OPTIONS, tmp_path / "run", console=Console(width=300))
    names = [f"{tmp_path}/{name}" for name in "ab"]
    assert list(result.evaluation_by_source) == names
    assert result.evaluation_by_source[names[0]] != result.evaluation_by_source[names[1]]
    (evaluation, *_) = [record for record in records(tmp_path / "run") if "eval_loss" in record]
    each, shares = result.evaluation_by_source.values(), (0.3, 0.7)
    loss = sum(share * one.loss_causal for share, one in zip(shares, each, strict=True))
    size = sum(share * source.bytes_per_token for share, source in zip(shares, corpus.sources, strict=True))
    assert result.evaluation is not None
    assert result.evaluation.loss_causal == pytest.approx(loss)
    assert result.evaluation.bits_per_byte == pytest.approx(loss / math.log(2) / size)
    of_run = [evaluation[f"eval_loss_causal/{name}"] for name in names]
    assert evaluation["eval_loss"] == pytest.approx(0.3 * of_run[0] + 0.7 * of_run[1])
    said = capsys.readouterr().out
    for name in names:
        assert evaluation[f"eval_loss_causal/{name}"] > 0
        assert f"{name}: {evaluation[f'eval_loss_causal/{name}']:.4f} causal" in said
    described = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(described["evaluation_by_source"]) == names


def test_the_order_of_shards_is_that_of_the_run_and_no_list_of_its_sequences(tmp_path: Path) -> None:
    corpus = sharded(tmp_path, 0.3, 0.7)
    order = in_order(corpus, TrainOptions(max_steps=1000, batch_size=4), 1000)
    assert len(order) == 4000
    again = in_order(corpus, TrainOptions(max_steps=1000, batch_size=4), 1000)
    assert [order[place]["sequence"] for place in range(3900, 4000)] == [
        again[place]["sequence"] for place in range(3900, 4000)
    ]


def batches_of(corpus: Corpus, folder: Path, **options: int) -> tuple[list[list[int]], float]:
    """The numbers of the sequences of every batch of a run, and its first loss."""
    batches: list[list[int]] = []

    class Noting(MoDTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples = super().get_batch_samples(*args, **kwargs)
            batches.extend(part.tolist() for part in self._sequences)
            return samples

    training = TrainOptions(batch_size=4, eval_sequences=1, **options)
    config = config_for(corpus)
    torch.manual_seed(training.seed)
    tuning = Tuning(MoDForCausalLM(config), {}, trainer=Noting)
    train(config, corpus, training, folder, console=QUIET, tuning=tuning)
    return batches, records(folder)[0]["loss"]


def test_the_next_seed_does_not_see_the_order_of_this_one_s_next_epoch(corpus: Corpus, tmp_path: Path) -> None:
    assert isinstance(corpus.train, datasets.Dataset)
    small = replace(corpus, train=corpus.train.select(range(16)))
    this, after = (batches_of(small, tmp_path / str(seed), seed=seed, max_steps=8)[0] for seed in (0, 1))
    for epoch in (this[:4], this[4:], after[:4]):
        assert sorted(number for batch in epoch for number in batch) == list(range(16))
    assert this[4:] != after[:4]


def test_runs_of_one_data_seed_see_the_same_text_from_other_weights(corpus: Corpus, tmp_path: Path) -> None:
    first, again, other = (
        batches_of(corpus, tmp_path / name, max_steps=3, **seeds)
        for name, seeds in (("0-0", {"seed": 0}), ("1-0", {"seed": 1, "data_seed": 0}), ("1-1", {"seed": 1}))
    )
    assert first[0] == again[0] != other[0]
    assert first[1] != again[1]
    places = range(8)
    shards = sharded(tmp_path, 0.3, 0.7)
    orders = [
        in_order(shards, TrainOptions(max_steps=2, batch_size=4, **seeds), 2)
        for seeds in ({"seed": 0}, {"seed": 1, "data_seed": 0}, {"seed": 1})
    ]
    numbers = [[order[place]["sequence"] for place in places] for order in orders]
    assert numbers[0] == numbers[1] != numbers[2]


def test_a_run_by_the_threshold_compiles_the_dense_blocks_alone(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(DecoderLayer, "compile", lambda layer, **_: compiled.append(layer.layer_idx))
    config = config_for(corpus, causal_router="threshold", training_routing="threshold")
    opts = TrainOptions(max_steps=3, batch_size=4, eval_sequences=1, compile=True)
    _, result = train(config, corpus, opts, tmp_path / "run", console=QUIET)
    assert compiled == [layer for layer in range(config.num_hidden_layers) if config.routed_part(layer) is None]
    assert result.finished
    assert MoDForCausalLM.from_pretrained(tmp_path / "run").config.training_routing == "threshold"


def test_checkpointing_a_run_by_the_threshold_is_refused_before_its_folder_is_made(
    corpus: Corpus, tmp_path: Path
) -> None:
    config = config_for(corpus, causal_router="threshold", training_routing="threshold")
    opts = TrainOptions(max_steps=3, batch_size=4, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing=True needs training_routing='top_k'"):
        train(config, corpus, opts, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
