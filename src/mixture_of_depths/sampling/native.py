"""The fast step on a CPU: attention in C++, and each product in the way that is the fastest on this processor.

Ways, by name: "native" is this package's own, in C++ (`native.cpp`), which reads a weight once for four rows and sums
in float32; "linear" and "transposed" are the library's, in either order. Processors with units for matrices are faster
with those at many rows. Each shape is measured once, and what was found is kept on the disk by processor, number of
threads and versions.

Shapes: R rows, M rows sorted by expert, E experts, B batch, I inputs, O outputs, N weights, H key-value heads, G query
heads each, h head width, S slots.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_depths.compiler import compiler_cache, load_native
from mixture_of_depths.files import locked, read_json, write_aside
from mixture_of_depths.provenance import processor

# Rows, type of the weights, outputs, inputs.
Shape = tuple[int, torch.dtype, int, int]
SOURCE, STEP_SOURCE = (Path(__file__).with_name(name) for name in ("native.cpp", "step.cpp"))
NATIVE_TYPES = (torch.float32, torch.bfloat16, torch.int8)
# Weights that are read in turn: more than a processor's cache holds, but not endlessly many small ones.
COLD_BYTES, MOST_WEIGHTS = 64e6, 200
TURNS = 5
# How much longer than the fastest turn the middle one may take.
STEADY = 1.5
# Interruptions a second beside which a measurement counts: an idle machine has a few tens, other work makes hundreds.
MOST_INTERRUPTIONS = 100
# By how much the library must be faster.
CLEARLY = 1.1
# What was measured by number of threads, in GB/s by way, and the fastest way for each shape of a step.
SPEEDS: dict[int, dict[Shape, dict[str, float]]] = {}
FASTEST: dict[Shape, str] = {}
# Holds something once the operators in C++ are there. Not asked of what was chosen, which graphs would be compiled anew
# for whenever it grows.
READY: list[bool] = []

torch.library.define("mixture_of_depths::products", "(Tensor[] weights, Tensor x) -> Tensor[]")


@torch.library.register_fake("mixture_of_depths::products")
def _(weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


torch.library.define(
    "mixture_of_depths::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor used, Tensor row) -> Tensor",
)


@torch.library.register_fake("mixture_of_depths::attend")
def _(query: Tensor, *others: Tensor) -> Tensor:
    return query.new_empty(query.shape)


torch.library.define("mixture_of_depths::grouped", "(Tensor weight, Tensor x, Tensor ends) -> Tensor")


@torch.library.register_fake("mixture_of_depths::grouped")
def _(weight: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@cache
def require_native() -> Any:
    """Compiles all that is in C++, the first time, and loads it; returns the library."""
    library = load_native(SOURCE.read_text() + STEP_SOURCE.read_text())
    READY.append(True)
    return library


def native(weights: Sequence[Tensor], x_RI: Tensor) -> list[Tensor]:
    """Products in float32, of shapes [R, O], of float32 rows with weights [O, I] of one type of `NATIVE_TYPES`."""
    return torch.ops.mixture_of_depths.products(weights, x_RI)


def is_native(weight: Tensor) -> bool:
    """Whether what is in C++ is ready for what lies on this device in this precision."""
    return weight.device.type == "cpu" and weight.dtype in NATIVE_TYPES and len(READY) > 0


def grouped_native(weight_EOI: Tensor, x_MI: Tensor, ends_E: Tensor) -> Tensor:
    """Products in float32, of shape [M, O], of rows sorted by expert with the weights of theirs; see `grouped_mm`."""
    return torch.ops.mixture_of_depths.grouped(weight_EOI, x_MI, ends_E)


def attend_native(
    query_RHGh: Tensor,
    key_RHh: Tensor,
    value_RHh: Tensor,
    keys_BHSh: Tensor,
    values_BHSh: Tensor,
    used_BS: Tensor,
    row_R: Tensor,
) -> Tensor:
    """Attention of rows to what is stored for them and to themselves, of shape [R, H, G, h]; see `step.attend`.

    No slot that is not used is read, nor one of another row.
    """
    return torch.ops.mixture_of_depths.attend(query_RHGh, key_RHh, value_RHh, keys_BHSh, values_BHSh, used_BS, row_R)


def linear(weight_OI: Tensor, x_RI: Tensor) -> Tensor:
    """The library's product, of rows rounded to the weight's type; to bf16 where that is 8 bits."""
    dtype = torch.bfloat16 if weight_OI.dtype == torch.int8 else weight_OI.dtype
    return F.linear(x_RI.to(dtype), weight_OI.to(dtype)).float()


def transposed(weight_OI: Tensor, x_RI: Tensor) -> Tensor:
    """The same the other way round."""
    dtype = torch.bfloat16 if weight_OI.dtype == torch.int8 else weight_OI.dtype
    return (weight_OI.to(dtype) @ x_RI.to(dtype).t()).t().float()


def each(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Sequence[Tensor], Tensor], list[Tensor]]:
    """The same product with one weight after the other."""
    return lambda weights, x_RI: [product(weight_OI, x_RI) for weight_OI in weights]


WAYS: dict[str, Callable[[Sequence[Tensor], Tensor], list[Tensor]]] = {
    "native": native,
    "linear": each(linear),
    "transposed": each(transposed),
}


def shape_of(rows: int, weight_OI: Tensor) -> Shape:
    """The shape of a product of so many rows with a weight."""
    outputs, inputs = weight_OI.shape
    return rows, weight_OI.dtype, outputs, inputs


def ways_for(shape: Shape) -> list[str]:
    """What is tried: weights of 8 bits are not made wider on the way, and Windows' compiler lacks what ours needs."""
    own = ["native"] if shape[1] in NATIVE_TYPES and platform.system() != "Windows" else []
    return own if own and shape[1] == torch.int8 else [*own, "linear", "transposed"]


def measure(shape: Shape) -> tuple[dict[str, float], bool]:
    """The speed of each way at which weights are read that no cache holds, in GB/s, and whether nothing disturbed it.

    Ways take turns, and of each its fastest turn counts, which other work on the machine slows down least. There was
    such work where turns differ much, or where this process was often interrupted.
    """
    rows, dtype, outputs, inputs = shape
    count = min(MOST_WEIGHTS, round(COLD_BYTES / (outputs * inputs * dtype.itemsize)) + 1)
    weight_NOI = torch.ones(count, outputs, inputs, dtype=dtype, device="cpu")
    x_RI = torch.ones(rows, inputs, dtype=torch.float32, device="cpu")
    seconds: dict[str, list[float]] = {way: [] for way in ways_for(shape)}
    began, interruptions = time.perf_counter(), times_interrupted()
    # The first turn only warms up.
    for turn in range(TURNS + 1):
        for way, times in seconds.items():
            start = time.perf_counter()
            WAYS[way](weight_NOI.unbind(), x_RI)
            if turn > 0:
                times.append(time.perf_counter() - start)
    rate = (times_interrupted() - interruptions) / (time.perf_counter() - began)
    is_steady = rate < MOST_INTERRUPTIONS and all(median(times) < STEADY * min(times) for times in seconds.values())
    return {way: round(weight_NOI.nbytes / min(times) / 1e9, 2) for way, times in seconds.items()}, is_steady


def times_interrupted() -> int:
    """How many times this process has had to make way for another."""
    return psutil.Process().num_ctx_switches().involuntary


def cache_file() -> Path:
    """Where measurements are kept: beside compiled graphs, under the name of all that they depend on."""
    code = [path.read_text() for path in (SOURCE, Path(__file__))]
    facts = [processor(), torch.get_num_threads(), torch.__version__, *code]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return compiler_cache() / "mixture-of-depths" / f"products-{name}.json"


def measured(shapes: Iterable[Shape]) -> dict[Shape, dict[str, float]]:
    """The speeds for each shape: those that are kept, and new ones for the others.

    What other work disturbed is not kept, and says nothing against our own products: then these alone are named.
    """
    speeds = SPEEDS.setdefault(torch.get_num_threads(), {})
    shapes = list(shapes)
    missing = [shape for shape in shapes if shape not in speeds]
    if missing:
        speeds.update(_measured(missing))
    return {shape: speeds[shape] for shape in shapes}


def _measured(shapes: list[Shape]) -> dict[Shape, dict[str, float]]:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {shape: " ".join(map(str, shape)) for shape in shapes}
    # Two processes would measure each other.
    with locked(path.with_suffix(".lock")):
        kept = read_speeds(path)
        missing = [shape for shape, name in names.items() if name not in kept]
        if any("native" in ways_for(shape) for shape in missing):
            require_native()
        new = {names[shape]: measure(shape) for shape in missing}
        steady = {name: speeds for name, (speeds, is_steady) in new.items() if is_steady}
        if steady:
            write_aside(path, json.dumps(kept | steady, indent=1))
    disturbed = {
        name: {"native": speeds["native"]} if "native" in speeds else speeds
        for name, (speeds, is_steady) in new.items()
        if not is_steady
    }
    every = kept | steady | disturbed
    return {shape: every[name] for shape, name in names.items()}


def read_speeds(path: Path) -> dict[str, dict[str, float]]:
    """What was kept, by shape and way; nothing when there is no file yet.

    Raises:
        ValueError: for a file that holds something else.
    """
    kept = read_json(path) if path.exists() else {}
    is_known = isinstance(kept, dict) and all(
        isinstance(speeds, dict)
        and len(speeds) > 0
        and all(way in WAYS and isinstance(speed, float) for way, speed in speeds.items())
        for speeds in kept.values()
    )
    if not is_known:
        raise ValueError(f"{path} does not hold measured products; delete it")
    return kept


def is_native_fastest(weights: Iterable[Tensor], rows: int) -> bool:
    """Whether products of so many rows with all these weights are nearly as fast in C++ as each in its fastest way."""
    sizes: dict[Shape, int] = {}
    for weight in weights:
        shape = shape_of(rows, weight)
        if "native" not in ways_for(shape):
            return False
        sizes[shape] = sizes.get(shape, 0) + weight.nbytes
    speeds = measured(sizes)
    own = sum(size / speeds[shape]["native"] for shape, size in sizes.items())
    best = sum(size / max(speeds[shape].values()) for shape, size in sizes.items())
    return own <= CLEARLY * best


def choose_fastest(shapes: Iterable[Shape]) -> None:
    """Notes the fastest way for each shape in `FASTEST`, and makes ready what it calls.

    The library's must be clearly faster than our own, which reads weights of the same rows in one call.
    """
    for shape, speeds in measured(shape for shape in shapes if shape not in FASTEST).items():
        FASTEST[shape] = max(speeds, key=lambda way: speeds[way] * (CLEARLY if way == "native" else 1))
    if "native" in FASTEST.values():
        require_native()
