"""Sides of a sampling benchmark: random tokens, routers calibrated on them, and transformers' Llama.

Everything is where its model is.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDConfig, MoDForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    "A": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "S": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 4},
}


def random_tokens(vocab_size: int, batch_size: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def spread_embeddings(model: MoDForCausalLM) -> None:
    """Gives embeddings a variance of 1, so that a router sees the token more than what its sequence has in common."""
    model.model.embed_tokens.weight.data.mul_(1 / model.config.initializer_range)


def build(shape: str, vocab_size: int, positions: int) -> dict[str, MoDForCausalLM]:
    """Both of our sides in float32, with random weights: every other block routed at 12.5 %, and dense."""
    sizes = {**SHAPES[shape], "vocab_size": vocab_size, "max_position_embeddings": positions}
    torch.manual_seed(0)
    mod = MoDForCausalLM(MoDConfig(**sizes, causal_router="threshold")).eval()
    dense = MoDForCausalLM(MoDConfig(**sizes, routed_layers=[])).eval()
    for model in (mod, dense):
        spread_embeddings(model)
    return {"mod": mod, "dense": dense}


@torch.no_grad()
def routed(model: MoDForCausalLM, tokens: torch.Tensor) -> dict[int, Any]:
    """What each routed block decides under causal routing."""
    routing = model.model(tokens.to(model.device), use_cache=False, routing="causal").routing
    return {layer_idx: routing[layer_idx] for layer_idx in model.config.routed_layers or []}


def calibrate(model: MoDForCausalLM, prompt: int, new: int, rows: int = 64) -> None:
    """Sets thresholds, in order of depth, so that the capacity's share of random tokens enters.

    Args:
        model: a model of `causal_router="threshold"`.
        prompt: tokens of the prompts, which are not looked at.
        new: tokens after them.
        rows: number of sequences.
    """
    tokens = random_tokens(model.config.vocab_size, rows, prompt + new, seed=1000)
    for layer_idx in model.config.routed_layers or []:
        router: Any = model.model.layers[layer_idx].router
        logits = routed(model, tokens)[layer_idx].causal_logits[:, prompt:].flatten().sort(descending=True).values
        router.threshold.add_(logits[round(len(logits) * model.config.capacity_fraction(layer_idx))])


def llama(dense: MoDForCausalLM) -> LlamaForCausalLM:
    """transformers' model with the dense side's weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{name: getattr(dense.config, name) for name in names},
        max_position_embeddings=dense.config.max_position_embeddings,
    )
    with dense.device:
        model = LlamaForCausalLM(config)
    model.load_state_dict(dense.state_dict())
    torch.nn.Module.to(model, dense.device, dense.dtype)
    return model.eval()


def decode_speed(run: Callable[[int], None], batch_size: int, new: int) -> float:
    """Tokens per second of decoding: what `new` tokens take beyond the first, with which the prefill goes.

    Args:
        run: makes that many new tokens for each prompt, and returns when they are there.
        batch_size: number of prompts.
        new: number of tokens.
    """
    seconds = []
    for count in (1, new):
        start = time.perf_counter()
        run(count)
        seconds.append(time.perf_counter() - start)
    return batch_size * (new - 1) / (seconds[1] - seconds[0])


def generate_speed(model: LlamaForCausalLM, input_ids: torch.Tensor, new: int, **settings: Any) -> float:
    """Speed of greedy sampling with `generate()`, end of text ignored."""
    input_ids = input_ids.to(model.device)

    def run(count: int) -> None:
        tokens = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
        # Waits for the device.
        tokens[0, -1].item()

    return decode_speed(run, input_ids.shape[0], new)
