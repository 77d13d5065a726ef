"""A training run, from its options to the finished model in its folder."""

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import datasets
import numpy as np
import torch
import transformers
from packaging.version import Version
from rich.console import Console
from torch import nn
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers import TrainingArguments as HFTrainingArguments

from mixture_of_depths.compiler import require_compiler
from mixture_of_depths.device import chosen_device
from mixture_of_depths.distributed import failing_together, from_main, is_main, meet
from mixture_of_depths.evaluation.calibration import calibrate
from mixture_of_depths.evaluation.loss import Evaluation
from mixture_of_depths.evaluation.text import held_out_of, without_calibrating
from mixture_of_depths.files import make_folder, write_aside
from mixture_of_depths.inspect.curves import training_curve
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.flops import model_parameters
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.text.batches import halves
from mixture_of_depths.text.corpus import Corpus, Source
from mixture_of_depths.text.order import Order
from mixture_of_depths.text.tokenizer import save_tokenizer
from mixture_of_depths.training.callbacks import Board, Recorder, StopOnSignal
from mixture_of_depths.training.checkpoint import load_weights, set_own_seed, whole_weights
from mixture_of_depths.training.folder import check_folder, only_run, open_folder
from mixture_of_depths.training.horizon import Horizon, horizon
from mixture_of_depths.training.settings import check_memory, check_options, trainer_arguments
from mixture_of_depths.training.trainer import MoDTrainer, NumberedCollator, evaluate_held_out


@dataclass(frozen=True)
class Tuning:
    """A run that goes on from a pretrained model, in the place of new weights.

    Attributes:
        model: the start; it is trained in place.
        facts: what defines the run beside model, text and options: kept in `run.json` as "tuning", and compared when
            the run is resumed.
        trainer: the trainer's class.
        callbacks: further callbacks.
        finish: turns the trained model into the one that is calibrated, saved and evaluated.
        prepared: the names of what the caller, who holds the folder by `only_run`, has left in it; None where `train`
            is to hold it.
    """

    model: MoDForCausalLM
    facts: dict[str, Any]
    trainer: Callable[..., MoDTrainer] = MoDTrainer
    callbacks: tuple[TrainerCallback, ...] = ()
    finish: Callable[[MoDForCausalLM], MoDForCausalLM] = lambda model: model
    prepared: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: False when it was stopped before its horizon; it can be resumed.
        steps, tokens, flops: what was done, in all; the FLOPs of a retrofit at its final capacity, without the teacher.
        parameters: number of weights.
        train_seconds: time spent in training steps, without evaluation and checkpoints; compiling counts.
        calibrated: whether half of the held-out text set the causal routers or the experts.
        evaluation: figures on the held-out text, when finished; on the half that calibrates no model, or with
            `calibrate=False`, or of a single sequence, on all of it; of several sources the mean by their shares.
        evaluation_by_source: as `evaluation`, of each of several sources by its name.
    """

    finished: bool
    steps: int
    tokens: int
    flops: float
    parameters: int
    train_seconds: float
    calibrated: bool
    evaluation: Evaluation | None
    evaluation_by_source: dict[str, Evaluation] = field(default_factory=dict)


def split_held_out(corpus: Corpus, options: TrainOptions) -> tuple[datasets.Dataset | None, tuple[Source, ...]]:
    """What calibrates, None for nothing, and what evaluates: the same for every model, so that they compare."""
    sources = held_out_of(corpus)
    if not options.calibrate or len(corpus.validation) < 2:
        return None, sources
    return halves(corpus.validation)[0], without_calibrating(sources)


def train(
    config: MoDConfig,
    corpus: Corpus,
    options: TrainOptions,
    folder: Path,
    resume: bool = False,
    console: Console | None = None,
    tuning: Tuning | None = None,
    device: str | torch.device = "auto",
) -> tuple[MoDForCausalLM, TrainResult]:
    """Trains a model to its horizon and leaves model, tokenizer, records and curve in `folder`.

    Args:
        config: the model.
        corpus: text to train and evaluate on.
        options: how to train.
        folder: where the run lives: the finished model, `checkpoint-*`, `metrics.jsonl`, `run.json`, `curve.png`.
        resume: whether to go on from the newest whole checkpoint in `folder`; a finished run is only evaluated again.
        console: where progress is shown.
        tuning: what to start from, by default new weights; `config` is then its model's.
        device: what computes: "auto", a CUDA GPU where there is one; "cpu", "cuda", "cuda:N" or "mps". A run may go on
            on another.

    Raises:
        ValueError: for options that contradict one another, or a folder that holds another run or none to resume,
            or a device that is not there.
        DivergenceError: for a loss or gradient that is no number.

    Several processes, as `torchrun` or `accelerate launch` starts them, all call this with the same arguments and share
    a run, whose `folder` they must all see; the first writes. The returned model may be spread over them.
    """
    place = chosen_device(device)
    meet(place)
    console = console if console and is_main() else Console(quiet=not is_main())
    sequence_length = len(corpus.train[0]["input_ids"])
    length = horizon(options, config, sequence_length)
    check_options(options, corpus)
    check_memory(config, place)
    if options.gradient_checkpointing and config.training_routing == "threshold":
        raise ValueError(
            "gradient_checkpointing=True needs training_routing='top_k', not 'threshold', since blocks would run again "
            "after their thresholds have moved; change one of them"
        )
    if options.compile:
        require_compiler("compile", place)
    arguments = trainer_arguments(options, config, length, folder, place)
    with ExitStack() as held:

        def begin() -> tuple[Path, int] | None:
            prepared = tuning.prepared if tuning else None
            check_folder(folder, resume, prepared or ())
            make_folder(folder, "out")
            if prepared is None:
                held.enter_context(only_run(folder))
            facts = tuning.facts if tuning else {}
            return open_folder(folder, config, corpus, options, resume, facts, place, prepared or ())

        start = from_main(begin)
        if resume and start is None:
            console.print("no whole checkpoint yet; starting from the beginning")
        return _train(config, corpus, options, arguments, length, folder, start, console, tuning)


def _train(
    config: MoDConfig,
    corpus: Corpus,
    options: TrainOptions,
    arguments: HFTrainingArguments,
    length: Horizon,
    folder: Path,
    start: tuple[Path, int] | None,
    console: Console,
    tuning: Tuning | None,
) -> tuple[MoDForCausalLM, TrainResult]:
    """Trains from a checkpoint, or from the beginning, and evaluates; see `train`."""
    sequence_length = len(corpus.train[0]["input_ids"])
    set_seed(options.seed)
    tuning = tuning or Tuning(MoDForCausalLM(copy.deepcopy(config)), {})
    model = tuning.model
    tokens_per_step = options.batch_size * sequence_length
    recorder = Recorder(folder, length.flops / length.tokens, tokens_per_step, console)
    steps = start[1] if start else 0
    with failing_together():
        if is_main():
            recorder.recall(steps)
    if start and steps >= length.steps:
        # The trainer would take one step before it looks at the horizon.
        load_weights(model, start[0])
        nn.Module.to(model, arguments.device)
    else:
        steps = _run(tuning, corpus, options, arguments, recorder, start[0] if start else None)

    finished = steps >= length.steps
    calibrated, evaluation = False, None
    by_source: dict[str, Evaluation] = {}
    if finished:
        model = tuning.finish(model)
        calibration, others = split_held_out(corpus, options)
        if options.calibrate and (model.config.causal_routers or model.config.expert_capacity is not None):
            calibrated = calibration is not None
            if calibration is None:
                console.print("the held-out text is one sequence, which cannot be halved: the model is not calibrated")
            else:
                # Of several processes each does the same, from the same weights and on the same text.
                with torch.autocast(model.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                    calibrate(model, calibration, corpus.end_of_text)
        weights = whole_weights(model)
        with failing_together():
            if is_main():
                model.save_pretrained(folder, state_dict=weights)
                save_tokenizer(corpus.tokenizer, folder)
                training_curve({"loss": folder / "metrics.jsonl"}, folder / "curve.png")
        evaluation, each = evaluate_held_out(model, others, corpus, options)
        by_source = {source.name: of_source for source, of_source in zip(corpus.sources, each, strict=False)}
        _say_what_enters(evaluation, model.config, calibrated, console)
    result = TrainResult(
        finished=finished,
        steps=steps,
        tokens=steps * tokens_per_step,
        flops=steps * length.flops / length.steps,
        parameters=model_parameters(config),
        train_seconds=recorder.train_seconds,
        calibrated=calibrated,
        evaluation=evaluation,
        evaluation_by_source=by_source,
    )
    with failing_together():
        if finished and is_main():
            record = json.dumps({**asdict(result), **provenance(arguments.device)}, indent=2, allow_nan=False)
            write_aside(folder / "result.json", record)
    return model, result


def _say_what_enters(evaluation: Evaluation, config: MoDConfig, calibrated: bool, console: Console) -> None:
    if not config.causal_routers:
        return
    entering = fmean(evaluation.causal_routers[config.causal_router].share_entering.values())
    capacity = fmean(config.capacity_fraction(layer_idx) for layer_idx in config.routed_layers or [])
    console.print(f"{100 * entering:.1f} % of the tokens enter the routed blocks (capacity {100 * capacity:.1f} %)")
    if calibrated and config.causal_router == "auxiliary_loss":
        console.print(
            "the auxiliary loss leaves no constant to calibrate: the threshold was, and `mod calibrate` lets it decide"
        )


def compile_blocks(model: MoDForCausalLM) -> None:
    """Compiles the blocks for training, each by itself, but those whose shapes depend on the data."""
    for layer_idx, layer in enumerate(model.model.layers):
        # How many tokens enter by a threshold is known at run time only.
        if model.config.training_routing == "top_k" or model.config.routed_part(layer_idx) is None:
            layer.compile(fullgraph=True, dynamic=False)


def in_order(corpus: Corpus, options: TrainOptions, steps: int) -> datasets.Dataset | Order:
    """A run's sequences with their numbers: in an order of their own, or for the library to shuffle."""
    if isinstance(corpus.train, datasets.Dataset):
        # Whole batches only: every step then costs the same, and the horizon is exact.
        whole = np.arange(len(corpus.train) // options.batch_size * options.batch_size)
        return corpus.train.select(range(len(whole))).add_column("sequence", cast(Any, whole))
    return Order(corpus.train, corpus.weights, options.order_seed, steps * options.batch_size)


def _run(
    tuning: Tuning,
    corpus: Corpus,
    options: TrainOptions,
    arguments: HFTrainingArguments,
    recorder: Recorder,
    start: Path | None,
) -> int:
    """Trains to the horizon, or until a signal; returns the steps done in all."""
    model = tuning.model
    if options.gradient_checkpointing:
        # transformers before 5.23 has the former name only, and those after it warn of that one.
        if Version(transformers.__version__) < Version("5.23"):
            model.gradient_checkpointing_enable()
        else:
            model.activation_checkpointing_enable()
    if options.compile:
        # The graphs of models trained before in this process count against the number the compiler keeps.
        torch.compiler.reset()
        compile_blocks(model)
    with StopOnSignal() as stop, recorder:
        trainer = tuning.trainer(
            corpus,
            options,
            model=model,
            args=arguments,
            train_dataset=cast(Any, in_order(corpus, options, arguments.max_steps)),
            eval_dataset=corpus.validation,
            data_collator=NumberedCollator(corpus.end_of_text),
            # The recorder behind what draws and lowers: that is no part of a step's time.
            callbacks=[Board(corpus), *tuning.callbacks, recorder, stop],
        )
        trainer.remove_callback(PrinterCallback)
        set_own_seed(options.seed)
        with warnings.catch_warnings():
            # Nothing is changed in place, and what accelerate passes on is its own affair.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        trainer.average_thresholds()
    # Accelerate puts mixed precision into the model's own forward pass, where it would stay for all that follows.
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
    # So would the hook that checkpointing puts on the embedding.
    model.disable_input_require_grads()
    return trainer.state.global_step
