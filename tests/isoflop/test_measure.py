"""What is measured on the trained models of a study."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from runs import CPU
from studies import study_file

from mixture_of_depths import MoDConfig, MoDForCausalLM, TrainOptions
from mixture_of_depths.files import read_records
from mixture_of_depths.isoflop.measure import gain_from_later_tokens, measure, seconds_per_step
from mixture_of_depths.isoflop.plan import load_study, plan
from mixture_of_depths.isoflop.run import RECORDS, run_here
from mixture_of_depths.options import OptimizerName
from mixture_of_depths.text.corpus import Corpus, prepare
from mixture_of_depths.training.muon import Muon

END_OF_TEXT = 0


def model(**changes: object) -> MoDForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = MoDConfig(**{**shape, "num_hidden_layers": 2, "capacity": 0.25, **changes})  # type: ignore[arg-type]
    found = MoDForCausalLM(config).double().eval()
    for weight in found.parameters():
        weight.data.mul_(8)
    return found


def sequences(count: int = 5, length: int = 24) -> datasets.Dataset:
    tokens = torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist()})


def finished_study(folder: Path) -> tuple[Corpus, Path, list[dict[str, Any]]]:
    study = load_study(study_file(folder))
    corpus, out = prepare(study.data), folder / "out"
    run_here(plan(study, corpus), corpus, out, Console(quiet=True), CPU)
    return corpus, out, read_records(out / RECORDS)


def test_only_routing_that_looks_ahead_depends_on_later_tokens() -> None:
    assert abs(gain_from_later_tokens(model(), sequences(), END_OF_TEXT, "top_k", stride=5)) > 1e-4
    assert gain_from_later_tokens(model(), sequences(), END_OF_TEXT, "causal", stride=5) == pytest.approx(0, abs=1e-12)
    dense = model(routed_layers=[], capacity=1.0)
    assert gain_from_later_tokens(dense, sequences(), END_OF_TEXT, "top_k", stride=5) == pytest.approx(0, abs=1e-12)


def test_the_gain_is_that_of_cutting_every_block_by_hand() -> None:
    routed, given, stride = model(), sequences(count=2, length=12), 4
    tokens = torch.tensor(given["input_ids"])
    own = cut = 0.0
    for row in range(2):
        for end in (4, 8):
            for target in range(end - stride + 1, end + 1):
                mixed = torch.cat([tokens[row, :end], tokens[1 - row, end:]])
                for is_own, source in ((True, tokens[row]), (False, mixed)):
                    logits = routed(source[None], routing="top_k", use_cache=False).logits[0, target - 1]
                    loss = -logits.log_softmax(-1)[tokens[row, target]].item()
                    own, cut = own + loss * is_own, cut + loss * (not is_own)
    assert gain_from_later_tokens(routed, given, END_OF_TEXT, stride=stride) == pytest.approx(cut / own - 1, rel=1e-6)


def test_a_study_without_its_models_cannot_be_measured(tmp_path: Path) -> None:
    corpus, out, records = finished_study(tmp_path)
    (out / "runs" / "mod-3e07-depth2-seed0" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no trained model of mod-3e07-depth2-seed0"):
        next(measure(records, "baseline", "mod", corpus, out, {}, CPU))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_step_that_is_timed_is_that_of_the_runs(optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped = set[int]()
    monkeypatch.setattr(Muon, "_step", lambda _, weight, *rest: stepped.add(weight.numel()))
    batch = {"input_ids": torch.randint(1, 50, (2, 24))}
    batch["labels"] = batch["input_ids"]
    options = TrainOptions(max_steps=1, optimizer=optimizer)
    seconds = seconds_per_step({"mod": model().float()}, batch, options, repeats=1)
    assert seconds["mod"] > 0
    # The matrices of attention and of the MLP.
    assert stepped == ({16 * 16, 16 * 32} if optimizer == "muon" else set())


@pytest.mark.slow
def test_the_models_of_a_study_are_measured(tmp_path: Path) -> None:
    corpus, out, records = finished_study(tmp_path)
    # So that one of them is as good as the baseline.
    for record in records:
        record["evaluation"]["loss_causal"] += record["family"] == "baseline"
    ((budget, found),) = measure(records, "baseline", "mod", corpus, out, {}, CPU)
    assert budget == "3e07"
    assert list(measure(records, "baseline", "mod", corpus, out, {budget: found}, CPU)) == []
    assert found["models"]["equal"] == "mod-3e07-depth2-seed0"
    steps = {record["family"]: record["steps"] for record in records}
    whole = {side: seconds * steps[side] for side, seconds in found["seconds_per_step"].items()}
    assert found["train_wall_ratio"] == pytest.approx(whole["mod"] / whole["baseline"])
    for suffix in ("", "_bf16"):
        speeds = found[f"tokens_per_second{suffix}"]
        assert found[f"sampling_speedup{suffix}"] == pytest.approx(speeds["mod"] / speeds["baseline"])
    assert 0 < abs(found["gain_from_later_tokens"]) < 0.1
