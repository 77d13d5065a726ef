"""The part "training" of `gpu.py`: a training step, dense, Mixture-of-Depths and transformers' Llama in turns.

Forward and backward pass in bf16 autocast over float32 weights, no optimiser; every other block routed at 12.5 %.
Figures are those of `train_step.py`: `speedup` is the dense step's time over Mixture-of-Depths', `flop_ratio` the same
of the counted operations, `realised` the first over the second; `utilisation` is a step's FLOP/s over those of a large
product in the same turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_scale import SHAPES, Scale, config_of, in_turns, matmul, own_peak_gigabytes, seconds, short
from parts import Case
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDForCausalLM, model_parameters, training_flops_per_token

SIDES = ("dense", "mod", "hf_llama")


def build(side: str, size: str, scale: Scale) -> torch.nn.Module:
    torch.manual_seed(0)
    with scale.device:
        if side == "hf_llama":
            config = LlamaConfig(**SHAPES[size], max_position_embeddings=scale.train_length)
            return LlamaForCausalLM(config).train()
        return MoDForCausalLM(config_of(size, side, scale.train_length)).train()


def step_of(model: Any, rows: int, compiled: str, scale: Scale) -> Callable[[], None]:
    """One step of a model, on the same tokens every time."""
    run = model
    if compiled == "blocks":
        for layer in model.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    elif compiled == "model":
        run = torch.compile(model, fullgraph=True, dynamic=False)
    tokens = torch.randint(0, model.config.vocab_size, (rows, scale.train_length), device=scale.device)

    def step() -> None:
        with torch.autocast(scale.device.type, torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def measure(size: str, rows: int, compiled: str, scale: Scale) -> dict[str, Any]:
    models = {side: build(side, size, scale) for side in SIDES}
    steps: dict[str, Callable[[], object]] = {
        side: step_of(model, rows, compiled, scale) for side, model in models.items()
    }
    first = {side: round(seconds(step, scale.device), 1) for side, step in steps.items()}
    for step in steps.values():
        step()
    memory = {
        side: own_peak_gigabytes(step, sum(weight.nbytes for weight in models[side].parameters()), scale.device)
        for side, step in steps.items()
    }
    product, operations = matmul(scale, torch.bfloat16)
    times = in_turns({**steps, "matmul": product}, scale.repeats, scale.device)
    peak = operations / times["matmul"]
    flops = {
        side: training_flops_per_token(config_of(size, side, scale.train_length), scale.train_length)
        for side in ("dense", "mod")
    }
    flops["hf_llama"] = flops["dense"]
    tokens = rows * scale.train_length
    speedup, flop_ratio = times["dense"] / times["mod"], flops["dense"] / flops["mod"]
    return {
        "parameters": model_parameters(config_of(size, "dense", scale.train_length)),
        "rows": rows,
        "compiled": compiled,
        "ms": {side: round(times[side] * 1e3, 2) for side in SIDES},
        "tokens_per_s": {side: round(tokens / times[side]) for side in SIDES},
        "speedup": round(speedup, 3),
        "flop_ratio": round(flop_ratio, 3),
        "realised": round(speedup / flop_ratio, 3),
        "mod_over_hf_llama": round(times["hf_llama"] / times["mod"], 3),
        "dense_over_hf_llama": round(times["hf_llama"] / times["dense"], 3),
        "matmul_peak_tflops": short(peak / 1e12),
        "utilisation": {side: round(flops[side] * tokens / times[side] / peak, 3) for side in SIDES},
        "peak_gb": memory,
        "first_step_s": first,
    }


def cases(scale: Scale) -> dict[str, Case]:
    return {
        f"{size}, {compiled} compiled": partial(measure, size, rows, compiled, scale)
        for size, rows, compiled in scale.training
    }
