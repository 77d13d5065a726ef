"""The part "parity" of `gpu.py`: a small model does on the device what it does on the CPU.

In float32, logits under both routings, and a training step's loss and gradients, agree to 1e-4 of the largest; as many
decisions as differ are counted. In bf16 the device must be as near to float32 on the CPU as the CPU's own bf16 is, to a
factor of two. `generate()`, `stream()` and its compiled step must sample the same tokens.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from gpu_scale import Scale, short
from parts import Case

from mixture_of_depths import MoDConfig, MoDForCausalLM, SamplingOptions, stream
from mixture_of_depths.model.routing import Routing

ROUTINGS: tuple[Routing, ...] = ("top_k", "causal")
TOLERANCE = 1e-4
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "capacity": 0.25,
    # Large enough for routers to decide and tokens to differ.
    "initializer_range": 0.1,
    "causal_router": "threshold",
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"routed_layers": []},
    "mod": {},
    "predictor": {"causal_router": "predictor"},
    "staged experts": {"num_experts": 4},
    "integrated experts": {"routed_layers": [], "num_experts": 4, "num_noop_experts": 1},
}
# Sampling compiles, which takes time: a few of them, and in a trial a smaller one.
SAMPLED = ("mod", "dense", "staged experts")
SMALL = {"two blocks": {"num_hidden_layers": 2}}
ROWS, LENGTH, PROMPT, NEW = 4, 96, 24, 16


def build(name: str) -> MoDForCausalLM:
    torch.manual_seed(0)
    return MoDForCausalLM(MoDConfig(**{**SHAPE, **{**MODELS, **SMALL}[name]})).eval()


def copied(model: MoDForCausalLM, device: torch.device, dtype: torch.dtype = torch.float32) -> MoDForCausalLM:
    """A copy on a device, with weights in `dtype`."""
    copy_of_it = copy.deepcopy(model)
    torch.nn.Module.to(copy_of_it, device, dtype)
    return copy_of_it


def tokens_of(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE["vocab_size"], (ROWS, length), generator=generator)


@torch.no_grad()
def seen(model: MoDForCausalLM, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits, and every block's decisions, on the CPU."""
    output = model(tokens_of(LENGTH).to(model.device), routing=routing, use_cache=False, output_routing=True)
    decisions = [layer.entered.flatten() for layer in output.routing if layer is not None]
    return output.logits.float().cpu(), torch.cat([torch.zeros(0), *(entered.cpu() for entered in decisions)]).bool()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return short(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))


def forward_fp32(name: str, scale: Scale) -> dict[str, Any]:
    here = build(name)
    there = copied(here, scale.device)
    figures: dict[str, Any] = {}
    for routing in ROUTINGS:
        logits, decisions = seen(here, routing)
        other_logits, other_decisions = seen(there, routing)
        figures[routing] = {
            "difference": difference(other_logits, logits),
            "decisions": decisions.numel(),
            "decisions_that_differ": int((decisions != other_decisions).sum()),
        }
    return {**figures, "holds": all(figures[routing]["difference"] <= TOLERANCE for routing in ROUTINGS)}


def forward_bf16(name: str, scale: Scale) -> dict[str, Any]:
    exact = build(name)
    here, there = (copied(exact, device, torch.bfloat16) for device in (torch.device("cpu"), scale.device))
    figures: dict[str, Any] = {}
    for routing in ROUTINGS:
        logits, decisions = seen(exact, routing)
        (on_cpu, decided_here), (on_device, decided_there) = seen(here, routing), seen(there, routing)
        figures[routing] = {
            # Means, since a single token that is decided otherwise moves its own logits by much.
            "error_on_cpu": short(float((on_cpu - logits).abs().mean())),
            "error_on_device": short(float((on_device - logits).abs().mean())),
            "decisions": decisions.numel(),
            "decisions_that_differ_on_cpu": int((decisions != decided_here).sum()),
            "decisions_that_differ_on_device": int((decisions != decided_there).sum()),
        }
    holds = all(figures[routing]["error_on_device"] <= 2 * figures[routing]["error_on_cpu"] for routing in ROUTINGS)
    return {**figures, "holds": holds}


def training_fp32(name: str, scale: Scale) -> dict[str, Any]:
    here = build(name).train()
    there = copied(here, scale.device)
    losses = []
    for model in (here, there):
        tokens = tokens_of(LENGTH).to(model.device)
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    gradients = {
        key: difference(other.grad.cpu(), weight.grad)
        for (key, weight), other in zip(here.named_parameters(), there.parameters(), strict=True)
        if weight.grad is not None and other.grad is not None
    }
    worst = max(gradients, key=gradients.__getitem__)
    figures = {
        "loss_difference": short(abs(losses[1] - losses[0])),
        "gradient_difference": gradients[worst],
        "largest_in": worst,
    }
    return {**figures, "holds": max(figures["loss_difference"], figures["gradient_difference"]) <= TOLERANCE}


def samples(model: MoDForCausalLM, rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What each of the ways to sample gives after prompts of two lengths, padded on the left."""
    prompts = tokens_of(PROMPT)[:rows].to(model.device)
    mask = torch.ones_like(prompts)
    mask[::2, : PROMPT // 3] = 0
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
    made: Any = model.generate(prompts, attention_mask=mask, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    yield "generate", made[:, PROMPT:].cpu()
    options = SamplingOptions(max_new_tokens=NEW, temperature=0)
    for way, compiled in (("stream", False), ("compiled", True)):
        tokens = list(stream(model, prompts, mask, options=options, compiled=compiled))
        yield way, torch.stack(tokens, dim=1).cpu()


def sampling(name: str, rows: int, dtype: torch.dtype, scale: Scale) -> dict[str, Any]:
    model = copied(build(name), scale.device, dtype)
    (_, expected), *others = samples(model, rows)
    differing = {way: int((tokens != expected).sum()) for way, tokens in others}
    figures: dict[str, Any] = {"tokens": expected.numel(), "tokens_that_differ_from_generate": differing}
    if dtype == torch.float32:
        # In bf16 two likeliest tokens are often equal up to rounding.
        figures["holds"] = not any(differing.values())
    return figures


def cases(scale: Scale, smoke: bool) -> dict[str, Case]:
    figures: dict[str, Case] = {}
    for name in MODELS:
        figures[f"{name}, forward, fp32"] = partial(forward_fp32, name, scale)
        figures[f"{name}, training, fp32"] = partial(training_fp32, name, scale)
        figures[f"{name}, forward, bf16"] = partial(forward_bf16, name, scale)
    if smoke:
        return {**figures, "sampling": partial(sampling, *SMALL, 1, torch.float32, scale)}
    for name in SAMPLED:
        figures[f"{name}, sampling, fp32"] = partial(sampling, name, ROWS, torch.float32, scale)
        figures[f"{name}, sampling, bf16"] = partial(sampling, name, ROWS, torch.bfloat16, scale)
    return figures
