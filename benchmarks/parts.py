"""A long measurement in parts: each a process of its own with a limit of time, whose figures are on the disk at once.

A part is a file of JSON and a row of cases. The process of a part runs `run_cases`, which writes the file anew, whole
or not at all, before and after each case; the process that owns the parts calls `run_part` for each. A case that
raises, or crashes its process, is written down with its error, and the others go on in a fresh process, since what
broke a GPU's context or filled its memory would break them, too. A part that is begun again goes on behind its last
case. Needs nothing but Python, so that what is missing is told by the parts.
"""

import fcntl
import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

Case = Callable[[], dict[str, Any]]

# Exit status of a part's process of which a case failed: the next case needs a fresh one.
CASE_FAILED = 75
# Seconds that a process has to end by itself.
GRACE = 30.0
LAST_LINES = 12


def read_part(path: Path) -> dict[str, Any]:
    """What is known of a part: its `cases` by name, the one that is `running`, and whether it is `complete`.

    Raises:
        ValueError: when the file holds no part.
    """
    if not path.exists():
        return {"cases": {}, "running": None, "complete": False}
    try:
        part = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and its part is measured anew") from error
    if not isinstance(part, dict) or not {"cases", "running", "complete"} <= part.keys():
        raise ValueError(f"{path} is not the file of a part; name another folder, or remove it")
    return part


@contextmanager
def only_owner(paths: Sequence[Path]) -> Iterator[tuple[int, ...]]:
    """Holds parts, so that no second start runs them, too; for as long as a process has one of the descriptors.

    Raises:
        ValueError: when one of them is held, or their folder cannot be written.
    """
    with ExitStack() as files:
        descriptors = []
        for path in paths:
            try:
                file = files.enter_context(path.with_suffix(".lock").open("w"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"{path.parent} is in use: another process is at the part {path.stem}; wait for it, or end it"
                ) from error
            except OSError as error:
                raise ValueError(f"{path.parent} cannot be written ({error.strerror}); name another folder") from error
            descriptors.append(file.fileno())
        yield tuple(descriptors)


def write_part(path: Path, part: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(part, indent=1) + "\n")
    aside.replace(path)


def is_failed(figures: Mapping[str, Any]) -> bool:
    """Whether a case raised, ended its process, took too long, or found that what it checks does not hold."""
    return "error" in figures or figures.get("holds") is False


def status(part: Mapping[str, Any]) -> str:
    """ "done", "failed", or "stopped": there is more to do."""
    if "error" in part or any(is_failed(figures) for figures in part["cases"].values()):
        return "failed"
    return "done" if part["complete"] else "stopped"


def forget_failures(path: Path) -> None:
    """Has the next process of a part try again what failed."""
    part = read_part(path)
    if status(part) == "failed":
        part.pop("error", None)
        part["cases"] = {name: figures for name, figures in part["cases"].items() if not is_failed(figures)}
        write_part(path, {**part, "complete": False})


def run_cases(path: Path, cases: Mapping[str, Case], facts: Mapping[str, Any]) -> int:
    """Runs the cases of a part that have no figures yet; returns the exit status for its process.

    Args:
        path: the part's file.
        cases: by name, in order. One whose figures say `finished: False` has more to do, and is run again next time.
        facts: what else the file is to say.
    """
    part = {**read_part(path), **facts}
    # Of a process that could not begin, where this one can.
    part.pop("error", None)
    for name, case in cases.items():
        if part["cases"].get(name, {}).get("finished", name in part["cases"]):
            continue
        part["running"] = name
        write_part(path, part)
        start = time.perf_counter()
        try:
            figures = case()
        except Exception as error:
            lines = traceback.format_exc().strip().splitlines()
            figures = failure(type(error).__name__, str(error), lines)
        part["cases"][name] = {**figures, "seconds": round(time.perf_counter() - start, 1)}
        part["running"] = None
        write_part(path, part)
        if "error" in figures:
            return CASE_FAILED
        if not figures.get("finished", True):
            return 0
    write_part(path, {**part, "complete": True})
    return 0


def failure(kind: str, message: str, lines: list[str]) -> dict[str, Any]:
    """The figures of a case that failed."""
    return {
        "error": {"type": kind, "message": message[:500], "last_lines": [line[:200] for line in lines[-LAST_LINES:]]}
    }


def run_part(
    path: Path,
    command: list[str],
    environment: Mapping[str, str],
    limit: float,
    left: float,
    descriptors: Sequence[int] = (),
) -> None:
    """Runs a part's process, and again after each case that fails, until all is done or the time is over.

    A case that is cut off by the part's own limit has failed if it had all of it, being the first. One that others left
    too little of it, or that is cut off by the end of all time, is run again next time.

    Args:
        path: the part's file; what its processes print goes beside it, as .log.
        command: starts its process, which calls `run_cases`.
        environment: of the process.
        limit: seconds for the part.
        left: seconds for all that is still to do.
        descriptors: of `only_owner`: its parts are held for as long as the process lives.
    """
    start = time.monotonic()
    log = path.with_suffix(".log")
    part = read_part(path)
    begun_with = len(part["cases"])
    if part["running"] is not None:
        # What an earlier start was ended at has not failed.
        write_part(path, {**part, "running": None})
    while True:
        before = len(read_part(path)["cases"])
        seconds = min(limit, left) - (time.monotonic() - start)
        if seconds <= 0:
            return
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=output, stderr=output, pass_fds=descriptors
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_process(process)
        part = read_part(path)
        running = part["running"]
        lines = log.read_text(errors="replace").splitlines()
        if code == 0 or (code == CASE_FAILED and len(part["cases"]) > before):
            error = None
        elif code is None:
            cut_off = failure("TimeoutError", f"was cut off: the part has {limit:.0f} s", lines)
            # A process that was asked to end, and did so in order, is at no case.
            had_all_time = limit <= left and len(part["cases"]) == begun_with
            error = cut_off if had_all_time and running is not None else None
        else:
            error = failure(f"exit status {code}", "the process ended", lines)
        if error is not None:
            if running is None:
                part |= error
            else:
                part["cases"][running] = error
        write_part(path, {**part, "running": None})
        if code in (0, None) or (running is None and error is not None):
            return


def end_process(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process, if it has not ended: first by asking it to."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
