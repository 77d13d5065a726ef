"""The state of a run beside the model's weights, as safetensors and JSON: optimiser, schedule, random generators."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

OPTIMIZER, SCHEDULE, GENERATORS = "optimizer", "schedule.json", "generators"


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


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The whole checkpoint with the most steps in a run's folder, and its steps; damaged ones are passed over."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            found.append((path, int(read_json(path / "trainer_state.json")["global_step"])))
            for tensors in ("model.safetensors", f"{OPTIMIZER}.safetensors", f"{GENERATORS}.safetensors"):
                with safe_open(path / tensors, "pt"):
                    pass
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            found = [entry for entry in found if entry[0] != path]
    return max(found, key=lambda entry: entry[1], default=None)
