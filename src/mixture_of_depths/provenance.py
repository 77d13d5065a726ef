"""Where a result comes from: commit, command, versions and machine, for every results file."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixture_of_depths import __version__

if TYPE_CHECKING:
    import torch


def provenance(device: "torch.device | None" = None) -> dict[str, Any]:
    """The commit of this source tree (None outside one), the command, the versions that matter, and the machine.

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


def _program() -> str:
    """The script, or the package that `python -m` runs."""
    script = Path(sys.argv[0])
    return f"python -m {script.parent.name}" if script.name == "__main__.py" else script.name


def _git_commit() -> str | None:
    folder = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    # An installed package may lie inside another project's tree, whose commit says nothing about this source.
    tracked = subprocess.run(["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True)
    return run.stdout.strip() if run.returncode == 0 and tracked.returncode == 0 else None


def processor() -> str:
    """The processor's name; on Linux with the numbers of its family and model, which virtual machines leave out."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        fields = {name.strip(): value.strip() for name, value in fields.items()}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()
