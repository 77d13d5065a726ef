"""How fast a model samples on this machine, and what its step must read at least."""

import copy
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mixture_of_depths.device import wait_for
from mixture_of_depths.model.cache import MoDCache
from mixture_of_depths.model.flops import cache_bytes, decode_bytes
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.native import measured
from mixture_of_depths.sampling.quantization import quantize
from mixture_of_depths.sampling.step import product_shapes
from mixture_of_depths.sampling.stream import stream

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}


def in_precision(model: MoDForCausalLM, precision: str) -> MoDForCausalLM:
    """A copy of the model that never ends a text, with weights in "fp32", "bf16", or "int8" (all else in bf16)."""
    converted = copy.deepcopy(model).eval()
    nn.Module.to(converted, torch.float32 if precision == "fp32" else torch.bfloat16)
    assert converted.generation_config is not None
    converted.generation_config.eos_token_id = None
    if precision == "int8":
        quantize(converted)
    return converted


def decode_seconds(model: MoDForCausalLM, input_ids: Tensor, options: SamplingOptions, compiled: bool = True) -> float:
    """Mean seconds of a sampling step after the prompts; the prefill and the first steps are left out."""
    times, last = [], None
    for _ in stream(model, input_ids, options=options, compiled=compiled):
        now = time.perf_counter()
        if last is not None:
            times.append(now - last)
        last = now
    # The first step compiles, and the second is recorded, on a GPU, or the first without its checks.
    return sum(times[2:]) / len(times[2:])


def generate_tokens_per_second(model: MoDForCausalLM, input_ids: Tensor, max_new_tokens: int) -> float:
    """Speed of greedy sampling with `generate()`, end of text ignored; prefill included."""
    start = time.perf_counter()
    # The mixin annotates itself with a private protocol that no public class satisfies.
    tokens = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
    )
    assert isinstance(tokens, Tensor)
    wait_for(model.device)
    return (tokens.shape[1] - input_ids.shape[1]) / (time.perf_counter() - start)


def stream_over_generate(model: MoDForCausalLM, input_ids: Tensor, max_new_tokens: int, repeats: int) -> float:
    """How much faster `stream` is, not compiled, than `generate()`; prefill included, the two taking turns."""
    options, ratios = SamplingOptions(max_new_tokens=max_new_tokens, temperature=0), []
    # The first turn only warms up.
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in stream(model, input_ids, options=options):
            pass
        speed = max_new_tokens / (time.perf_counter() - start)
        ratios.append(speed / generate_tokens_per_second(model, input_ids, max_new_tokens))
    return median(ratios[1:])


@torch.no_grad()
def prefill_seconds(model: MoDForCausalLM, input_ids: Tensor) -> float:
    """Seconds of the causal pass over prompts that fills the cache."""
    start = time.perf_counter()
    model(input_ids=input_ids, use_cache=True, routing="causal", logits_to_keep=1)
    wait_for(model.device)
    return time.perf_counter() - start


@torch.no_grad()
def cache_of(model: MoDForCausalLM, input_ids: Tensor) -> int:
    """Bytes of the keys and values that the prompts leave."""
    cache = model(input_ids=input_ids, use_cache=True, routing="causal", logits_to_keep=1).cache
    assert isinstance(cache, MoDCache)
    return cache.num_bytes()


def read_gigabytes_per_second(device: torch.device) -> float:
    """The speed at which a device, of a CPU all cores, reads its memory: the sum of 400 MB of float32."""
    values = torch.ones(100_000_000, device=device)
    wait_for(device)
    start = time.perf_counter()
    values.sum()
    wait_for(device)
    return values.nbytes / (time.perf_counter() - start) / 1e9


def product_speeds(model: MoDForCausalLM, batch_size: int) -> dict[str, dict[str, float]]:
    """The speeds, in GB/s, by which the step's products are chosen."""
    speeds = measured(product_shapes(model, batch_size))
    return {f"{rows} x {dtype} {[*shape]}": ways for (rows, dtype, *shape), ways in speeds.items()}


def bench(
    model: MoDForCausalLM, prompt_tokens: int, new_tokens: int, batch_sizes: tuple[int, ...], repeats: int = 5
) -> dict[str, Any]:
    """Speed and memory of sampling with a model: per precision and batch size, each a median of `repeats`.

    Prompts are random tokens, which a trained router may let in more or less often than text. All is of the compiled
    step but `not_compiled_over_generate`, which is the speed of `stream` without compiling over that of `generate()`.
    `products` has the GB/s at which each way of multiplying reads weights, by rows, type and shape; on a CPU only.
    """
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, Any] = {"parameters": sum(weight.numel() for weight in model.parameters())}
    context = prompt_tokens + new_tokens // 2
    options = SamplingOptions(max_new_tokens=new_tokens, temperature=0)
    for precision, size in BYTES.items():
        sides = in_precision(model, precision)
        figures[precision] = {"weight_bytes": sum(t.nbytes for t in [*sides.parameters(), *sides.buffers()])}
        for batch_size in batch_sizes:
            # Drawn on the CPU: the same on every device.
            prompts = torch.randint(0, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
            input_ids = prompts.to(model.device)
            torch.compiler.reset()
            start = time.perf_counter()
            decode_seconds(sides, input_ids, SamplingOptions(max_new_tokens=5, temperature=0))
            compile_seconds = time.perf_counter() - start
            steps, bandwidths = [], []
            for _ in range(repeats):
                steps.append(decode_seconds(sides, input_ids, options))
                bandwidths.append(read_gigabytes_per_second(model.device))
            read = decode_bytes(model.config, context, batch_size, 1)
            bytes_read = read.weights * size + read.cache * max(size, 2)
            figures[precision][f"batch {batch_size}"] = {
                "tokens_per_s": round(batch_size / median(steps), 1),
                "roof_fraction": round(bytes_read / median(steps) / 1e9 / median(bandwidths), 3),
                "cache_bytes": cache_of(sides, input_ids),
                "cache_bytes_expected": cache_bytes(model.config, prompt_tokens, max(size, 2.0)) * batch_size,
                "compile_s": round(compile_seconds, 1),
                "products": product_speeds(sides, batch_size) if model.device.type == "cpu" else {},
                "not_compiled_over_generate": round(stream_over_generate(sides, input_ids, new_tokens, repeats), 3),
            }
    return figures
