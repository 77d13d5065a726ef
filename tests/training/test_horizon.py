"""A run is as long as its steps, tokens or FLOPs say."""

import math
from typing import Any

import pytest

from mixture_of_depths import MoDConfig
from mixture_of_depths.model.flops import training_flops_per_token
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.training.horizon import horizon


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
