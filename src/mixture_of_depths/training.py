"""Training: a `transformers.Trainer` with a horizon, both routings in evaluation, records, and exact resumption."""

import copy
import json
import math
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import psutil
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, parse_flag_from_env
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers import TrainingArguments as HFTrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixture_of_depths import plots
from mixture_of_depths.checkpoint import (
    ASIDE,
    LOCK,
    SCHEDULE,
    drop_checkpoints,
    is_sharded,
    latest_checkpoint,
    load_generators,
    load_optimizer,
    load_weights,
    only_run,
    read_json,
    read_run,
    save_generators,
    save_optimizer,
    seal,
    sync_folder,
    whole_weights,
    write_aside,
)
from mixture_of_depths.configuration import MoDConfig
from mixture_of_depths.data import Collator, Corpus
from mixture_of_depths.distributed import (
    LONGEST_WAIT,
    anywhere,
    average_,
    failing_together,
    from_main,
    is_main,
    processes,
)
from mixture_of_depths.evaluation import Evaluation, evaluate
from mixture_of_depths.flops import model_parameters, training_flops_per_token
from mixture_of_depths.inspect.trace import Trace, trace_tokens
from mixture_of_depths.modeling import MoDForCausalLM
from mixture_of_depths.options import ModelOptions, TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.tokenizer import end_of_text

# The schedule of the learning rate counts in 32 bits.
MOST_STEPS = 2**31 - 1


class DivergenceError(ValueError):
    """A loss or a gradient is no number."""


@dataclass(frozen=True)
class Horizon:
    """The exact length of a run."""

    steps: int
    tokens: int
    flops: float


def horizon(options: TrainOptions, config: MoDConfig, sequence_length: int) -> Horizon:
    """The length of a run in steps, tokens and training FLOPs, from the one of them that the options give.

    Raises:
        ValueError: when not exactly one is given, or it is shorter than one step.
    """
    given = {
        name: value
        for name in ("max_steps", "max_tokens", "max_flops")
        if (value := getattr(options, name)) is not None
    }
    if len(given) != 1:
        raise ValueError(
            f"give exactly one of max_steps, max_tokens and max_flops; given: {', '.join(given) or 'none'}"
        )
    (name, value), *_ = given.items()
    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} must be at least 1")
    if not 0 < value < 1e30:
        raise ValueError(f"{name}={value} must be a number above 0 and below 1e30")
    tokens_per_step = options.batch_size * sequence_length
    flops_per_step = training_flops_per_token(config, sequence_length) * tokens_per_step
    per_step = {"max_steps": 1, "max_tokens": tokens_per_step, "max_flops": flops_per_step}[name]
    steps = math.floor(value / per_step)
    if steps > MOST_STEPS:
        raise ValueError(f"{name}={value:g} is {steps:g} steps; lower it to at most {MOST_STEPS:,}")
    if steps < 1:
        raise ValueError(f"{name}={value:g} is less than one step, which takes {per_step:g}; raise it")
    return Horizon(steps, steps * tokens_per_step, steps * flops_per_step)


def model_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> MoDConfig:
    """The configuration that the options describe, for a tokenizer and blocks of `sequence_length` tokens."""
    explicit = [name for name in ("routed_layers", "every", "offset") if getattr(options, name) is not None]
    if (not options.routed and explicit) or ("routed_layers" in explicit and len(explicit) > 1):
        names = " and ".join(explicit if options.routed else [*explicit, "no-routed"])
        raise ValueError(f"{names} contradict one another; give no-routed, or routed_layers, or every and offset")
    if not options.routed:
        routed: dict[str, Any] = {"routed_layers": []}
    elif options.routed_layers is not None:
        routed = {"routed_layers": list(options.routed_layers)}
    else:
        routed = {"every": options.every, "offset": options.offset}
    return MoDConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        tie_word_embeddings=options.tie_word_embeddings,
        initializer_range=options.initializer_range,
        max_position_embeddings=max(2048, sequence_length),
        capacity=options.capacity[0] if len(options.capacity) == 1 else list(options.capacity),
        router_type=options.router_type,
        router_activation=options.router_activation,
        causal_router=options.causal_router,
        predictor_hidden_size=options.predictor_hidden_size,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        expert_routing=options.expert_routing,
        expert_capacity=options.expert_capacity,
        num_noop_experts=options.num_noop_experts,
        noop_share=options.noop_share,
        load_balance_loss_weight=options.load_balance_loss_weight,
        expert_z_loss_weight=options.expert_z_loss_weight,
        eos_token_id=end_of_text(tokenizer),
        pad_token_id=cast(int | None, tokenizer.pad_token_id),
        **routed,
    )


class NumberedCollator(Collator):
    """Stacks blocks into a batch that names them, as `block`."""

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**super().__call__(blocks), "block": torch.tensor([block["block"] for block in blocks])}


class MoDTrainer(Trainer):
    """The library's trainer; its own are only the evaluation, the FLOP count and the form of its checkpoints.

    How several processes share the work is accelerate's: DDP, or FSDP2 when its configuration says so.

    Raises:
        ValueError: when that asks for the first version of FSDP, or for its loading from process 0.
    """

    def __init__(self, corpus: Corpus, options: TrainOptions, **kwargs: Any) -> None:
        self.corpus = corpus
        self.run_options = options
        # Where a checkpoint is being written, before it is renamed.
        self._aside: str | None = None
        # Which blocks of the training text the step under way is made on.
        self._blocks: list[int] = []
        super().__init__(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Has accelerate set itself up, with FSDP on CPUs, too, where it would quietly use DDP."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            plugin = FullyShardedDataParallelPlugin()
            if self.args.bf16:
                plugin.set_mixed_precision("bf16")
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        if not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version=1 is not supported; set it to 2, in the file or as FSDP_VERSION=2")
        if cast(FullyShardedDataParallelPlugin, state.fsdp_plugin).cpu_ram_efficient_loading:
            # accelerate takes every entry of the state for a sharded weight, and thresholds are buffers.
            raise ValueError("fsdp_cpu_ram_efficient_loading=true is not supported; set it to false")

    def average_thresholds(self) -> None:
        """Makes the routers' thresholds those of the whole batches.

        In training each process' thresholds follow its own share of every batch. They are running averages of means
        over rows, and nothing in training reads them: their mean is what one process would have, where experts' are
        concerned up to rows of which an expert took nothing.
        """
        model = cast(nn.Module, self.model)
        average_([buffer for name, buffer in model.named_buffers() if name.endswith("router.threshold")])

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The parts of the next step's batch, whose blocks are noted."""
        parts, count = super().get_batch_samples(*args, **kwargs)
        self._blocks = [int(block) for part in parts for block in part.pop("block")]
        return parts, count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates under top-k and causal routing; returns and logs the figures."""
        assert isinstance(self.model, MoDForCausalLM)
        self.average_thresholds()
        found = _evaluate(self.model, self.corpus, self.run_options, self.run_options.eval_blocks, every_router=False)
        metrics = {
            "eval_loss": found.loss_causal,
            "eval_loss_top_k": found.loss_top_k,
            "eval_loss_causal": found.loss_causal,
            "eval_bits_per_byte": found.bits_per_byte,
        }
        for causal in found.causal_routers.values():
            metrics["eval_causal_accuracy"] = causal.accuracy
            metrics |= {f"eval_share_entering_{layer}": share for layer, share in causal.share_entering.items()}
        experts, num_experts = found.experts.get("causal", {}), self.model.config.num_experts
        metrics |= {f"eval_expert_dropped_{layer}": seen.dropped for layer, seen in experts.items()}
        if self.model.config.num_noop_experts:
            metrics |= {f"eval_noop_share_{layer}": sum(seen.share[num_experts:]) for layer, seen in experts.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch, counted analytically."""
        assert isinstance(self.model, MoDForCausalLM)
        tokens, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[1]
        return round(training_flops_per_token(self.model.config, length) * tokens)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices of the language model; routers, predictors, norms and biases do not decay."""
        return [name for name, weight in model.named_parameters() if weight.ndim >= 2 and ".router." not in name]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands the figures to the callbacks; one that cannot write them ends all processes.

        Raises:
            DivergenceError: for a loss or gradient that is no number, naming the step and the batch of all processes.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                blocks = gather_object(self._blocks)
                raise DivergenceError(
                    f"{name}={logs[name]} at step {self.state.global_step} is no number; its batch was blocks "
                    f"{', '.join(map(str, blocks))} of the training text, in epoch {self.state.epoch:.2f}. The "
                    "checkpoints up to here are kept. Lower learning_rate or max_grad_norm and start again in another "
                    "folder"
                )
        with failing_together():
            super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.average_thresholds()
        with failing_together():
            if is_main():
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
                (folder / ASIDE / name).mkdir(parents=True)
        self._aside = str(folder / ASIDE)
        try:
            with failing_together():
                super()._save_checkpoint(model, trial)
                if is_main():
                    seal(folder / ASIDE / name)
        except SafetensorError as error:
            raise OSError(f"checkpoint in {folder} cannot be written: {error}") from error
        finally:
            self._aside = None
        with failing_together():
            if is_main():
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / ASIDE / name).rename(folder / name)
                sync_folder(folder)
                shutil.rmtree(folder / ASIDE)
                assert self.args.save_total_limit is not None
                drop_checkpoints(folder, self.state.global_step, self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and tokenizer; of a sharded model only what is not sharded."""
        folder = output_dir or self.args.output_dir
        assert isinstance(self.model, MoDForCausalLM) and folder is not None
        with failing_together():
            if is_main():
                save = self.model.config if is_sharded(self.model) else self.model
                save.save_pretrained(folder)
                self.corpus.tokenizer.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert isinstance(self.model, MoDForCausalLM)
        save_optimizer(cast(Optimizer, self.optimizer), self.model, Path(output_dir))
        if is_main():
            schedule = cast(LRScheduler, self.lr_scheduler)
            (Path(output_dir) / SCHEDULE).write_text(json.dumps(schedule.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, MoDForCausalLM)
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(cast(Optimizer, self.optimizer), Path(checkpoint))
        cast(LRScheduler, self.lr_scheduler).load_state_dict(read_json(Path(checkpoint) / SCHEDULE))

    def _save_rng_state(self, output_dir: str) -> None:
        # All processes draw the same numbers.
        if is_main():
            save_generators(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_generators(Path(checkpoint))


class Recorder(TrainerCallback):
    """Writes `metrics.jsonl`, one line a logged step, and shows a progress bar with the time left.

    Of several processes the first writes.
    """

    def __init__(self, folder: Path, flops_per_token: float, tokens_per_step: int, console: Console) -> None:
        self.path = folder / "metrics.jsonl"
        self.flops_per_token = flops_per_token
        self.tokens_per_step = tokens_per_step
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
        )
        self.task: TaskID | None = None
        self.last_time = self.last_step = 0.0
        self.train_seconds = 0.0

    def recall(self, steps: int) -> None:
        """Drops what a stopped run logged after its last checkpoint, which is computed again."""
        records = [record for record in read_records(self.path) if record["step"] <= steps]
        write_aside(self.path, "".join(json.dumps(record) + "\n" for record in records))
        self.train_seconds = max((record.get("train_seconds", 0.0) for record in records), default=0.0)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last_time, self.last_step = time.perf_counter(), state.global_step
        self.task = self.progress.add_task("step", total=state.max_steps, completed=state.global_step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        record: dict[str, Any] = {"step": state.global_step, **(logs or {})}
        if "train_runtime" in record:
            # What the library sums up is of this process alone, and a run may have had several.
            return
        if "loss" in record and self.task is not None:
            now = time.perf_counter()
            steps, seconds = state.global_step - self.last_step, now - self.last_time
            self.train_seconds += seconds
            record["tokens_per_second"] = steps * self.tokens_per_step / seconds
            record["flops_per_second"] = record["tokens_per_second"] * self.flops_per_token
            record["train_seconds"] = self.train_seconds
            record["flops"] = state.global_step * self.tokens_per_step * self.flops_per_token
            self.progress.update(self.task, completed=state.global_step, description=f"loss {record['loss']:.3f}")
        elif "eval_loss_causal" in record:
            self.progress.console.print(
                f"  step {state.global_step}: validation loss {record['eval_loss_causal']:.4f} causal, "
                f"{record['eval_loss_top_k']:.4f} top-k"
            )
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.last_time, self.last_step = time.perf_counter(), state.global_step

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.last_time = time.perf_counter()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.last_time = time.perf_counter()

    def __enter__(self) -> "Recorder":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


class Board(TensorBoardCallback):
    """The library's TensorBoard records, and at each evaluation the routing of one fixed block of held-out text."""

    def __init__(self, corpus: Corpus) -> None:
        super().__init__()
        self.tokens = cast(list[int], corpus.validation[0]["input_ids"])
        self.tokenizer = corpus.tokenizer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        with failing_together():
            super().on_train_begin(*args, **kwargs)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if not model.config.routed_layers:
            return
        # In all processes, for the model may be spread over them.
        was_training = model.training
        found = trace_tokens(model.eval(), self.tokenizer, self.tokens)
        model.train(was_training)
        with failing_together():
            if self.tb_writer is not None:
                self._draw(self.tb_writer, found, state.global_step)

    def _draw(self, writer: SummaryWriter, found: Trace, step: int) -> None:
        for block, weights in zip(found.routed_layers, found.router_weight, strict=True):
            # A run that diverges is stopped at its next step, by name.
            if np.isfinite(weights).all():
                writer.add_histogram(f"router_weight/{block}", weights, step)
        # The deepest block on top, each a band of pixels.
        picture = np.repeat(found.entered[::-1], 8, axis=0).astype(np.float32)
        writer.add_image("routing", picture, step, dataformats="HW")


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that is under way, with a checkpoint; a second one ends it at once.

    One that reaches any process ends the run in all of them.

    Used as a context manager around the run; outside the main thread, where signals do not arrive, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self.previous: dict[signal.Signals, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if anywhere(self.received):
            control.should_save = control.should_training_stop = True


@dataclass(frozen=True)
class Tuning:
    """A run that goes on from a pretrained model, in the place of new weights.

    Attributes:
        model: the start; it is trained in place.
        facts: what defines the run beside model, text and options: kept in `run.json` as "tuning", and compared when
            the run is resumed.
        trainer: the trainer's class.
        callbacks: further callbacks.
        finish: turns the trained model into the one that is saved and evaluated.
    """

    model: MoDForCausalLM
    facts: dict[str, Any]
    trainer: Callable[..., MoDTrainer] = MoDTrainer
    callbacks: tuple[TrainerCallback, ...] = ()
    finish: Callable[[MoDForCausalLM], MoDForCausalLM] = lambda model: model


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        finished: False when it was stopped before its horizon; it can be resumed.
        steps, tokens, flops: what was done, in all; the FLOPs of a retrofit at its final capacity, without the teacher.
        parameters: number of weights.
        train_seconds: time spent in training steps, without evaluation and checkpoints; compiling counts.
        evaluation: figures on the whole held-out text, when finished.
    """

    finished: bool
    steps: int
    tokens: int
    flops: float
    parameters: int
    train_seconds: float
    evaluation: Evaluation | None


def train(
    config: MoDConfig,
    corpus: Corpus,
    options: TrainOptions,
    folder: Path,
    resume: bool = False,
    console: Console | None = None,
    tuning: Tuning | None = None,
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

    Raises:
        ValueError: for options that contradict one another, or a folder that holds another run or none to resume.
        DivergenceError: for a loss or gradient that is no number.

    Several processes, as `torchrun` or `accelerate launch` starts them, all call this with the same arguments and share
    a run, whose `folder` they must all see; the first writes. The returned model may be spread over them.
    """
    console = console if console and is_main() else Console(quiet=not is_main())
    sequence_length = len(corpus.train[0]["input_ids"])
    length = horizon(options, config, sequence_length)
    check_options(options, corpus)
    _check_memory(config)
    arguments = _arguments(options, length, folder)
    with ExitStack() as held:

        def open_folder() -> tuple[Path, int] | None:
            check_folder(folder, resume)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_run(folder))
            return _open_folder(folder, config, corpus, options, resume, tuning.facts if tuning else {})

        start = from_main(open_folder)
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
    recorder = Recorder(folder, training_flops_per_token(config, sequence_length), tokens_per_step, console)
    steps = start[1] if start else 0
    with failing_together():
        if is_main():
            recorder.recall(steps)
    if start and steps >= length.steps:
        # The trainer would take one step before it looks at the horizon.
        load_weights(model, start[0])
    else:
        steps = _run(tuning, corpus, options, arguments, recorder, start[0] if start else None)

    finished = steps >= length.steps
    evaluation = None
    if finished:
        model = tuning.finish(model)
        weights = whole_weights(model)
        with failing_together():
            if is_main():
                model.save_pretrained(folder, state_dict=weights)
                corpus.tokenizer.save_pretrained(str(folder))
                plots.training_curve({"loss": folder / "metrics.jsonl"}, folder / "curve.png")
        evaluation = _evaluate(model, corpus, options, max_blocks=None, every_router=True)
    result = TrainResult(
        finished=finished,
        steps=steps,
        tokens=steps * tokens_per_step,
        flops=steps * length.flops / length.steps,
        parameters=model_parameters(config),
        train_seconds=recorder.train_seconds,
        evaluation=evaluation,
    )
    with failing_together():
        if finished and is_main():
            record = json.dumps({**asdict(result), **provenance()}, indent=2, allow_nan=False)
            write_aside(folder / "result.json", record)
    return model, result


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
        model.activation_checkpointing_enable()
    if options.compile:
        # The graphs of models trained before in this process count against the number the compiler keeps.
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    # Whole batches only: every step then costs the same, and the horizon is exact.
    whole = np.arange(len(corpus.train) // options.batch_size * options.batch_size)
    with StopOnSignal() as stop, recorder:
        trainer = tuning.trainer(
            corpus,
            options,
            model=model,
            args=arguments,
            train_dataset=corpus.train.select(range(len(whole))).add_column("block", cast(Any, whole)),
            eval_dataset=corpus.validation,
            data_collator=NumberedCollator(corpus.end_of_text),
            # The recorder behind what draws and lowers: that is no part of a step's time.
            callbacks=[Board(corpus), *tuning.callbacks, recorder, stop],
        )
        trainer.remove_callback(PrinterCallback)
        with warnings.catch_warnings():
            # Nothing is changed in place, and what accelerate passes on is its own affair.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        trainer.average_thresholds()
    # Accelerate puts mixed precision into the model's own forward pass, where it would stay for all that follows.
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
    return trainer.state.global_step


def _evaluate(
    model: MoDForCausalLM, corpus: Corpus, options: TrainOptions, max_blocks: int | None, every_router: bool
) -> Evaluation:
    return evaluate(
        model,
        corpus.validation,
        corpus.end_of_text,
        corpus.facts.validation_bytes_per_token,
        max_blocks=max_blocks,
        bf16=options.precision == "bf16",
        all_causal_routers=every_router,
    )


def _check_memory(config: MoDConfig) -> None:
    """Raises ValueError for a model whose weights alone are more than the machine's memory, before it is tried."""
    needed, there = 4 * model_parameters(config), psutil.virtual_memory().total
    if needed > there:
        raise ValueError(
            f"hidden_size={config.hidden_size} and num_hidden_layers={config.num_hidden_layers}: the weights alone "
            f"take {needed / 1e9:.3g} GB, and the machine has {there / 1e9:.3g}; lower them"
        )


def check_options(options: TrainOptions, corpus: Corpus) -> None:
    """Raises ValueError for an option that is out of its range, or a batch larger than the text."""
    for name in ("batch_size", "gradient_accumulation_steps", "eval_blocks", "learning_rate", "max_grad_norm"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name}={getattr(options, name)} must be a finite number above 0")
    if options.batch_size % processes().num_processes:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of the {processes().num_processes} processes, which "
            "share it; change one of them"
        )
    if options.batch_size // processes().num_processes % options.gradient_accumulation_steps:
        shared = f" over {processes().num_processes} processes" if processes().num_processes > 1 else ""
        raise ValueError(
            f"gradient_accumulation_steps={options.gradient_accumulation_steps} must divide batch_size="
            f"{options.batch_size}{shared}"
        )
    if not 0 <= options.warmup_fraction < 1:
        raise ValueError(f"warmup_fraction={options.warmup_fraction} must be at least 0 and below 1")
    if options.weight_decay < 0:
        raise ValueError(f"weight_decay={options.weight_decay} must be at least 0")
    for name in ("eval_every", "save_every"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if len(corpus.train) < options.batch_size:
        raise ValueError(
            f"batch_size={options.batch_size} is more than the {len(corpus.train)} blocks of training text; lower it, "
            "shorten sequence_length or give more text"
        )


def _open_folder(
    folder: Path, config: MoDConfig, corpus: Corpus, options: TrainOptions, resume: bool, tuning: dict[str, Any]
) -> tuple[Path, int] | None:
    """Describes the run in its folder, or checks that it holds the same; returns the checkpoint to go on from."""
    text = {"key": corpus.key, "options": {**asdict(corpus.options), "cache_dir": str(corpus.options.cache_dir)}}
    described = json.loads(
        json.dumps(
            {"model": config.to_diff_dict(), "train": asdict(options), "text": text, "tuning": tuning}, allow_nan=False
        )
    )
    path = folder / "run.json"
    if resume:
        earlier = read_run(folder)
        if earlier["text"]["key"] != corpus.key:
            raise ValueError(
                f"the text, its tokenizer or sequence_length differs from that of the run in out={folder}, which had "
                f"{earlier['text']['options']}; resume with the same or use another folder"
            )
        # A field that the run's version of this package did not have stood at its default.
        defaults = {"model": MoDConfig().to_diff_dict(), "train": asdict(TrainOptions()), "tuning": {}}
        for part in ("model", "train", "tuning"):
            for name in sorted(described[part].keys() | earlier.get(part, {}).keys()):
                # What transformers adds of its own accord may differ.
                if name in ("transformers_version", "architectures", "dtype"):
                    continue
                old = earlier.get(part, {}).get(name, defaults[part].get(name))
                check_unchanged(folder, name, old, described[part].get(name))
        found = latest_checkpoint(folder)
        if found is None and (folder / "result.json").exists():
            raise ValueError(
                f"out={folder} holds a finished run and no whole checkpoint of it, so that it would be trained again "
                "from the beginning; use its model as it is, or name another folder"
            )
        return found
    # It may have been taken since.
    _check_unused(folder)
    write_aside(path, json.dumps({**described, **provenance()}, indent=2))
    return None


def check_folder(folder: Path, resume: bool) -> None:
    """Raises ValueError for a folder in which no run can begin, or that holds none to resume."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder} is a file; name a folder")
    if resume and not (folder / "run.json").exists():
        raise ValueError(f"out={folder} holds no run to resume; leave out resume, or name the run's folder")
    if not resume and folder.exists():
        _check_unused(folder)


def check_unchanged(folder: Path, name: str, old: object, new: object) -> None:
    """Raises ValueError when an option of a run that is to go on is another than before."""
    if old != new:
        raise ValueError(
            f"{name}={new} differs from {old} of the run in out={folder}; resume with the same options or use another "
            "folder"
        )


def _check_unused(folder: Path) -> None:
    """Raises ValueError for a folder that holds anything; what a run that was killed at once leaves is nothing."""
    if any(path.name not in (LOCK, "run.json.part") for path in folder.iterdir()):
        raise ValueError(f"out={folder} is not empty; name another folder, or give resume to go on with its run")


def _arguments(options: TrainOptions, length: Horizon, folder: Path) -> HFTrainingArguments:
    part = math.ceil(length.steps / 5)
    arguments = HFTrainingArguments(
        output_dir=str(folder),
        max_steps=length.steps,
        per_device_train_batch_size=options.batch_size
        // processes().num_processes
        // options.gradient_accumulation_steps,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        dataloader_drop_last=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(options.warmup_fraction * length.steps),
        weight_decay=options.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_every or part,
        save_steps=options.save_every or part,
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every weight gets its gradient in every step, and thresholds follow each process' own rows.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
    )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"one process sees {arguments.n_gpu} GPUs; start one for each with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one"
        )
    return arguments


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} is damaged in line {number}: {error}") from error
    return records
