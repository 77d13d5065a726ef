"""The state of a run beside the model's weights, as safetensors and JSON, for any number of processes.

A checkpoint is written aside, sealed with the checksums of its files, and only then renamed to where it is looked for.
Its tensors lie in one file a kind, or in one file a process that holds that process' shards of them all. Both are read
by name, each process its own part, so that any number of processes goes on from what any other number wrote. Random
generators lie in files of each process: as many processes go on bit for bit, and one more than before draws anew.
"""

import json
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers import PreTrainedModel, set_seed

from mixture_of_depths.distributed import is_main, processes
from mixture_of_depths.files import is_whole, read_json

OPTIMIZER, SCHEDULE, GENERATORS = "optimizer", "schedule.json", "generators"
ASIDE = ".saving"


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only its shards of the weights."""
    return isinstance(model, FSDPModule)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights and buffers by name, or this process' shards of them; a shared one under one name only."""
    shared = (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    return {name: value for name, value in model.state_dict().items() if name not in shared}


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fills the model's weights and buffers, or this process' shards of them, from a checkpoint.

    Raises:
        ValueError: when the checkpoint lacks one, or has it in another shape.
    """
    _fill(weights_of(model), folder)


def whole_weights(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights of a sharded model put together in process 0, for which all must call this; None for others."""
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def save_optimizer(optimizer: Optimizer, model: PreTrainedModel, folder: Path) -> None:
    """Writes an optimiser's state, its tensors by index of the parameter and name; all processes must call it.

    Of a sharded model each process writes a file of its own, with its shards of the weights beside those of the state.

    Raises:
        OSError: in all processes, when one cannot write its shards.
    """
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                scalars[f"{index}.{name}"] = value
    if is_sharded(model):
        _save_shards(weights_of(model) | tensors, folder)
    elif is_main():
        save_file(tensors, folder / f"{OPTIMIZER}.safetensors")
    if is_main():
        rest = {"param_groups": state["param_groups"], "scalars": scalars}
        (folder / f"{OPTIMIZER}.json").write_text(json.dumps(rest))


def _save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(cast(dict[str, Any], tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(f"checkpoint in {folder} cannot be written: {error}") from error


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Fills the optimiser's state, or this process' shards of it, with what `save_optimizer` wrote."""
    rest = read_json(folder / f"{OPTIMIZER}.json")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored_tensors = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {
        key: _empty_like(parameters[int(index)], cast(TensorStorageMetadata, stored))
        for key, stored in stored_tensors.items()
        if (index := key.split(".", 1)[0]).isdigit()
    }
    _fill(tensors, folder)
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["scalars"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    for group in rest["param_groups"]:
        group["betas"] = tuple(group["betas"])
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def _empty_like(parameter: Tensor, stored: TensorStorageMetadata) -> Tensor:
    """Room for what an optimiser keeps about a parameter: cut as the parameter is, or a number such as the step."""
    if stored.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=stored.properties.dtype)
    return torch.zeros(stored.size, dtype=stored.properties.dtype)


def _fill(tensors: Mapping[str, Tensor], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            # Each process reads for itself, whether or not there are others.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(folder))
            load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=True)
    except (CheckpointException, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} does not fit the model: {error}") from error


def set_own_seed(seed: int, steps: int = 0) -> None:
    """Seeds the random generators of every process but the first anew, each in a way of its own.

    All start from one seed, so that they build the same model. The rows of each are to be routed at random by other
    numbers than those of the others, and after some steps by other numbers than at first.
    """
    rank = processes().process_index
    if rank:
        set_seed(int(np.random.SeedSequence(seed, spawn_key=(rank, steps)).generate_state(1)[0]))


def _generators() -> str:
    """The name of the files of this process' generators."""
    rank = processes().process_index
    return f"{GENERATORS}-{rank}" if rank else GENERATORS


def save_generators(folder: Path, device: torch.device) -> None:
    """Writes the states of Python's, NumPy's and PyTorch's random generators of this process, and of a GPU's."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    save_file(states, folder / f"{_generators()}.safetensors")
    numpy_state = [name, np.asarray(keys).tolist(), position, has_gauss, cached]
    (folder / f"{_generators()}.json").write_text(json.dumps({"python": random.getstate(), "numpy": numpy_state}))


def load_generators(folder: Path, device: torch.device, seed: int, steps: int) -> None:
    """Restores what `save_generators` wrote in this process.

    One that the run did not have before has none, and draws from a seed made of the run's, its own number and the steps
    done.
    """
    if not (folder / f"{_generators()}.json").exists():
        set_own_seed(seed, steps)
        return
    states = read_json(folder / f"{_generators()}.json")
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    tensors = load_file(folder / f"{_generators()}.safetensors")
    torch.set_rng_state(tensors["torch"])
    # The run may have been on another kind of device.
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def latest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The whole checkpoint with the most steps in a run's folder, and its steps; damaged ones are passed over."""
    for steps, path in reversed(_checkpoints(folder)):
        if is_whole(path):
            return path, steps
    return None


def drop_checkpoints(folder: Path, steps: int, count: int) -> None:
    """Deletes all but the last `count` checkpoints of a run up to `steps`, where the newest stands."""
    earlier = [path for there, path in _checkpoints(folder) if there < steps]
    for path in earlier[: len(earlier) + 1 - count]:
        shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by their steps, whole or not."""
    return sorted((int(path.name[11:]), path) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal())
