"""What a run does between its steps: records, TensorBoard, and an orderly end on a signal."""

import json
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback

from mixture_of_depths.distributed import anywhere, failing_together, is_main
from mixture_of_depths.files import read_records, write_aside
from mixture_of_depths.inspect.trace import Trace, trace_tokens
from mixture_of_depths.text.corpus import Corpus


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
        # The library takes the intervals of a resumed run from its checkpoint; this call's options count.
        state.compute_steps(args, state.max_steps)
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
            for name in (name for name in record if name.startswith("eval_loss_causal/")):
                source = name.removeprefix("eval_loss_causal/")
                self.progress.console.print(
                    f"    {source}: {record[name]:.4f} causal, {record[f'eval_loss_top_k/{source}']:.4f} top-k",
                    markup=False,
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
    """The library's TensorBoard records, and at each evaluation the routing of one fixed sequence of held-out text."""

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
        trace = trace_tokens(model.eval(), self.tokenizer, self.tokens)
        model.train(was_training)
        with failing_together():
            if self.tb_writer is not None:
                self._draw(self.tb_writer, trace, state.global_step)

    def _draw(self, writer: SummaryWriter, trace: Trace, step: int) -> None:
        name = trace.told_apart_by
        for block, values in zip(trace.routed_layers, getattr(trace, name), strict=True):
            # A run that diverges is stopped at its next step, by name.
            if np.isfinite(values).all():
                writer.add_histogram(f"{name}/{block}", values, step)
        # The deepest block on top, each a band of pixels.
        picture = np.repeat(trace.entered[::-1], 8, axis=0).astype(np.float32)
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
