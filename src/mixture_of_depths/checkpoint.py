"""The state of a run beside the model's weights, as safetensors and JSON, and checkpoints that are whole or not there.

A checkpoint is written aside, sealed with the checksums of its files, and only then renamed to where it is looked for.
"""

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

OPTIMIZER, SCHEDULE, GENERATORS = "optimizer", "schedule.json", "generators"
CHECKSUMS, ASIDE, LOCK = "checksums.json", ".saving", ".lock"


def save_optimizer(state: dict[str, Any], folder: Path) -> None:
    """Writes an optimiser's `state_dict`: tensors to optimizer.safetensors, all else to optimizer.json."""
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    save_file(tensors, folder / f"{OPTIMIZER}.safetensors")
    rest = {"param_groups": state["param_groups"], "scalars": scalars}
    (folder / f"{OPTIMIZER}.json").write_text(json.dumps(rest))


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Reads what `save_optimizer` wrote, as a `state_dict`."""
    rest = read_json(folder / f"{OPTIMIZER}.json")
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(folder / f"{OPTIMIZER}.safetensors").items(), *rest["scalars"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for group in rest["param_groups"]:
        group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": rest["param_groups"]}


def save_generators(folder: Path) -> None:
    """Writes the states of Python's, NumPy's and PyTorch's random generators."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    save_file(states, folder / f"{GENERATORS}.safetensors")
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    (folder / f"{GENERATORS}.json").write_text(json.dumps({"python": random.getstate(), "numpy": numpy_state}))


def load_generators(folder: Path) -> None:
    """Restores what `save_generators` wrote."""
    states = read_json(folder / f"{GENERATORS}.json")
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    tensors = load_file(folder / f"{GENERATORS}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda.{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{i}"], i)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: naming the file, when it holds no JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_aside(path: Path, text: str) -> None:
    """Writes a file whole or not at all: aside first, to the disk, and then renamed."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def seal(folder: Path) -> None:
    """Writes the checksums of all files in a folder into it, last, and everything to the disk."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sums[str(path.relative_to(folder))] = _checksum(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
    write_aside(folder / CHECKSUMS, json.dumps(sums, indent=2))


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder holds what it held when it was sealed."""
    try:
        sums = read_json(folder / CHECKSUMS)
        return bool(sums) and all(_checksum(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The whole checkpoint with the most steps in a run's folder, and its steps; damaged ones are passed over."""
    steps = {path: int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        if is_whole(path):
            return path, steps[path]
    return None


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Holds a run's folder, so that no second process works in it; a killed one lets go of it.

    Raises:
        ValueError: when another process holds it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"out={folder} is in use by another run; wait for it, or name another folder") from None
        yield
