"""What the options become in the trainer, and those that it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpus import pretended_gpus
from runs import CPU, QUIET, config_for, records
from transformers import TrainingArguments

from mixture_of_depths import MoDConfig, ModelOptions, model_config, model_parameters
from mixture_of_depths.distributed import processes
from mixture_of_depths.model.attention import rotary_factors
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.horizon import Horizon
from mixture_of_depths.training.run import train
from mixture_of_depths.training.settings import check_memory, trainer_arguments

LENGTH = Horizon(steps=2, tokens=2, flops=1.0)


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("block", 0, False)),
        ({"routed_parts": ("mlp",), "bypass_rank": 4, "query_key_norm": True}, ("mlp", 4, True)),
        ({"routed_parts": ("block", "block_keep_keys", "mlp")}, (["block", "block_keep_keys", "mlp"], 0, False)),
    ],
)
def test_a_run_routes_the_parts_that_its_options_name(options: dict[str, Any], expected: Any, corpus: Corpus) -> None:
    config = model_config(ModelOptions(**options), corpus.tokenizer, 32)
    assert (config.routed_parts, config.bypass_rank, config.query_key_norm) == expected


@pytest.mark.parametrize(("options", "base"), [({}, 10_000), ({"rope_theta": 100}, 100)])
def test_a_run_rotates_by_the_base_that_its_options_name(options: dict[str, Any], base: float, corpus: Corpus) -> None:
    cos_BTh, _ = rotary_factors(
        model_config(ModelOptions(**options), corpus.tokenizer, 32), torch.tensor([[1]]), torch.float32
    )
    angles_h = base ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(cos_BTh[0, 0], torch.cat([angles_h, angles_h]).cos())


def test_a_base_of_rotations_is_positive(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="rope_theta=0"):
        model_config(ModelOptions(rope_theta=0), corpus.tokenizer, 32)


def test_a_run_is_trained_by_the_threshold_where_its_options_say_so(corpus: Corpus) -> None:
    options = ModelOptions(causal_router="threshold", training_routing="threshold")
    assert model_config(options, corpus.tokenizer, 32).training_routing == "threshold"
    with pytest.raises(ValueError, match="training_routing='threshold' needs causal_router='threshold'"):
        model_config(ModelOptions(training_routing="threshold"), corpus.tokenizer, 32)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth_over_the_horizon(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=40, batch_size=4, learning_rate=1e-3, warmup_fraction=0.1, eval_sequences=1)
    train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    rates = [r["learning_rate"] for r in records(tmp_path / "run") if "loss" in r]
    assert max(rates) == rates[4] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-4, rel=0.02)


@pytest.mark.parametrize(
    ("device", "place", "gpus"),
    [("cpu", "machine", 0), ("mps", "machine", 0), ("cuda:1", "GPU", 1), ("cuda", "2 GPUs", 2)],
)
def test_a_model_whose_weights_do_not_fit_the_memory_is_refused_with_both_sizes(
    monkeypatch: pytest.MonkeyPatch, device: str, place: str, gpus: int
) -> None:
    config = MoDConfig()
    needed = 4 * model_parameters(config)
    if gpus == 2:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setattr("mixture_of_depths.training.settings.processes", lambda: SimpleNamespace(num_processes=2))

    def memory(bytes_there: int) -> None:
        of_machine, of_gpu = (0, bytes_there // gpus) if gpus else (bytes_there, 0)
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=of_machine))
        # What is free, and what there is.
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda asked: (0, of_gpu if asked == torch.device(device) else 0)
        )

    memory(needed)
    check_memory(config, torch.device(device))
    memory(needed - 1)
    sizes = f"the weights alone take {needed / 1e9:.3g} GB, and the memory of the {place} is {(needed - 1) / 1e9:.3g};"
    with pytest.raises(ValueError, match=sizes):
        check_memory(config, torch.device(device))


def arguments_on(device: str, folder: Path) -> TrainingArguments:
    return trainer_arguments(TrainOptions(max_steps=2), MoDConfig(), LENGTH, folder, torch.device(device))


def test_the_trainer_stays_on_the_cpu_where_there_are_gpus(tmp_path: Path) -> None:
    with pretended_gpus(2):
        arguments = arguments_on("cpu", tmp_path)
        assert (arguments.device, arguments.n_gpu) == (CPU, 0)
        assert processes().device == CPU
        assert not arguments.dataloader_pin_memory


def test_the_trainer_takes_one_gpu_of_several_and_the_one_that_is_named(tmp_path: Path) -> None:
    with pretended_gpus(2) as taken:
        for name, device in (("cuda:1", "cuda:1"), ("cuda", "cuda:0")):
            arguments = arguments_on(name, tmp_path)
            assert (arguments.device, arguments.n_gpu) == (torch.device(device), 1)
            assert processes().device == torch.device(device)
            assert arguments.dataloader_pin_memory
            assert not arguments.use_cpu
    assert taken == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert arguments_on("cpu", tmp_path).device == CPU
