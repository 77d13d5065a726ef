"""What a study consists of: every run, with its size, length and cost, from one YAML file.

A run is one model of a family, of one size, trained to one budget from one seed. One dial gives the size: a model of
`depth` blocks is `width_per_block * depth + width_offset` wide, with heads of `head_dim`.
"""

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from annotated_types import Gt, Len
from pydantic import TypeAdapter, ValidationError
from scipy.stats import t as student_t

from mixture_of_depths.device import wait_for
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.flops import forward_flops_per_token, model_parameters
from mixture_of_depths.options import DataOptions, ModelOptions, NotNegative, Positive, TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.folder import MAY_CHANGE
from mixture_of_depths.training.horizon import Horizon, horizon
from mixture_of_depths.training.settings import check_options, model_config

# What the study itself sets.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
HORIZON_FIELDS = ("max_steps", "max_tokens", "max_flops", "seed", "learning_rate")
# The same in every study: models are compared as they were trained, on all of the held-out text.
FIXED_FIELDS = ("calibrate",)


@dataclass(frozen=True)
class Ladder:
    """How a depth becomes a size."""

    width_per_block: Positive = 16
    width_offset: int = 32
    head_dim: Positive = 32
    """Width of a head; a model is as wide as its whole heads."""
    initializer_scale: Annotated[float, Gt(0)] | None = None
    """Standard deviation of the initial weights times the root of the width; by default the model's own deviation."""

    def size(self, depth: int) -> dict[str, Any]:
        """The fields of `ModelOptions` for a model of `depth` blocks.

        Raises:
            ValueError: when not one head fits into the width.
        """
        heads = (self.width_per_block * depth + self.width_offset) // self.head_dim
        if depth < 1 or heads < 1:
            raise ValueError(
                f"depth={depth} makes models too narrow for a head of head_dim={self.head_dim}; change the depth, or "
                "ladder"
            )
        width = heads * self.head_dim
        size = {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": heads}
        if self.initializer_scale is None:
            return size
        return {**size, "initializer_range": self.initializer_scale / width**0.5}


@dataclass(frozen=True)
class Sweep:
    """Runs to make: every budget, with every depth, family and seed."""

    budgets: tuple[float, ...]
    """Training FLOPs."""
    families: tuple[str, ...]
    """Names of families."""
    depths: tuple[int, ...]
    """Sizes, by number of blocks."""
    seeds: Annotated[tuple[NotNegative, ...], Len(1)] = (0,)
    """Seeds of initialisation and data order."""
    batch_size: Positive | None = None
    """Sequences per step, as larger budgets allow; by default that of `training`."""


@dataclass(frozen=True)
class Study:
    """A study file."""

    families: dict[str, dict[str, Any]]
    """Changes of `ModelOptions` by the name of the family; sizes come from the ladder."""
    learning_rates: dict[str, Annotated[float, Gt(0)]]
    """Peak learning rate of each family at `learning_rate_width`; at other widths times the root of their ratio."""
    sweeps: Annotated[tuple[Sweep, ...], Len(1)]
    """The runs."""
    baseline: str = "baseline"
    """The family the others are compared with."""
    learning_rate_width: Positive = 128
    """Width at which `learning_rates` hold."""
    seed_deviation: Annotated[float, Gt(0)] | None = None
    """Standard deviation of the loss between seeds, over the loss, from earlier runs; `plan` then says how many seeds
    tell two families apart."""
    ladder: Ladder = field(default_factory=Ladder)
    """How a depth becomes a size."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes of `ModelOptions` that all families share; their own go before."""
    data: DataOptions = field(default_factory=DataOptions)
    """Text and tokens."""
    training: TrainOptions = field(default_factory=TrainOptions)
    """How every run is trained; its length, seed and learning rate come from the study."""

    def changes(self, family: str) -> dict[str, Any]:
        """What a family changes of `ModelOptions`, but for the size."""
        return {**self.model, **self.families[family]}


def budget_name(budget: float) -> str:
    """Training FLOPs as a key, such as 1e13."""
    return f"{budget:g}".replace("+", "")


@dataclass(frozen=True)
class Run:
    """One training."""

    family: str
    depth: int
    budget: float
    seed: int
    model: ModelOptions
    training: TrainOptions

    @property
    def name(self) -> str:
        """The run's name, which tells it from all others of its study."""
        return f"{self.family}-{budget_name(self.budget)}-depth{self.depth}-seed{self.seed}"


@dataclass(frozen=True)
class PlannedRun:
    """A run, its model and its cost.

    Attributes:
        run: the training.
        config: its model.
        length: its steps, tokens and training FLOPs.
        parameters: number of weights.
        flops_per_token: forward FLOPs per token.
        definition: a digest of all that decides the result: model, training and text.
    """

    run: Run
    config: MoDConfig
    length: Horizon
    parameters: int
    flops_per_token: float
    definition: str


def load_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        ValueError: naming the field, for one that is unknown, missing, of a wrong type or contradicts another.
    """
    try:
        raw_study = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"study={path} is no YAML: {error}") from error
    _known(raw_study, Study, str(path))
    for name, kind in (("ladder", Ladder), ("data", DataOptions), ("training", TrainOptions)):
        _known(raw_study.get(name, {}), kind, f"{path}: {name}")
    for names, reason in ((FIXED_FIELDS, "is the same in every study"), (HORIZON_FIELDS, "comes from the study")):
        for name in names:
            if name in raw_study.get("training", {}):
                raise ValueError(f"study={path}: training: {name} {reason}; leave it out")
    sweeps = raw_study.get("sweeps")
    for number, sweep in enumerate(sweeps if isinstance(sweeps, list) else []):
        _known(sweep, Sweep, f"{path}: sweeps[{number}]")
    try:
        study = TypeAdapter(Study).validate_python(raw_study)
        for place, changes in _model_changes(study):
            _known(changes, ModelOptions, f"{path}: {place}")
            TypeAdapter(ModelOptions).validate_python(changes)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"study={path}: {place}={first['input']!r}: {first['msg']}") from error
    _check(study, path)
    return study


def _known(mapping: Any, kind: type, place: str) -> None:
    if not isinstance(mapping, dict):
        raise ValueError(f"study={place}: {mapping!r} must be a mapping of fields")
    names = [part.name for part in fields(kind)]
    for name in mapping:
        if name not in names:
            raise ValueError(f"study={place}: {name} is no field; there are {', '.join(names)}")


def _model_changes(study: Study) -> list[tuple[str, dict[str, Any]]]:
    """Every place of a study file that changes `ModelOptions`, and the changes."""
    return [("model", study.model), *((f"families.{name}", changes) for name, changes in study.families.items())]


def _check(study: Study, path: Path) -> None:
    for place, changes in _model_changes(study):
        for part in (*SIZE_FIELDS, *(["initializer_range"] if study.ladder.initializer_scale is not None else [])):
            if part in changes:
                raise ValueError(f"study={path}: {place}: {part} comes from the ladder; leave it out")
    for name in study.families:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise ValueError(f"study={path}: families: {name!r} must be made of letters, digits, '.', '_' and '-'")
        if name not in study.learning_rates:
            raise ValueError(f"study={path}: learning_rates needs a rate above 0 for {name}")
    if study.baseline not in study.families:
        raise ValueError(f"study={path}: baseline={study.baseline} is none of the families {list(study.families)}")
    for sweep in study.sweeps:
        for name in sweep.families:
            if name not in study.families:
                raise ValueError(f"study={path}: sweeps: {name} is none of the families {list(study.families)}")
    for name in study.learning_rates:
        if name not in study.families:
            raise ValueError(
                f"study={path}: learning_rates: {name} is none of the families {list(study.families)}; leave it out"
            )


def runs(study: Study) -> list[Run]:
    """Every run of a study, once, cheapest budgets first."""
    runs_by_name: dict[str, Run] = {}
    for sweep in study.sweeps:
        trained = replace(study.training, batch_size=sweep.batch_size or study.training.batch_size)
        for budget in sweep.budgets:
            for family in sweep.families:
                for depth in sweep.depths:
                    for seed in sweep.seeds:
                        size = study.ladder.size(depth)
                        rate = study.learning_rates[family] * (study.learning_rate_width / size["hidden_size"]) ** 0.5
                        changes = TypeAdapter(ModelOptions).validate_python({**study.changes(family), **size})
                        training = replace(trained, max_flops=budget, seed=seed, learning_rate=rate, calibrate=False)
                        run = Run(family, depth, budget, seed, changes, training)
                        if runs_by_name.setdefault(run.name, run) != run:
                            raise ValueError(
                                f"two runs are called {run.name}: round budgets that differ too little, and give all "
                                "its sweeps one batch_size"
                            )
    return sorted(runs_by_name.values(), key=lambda run: (run.budget, run.seed, run.family, run.depth))


def seeds_to_resolve(deviation: float, difference: float = 0.005) -> int:
    """How many seeds a size of both families needs, so that a difference of their losses shows.

    It shows in four of five studies, at a two-sided level of 5 %, by the distribution of Student's t.

    Args:
        deviation: standard deviation of the loss between seeds, over the loss.
        difference: of the losses, over the loss.
    """
    seeds = 2
    while resolved_difference(deviation, seeds) > difference:
        seeds += 1
    return seeds


def resolved_difference(deviation: float, seeds: int) -> float:
    """The difference of two families' losses, over the loss, that shows with two seeds or more of a size.

    See `seeds_to_resolve`.
    """
    return float(sum(student_t.ppf([0.975, 0.8], 2 * (seeds - 1)))) * deviation * (2 / seeds) ** 0.5


def capacities(study: Study, mod: str) -> dict[str, float]:
    """The capacity of every family that differs from `mod` in nothing else, `mod` itself included."""

    def rest(name: str) -> dict[str, Any]:
        return {field: value for field, value in study.changes(name).items() if field != "capacity"}

    default = ModelOptions().capacity
    by_family = {
        name: study.changes(name).get("capacity", default) for name in study.families if rest(name) == rest(mod)
    }
    return {name: capacity[0] for name, capacity in by_family.items() if len(capacity) == 1}


def plan(study: Study, corpus: Corpus) -> list[PlannedRun]:
    """Every run of a study with its cost.

    Raises:
        ValueError: naming the run, when its model is impossible or its budget less than one step.
    """
    planned = []
    for run in runs(study):
        try:
            check_options(run.training, corpus)
            config = model_config(run.model, corpus.tokenizer, study.data.sequence_length)
            length = horizon(run.training, config, study.data.sequence_length)
        except ValueError as error:
            raise ValueError(f"run {run.name}: {error}") from error
        training = {name: value for name, value in _changes(run.training).items() if name not in MAY_CHANGE}
        described = {"model": _changes(run.model), "training": training, "text": corpus.key}
        planned.append(
            PlannedRun(
                run=run,
                config=config,
                length=length,
                parameters=model_parameters(config),
                flops_per_token=forward_flops_per_token(config, study.data.sequence_length),
                definition=hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16],
            )
        )
    return planned


def _changes(options: ModelOptions | TrainOptions) -> dict[str, Any]:
    """What differs from the defaults: an option that is added later leaves the runs that do not use it as they were."""
    default = type(options)()
    return {name: value for name, value in asdict(options).items() if value != getattr(default, name)}


def flops_per_second(device: torch.device) -> float:
    """What training on a device is likely to reach: half of its speed in a large float32 product.

    Small models spend much of a step outside of products; a rough guide for planning, not a measurement of training.
    """
    values = torch.randn(2048, 2048, device=device)
    torch.mm(values, values)
    wait_for(device)
    start = time.perf_counter()
    torch.mm(values, values)
    wait_for(device)
    return 2 * 2048**3 / (time.perf_counter() - start) / 2
