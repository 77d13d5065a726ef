"""Where vLLM's time goes in steps of a number of rows, in this process: by operator, and by rows of a product.

    python benchmarks/serving_profile.py runs/80 --rows 8 --text wikitext2_test.txt
    python benchmarks/serving_profile.py DENSE --rows 8 --text wikitext2_test.txt

Each row is a request with a prompt of 128 tokens of the text. Prints one JSON line: milliseconds a step without the
profiler, which itself takes time, and with it those of every operator, others it calls left out, and its calls a step.
`products` has, for oneDNN's on a CPU, the microseconds of one by its width of input and output and its number of rows.
"""

# pyright: reportMissingImports=false

import argparse
import json
import os
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported: no process of its own, no binding to cores that others use, too, and no words where
# the record goes.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from mixture_of_depths.provenance import provenance

PROMPT, WARM_UP, STEPS = 128, 20, 20


def operators(profiled: Any) -> dict[str, dict[str, float]]:
    """Of those that take a hundredth of the time or more, the longest first."""
    every = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in every)
    return {
        re.sub(r"^#* *(.*?) *#*$", r"\1", event.key): {
            "ms": round(event.self_cpu_time_total / STEPS / 1e3, 2),
            "calls": round(event.count / STEPS, 1),
        }
        for event in every
        if event.self_cpu_time_total > total / 100
    }


def products(profiled: Any) -> dict[str, dict[int, float]]:
    """Microseconds of one product, by its widths and its rows."""
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for event in profiled.key_averages(group_by_input_shape=True):
        if event.key == "_C::onednn_mm":
            (rows, width_out), (_, width_in) = event.input_shapes[:2]
            times[f"{width_in} to {width_out}"][rows] = round(event.self_cpu_time_total / event.count, 1)
    return {widths: dict(sorted(by_rows.items())) for widths, by_rows in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--text", type=Path, required=True, help="a text to cut prompts from")
    parser.add_argument("--precision", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    llm = LLM(str(arguments.checkpoint), dtype=arguments.precision, max_model_len=1024, enable_prefix_caching=False)
    torch.set_num_threads(arguments.threads)
    tokens = AutoTokenizer.from_pretrained(str(arguments.checkpoint))(arguments.text.read_text())["input_ids"]
    assert isinstance(tokens, list)
    sampling = SamplingParams(
        max_tokens=WARM_UP + 3 * STEPS, min_tokens=WARM_UP + 3 * STEPS, temperature=0, detokenize=False
    )
    engine, apart = llm.llm_engine, len(tokens) // arguments.rows
    for row in range(arguments.rows):
        engine.add_request(str(row), {"prompt_token_ids": tokens[row * apart :][:PROMPT]}, sampling)
    for _ in range(WARM_UP):
        engine.step()
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    milliseconds = (time.perf_counter() - began) / STEPS * 1e3
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(STEPS):
            engine.step()
    record = {
        "benchmark": "serving_profile",
        "rows": arguments.rows,
        "threads": arguments.threads,
        "precision": arguments.precision,
        "ms_per_step": round(milliseconds, 2),
        "operators": operators(profiled),
        "products": products(profiled),
    }
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
