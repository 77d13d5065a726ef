"""Compiles every kernel that the step on a GPU launches, for a GPU that need not be there.

A program, run by `test_graph.py` in a process of its own, since in that of the tests kernels are interpreted. It prints
a JSON object: of each kernel, the most bytes of shared memory that a program of it takes. Arguments are the compute
capabilities to compile for, by default 80.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.sampling import graph

CONFIG = MoDConfig(
    vocab_size=9000,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=9,
    num_key_value_heads=3,
    routed_layers=[1, 2, 3],
    routed_parts=["block", "block_keep_keys", "mlp"],
    bypass_rank=16,
    query_key_norm=True,
)
# What else launches have arguments for.
OTHERS = {"causal_router": "threshold", "router_norm": True, "attention_bias": True}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def type_of(argument: Any) -> str:
    if isinstance(argument, torch.Tensor):
        return TYPES[argument.dtype]
    return "constexpr" if argument is None else "fp32" if isinstance(argument, float) else "i32"


@contextmanager
def recorded() -> Iterator[dict[str, Any]]:
    """The kernels that are to be launched, each with its types and constants once."""
    kernels: dict[str, Any] = {}

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
        options = {"num_warps": constants.pop("num_warps", 4), "num_stages": 2}
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        signature = {name: type_of(argument) for name, argument in named.items()}
        signature |= dict.fromkeys(constants, "constexpr")
        absent = {name: None for name, argument in named.items() if argument is None}
        constants = {**absent, **constants}
        signature = {name: signature[name] for name in kernel.arg_names}
        kernels[f"{kernel.__name__} {signature} {constants} {options}"] = (kernel, signature, constants, options)

    launch, factor = graph.launch, graph.GraphStep._factor
    graph.launch = record
    # As on a GPU.
    graph.GraphStep._factor = lambda self, map_of: graph.PRECISIONS[map_of.weight.dtype]
    try:
        yield kernels
    finally:
        graph.launch, graph.GraphStep._factor = launch, factor


def main() -> None:
    capabilities = [int(word) for word in sys.argv[1:]] or [80]
    shared: dict[str, int] = {}
    for dtype, changes in ((torch.bfloat16, {}), (torch.float32, OTHERS), (torch.float16, OTHERS)):
        model = MoDForCausalLM(CONFIG.changed(**changes)).eval()
        torch.nn.Module.to(model, dtype)
        with recorded() as kernels:
            for rows in (1, 64):
                prompts = torch.ones(rows, 2, dtype=torch.int64)
                graph.GraphStep(model, prompts, torch.ones_like(prompts), 400)
        for kernel, signature, constants, options in kernels.values():
            for capability in capabilities:
                source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
                made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                shared[kernel.__name__] = max(made.metadata.shared, shared.get(kernel.__name__, 0))
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
