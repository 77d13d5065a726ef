"""Time of a training step: this package's dense and Mixture-of-Depths models against transformers' Llama.

    python benchmarks/train_step.py                 # both precisions, eager and compiled
    python benchmarks/train_step.py --precision fp32 --repeats 11
    python benchmarks/train_step.py --profile       # where a compiled step's time goes

d 512, 8 blocks, 8 heads, S 512, B 4, SwiGLU 1408, vocabulary 4,096; forward and backward pass, no optimiser. All sides
are timed in turns in this process. Prints one JSON line.

Per precision: `dense_ms`, `mod_ms`, `hf_llama_ms` are the better of eager and compiled, each a median; `speedup` =
dense_ms / mod_ms; `flop_ratio` = training FLOPs per token of the dense model over the MoD model's; `realised` = speedup
/ flop_ratio; `matmul_peak_gflops` is the median of 4096-cubed products in the same precision, taken in the same turns;
`mfu` = the dense step's FLOP/s over that peak; `peak_rss_ratio` = peak memory of a process that runs eager MoD steps
over one that runs dense steps.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDConfig, MoDForCausalLM, training_flops_per_token
from mixture_of_depths.provenance import provenance

BATCH, LENGTH = 4, 512
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": LENGTH,
}


def config_of(side: str) -> MoDConfig:
    """The configuration of "dense" or "mod"."""
    routed: dict[str, Any] = {"routed_layers": []} if side == "dense" else {}
    return MoDConfig(**SHAPE, **routed)


def build(side: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if side == "hf_llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    return MoDForCausalLM(config_of(side)).train()


def make_step(side: str, bf16: bool, compiled: bool) -> Callable[[], None]:
    model = build(side)
    run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    input_ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = run(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def matmul_peak(bf16: bool, repeats: int) -> float:
    a, b = (torch.randn(4096, 4096, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    return 2 * 4096**3 / min(seconds(lambda: a @ b) for _ in range(repeats)) / 1e9


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(side: str, bf16: bool, threads: int) -> int:
    """Peak resident kilobytes of this process after a few eager steps."""
    torch.set_num_threads(threads)
    step = make_step(side, bf16, compiled=False)
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(side: str, bf16: bool, threads: int) -> str:
    """Where the time of a compiled step goes: milliseconds a step by kind of operation."""
    torch.set_num_threads(threads)
    step = make_step(side, bf16, compiled=True)
    step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    kinds = {"aten::mm": "matmul", "aten::bmm": "attention", "flash_attention": "attention", "Compiled": "fused"}
    spent: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = next((name for word, name in kinds.items() if word in event.key), "other")
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total / 3e3
    return f"{side} {'bf16' if bf16 else 'fp32'}: " + ", ".join(f"{kind} {ms:.0f} ms" for kind, ms in spent.items())


def measure(bf16: bool, repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    # Before this process grows: a child's peak starts at what its parent held.
    memory = {side: in_fresh_process(peak_memory, side, bf16, threads) for side in ("mod", "dense")}
    sides = [(side, compiled) for side in ("dense", "mod", "hf_llama") for compiled in (False, True)]
    steps = {side: make_step(side[0], bf16, side[1]) for side in sides}
    for step in steps.values():
        step()
        step()
    times: dict[tuple[str, bool], list[float]] = {side: [] for side in sides}
    peaks = []
    for _ in range(repeats):
        for side, step in steps.items():
            times[side].append(seconds(step))
        peaks.append(matmul_peak(bf16, 1))
    best = {
        side: min(median(times[side, compiled]) for compiled in (False, True)) for side in ("dense", "mod", "hf_llama")
    }
    flops = {side: training_flops_per_token(config_of(side), LENGTH) for side in ("dense", "mod")}
    speedup, flop_ratio = best["dense"] / best["mod"], flops["dense"] / flops["mod"]
    peak = median(peaks)
    return {
        **{f"{side}_ms": round(value * 1e3, 1) for side, value in best.items()},
        **{
            f"{side}_{'compiled' if compiled else 'eager'}_ms": round(median(times[side, compiled]) * 1e3, 1)
            for side, compiled in sides
        },
        "speedup": round(speedup, 3),
        "flop_ratio": round(flop_ratio, 3),
        "realised": round(speedup / flop_ratio, 3),
        "dense_over_hf_llama": round(best["dense"] / best["hf_llama"], 3),
        "matmul_peak_gflops": round(peak, 1),
        "mfu": round(flops["dense"] * BATCH * LENGTH / best["dense"] / 1e9 / peak, 3),
        "peak_rss_ratio": round(memory["mod"] / memory["dense"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--profile", action="store_true", help="print where a compiled step's time goes, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.profile:
        for precision in arguments.precision:
            for side in ("dense", "mod", "hf_llama"):
                print(in_fresh_process(profile, side, precision == "bf16", arguments.threads))
        return
    record: dict[str, Any] = {"benchmark": "train_step", "repeats": arguments.repeats}
    for precision in arguments.precision:
        bf16 = precision == "bf16"
        record[precision] = in_fresh_process(measure, bf16, arguments.repeats, arguments.threads)
    if {"fp32", "bf16"} <= record.keys():
        record["bf16_speedup_dense"] = round(record["fp32"]["dense_ms"] / record["bf16"]["dense_ms"], 3)
        record["bf16_speedup_mod"] = round(record["fp32"]["mod_ms"] / record["bf16"]["mod_ms"], 3)
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
