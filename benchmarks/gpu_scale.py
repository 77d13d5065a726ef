"""The sizes of `gpu.py` on a GPU and for a trial on the CPU, and how time and memory are measured on a device."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from mixture_of_depths import MoDConfig
from mixture_of_depths.device import wait_for

Shape = dict[str, Any]

SHAPES: dict[str, Shape] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "135M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
    },
    "3B": {
        "vocab_size": 32000,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 26,
        "num_attention_heads": 24,
    },
}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        device: where it runs.
        training: size, sequences a step, and what is compiled: "nothing", "blocks", each for itself as `mod train
            --compile` does, or "model", the whole of it.
        train_length: tokens of a sequence in training.
        decoding: size and rows.
        prompt, new: tokens of a prompt, and sampled after it.
        prefills: sizes.
        prefill_length: tokens of a long prompt.
        repeats: turns of which a figure is the median.
        matmul_width: width of the square matrices whose product is the peak.
        read_bytes: size of the tensor whose sum measures the memory's speed.
    """

    device: torch.device
    training: tuple[tuple[str, int, str], ...]
    train_length: int
    decoding: tuple[tuple[str, int], ...]
    prompt: int
    new: int
    prefills: tuple[str, ...]
    prefill_length: int
    repeats: int
    matmul_width: int
    read_bytes: float


def gpu_scale() -> Scale:
    """What one GPU of 80 GB is asked, most valuable first."""
    return Scale(
        device=torch.device("cuda"),
        training=(
            ("135M", 16, "blocks"),
            ("1B", 4, "blocks"),
            ("135M", 16, "nothing"),
            ("1B", 4, "nothing"),
            ("135M", 16, "model"),
        ),
        train_length=2048,
        decoding=(
            ("1B", 1),
            ("135M", 1),
            ("1B", 8),
            ("3B", 1),
            ("1B", 64),
            ("135M", 8),
            ("135M", 64),
            ("3B", 8),
            ("3B", 64),
        ),
        prompt=128,
        new=128,
        prefills=("1B", "135M", "3B"),
        prefill_length=4096,
        repeats=7,
        matmul_width=8192,
        read_bytes=4e9,
    )


def smoke_scale() -> Scale:
    """Everything once, in sizes that two cores do in seconds."""
    return Scale(
        device=torch.device("cpu"),
        training=(("tiny", 2, "blocks"),),
        train_length=64,
        decoding=(("tiny", 1),),
        prompt=16,
        new=12,
        prefills=("tiny",),
        prefill_length=128,
        repeats=2,
        matmul_width=256,
        read_bytes=4e6,
    )


def config_of(size: str, side: str, longest: int, **changes: Any) -> MoDConfig:
    """The configuration of a size's "dense" or "mod" side, for texts of at most `longest` tokens."""
    routed: dict[str, Any] = {"routed_layers": []} if side == "dense" else {}
    return MoDConfig(**SHAPES[size], max_position_embeddings=longest, **routed, **changes)


def short(value: float) -> float:
    """The value to three digits."""
    return float(f"{value:.3g}")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def in_turns(sides: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each side; all sides take turns, and begin in another order each time."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    order = list(sides)
    for turn in range(repeats):
        first = turn % len(order)
        for side in order[first:] + order[:first]:
            times[side].append(seconds(sides[side], device))
    return {side: median(values) for side, values in times.items()}


def matmul(scale: Scale, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square product in `dtype`, and its operations: the peak that utilisation is measured against."""
    width = scale.matmul_width
    a, b = (torch.randn(width, width, device=scale.device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)

    product()
    return product, 2.0 * width**3


def reading(scale: Scale) -> tuple[Callable[[], object], float]:
    """A sum over a tensor much larger than any cache, and its bytes: the roof of what decoding can reach."""
    values = torch.ones(int(scale.read_bytes / 4), device=scale.device)
    values.sum()
    return values.sum, float(values.nbytes)


def own_peak_gigabytes(run: Callable[[], object], own_bytes: int, device: torch.device) -> float | None:
    """Largest memory that one side holds while it runs, other sides' weights left out; None where it is not counted.

    Args:
        run: the side.
        own_bytes: what it holds all the time.
        device: where it runs.
    """
    if device.type != "cuda":
        return None
    wait_for(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait_for(device)
    return round((torch.cuda.max_memory_allocated(device) - before + own_bytes) / 1e9, 2)
