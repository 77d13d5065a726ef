"""The pieces of a text tokenised and written to shards, by one process or several, with a bar."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.documents import Skipped, cut_tail, is_held_out
from mixture_of_depths.text.encoder import Encoder
from mixture_of_depths.text.plan import Plan, read_piece
from mixture_of_depths.text.shards import SIDES, PartWriter, Side, parts_of
from mixture_of_depths.text.tokens import Vocabulary

# Tokens of a shard; the piece that it is of goes on in another.
SHARD = 1 << 25
# Characters that a process tokenises at once, each of which takes a hundred bytes and more, and of a document's pieces.
GROUP, LONGEST = 1 << 19, 1 << 17

Split = Literal["documents", "tails"]
Report = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Work:
    """All that a process needs to prepare any piece of a text."""

    folder: Path
    options: DataOptions
    plan: Plan
    split: Split
    backend: str
    first: list[int]
    vocabulary: Vocabulary

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.vocabulary.last < 1 << 16 else "<u4")

    def prepare(self, number: int, report: Report, stopped: Callable[[], bool]) -> None:
        """Writes what is not there yet of a piece.

        Args:
            number: of the piece.
            report: is told how many documents, tokens and bytes of text were added.
            stopped: whether to end early; what was written then is gone on from.

        Raises:
            OSError: when the disk is full.
        """
        parts = parts_of(self.folder, number)
        if parts and parts[-1].is_last:
            return
        skipped, read = Skipped(), parts[-1].documents_read if parts else 0
        encoder = Encoder(self.backend, self.first, self.vocabulary.end_of_text, LONGEST)
        documents = read_piece(self.plan, number, self.options, self.vocabulary, skipped)
        part = len(parts)
        writer = PartWriter(self.folder, number, part, self.dtype)
        try:
            for group in _groups(islice(documents, read, None)):
                if stopped():
                    return
                added = self._rows(group, encoder)
                for rows in added:
                    for side, row, size in rows:
                        writer.add(side, row, size)
                    read += 1
                    if writer.tokens >= SHARD:
                        writer.finish(read, False, Skipped())
                        part += 1
                        writer = PartWriter(self.folder, number, part, self.dtype)
                sides = [row for rows in added for row in rows]
                report(len(group), sum(len(row) for _, row, _ in sides), sum(size for _, _, size in sides))
            # Counted from the piece's beginning, whatever was there of it.
            writer.finish(read, True, skipped)
        finally:
            writer.close()

    def _rows(self, documents: list[str | np.ndarray], encoder: Encoder) -> list[list[tuple[Side, np.ndarray, int]]]:
        """What each document adds to each side: its tokens, and its bytes as text."""
        halves = [self._halves(document) for document in documents]
        texts = [half for sides in halves for _, half in sides if isinstance(half, str)]
        encoded = iter(encoder.encode(texts))
        rows: list[list[tuple[Side, np.ndarray, int]]] = []
        for sides in halves:
            rows.append([])
            for side, half in sides:
                if isinstance(half, str):
                    rows[-1].append((side, next(encoded), len(half.encode("utf-8"))))
                else:
                    # The text of what is trained on is nobody's affair, and decoding it would take long.
                    text = encoder.backend.decode(half.tolist(), skip_special_tokens=True) if side != "train" else ""
                    rows[-1].append((side, np.append(half, encoder.last), len(text.encode("utf-8"))))
        return rows

    def _halves(self, document: str | np.ndarray) -> list[tuple[Side, Any]]:
        fraction = self.options.validation_fraction
        if self.split == "tails":
            cut = cut_tail(len(document), fraction)
            return [
                (side, half) for side, half in zip(SIDES, (document[:cut], document[cut:]), strict=True) if len(half)
            ]
        content = document.encode("utf-8") if isinstance(document, str) else document.astype("<u4").tobytes()
        name = hashlib.sha256(content).digest()
        return [("validation" if is_held_out(name, fraction) else "train", document)]


def _groups(documents: Iterable[str | np.ndarray]) -> Iterator[list[str | np.ndarray]]:
    """Documents that are tokenised together."""
    group: list[str | np.ndarray] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= GROUP or len(group) == 4096:
            yield group
            group, size = [], 0
    if group:
        yield group


def carry_out(work: Work, processes: int, console: Console) -> None:
    """Prepares all pieces that are not there yet, in this process or in several."""
    waiting = [
        number
        for number in range(len(work.plan.pieces))
        if not ((parts := parts_of(work.folder, number)) and parts[-1].is_last)
    ]
    done = work.plan.size - sum(work.plan.pieces[number].size for number in waiting)
    with _Bar(work.plan.size, done, console) as bar:
        if processes == 1 or len(waiting) < 2:
            for number in waiting:
                work.prepare(number, bar.add, lambda: False)
                bar.finish(work.plan.pieces[number].size)
            return
        _run_in_several(work, waiting, min(processes, len(waiting)), bar)


def _run_in_several(work: Work, waiting: list[int], processes: int, bar: "_Bar") -> None:
    # A fresh start: forked ones would hold the locks of this process' threads.
    context = multiprocessing.get_context("spawn")
    counts, stop = context.Array("q", 3), context.Event()
    pool = ProcessPoolExecutor(processes, context, _begin, (work, counts, stop))
    try:
        pending: dict[Future[None], int] = {pool.submit(_prepare_piece, number): number for number in waiting}
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.show(*counts)
            for future in done:
                bar.finish(work.plan.pieces[pending.pop(future)].size)
                future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that prepares text was killed, as by a machine that is out of memory; the same command goes on, "
            "with fewer processes"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# What a process of the pool works on.
_work: tuple[Work, Report, Callable[[], bool]] | None = None


def _begin(work: Work, counts: Any, stop: Any) -> None:
    """Readies a process of the pool, which ends with the one that started it, even if that is killed."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are as many as the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(documents: int, tokens: int, size: int) -> None:
        with counts.get_lock():
            for number, more in enumerate((documents, tokens, size)):
                counts[number] += more

    _work = work, report, stop.is_set


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare_piece(number: int) -> None:
    assert _work is not None
    work, report, stopped = _work
    work.prepare(number, report, stopped)


class _Bar:
    """Documents, tokens and bytes per second, and the time left."""

    def __init__(self, size: int, done: int, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console
        )
        # Of a stream nobody knows how much is left.
        self.size = size
        self.task = self.progress.add_task("documents", total=size or None, completed=done)
        self.finished, self.began, self.before = done, time.perf_counter(), done
        self.counts = (0, 0, 0)

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def add(self, documents: int, tokens: int, size: int) -> None:
        """Counts what was added."""
        self.show(*(count + more for count, more in zip(self.counts, (documents, tokens, size), strict=True)))

    def show(self, documents: int, tokens: int, size: int) -> None:
        """Shows how much there is in all since the start."""
        self.counts = (documents, tokens, size)
        seconds = time.perf_counter() - self.began
        # Text and its files differ in size: by JSON around it, or compression.
        place = max(self.finished, min(self.before + size, self.size))
        self.progress.update(
            self.task,
            completed=place,
            description=f"{documents:,} documents ({documents / seconds:,.0f}/s), {tokens / 1e6:,.1f} M tokens "
            f"({tokens / seconds / 1e6:.2f} M/s), {size / 1e6:,.0f} MB ({size / seconds / 1e6:.2f} MB/s)",
        )

    def finish(self, size: int) -> None:
        """Notes that a piece is done."""
        self.finished += size
        self.show(*self.counts)
