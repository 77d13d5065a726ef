"""Where a result comes from: commit, command, versions and machine, for every results file."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixture_of_depths import __version__

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LIBRARY_FIELDS = ("transformers_version", "architectures", "dtype", "_name_or_path")


def provenance(device: "torch.device | None" = None) -> dict[str, Any]:
    """The commit of this source tree (None outside one), the command, the versions that matter, and the machine.

    The commit is that of the first call in a process: a long run is of the code that it began with.

    Args:
        device: what computed the result; None where that was the CPU, or nothing was computed.
    """
    import torch

    from mixture_of_depths.device import accelerator_name

    return {
        "git_commit": _git_commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            "mixture-of-depths": __version__,
            **{name: version(name) for name in ("torch", "transformers", "tokenizers")},
        },
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
            "accelerator": None if device is None else accelerator_name(device),
        },
    }


def model_digest(model: "PreTrainedModel", *others: str) -> str:
    """A digest of a model's configuration, weights and thresholds, and of other texts that decide what it does.

    Of two models under one name it tells whether they are the same.
    """
    import torch

    # What the library adds of its own accord says nothing of the model.
    fields = {name: value for name, value in model.config.to_diff_dict().items() if name not in LIBRARY_FIELDS}
    digest = hashlib.sha256(json.dumps([fields, others], sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _program() -> str:
    """The script, or the package that `python -m` runs."""
    script = Path(sys.argv[0])
    return f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name


@cache
def _git_commit() -> str | None:
    """The commit, with "-dirty" where a tracked file has changed since, but for those of results, which runs write."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        run = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        # An installed package may lie inside another project's tree, whose commit says nothing about this source.
        if git("ls-files", "--error-unmatch", __file__) is None:
            return None
    except FileNotFoundError:
        return None
    commit = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results")
    return f"{commit}-dirty" if changed else commit


def processor() -> str:
    """The processor's name; on Linux with the numbers of its family and model, which virtual machines leave out."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()
