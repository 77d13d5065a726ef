"""Training in two processes against one: how far the losses differ, and how fast it is on this machine.

    python benchmarks/distributed.py

A small Mixture-of-Depths model is trained on the Python standard library's source for 50 steps at the same global batch
in one process, in two with DDP and in two with FSDP2, started by `torchrun` over gloo, one thread a process. Prints one
JSON line: `ddp_max_loss_difference` and `fsdp_max_loss_difference` are the largest of the steps' training losses and of
the evaluations' losses, `*_tokens_per_second` the medians of the steps after the first ten.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from mixture_of_depths.files import read_records
from mixture_of_depths.provenance import provenance

MODEL = ["--hidden-size", "128", "--num-hidden-layers", "4", "--num-attention-heads", "4"]
DATA = ["--max-characters", "1000000", "--vocab-size", "1024", "--sequence-length", "128"]
RECIPE = yaml.safe_load((Path(__file__).parent.parent / "recipes" / "fsdp.yaml").read_text())
# As `accelerate launch` hands on its file; by itself it starts CPU processes only through MPI.
FSDP = {"ACCELERATE_USE_FSDP": "true", **{key.upper(): str(value) for key, value in RECIPE["fsdp_config"].items()}}
WAYS = {"one": (1, {}), "ddp": (2, {}), "fsdp": (2, FSDP)}


def train(folder: Path, way: str, steps: int) -> list[dict[str, Any]]:
    """Trains as `way` says and returns the run's records."""
    processes, settings = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    program = [sys.executable, *(launcher if processes > 1 else []), "-m", "mixture_of_depths", "train"]
    run = ["--out", str(folder / way), "--cache-dir", str(folder / "cache"), "--max-steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [*program, *run, *MODEL, *DATA, "--batch-size", "16"]
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return read_records(folder / way / "metrics.jsonl")


def largest_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    return max(
        abs(a[key] - b[key])
        for a, b in zip(one, other, strict=True)
        for key in ("loss", "eval_loss_top_k", "eval_loss_causal")
        if key in a
    )


def speed(records: list[dict[str, Any]]) -> float:
    steps = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    return round(median(steps[10:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        records = {way: train(Path(folder), way, steps) for way in WAYS}
    figures = {
        "benchmark": "distributed",
        "steps": steps,
        "ddp_max_loss_difference": largest_difference(records["one"], records["ddp"]),
        "fsdp_max_loss_difference": largest_difference(records["one"], records["fsdp"]),
        **{f"{way}_tokens_per_second": speed(records[way]) for way in WAYS},
    }
    print(json.dumps({**figures, **provenance()}))


if __name__ == "__main__":
    main()
