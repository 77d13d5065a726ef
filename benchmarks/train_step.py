"""Time of a training step: this package's dense and Mixture-of-Depths models against transformers' Llama.

    python benchmarks/train_step.py                 # both precisions, eager and compiled
    python benchmarks/train_step.py --precision fp32 --repeats 11

d 512, 8 layers, 8 heads, S 512, B 4, SwiGLU 1408, vocabulary 4,096; forward and backward pass, no optimiser. All sides
are timed in turns in this process. Prints one JSON line.

Per precision: `dense_ms`, `mod_ms`, `hf_llama_ms` are the better of eager and compiled, each a median; `speedup` =
dense_ms / mod_ms; `flop_ratio` = training FLOPs per token of the dense model over the MoD model's; `realised` = speedup
/ flop_ratio; `matmul_peak_gflops` is the best of several 4096-cubed products in the same precision; `mfu` = the dense
step's FLOP/s over that peak; `peak_rss_ratio` = peak memory of a process that runs MoD steps over one that runs dense
steps.
"""

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.flops import training_flops_per_token
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


def _report_peak(side: str, bf16: bool, queue: "multiprocessing.Queue[int]", threads: int) -> None:
    torch.set_num_threads(threads)
    step = make_step(side, bf16, compiled=False)
    for _ in range(3):
        step()
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak_memory(side: str, bf16: bool, threads: int) -> int:
    """Peak resident kilobytes of a fresh process that runs a few eager steps."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report_peak, args=(side, bf16, queue, threads))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def measure(bf16: bool, repeats: int, threads: int) -> dict[str, Any]:
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
    peak = max(peaks)
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
        "peak_rss_ratio": round(peak_memory("mod", bf16, threads) / peak_memory("dense", bf16, threads), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {"benchmark": "train_step", "repeats": arguments.repeats}
    for precision in arguments.precision:
        record[precision] = measure(precision == "bf16", arguments.repeats, arguments.threads)
    if {"fp32", "bf16"} <= record.keys():
        record["bf16_speedup_dense"] = round(record["fp32"]["dense_ms"] / record["bf16"]["dense_ms"], 3)
        record["bf16_speedup_mod"] = round(record["fp32"]["mod_ms"] / record["bf16"]["mod_ms"], 3)
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
