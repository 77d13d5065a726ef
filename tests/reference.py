"""Slow oracles, token by token and written from the equations; they share no code with the package."""

import math

import torch
from torch import Tensor

from mixture_of_depths.modeling import DecoderLayer, MoDForCausalLM


def rms_norm(x_D: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_D / torch.sqrt((x_D * x_D).mean() + eps) * weight_D


def rope(x_h: Tensor, position: int, theta: float) -> Tensor:
    """Rotates the pairs (i, i + h/2) by position * theta^(-2i/h)."""
    half = x_h.shape[0] // 2
    turned = []
    for i in range(half):
        angle = position * theta ** (-2 * i / x_h.shape[0])
        turned.append(x_h[i] * math.cos(angle) - x_h[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * theta ** (-2 * i / x_h.shape[0])
        turned.append(x_h[i + half] * math.cos(angle) + x_h[i] * math.sin(angle))
    return torch.stack(turned)


def linear(layer: torch.nn.Linear, x_D: Tensor) -> Tensor:
    y = layer.weight @ x_D
    return y if layer.bias is None else y + layer.bias


def block_deltas(
    layer: DecoderLayer,
    tokens: dict[int, Tensor],
    positions: list[int],
    documents: list[int],
    heads: int,
    key_heads: int,
    theta: float,
    eps: float,
) -> dict[int, Tensor]:
    """f(X)_i for every token i of `tokens`, which are the only ones that attend and are attended to."""
    attention, mlp = layer.self_attn, layer.mlp
    queries, keys, values = {}, {}, {}
    for i, x_D in tokens.items():
        normed = rms_norm(x_D, layer.input_layernorm.weight, eps)
        query = linear(attention.q_proj, normed).view(heads, -1)
        key = linear(attention.k_proj, normed).view(key_heads, -1)
        if isinstance(attention.q_norm, torch.nn.RMSNorm):
            query = torch.stack([rms_norm(q, attention.q_norm.weight, eps) for q in query])
            key = torch.stack([rms_norm(k, attention.k_norm.weight, eps) for k in key])
        queries[i] = [rope(q, positions[i], theta) for q in query]
        keys[i] = [rope(k, positions[i], theta) for k in key]
        values[i] = linear(attention.v_proj, normed).view(key_heads, -1)
    deltas = {}
    for i, x_D in tokens.items():
        seen = [j for j in tokens if j <= i and documents[j] == documents[i]]
        attended = []
        for head in range(heads):
            group = head // (heads // key_heads)
            scores = torch.stack([queries[i][head] @ keys[j][group] for j in seen]) / math.sqrt(len(queries[i][head]))
            shares = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            attended.append(sum(share * values[j][group] for share, j in zip(shares, seen, strict=True)))
        attended_D = linear(attention.o_proj, torch.cat(attended))
        normed = rms_norm(x_D + attended_D, layer.post_attention_layernorm.weight, eps)
        gate = linear(mlp.gate_proj, normed)
        deltas[i] = attended_D + linear(mlp.down_proj, gate / (1 + torch.exp(-gate)) * linear(mlp.up_proj, normed))
    return deltas


def activate(r: Tensor, name: str) -> Tensor:
    return {"none": lambda: r, "sigmoid": lambda: 1 / (1 + torch.exp(-r)), "tanh": lambda: torch.tanh(r)}[name]()


def causal_logit(layer: DecoderLayer, x_D: Tensor, eps: float) -> Tensor:
    """The predictor's logit behind a stop-gradient, or the router's own, against a threshold if it has one."""
    assert layer.router is not None
    predictor = layer.router.predictor
    if layer.router.config.causal_router == "threshold":
        return layer.router.proj.weight[0] @ x_D - layer.router.threshold[0]
    if predictor is None:
        return layer.router.proj.weight[0] @ x_D
    x_D = x_D.detach()
    hidden = linear(predictor.up_proj, x_D / torch.sqrt((x_D * x_D).mean() + eps))
    r = (layer.router.proj.weight[0] @ x_D).detach()
    return linear(predictor.down_proj, hidden / (1 + torch.exp(-hidden)))[0] + predictor.router_scale[0] * r


def reference_forward(
    model: MoDForCausalLM,
    input_ids: Tensor,
    real: list[list[bool]],
    positions: list[list[int]],
    documents: list[list[int]],
    routing: str,
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and the mean over routed blocks of the binary cross-entropy against top-k membership."""
    config = model.config
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    x = [[model.model.embed_tokens.weight[token] for token in row] for row in input_ids]
    batch, length = input_ids.shape
    losses = []
    for layer_idx, layer in enumerate(model.model.layers):
        entropy, counted = torch.zeros((), dtype=torch.float64), 0
        for b in range(batch):
            alive = [i for i in range(length) if real[b][i]]
            chosen, weights = alive, {}
            if layer_idx in config.routed_layers:
                r = {i: layer.router.proj.weight[0] @ x[b][i] for i in alive}
                logits = {i: causal_logit(layer, x[b][i], eps) for i in alive}
                if routing == "top_k":
                    capacity = max(1, math.floor(config.capacity_fraction(layer_idx) * length + 1e-9))
                    chosen = sorted(sorted(alive, key=lambda i: -float(r[i]))[:capacity])
                    for i in alive:
                        # -log p for members and -log (1 - p) for others, p = 1 / (1 + exp(-logit)); 1 - p itself
                        # would lose its digits to cancellation for a large logit.
                        entropy = entropy + torch.log1p(torch.exp(-logits[i] if i in chosen else logits[i]))
                    counted += len(alive) if config.causal_router != "threshold" else 0
                else:
                    chosen = [i for i in alive if float(logits[i]) > 0]
                weights = {i: activate(r[i], config.router_activation) for i in chosen}
            deltas = block_deltas(
                layer,
                {i: x[b][i] for i in chosen},
                positions[b],
                documents[b],
                config.num_attention_heads,
                config.num_key_value_heads,
                theta,
                eps,
            )
            for i in chosen:
                x[b][i] = x[b][i] + (weights[i] * deltas[i] if weights else deltas[i])
        if counted:
            losses.append(entropy / counted)
    rows = []
    for row in x:
        normed = [rms_norm(x_D, model.model.norm.weight, eps) for x_D in row]
        rows.append(torch.stack([model.lm_head.weight @ x_D for x_D in normed]))
    return torch.stack(rows), torch.stack(losses).mean() if losses else torch.zeros(())
