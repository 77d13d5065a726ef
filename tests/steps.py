"""Fast steps beside the eager one: models with blocks of every kind, and the logits of both for the same tokens."""

from collections.abc import Callable
from typing import Any

import torch
from models import left_padded, with_parts

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.sampling.step import decode_step, grow, prefill

# Sizes of which none is a power of two, and blocks of every kind.
ODD: dict[str, Any] = {
    "hidden_size": 24,
    "head_dim": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "routed_layers": [0, 2, 3],
}
TWO: dict[str, Any] = {"num_hidden_layers": 2, "routed_layers": [0, 1]}
EVERY_PART = ["block", "block_keep_keys", "mlp"]
# Numbers of rows with changes of a model: every router, activation and kind of routed block.
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (3, {"causal_router": "predictor", "router_activation": "tanh"}),
    (18, {**TWO, "parts": ["mlp", "block"], "bypass_rank": 0}),
    (
        2,
        {
            **TWO,
            "parts": "block",
            "router_type": "random",
            "router_activation": "none",
            "attention_bias": True,
            "capacity": 0.5,
        },
    ),
    (2, {**TWO, "parts": ["block", "block_keep_keys"], "causal_router": "auxiliary_loss", "query_key_norm": True}),
    (2, {**TWO, "parts": "mlp", "router_norm": True, "router_activation": "straight_through"}),
    (1, {**TWO, "parts": "block", "first_token_enters": True, "tie_word_embeddings": True}),
    (
        2,
        {
            **TWO,
            "parts": ["block", "block_keep_keys"],
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "causal_router": "predictor",
            "router_norm": True,
            "rms_norm_eps": 0.05,
        },
    ),
]


def model_of(parts: Any = EVERY_PART, bypass_rank: int = 3, **changes: Any) -> MoDForCausalLM:
    fields = {**ODD, "causal_router": "threshold", **changes}
    model = with_parts(parts, bypass_rank, **fields).float().eval()
    for name, weight in model.named_parameters():
        # No two are alike, and none does nothing.
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
        if name.endswith("router_scale"):
            torch.nn.init.constant_(weight, 0.7)
    return model


def logits_of_both(
    make_step: Callable[..., Any],
    model: MoDForCausalLM,
    batch: int,
    length: int,
    new: int,
    ended: dict[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of random tokens by the step and by the eager step, and which rows entered, which is the same.

    Args:
        make_step: makes a step of a model, prompts, their mask and the number of tokens.
        model: the model.
        batch, length, new: number of rows, of tokens of the prompts, and of those after them.
        ended: of rows that end, the number of tokens after which they do.
    """
    input_ids, mask = left_padded(batch, length)
    step = make_step(model, input_ids, mask, new)
    logits_BV, state = prefill(model, input_ids, mask, new)
    assert torch.equal(step.logits_BV, logits_BV)
    of_step, of_eager, entered = [], [], []
    for number in range(new):
        grow(state)
        token_B = torch.randint(0, 31, (batch,))
        active_B = torch.tensor([number < (ended or {}).get(row, new) for row in range(batch)])
        with torch.no_grad():
            of_eager.append(decode_step(model, token_B, active_B, state))
        of_step.append(step(token_B, None if bool(active_B.all()) else active_B).clone())
        entered.append(step.entered())
        assert torch.equal(entered[-1], torch.stack([layer.entered_B for layer in state.layers]))
    return torch.stack(of_step), torch.stack(of_eager), torch.stack(entered)


def spoil_routed_parts(model: MoDForCausalLM) -> None:
    """Makes no numbers of what is not read when no row enters a block of `model_of()`.

    Behind the prompts, which need the keys of all tokens, and attention where the MLP alone is routed.
    """
    for number, unread in (
        (0, "self_attn|mlp|norm"),
        (2, "q_proj|o_proj|mlp|post_attention"),
        (3, "mlp|post_attention"),
    ):
        for name, weight in model.model.layers[number].named_parameters():
            if any(part in name for part in unread.split("|")) and "router" not in name:
                weight.data.fill_(torch.nan)
