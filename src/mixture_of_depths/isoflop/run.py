"""Carries out the runs of a study that have no record yet: one after another here, or as tasks of a Ray cluster."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mixture_of_depths.device import chosen_device
from mixture_of_depths.files import locked, make_folder, read_records, write_aside
from mixture_of_depths.isoflop.lost import loss_rise
from mixture_of_depths.isoflop.plan import PlannedRun
from mixture_of_depths.provenance import provenance
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.run import train
from mixture_of_depths.training.trainer import DivergenceError

RECORDS = "records.jsonl"


def open_records(out: Path, planned: list[PlannedRun]) -> dict[str, dict[str, Any]]:
    """The records of a study's folder by the name of their run.

    Raises:
        ValueError: when a planned run has a record of another definition.
    """
    records = {record["name"]: record for record in read_records(out / RECORDS)}
    for item in planned:
        record = records.get(item.run.name)
        if record is not None and record["definition"] != item.definition:
            raise ValueError(
                f"out={out} holds a record of {item.run.name} with another definition: its model, training or text "
                "has changed since; use another folder, or take the change back"
            )
    return records


def add_record(out: Path, record: dict[str, Any]) -> bool:
    """Writes a record unless its run has one; a line that a kill cut off is dropped first. Says whether it wrote."""
    path = out / RECORDS
    with locked(out / f"{RECORDS}.lock"):
        kept = read_records(path)
        if any(earlier["name"] == record["name"] for earlier in kept):
            return False
        write_aside(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in [*kept, record]))
        return True


@contextmanager
def _claimed(out: Path, name: str, wait: bool) -> Iterator[bool]:
    """Only one process at a time trains a run; yields whether it is this one, at once or after waiting for others."""
    (out / "runs").mkdir(parents=True, exist_ok=True)
    with locked(out / "runs" / f"{name}.lock", wait) as ours:
        yield ours


def carry_out(
    item: PlannedRun, corpus: Corpus, out: Path, console: Console, device: torch.device
) -> dict[str, Any] | None:
    """Trains one run, from its newest checkpoint if it has one; returns its record, None when it was stopped.

    A run whose loss became no number has a record, too: with the reason as `diverged`, and no `evaluation`.
    """
    folder = out / "runs" / item.run.name
    # Before the training: another commit may be checked out until it ends.
    origin = provenance(device)
    try:
        resume = (folder / "run.json").exists()
        _, result = train(item.config, corpus, item.run.training, folder, resume, console, device=device)
    except DivergenceError as error:
        console.print(f"{item.run.name} diverged: {error}")
        outcome: dict[str, Any] = {"parameters": item.parameters, "evaluation": None, "diverged": str(error)}
    else:
        if not result.finished:
            return None
        losses = [line["loss"] for line in read_records(folder / "metrics.jsonl") if "loss" in line]
        outcome = asdict(result)
        # A machine that stopped may have kept a checkpoint and lost lines before it.
        if len(losses) == result.steps:
            outcome["loss_rise"] = loss_rise(losses)
    return {
        "name": item.run.name,
        "definition": item.definition,
        "family": item.run.family,
        "depth": item.run.depth,
        "budget": item.run.budget,
        "seed": item.run.seed,
        "hidden_size": item.run.model.hidden_size,
        "learning_rate": item.run.training.learning_rate,
        "flops_per_token": item.flops_per_token,
        **outcome,
        **origin,
    }


def run_here(planned: list[PlannedRun], corpus: Corpus, out: Path, console: Console, device: torch.device) -> bool:
    """Carries out what is missing on a device; False when a signal stopped it.

    What another process is at is left to it, and waited for once nothing else is missing: if that process ends without
    a record, this one goes on with the run.
    """
    make_folder(out, "out")
    for wait in (False, True):
        done = open_records(out, planned)
        missing = [item for item in planned if item.run.name not in done]
        for number, item in enumerate(missing, start=1):
            name = item.run.name
            console.print(f"[bold]{name}[/bold] (run {number} of {len(missing)} that have no record)")
            with _claimed(out, name, wait) as ours:
                if not ours or name in open_records(out, planned):
                    console.print(f"{name} was taken by another process")
                    continue
                record = carry_out(item, corpus, out, console, device)
                if record is None:
                    return False
                add_record(out, record)
    return True


def check_ray(device: str) -> None:
    """Raises ValueError where runs cannot go to a cluster: for the number of a GPU, or without Ray."""
    if device.startswith("cuda:"):
        raise ValueError(f"device={device!r} numbers a GPU, of which Ray chooses one for each run; give device='cuda'")
    if find_spec("ray") is None:
        raise ValueError("ray needs the package: pip install 'mixture-of-depths[ray]'")


def run_on_ray(
    planned: list[PlannedRun],
    corpus: Corpus,
    out: Path,
    address: str,
    cpus: int,
    console: Console,
    device: str = "auto",
) -> bool:
    """Carries out what is missing as tasks of a Ray cluster whose nodes share the folder `out` and the text's cache.

    A task whose worker or node dies is started again, and goes on from the run's newest checkpoint.

    Args:
        planned: the runs.
        corpus: text to train on.
        out: the study's folder.
        address: the cluster's address, or "auto".
        cpus: cores of each run.
        console: where progress is shown.
        device: what computes, by its name on the node of a run; "cuda" asks for a GPU for each, and without asking
            Ray shows a run none.

    Raises:
        ValueError: when Ray is not installed or there is no cluster, and for the number of a GPU: a run sees its own
            alone.
    """
    check_ray(device)
    import ray
    from ray.exceptions import RayTaskError

    # Workers have working folders of their own.
    out = out.resolve()
    make_folder(out, "out")
    done = open_records(out, planned)
    missing = [item for item in planned if item.run.name not in done]
    try:
        ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        raise ValueError(f"ray={address} is no running cluster: {error}") from error

    def task(item: PlannedRun, corpus: Corpus) -> str | None:
        with _claimed(out, item.run.name, wait=True):
            if item.run.name in open_records(out, [item]):
                return item.run.name
            record = carry_out(item, corpus, out, Console(quiet=True), chosen_device(device))
            if record is None:
                return None
            add_record(out, record)
        return item.run.name

    # A worker that dies, with its node or alone, is started again as often as it takes.
    remote: Any = ray.remote(num_cpus=cpus, num_gpus=int(device.startswith("cuda")), max_retries=-1)(task)
    try:
        shared = ray.put(corpus)
        waiting = [remote.remote(item, shared) for item in missing]
        ended = 0
        while waiting:
            ready, waiting = ray.wait(waiting)
            for name in ray.get(ready):
                ended += 1
                console.print(f"{name or 'stopped'} (run {ended} of {len(missing)} that had no record)")
    except RayTaskError as error:
        raise ValueError(f"a run failed on the cluster: {error.cause}") from error
    finally:
        ray.shutdown()
    return open_records(out, planned).keys() >= {item.run.name for item in planned}
