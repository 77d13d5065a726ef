"""Started by the tests of several processes, alone or by `torchrun`: runs the command line once for every job given.

The first argument is a file with a list of jobs: `argv`, `env`, and optionally `stop`, [process, step], after how many
steps a process sends itself SIGTERM, `full`, [process, step, bytes], after how many it can write no larger files, and
`poison`, [process, step], after how many its loss is no number.
Beside each run's folder each process leaves its exit status, the sequences it trained on, one line a batch, and whether
it read the text.
"""

import json
import math
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from mixture_of_depths import distributed
from mixture_of_depths.cli.main import main
from mixture_of_depths.text import corpus
from mixture_of_depths.training import run as training
from mixture_of_depths.training.trainer import MoDTrainer

RANK = int(os.environ.get("RANK", "0"))


def inject(job: dict[str, Any], folder: Path, sequences: list[Any]) -> None:
    """Has the run record what it reads in `sequences` and on the disk, and break where the job says so."""
    read, count = corpus.read_all, MoDTrainer.floating_point_ops
    loss = MoDTrainer.compute_loss

    def read_all(*args: Any) -> Any:
        Path(f"{folder}.read-{RANK}").touch()
        return read(*args)

    def floating_point_ops(self: Any, inputs: dict[str, Any]) -> int:
        sequences.append([self.state.global_step, inputs["input_ids"].tolist()])
        return count(self, inputs)

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        found: Any = loss(self, *args, **kwargs)
        return found * math.nan if [RANK, self.state.global_step] == job.get("poison") else found

    class Recorder(training.Recorder):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            here = [RANK, state.global_step]
            if here == job.get("stop"):
                os.kill(os.getpid(), signal.SIGTERM)
            if here == job.get("full", [])[:2]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["full"][2], resource.RLIM_INFINITY))

    corpus.read_all, MoDTrainer.floating_point_ops = read_all, floating_point_ops
    MoDTrainer.compute_loss, training.Recorder = compute_loss, Recorder


def run(jobs: list[dict[str, Any]]) -> None:
    """Runs the jobs in this process, as one of those that run them."""
    trainer = MoDTrainer
    originals = corpus.read_all, trainer.floating_point_ops, trainer.compute_loss, training.Recorder
    arguments = list(sys.argv)
    for job in jobs:
        argv, folder = job["argv"], Path(job["argv"][job["argv"].index("--out") + 1])
        os.environ |= job.get("env", {})
        sequences: list[Any] = []
        inject(job, folder, sequences)
        sys.argv[1:] = argv
        status: Any = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(f"{folder}.status-{RANK}").write_text(str(status))
        with Path(f"{folder}.sequences-{RANK}").open("a") as file:
            file.writelines(json.dumps(seen) + "\n" for seen in sequences)
        corpus.read_all, trainer.floating_point_ops, trainer.compute_loss, training.Recorder = originals
        for name in job.get("env", {}):
            del os.environ[name]
    sys.argv[:] = arguments


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The next job goes on with the same processes.
    distributed.leave = lambda: None
    run(json.loads(Path(sys.argv[1]).read_text()))
