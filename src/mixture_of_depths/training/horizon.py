"""The length of a run: exactly one of steps, tokens and training FLOPs, and what it is in the others."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mixture_of_depths.fields import validate_fields
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.flops import training_flops_per_token
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.training.muon import muon_flops

# The schedule of the learning rate counts in 32 bits.
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Horizon:
    """The exact length of a run."""

    steps: int
    tokens: int
    flops: float


def given_length(
    options: TrainOptions, names: Sequence[str] = ("max_steps", "max_tokens", "max_flops")
) -> tuple[str, float]:
    """The field that gives the length of a run, of those that may, and its value.

    Raises:
        ValueError: when not exactly one is given, or an option is out of its range.
    """
    lengths = {name: value for name in names if (value := getattr(options, name)) is not None}
    if len(lengths) != 1:
        raise ValueError(
            f"give exactly one of {', '.join(names[:-1])} and {names[-1]}; given: {', '.join(lengths) or 'none'} "
            f"({', '.join('--' + name.replace('_', '-') for name in names)})"
        )
    validate_fields(options)
    return next(iter(lengths.items()))


def horizon(options: TrainOptions, config: MoDConfig, sequence_length: int) -> Horizon:
    """The length of a run in steps, tokens and training FLOPs, from the one of them that the options give.

    Raises:
        ValueError: when not exactly one is given, or it is shorter than one step.
    """
    name, value = given_length(options)
    tokens_per_step = options.batch_size * sequence_length
    flops_per_step = training_flops_per_token(config, sequence_length) * tokens_per_step
    if options.optimizer == "muon":
        flops_per_step += muon_flops(config)
    per_step = {"max_steps": 1, "max_tokens": tokens_per_step, "max_flops": flops_per_step}[name]
    steps = math.floor(value / per_step)
    if steps > MOST_STEPS:
        raise ValueError(f"{name}={value:g} is {steps:g} steps; lower it to at most {MOST_STEPS:,}")
    if steps < 1:
        raise ValueError(f"{name}={value:g} is less than one step, which takes {per_step:g}; raise it")
    return Horizon(steps, steps * tokens_per_step, steps * flops_per_step)
