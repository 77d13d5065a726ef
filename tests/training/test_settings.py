"""What the options become in the trainer, and those that it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import QUIET, config_for, records
from transformers import TrainingArguments

from mixture_of_depths import MoDConfig, model_parameters
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.horizon import Horizon
from mixture_of_depths.training.run import train
from mixture_of_depths.training.settings import check_memory, trainer_arguments


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


def test_the_learning_rate_warms_up_and_falls_to_a_tenth_over_the_horizon(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=40, batch_size=4, learning_rate=1e-3, warmup_fraction=0.1, eval_sequences=1)
    train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if "loss" in r]
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.02)


def test_a_model_whose_weights_do_not_fit_the_memory_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = MoDConfig()
    needed = 4 * model_parameters(config)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=needed))
    check_memory(config)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=needed - 1))
    with pytest.raises(ValueError, match=f"the weights alone take {needed / 1e9:.3g} GB"):
        check_memory(config)


def test_one_process_with_several_gpus_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length = Horizon(steps=2, tokens=2, flops=1.0)
    for count in (0, 1):
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _, count=count: count))
        assert trainer_arguments(TrainOptions(max_steps=2), MoDConfig(), length, tmp_path).max_steps == 2
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _: 2))
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        trainer_arguments(TrainOptions(max_steps=2), MoDConfig(), length, tmp_path)
