"""Kills a training run at random moments, and compares where it ends with a run that nobody killed.

    python benchmarks/kills.py        # writes results/reliability/kills.json

A small model is trained by `mod train` in a process of its own, on the Python standard library's source. Each kill is a
SIGKILL at a random moment of a phase: the first of a run while its text is prepared, the others in a step, a save or an
evaluation drawn at random, at a random occurrence of it, after a random part of the time it took when nobody killed.
The command is then given again, with `--resume` once there is a run to resume, as a user would. A run is killed five
times and then left to end; there are as many runs as the kills need, each with a cache of prepared text of its own.

The run's process notes the phase it is in, in a file; the phase of a kill is what the file held when the process was
dead, "other" outside the four. A kill is survived when the next process goes on without an error and the run ends; it
is exact when the run's weights, and every figure in `metrics.jsonl` and `result.json` but those of time, are those of
the run that nobody killed, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from hashlib import sha256
from pathlib import Path
from typing import Any

from mixture_of_depths.cli.main import main as command_line
from mixture_of_depths.files import read_json, read_records
from mixture_of_depths.provenance import provenance
from mixture_of_depths.text import corpus
from mixture_of_depths.training.trainer import MoDTrainer

RESULTS = Path(__file__).parent.parent / "results" / "reliability"
PHASES: tuple[str, ...] = ("preparation", "step", "save", "evaluation")
KILLS_A_RUN = 5
OPTIONS = [
    *("--max-characters", "1000000", "--vocab-size", "512", "--sequence-length", "64"),
    *("--hidden-size", "32", "--num-hidden-layers", "4", "--num-attention-heads", "2"),
    *("--max-steps", "60", "--batch-size", "8", "--save-every", "5", "--eval-every", "10", "--eval-sequences", "32"),
]
OF_TIME = {"tokens_per_second", "flops_per_second", "train_seconds"}
OF_TIME |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}


class Phase:
    """The file in which a process notes its phase: the time it began, its number of occurrences, and its name."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)
        self.counts = dict.fromkeys(PHASES, 0)
        self.seconds: dict[str, list[float]] = {name: [] for name in PHASES}

    def note(self, name: str) -> None:
        os.pwrite(self.file, f"{self.counts.get(name, 0):6d} {name:12s}".encode(), 0)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        self.counts[name] += 1
        self.note(name)
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)
        self.note("other")

    def wrap(self, place: Any, function: str, name: str) -> None:
        original: Callable[..., Any] = getattr(place, function)

        @wraps(original)
        def noted(*args: Any, **kwargs: Any) -> Any:
            with self.during(name):
                return original(*args, **kwargs)

        setattr(place, function, noted)

    def read(self) -> tuple[int, str]:
        count, name = os.pread(self.file, 19, 0).decode().split()
        return int(count), name


def run_command_line(noted: str, arguments: list[str]) -> None:
    """What the killed process does: the command line, noting its phases."""
    phase = Phase(Path(noted))
    phase.note("other")
    # The command imports it from there when it runs.
    phase.wrap(corpus, "prepare_cache", "preparation")
    phase.wrap(MoDTrainer, "training_step", "step")
    phase.wrap(MoDTrainer, "_save_checkpoint", "save")
    phase.wrap(MoDTrainer, "evaluate", "evaluation")
    sys.argv[1:] = arguments
    command_line()
    Path(f"{noted}.seconds").write_text(json.dumps(phase.seconds))


def start(folder: Path) -> tuple[subprocess.Popen[bytes], Phase]:
    """Gives the command, with `--resume` once there is something to resume."""
    out, noted = folder / "run", folder / "phase"
    phase = Phase(noted)
    phase.note("starting")
    command = [sys.executable, __file__, "--as-the-run", str(noted), "train", "--out", str(out)]
    command += [*OPTIONS, "--cache-dir", str(folder / "cache"), *(["--resume"] if (out / "run.json").exists() else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "errors.txt").open("ab") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors), phase


def left_behind(folder: Path) -> dict[str, Any]:
    """What a finished run leaves that depends on neither time nor place."""
    out = folder / "run"
    records = [
        {name: value for name, value in record.items() if name not in OF_TIME}
        for record in read_records(out / "metrics.jsonl")
    ]
    figures = read_json(out / "result.json")
    result = {name: figures[name] for name in ("finished", "steps", "tokens", "flops", "parameters", "evaluation")}
    weights = sha256((out / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "records": records, "result": result}


def kill_at(process: subprocess.Popen[bytes], phase: Phase, aim: str, occurrence: int, delay: float) -> dict[str, Any]:
    """Kills a process in a phase; says where it was, or that it had ended."""
    began = time.perf_counter()
    while process.poll() is None:
        count, name = phase.read()
        if name == aim and count >= occurrence:
            time.sleep(delay)
            break
        time.sleep(0.0002)
    process.kill()
    status = process.wait()
    count, name = phase.read()
    moment = round(time.perf_counter() - began, 2)
    return {"aim": aim, "phase": name, "occurrence": count, "after_seconds": moment, "status": status}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "whole"
        folder.mkdir()
        process, _ = start(folder)
        assert process.wait() == 0, (folder / "errors.txt").read_text()
        whole, seconds = left_behind(folder), read_json(folder / "phase.seconds")
        while len(kills) < arguments.kills:
            number = len(kills)
            folder = Path(place) / str(number)
            folder.mkdir()
            here: list[dict[str, Any]] = []
            for _ in range(min(KILLS_A_RUN, arguments.kills - number)):
                # Only the first process of a run finds its text not prepared.
                aim = draw.choice(PHASES[1:]) if here else "preparation"
                occurrence = draw.randint(1, {"preparation": 1, "step": 12, "save": 2, "evaluation": 1}[aim])
                process, phase = start(folder)
                here.append(kill_at(process, phase, aim, occurrence, draw.random() * max(seconds[aim])))
                if here[-1]["status"] != -signal.SIGKILL:
                    break
            process, _ = start(folder)
            # One that ended by itself before its kill counts, too.
            ended = process.wait() == 0 and all(kill["status"] in (0, -signal.SIGKILL) for kill in here)
            left = left_behind(folder) if ended else {}
            differing = [name for name in whole if left.get(name) != whole[name]]
            exact = not differing
            counted = [kill for kill in here if kill.pop("status") == -signal.SIGKILL]
            kills += [{"run": number, **kill, "survived": ended, "exact": exact} for kill in counted]
            if differing:
                print(f"{differing} differ\n{(folder / 'errors.txt').read_text()}", file=sys.stderr)
            print(f"{len(kills)} kills, run {number}: ended {ended}, exact {exact}", file=sys.stderr)
    record = {
        "benchmark": "kills",
        "kills_total": len(kills),
        "kills_survived": sum(kill["survived"] for kill in kills),
        "resume_bit_exact": all(kill["exact"] for kill in kills),
        "kills_by_phase": {name: sum(kill["phase"] == name for kill in kills) for name in (*PHASES, "other")},
        "kills": kills,
        **provenance(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "kills"}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-the-run"]:
        run_command_line(sys.argv[2], sys.argv[3:])
    else:
        main()
