"""A run's folder: what it describes, whether a run may begin or go on there, and that only one works in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixture_of_depths.files import check_place, locked, read_json, write_aside
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.provenance import LIBRARY_FIELDS, provenance
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.checkpoint import latest_checkpoint

LOCK = ".lock"
# Options that decide nothing of the training: they look at it, or act on its result. (Of several processes the
# thresholds are averaged where it is looked at or saved, which moves them by rounding.)
MAY_CHANGE = ("eval_every", "eval_sequences", "save_every", "calibrate")


def read_run(folder: Path) -> dict[str, Any]:
    """The description of a run, from the `run.json` in its folder.

    Raises:
        ValueError: when it does not describe one.
    """
    run = read_json(folder / "run.json")
    parts = ("model", "train", "text", "tuning")
    whole = isinstance(run, dict) and all(isinstance(run.get(name, {}), dict) for name in parts)
    if not whole or not {"key", "options"} <= run.get("text", {}).keys():
        raise ValueError(f"{folder / 'run.json'} is damaged: it does not describe a run")
    return run


def open_folder(
    folder: Path,
    config: MoDConfig,
    corpus: Corpus,
    options: TrainOptions,
    resume: bool,
    tuning: dict[str, Any],
    device: torch.device,
    prepared: tuple[str, ...] = (),
) -> tuple[Path, int] | None:
    """Describes the run in its folder, or checks that it holds the same; returns the checkpoint to go on from.

    What lies in the folder by a name of `prepared` belongs to the run, and was there before it.
    """
    text = {"key": corpus.key, "options": {**asdict(corpus.options), "cache_dir": str(corpus.options.cache_dir)}}
    described = json.loads(
        json.dumps(
            {"model": config.to_diff_dict(), "train": asdict(options), "text": text, "tuning": tuning}, allow_nan=False
        )
    )
    path = folder / "run.json"
    if resume:
        earlier = read_run(folder)
        check_same_text(folder, earlier["text"]["key"], corpus.key, f", which had {earlier['text']['options']}")
        check_training(folder, earlier, options)
        _check_part(folder, earlier.get("model", {}), described["model"], MoDConfig().to_diff_dict())
        _check_part(folder, earlier.get("tuning", {}), described["tuning"], {})
        newest = latest_checkpoint(folder)
        if newest is None and (folder / "result.json").exists():
            raise ValueError(
                f"out={folder} holds a finished run and no whole checkpoint of it, so that it would be trained again "
                "from the beginning; use its model as it is, or name another folder"
            )
        changed = {name: described["train"][name] for name in MAY_CHANGE}
        if {name: earlier["train"].get(name) for name in MAY_CHANGE} != changed:
            earlier["train"] |= changed
            write_aside(path, json.dumps(earlier, indent=2))
        return newest
    # It may have been taken since.
    _check_unused(folder, prepared)
    write_aside(path, json.dumps({**described, **provenance(device)}, indent=2))
    return None


def check_folder(folder: Path, resume: bool, prepared: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a folder in which no run can begin, or that holds none to resume; see `open_folder`."""
    check_place(folder, "out")
    if resume and not (folder / "run.json").exists():
        raise ValueError(
            f"out={folder} holds no run to resume; leave out resume=True (--resume), or name the run's folder"
        )
    if not resume and folder.exists():
        _check_unused(folder, prepared)


def check_ready(folder: Path, resume: bool, prepared: tuple[str, ...] = ()) -> None:
    """As `check_folder`, and for a folder in which another run is at work: before anything is read for a new one."""
    check_place(folder, "out")
    check_free(folder)
    check_folder(folder, resume, prepared)


def check_free(folder: Path) -> None:
    """Raises ValueError for a folder in which another run is at work."""
    if (folder / LOCK).exists():
        with only_run(folder):
            pass


def check_same_text(folder: Path, old_key: object, new_key: object, had: str = "") -> None:
    """Raises ValueError when a run is to go on with text of another key than before; `had` says more of that."""
    if old_key != new_key:
        raise ValueError(
            f"the text, its tokenizer or sequence_length differs from that of the run in out={folder}{had}; resume "
            "with the same or use another folder"
        )


def check_training(folder: Path, run: dict[str, Any], options: TrainOptions) -> None:
    """Raises ValueError when a run is to go on with other options of training; `run` is its description."""
    earlier, described = run.get("train", {}), json.loads(json.dumps(asdict(options)))
    for name in sorted(earlier.keys() - described.keys()):
        raise ValueError(
            f"out={folder} holds a run of another version of this package, with {name}={earlier[name]}, which this one "
            "does not know; go on with that version, or use another folder"
        )
    _check_part(folder, earlier, described, asdict(TrainOptions()))


def _check_part(folder: Path, earlier: dict[str, Any], described: dict[str, Any], defaults: dict[str, Any]) -> None:
    """As `check_unchanged`, of one part of a run's description."""
    for name in sorted(described.keys() | earlier.keys()):
        # What transformers adds of its own accord may differ, and what decides nothing of the training.
        if name not in (*LIBRARY_FIELDS, *MAY_CHANGE):
            # A field that the run's version of this package did not have stood at its default.
            check_unchanged(folder, name, earlier.get(name, defaults.get(name)), described.get(name))


def check_unchanged(folder: Path, name: str, old: object, new: object) -> None:
    """Raises ValueError when an option of a run that is to go on is another than before."""
    if old != new:
        raise ValueError(
            f"{name}={new} differs from {old} of the run in out={folder}; resume with the same options or use another "
            "folder"
        )


def _check_unused(folder: Path, prepared: tuple[str, ...]) -> None:
    """Raises ValueError for a folder that holds anything; what a run that was killed at once leaves is nothing."""
    if any(path.name not in (LOCK, "run.json.part", *prepared) for path in folder.iterdir()):
        raise ValueError(
            f"out={folder} is not empty; name another folder, or go on with its run by resume=True (--resume)"
        )


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that no second process works in it.

    Raises:
        ValueError: when another process holds it.
    """
    with locked(folder / LOCK, wait=False) as ours:
        if not ours:
            raise ValueError(f"out={folder} is in use by another run; wait for it, or name another folder")
        yield
