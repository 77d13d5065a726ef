"""What the optimiser is given: its settings, its groups of weights, and gradients that are clipped."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, QUIET, config_for
from transformers import TrainerCallback

from mixture_of_depths import Corpus, MoDForCausalLM, TrainOptions, Tuning, train
from mixture_of_depths.training.horizon import horizon
from mixture_of_depths.training.settings import trainer_arguments

OPTIONS = TrainOptions(max_steps=2, batch_size=4, learning_rate=1e-2, weight_decay=0.3, max_grad_norm=0.7)


class Seen(TrainerCallback):
    """Keeps the optimiser, and the norm of all gradients when it steps."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.names: dict[int, str] = {}
        self.norms: list[float] = []

    def on_train_begin(self, *args: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self.optimizer = optimizer
        self.names = {id(weight): name for name, weight in model.named_parameters()}

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        squares = [weight.grad.square().sum() for weight in model.parameters() if weight.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


@pytest.fixture
def seen(corpus: Corpus, tmp_path: Path) -> Seen:
    """What a run of two steps shows."""
    callback, config = Seen(), config_for(corpus)
    tuning = Tuning(MoDForCausalLM(config), {}, callbacks=(callback,))
    train(config, corpus, OPTIONS, tmp_path / "run", console=QUIET, tuning=tuning)
    return callback


def test_adamw_has_the_betas_the_decay_and_the_weights_it_is_meant_to_have(seen: Seen) -> None:
    decaying, others = seen.optimizer.param_groups
    assert isinstance(seen.optimizer.optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in seen.optimizer.param_groups} == {(0.9, 0.95)}
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {seen.names[id(weight)] for weight in decaying["params"]}
    assert all("router" not in name and "norm" not in name and not name.endswith("bias") for name in names)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"} <= names
    assert names | {seen.names[id(weight)] for weight in others["params"]} == set(seen.names.values())


def test_gradients_are_clipped_to_the_norm_asked_for(seen: Seen) -> None:
    # The first gradients of a new model are larger.
    assert seen.norms[0] == pytest.approx(0.7, rel=1e-4)


def test_the_library_s_arguments_are_those_of_the_options(corpus: Corpus, tmp_path: Path) -> None:
    options = replace(
        OPTIONS, max_steps=100, warmup_fraction=0.2, gradient_accumulation_steps=2, precision="bf16", seed=7
    )
    config = config_for(corpus)
    arguments = trainer_arguments(options, config, horizon(options, config, 16), tmp_path, CPU)
    settings = {
        "max_steps": 100,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 20,
        "weight_decay": 0.3,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.7,
        "bf16": True,
        "dataloader_drop_last": True,
        "logging_nan_inf_filter": False,
        "eval_steps": 20,
        "save_steps": 20,
        "save_total_limit": 2,
        "seed": 7,
        # Far from that of the next seed.
        "data_seed": 7_000_021,
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": False,
    }
    assert {name: getattr(arguments, name) for name in settings} == settings
    assert arguments.lr_scheduler_type == "cosine_with_min_lr"
    assert arguments.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
