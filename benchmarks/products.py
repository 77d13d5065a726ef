"""Products of few rows with weights that no cache holds: this package's C++, the library's, and those prepacked.

    python benchmarks/products.py                # 2816 x 1024, 1 to 16 rows, fp32 and bf16, all threads
    python benchmarks/products.py --outputs 1408 --inputs 512

Prints one JSON line: by precision and rows the GB/s at which each way reads the weights, the medians of turns that they
take one after the other; `native`, `linear` and `transposed` are what the fast step chooses from, `prepacked` is
oneDNN's reordered weight, or null where this processor refuses it. Prepacked weights come on top of the model's own,
which its own pass needs.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from mixture_of_depths.provenance import provenance
from mixture_of_depths.sampling.bench import read_gigabytes_per_second
from mixture_of_depths.sampling.native import COLD_BYTES, WAYS, require_native

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepacked(weight_NOI: Tensor, x_RI: Tensor) -> Callable[[], object] | None:
    """The products with weights in oneDNN's own order, as PyTorch's compiler calls them when it freezes weights."""
    operators = torch.ops.mkldnn
    try:
        packed = [operators._reorder_linear_weight(weight_OI, len(x_RI)) for weight_OI in weight_NOI]
    except RuntimeError:
        return None

    def products() -> list[Tensor]:
        rows_RI = x_RI.to(weight_NOI.dtype)
        return [operators._linear_pointwise(rows_RI, weight, None, "none", [], "").float() for weight in packed]

    return products


@torch.no_grad()
def speeds(outputs: int, inputs: int, rows: int, dtype: torch.dtype, turns: int) -> dict[str, float | None]:
    """GB/s of weights by way."""
    count = round(COLD_BYTES / (outputs * inputs * dtype.itemsize)) + 1
    weight_NOI, x_RI = torch.randn(count, outputs, inputs).to(dtype), torch.randn(rows, inputs)
    weights = weight_NOI.unbind()
    ways: dict[str, Callable[[], object]] = {name: partial(way, weights, x_RI) for name, way in WAYS.items()}
    if (products := prepacked(weight_NOI, x_RI)) is not None:
        ways["prepacked"] = products
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # The first turn only warms up.
    for turn in range(turns + 1):
        for name in sorted(ways, reverse=bool(turn % 2)):
            start = time.perf_counter()
            ways[name]()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    known = {name: round(weight_NOI.nbytes / median(times) / 1e9, 1) for name, times in seconds.items()}
    return {name: known.get(name) for name in (*WAYS, "prepacked")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=2816)
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--turns", type=int, default=21)
    arguments = parser.parse_args()
    require_native()
    result: dict[str, object] = {"benchmark": "products", "outputs": arguments.outputs, "inputs": arguments.inputs}
    for precision, dtype in PRECISIONS.items():
        for rows in arguments.rows:
            found = speeds(arguments.outputs, arguments.inputs, rows, dtype, arguments.turns)
            result[f"{precision} rows {rows}"] = found
    result["read_gb_per_s"] = round(read_gigabytes_per_second(torch.device("cpu")), 1)
    print(json.dumps({**result, **provenance()}))


if __name__ == "__main__":
    main()
