"""The parts "decoding" and "prefill" of `gpu.py`: Mixture-of-Depths, dense and transformers' Llama, in bf16, in turns.

Random weights and random prompts; every other block routed at 12.5 %, its thresholds set on random tokens. `dense` and
`mod` are `stream()` with its fast step, which is a CUDA graph on a GPU, `hf_static` is `generate()` with its static
cache, which it compiles there; all greedy. `roof_fraction` is the bytes that a step must read over its time and over
the speed at which the device reads memory in the same turns; `entered` the share of the tokens, sampled or of the long
prompt, that entered a block.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import torch
from gpu_scale import Scale, config_of, in_turns, reading, seconds
from parts import Case
from sampling_sides import calibrate, generate_speed, llama, random_tokens, routed, spread_embeddings

from mixture_of_depths import MoDForCausalLM, SamplingOptions, decode_bytes, model_parameters, stream
from mixture_of_depths.device import wait_for

# Sampled before the clock starts: the first steps compile, are recorded, grow the buffers and drop their checks.
WARM_UP = 4


def build(size: str, longest: int, scale: Scale) -> dict[str, MoDForCausalLM]:
    """Both of our sides in bf16, calibrated."""
    models = {}
    for side in ("mod", "dense"):
        torch.manual_seed(0)
        with scale.device:
            model = MoDForCausalLM(config_of(size, side, longest, causal_router="threshold")).eval()
        torch.nn.Module.to(model, torch.bfloat16)
        spread_embeddings(model)
        models[side] = model
    calibrate(models["mod"], scale.prompt, scale.new, rows=32)
    return models


def stream_speed(model: MoDForCausalLM, prompts: torch.Tensor, new: int) -> tuple[float, float | None]:
    """Tokens per second of decoding, and the share of the sampled tokens that entered; None for a dense model."""
    options = SamplingOptions(max_new_tokens=new, temperature=0)
    routed_layers = model.config.routed_layers or []
    entered: list[torch.Tensor] = []

    def watch(entered_LB: torch.Tensor) -> None:
        entered.append(entered_LB[routed_layers])

    start = 0.0
    for number, _ in enumerate(stream(model, prompts, options=options, compiled=True, watch=watch), start=1):
        if number == WARM_UP:
            wait_for(model.device)
            start = time.perf_counter()
    wait_for(model.device)
    elapsed = time.perf_counter() - start
    speed = prompts.shape[0] * (new - WARM_UP) / elapsed
    if not routed_layers:
        return speed, None
    return speed, torch.stack(entered).float().mean().item()


def decode(size: str, rows: int, scale: Scale) -> dict[str, Any]:
    models = build(size, scale.prompt + scale.new, scale)
    peer = llama(models["dense"])
    vocabulary, length = models["dense"].config.vocab_size, scale.prompt
    entered: list[float] = []

    def ours(side: str, prompts: torch.Tensor) -> float:
        speed, share = stream_speed(models[side], prompts, scale.new)
        if share is not None:
            entered.append(share)
        return speed

    sides: dict[str, Callable[[torch.Tensor], float]] = {side: partial(ours, side) for side in models}
    sides["hf_static"] = lambda prompts: generate_speed(peer, prompts, scale.new, cache_implementation="static")
    read, read_bytes = reading(scale)
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    readings, first = [], {}
    order = list(sides)
    for turn in range(scale.repeats + 1):
        prompts = random_tokens(vocabulary, rows, length, seed=turn).to(scale.device)
        at = turn % len(order)
        for side in order[at:] + order[:at]:
            start = time.perf_counter()
            speed = sides[side](prompts)
            if turn == 0:
                first[side] = round(time.perf_counter() - start, 1)
            else:
                speeds[side].append(speed)
        readings.append(seconds(read, scale.device))
    middle = {side: median(values) for side, values in speeds.items()}
    bandwidth = read_bytes / median(readings)
    roofs = {}
    for side, values in middle.items():
        config = models["mod" if side == "mod" else "dense"].config
        needed = decode_bytes(config, scale.prompt + scale.new // 2, rows, 2).total
        roofs[side] = round(needed * values / rows / bandwidth, 3)
    return {
        "parameters": model_parameters(models["dense"].config),
        "rows": rows,
        "tokens_per_s": {side: round(value, 1) for side, value in middle.items()},
        **{f"mod_over_{side}": round(middle["mod"] / value, 3) for side, value in middle.items() if side != "mod"},
        "roof_fraction": roofs,
        "read_gb_per_s": round(bandwidth / 1e9),
        "entered": round(sum(entered) / len(entered), 4),
        "first_run_s": first,
    }


def prefill(size: str, scale: Scale) -> dict[str, Any]:
    models = build(size, scale.prefill_length + scale.new, scale)
    peer = llama(models["dense"])
    tokens = random_tokens(peer.config.vocab_size, 1, scale.prefill_length, seed=1).to(scale.device)

    def prompts() -> Iterator[torch.Tensor]:
        """One token shorter each turn: a kernel that is planned for every length is so here, too."""
        for cut in count():
            yield tokens[:, : scale.prefill_length - cut]

    @torch.no_grad()
    def ours(model: MoDForCausalLM, prompts: Iterator[torch.Tensor]) -> None:
        model(input_ids=next(prompts), use_cache=True, routing="causal", logits_to_keep=1)

    @torch.no_grad()
    def theirs(prompts: Iterator[torch.Tensor]) -> None:
        peer(input_ids=next(prompts), use_cache=True, logits_to_keep=1)

    sides: dict[str, Callable[[], object]] = {side: partial(ours, model, prompts()) for side, model in models.items()}
    sides["hf_llama"] = partial(theirs, prompts())
    for side in sides.values():
        side()
    times = in_turns(sides, scale.repeats, scale.device)
    shares = [layer.entered.float().mean() for layer in routed(models["mod"], tokens).values()]
    return {
        "tokens": scale.prefill_length,
        "ms": {side: round(value * 1e3, 2) for side, value in times.items()},
        "speedup": round(times["dense"] / times["mod"], 3),
        "mod_over_hf_llama": round(times["hf_llama"] / times["mod"], 3),
        "entered": round(sum(share.item() for share in shares) / len(shares), 4),
    }


def decoding_cases(scale: Scale) -> dict[str, Case]:
    return {f"{size}, {rows} rows": partial(decode, size, rows, scale) for size, rows in scale.decoding}


def prefill_cases(scale: Scale) -> dict[str, Case]:
    return {size: partial(prefill, size, scale) for size in scale.prefills}
