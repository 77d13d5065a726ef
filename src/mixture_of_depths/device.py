"""The device that computes: chosen by its name, and refused by name where it is not there."""

import re

import torch

REMEDY = "give device='cpu'"


def chosen_device(device: str | torch.device = "auto") -> torch.device:
    """The device of a name; nothing is put on it yet, and a GPU is not woken.

    Args:
        device: "auto", the CUDA GPU where there is one and else the CPU; "cpu"; "cuda", PyTorch's current GPU;
            "cuda:N", the GPU number N; or "mps", Apple's. The last is taken by name only, for it has no float64: tokens
            are drawn in that at a temperature, routing at random decides in it, and padded rows count their capacity
            under top-k.

    Raises:
        ValueError: for another name, or a device that is not there.
    """
    name = str(device)
    known = re.fullmatch(r"auto|cpu|mps|cuda(?::(0|[1-9][0-9]*))?", name)
    if known is None:
        raise ValueError(f"device={name!r} is unknown; give 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            is_built = torch.version.cuda is not None or torch.version.hip is not None
            reason = "PyTorch finds no CUDA GPU" if is_built else "this build of PyTorch has no CUDA"
            raise ValueError(f"device={name!r} is not available: {reason}; {REMEDY}")
        count = torch.cuda.device_count()
        if known[1] is not None and int(known[1]) >= count:
            there = f"the GPUs that PyTorch sees are numbered from 0 to {count - 1}"
            raise ValueError(f"device={name!r} is not available: {there}; give one of them, or device='cpu'")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={name!r} is not available: PyTorch finds no GPU of Apple's; {REMEDY}")
    return torch.device(name)


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was told, before a time is taken."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def accelerator_name(device: torch.device) -> str | None:
    """What the records call the accelerator that a device is; None for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return None if device.type == "cpu" else device.type
