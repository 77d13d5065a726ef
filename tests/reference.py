"""Slow oracles, token by token and written from the equations; they share no code with the package."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixture_of_depths import MoDConfig
from mixture_of_depths.model.experts import ExpertMLP
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM


class Reference(NamedTuple):
    """Logits [B, T, V], and the losses of the routers, each a mean over the blocks that have it."""

    logits: Tensor
    router_loss: Tensor
    balance_loss: Tensor
    z_loss: Tensor


class Asked(NamedTuple):
    """What one token asked its expert router for: the logits, and the experts and no-ops it chose."""

    logits: Tensor
    chosen: list[int]


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


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def first_largest(scores: dict[int, Tensor], count: int) -> list[int]:
    """The keys of the largest values; the first among equals."""
    return sorted(scores, key=lambda key: -float(scores[key]))[:count]


def expert_outputs(mlp: ExpertMLP, tokens: dict[int, Tensor], routing: str, asked: list[Asked]) -> dict[int, Tensor]:
    """The weighted sum of the experts that take each token; appends what every token asked for."""
    config: MoDConfig = mlp.config
    probabilities, chosen = {}, {}
    for i, x_D in tokens.items():
        logits = mlp.router.proj.weight @ x_D
        exponentials = torch.exp(logits - logits.max())
        probabilities[i] = exponentials / exponentials.sum()
        if config.expert_routing == "expert_choice":
            chosen[i] = list(range(config.num_experts))
        else:
            chosen[i] = first_largest(dict(enumerate(probabilities[i])), config.num_experts_per_tok)
        asked.append(Asked(logits, chosen[i]))
    outputs = {i: torch.zeros_like(x_D) for i, x_D in tokens.items()}
    for expert in range(config.num_experts):
        takes = [i for i in tokens if expert in chosen[i]]
        if config.expert_capacity is not None and routing == "top_k":
            fraction = config.expert_capacity * config.num_experts_per_tok / config.num_experts
            places = max(1, math.floor(fraction * len(tokens) + 1e-9))
            takes = first_largest({i: probabilities[i][expert] for i in takes}, places)
        elif config.expert_capacity is not None:
            takes = [i for i in takes if float(probabilities[i][expert]) > float(mlp.router.threshold[expert])]
        for i in takes:
            weight = probabilities[i][expert]
            if config.expert_routing == "token_choice" and config.num_experts_per_tok > 1:
                weight = weight / sum(probabilities[i][other] for other in chosen[i])
            gate, up = (mlp.gate_up_proj.weight[expert] @ tokens[i]).chunk(2)
            outputs[i] = outputs[i] + weight * (mlp.down_proj.weight[expert] @ swiglu(gate, up))
    return outputs


def expert_losses(asked: list[Asked], config: MoDConfig) -> tuple[Tensor, Tensor]:
    """The balance loss, sum over e of f_e p_e / q_e, and the z-loss, mean of log(sum(exp))^2."""
    tokens, choices = len(asked), config.num_experts + config.num_noop_experts
    balance = torch.zeros((), dtype=torch.float64)
    noop_share = config.noop_share if config.num_noop_experts else 0
    for expert in range(choices):
        share = sum(expert in one.chosen for one in asked) / (tokens * config.num_experts_per_tok)
        mean = sum((torch.exp(one.logits) / torch.exp(one.logits).sum())[expert] for one in asked) / tokens
        is_noop = expert >= config.num_experts
        target = noop_share / config.num_noop_experts if is_noop else (1 - noop_share) / config.num_experts
        balance = balance + share * mean / target
    z = sum(torch.log(torch.exp(one.logits).sum()) ** 2 for one in asked) / tokens
    assert isinstance(z, Tensor)
    return balance, z


def attention_outputs(
    layer: DecoderLayer,
    tokens: dict[int, Tensor],
    asking: list[int],
    positions: list[int],
    documents: list[int],
    config: MoDConfig,
) -> dict[int, Tensor]:
    """What attention gives every token of `asking`; all of `tokens`, and no others, are attended to."""
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    attention = layer.self_attn
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
    outputs = {}
    for i in asking:
        seen = [j for j in tokens if j <= i and documents[j] == documents[i]]
        attended = []
        for head in range(heads):
            group = head // (heads // key_heads)
            scores = torch.stack([queries[i][head] @ keys[j][group] for j in seen]) / math.sqrt(len(queries[i][head]))
            shares = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
            attended.append(sum(share * values[j][group] for share, j in zip(shares, seen, strict=True)))
        outputs[i] = linear(attention.o_proj, torch.cat(attended))
    return outputs


def mlp_outputs(
    layer: DecoderLayer, tokens: dict[int, Tensor], config: MoDConfig, routing: str, asked: list[Asked]
) -> dict[int, Tensor]:
    """What the MLP, or the experts, give every token."""
    mlp = layer.mlp
    normed = {i: rms_norm(x_D, layer.post_attention_layernorm.weight, config.rms_norm_eps) for i, x_D in tokens.items()}
    if isinstance(mlp, ExpertMLP):
        return expert_outputs(mlp, normed, routing, asked)
    return {
        i: linear(mlp.down_proj, swiglu(linear(mlp.gate_proj, x_D), linear(mlp.up_proj, x_D)))
        for i, x_D in normed.items()
    }


def bypass_output(layer: DecoderLayer, x_D: Tensor, part: str, eps: float) -> Tensor:
    """What a token takes in the place of the part that it skips: U V norm(x), or nothing without a bypass."""
    if layer.bypass is None:
        return torch.zeros_like(x_D)
    norm = layer.post_attention_layernorm if part == "mlp" else layer.input_layernorm
    return layer.bypass.up.weight @ (layer.bypass.down.weight @ rms_norm(x_D, norm.weight, eps))


def activate(r: Tensor, name: str) -> Tensor:
    return {
        "none": lambda: r,
        "sigmoid": lambda: 1 / (1 + torch.exp(-r)),
        "tanh": lambda: torch.tanh(r),
        "straight_through": lambda: r + (1 - r).detach(),
    }[name]()


def router_logit(layer: DecoderLayer, x_D: Tensor, eps: float) -> Tensor:
    assert layer.router is not None
    if layer.router.config.router_activation == "straight_through":
        x_D = x_D.detach()
    scale = torch.sqrt((x_D * x_D).mean() + eps) if layer.router.config.router_norm else 1.0
    return layer.router.proj.weight[0] @ (x_D / scale)


def causal_logit(layer: DecoderLayer, x_D: Tensor, eps: float) -> Tensor:
    """The predictor's logit behind a stop-gradient, or the router's own, against a threshold if it has one."""
    assert layer.router is not None
    predictor = layer.router.predictor
    if layer.router.config.causal_router == "threshold":
        return router_logit(layer, x_D, eps) - layer.router.threshold[0]
    if predictor is None:
        return router_logit(layer, x_D, eps)
    x_D = x_D.detach()
    hidden = linear(predictor.up_proj, x_D / torch.sqrt((x_D * x_D).mean() + eps))
    r = router_logit(layer, x_D, eps).detach()
    return linear(predictor.down_proj, hidden / (1 + torch.exp(-hidden)))[0] + predictor.router_scale[0] * r


def reference_forward(
    model: MoDForCausalLM,
    input_ids: Tensor,
    real: list[list[bool]],
    positions: list[list[int]],
    documents: list[list[int]],
    routing: str,
) -> Reference:
    """The whole model; the router loss is the binary cross-entropy against top-k membership."""
    config = model.config
    eps = config.rms_norm_eps
    x = [[model.model.embed_tokens.weight[token] for token in row] for row in input_ids]
    batch, length = input_ids.shape
    losses, balances, zs = [], [], []
    for layer_idx, layer in enumerate(model.model.layers):
        entropy, counted, asked = torch.zeros((), dtype=torch.float64), 0, []
        part = config.routed_parts
        if isinstance(part, list) and layer_idx in config.routed_layers:
            part = part[config.routed_layers.index(layer_idx)]
        for b in range(batch):
            alive = [i for i in range(length) if real[b][i]]
            chosen, weights = alive, {}
            if layer_idx in config.routed_layers and part == "mlp":
                # Before the router, which decides about the MLP alone.
                attended = attention_outputs(
                    layer, {i: x[b][i] for i in alive}, alive, positions[b], documents[b], config
                )
                for i in alive:
                    x[b][i] = x[b][i] + attended[i]
            if layer_idx in config.routed_layers:
                r = {i: router_logit(layer, x[b][i], eps) for i in alive}
                logits = {i: causal_logit(layer, x[b][i], eps) for i in alive}
                firsts = [i for i in alive if positions[b][i] == 0] if config.first_token_enters else []
                others = [i for i in alive if i not in firsts]
                if routing == "top_k":
                    fraction = config.capacity_fraction(layer_idx)
                    places = max(1, math.floor(fraction * len(alive) + 1e-9))
                    chosen = sorted((firsts + first_largest({i: r[i] for i in others}, places))[:places])
                    # A row too short for a choice teaches nothing.
                    deciding = others if fraction == 1 or len(chosen) < len(alive) else []
                    for i in deciding:
                        # -log p for members and -log (1 - p) for others, p = 1 / (1 + exp(-logit)); 1 - p itself
                        # would lose its digits to cancellation for a large logit.
                        entropy = entropy + torch.log1p(torch.exp(-logits[i] if i in chosen else logits[i]))
                    counted += len(deciding) if config.causal_router != "threshold" else 0
                else:
                    chosen = [i for i in alive if i in firsts or float(logits[i]) > 0]
                weights = {i: activate(r[i], config.router_activation) for i in chosen}
            attended = {i: torch.zeros_like(x[b][i]) for i in chosen}
            if layer_idx not in config.routed_layers or part != "mlp":
                keyed = alive if part == "block_keep_keys" else chosen
                attended = attention_outputs(
                    layer, {i: x[b][i] for i in keyed}, chosen, positions[b], documents[b], config
                )
            outputs = mlp_outputs(layer, {i: x[b][i] + attended[i] for i in chosen}, config, routing, asked)
            for i in alive:
                if i in chosen:
                    delta = attended[i] + outputs[i]
                    x[b][i] = x[b][i] + (weights[i] * delta if weights else delta)
                else:
                    x[b][i] = x[b][i] + bypass_output(layer, x[b][i], part, eps)
        if routing == "top_k" and layer_idx in config.routed_layers and config.causal_router != "threshold":
            losses.append(entropy / max(counted, 1))
        if asked:
            balance, z = expert_losses(asked, config)
            balances.append(balance)
            zs.append(z)
    rows = []
    for row in x:
        normed = [rms_norm(x_D, model.model.norm.weight, eps) for x_D in row]
        rows.append(torch.stack([model.lm_head.weight @ x_D for x_D in normed]))
    means = [torch.stack(found).mean() if found else torch.zeros(()) for found in (losses, balances, zs)]
    return Reference(torch.stack(rows), *means)
