"""What one step trains, in which precision, and how a loss that is no number ends it."""

import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QUIET, config_for, records

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.checkpoint import latest_checkpoint
from mixture_of_depths.training.run import train
from mixture_of_depths.training.trainer import DivergenceError, MoDTrainer


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


def test_a_loss_that_is_no_number_stops_the_run_and_gives_signals_back(corpus: Corpus, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    opts = TrainOptions(max_steps=20, batch_size=4, learning_rate=1e30, save_every=1, eval_every=100)
    with pytest.raises(ValueError, match=r"(loss|grad_norm)=nan at step \d+ is no number"):
        train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    assert signal.getsignal(signal.SIGINT) == before
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
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
