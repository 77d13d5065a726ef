"""Maps and routers of a dense model's blocks, fitted in closed form to what the blocks do to the tokens of a text.

A token that skips a block takes a linear map of low rank of its normed state: of all maps of that rank the one with the
least squared error to what the block adds, by reduced-rank regression. The block's router is linear in the state scaled
to a root mean square of 1, and fitted by least squares to the logarithm of the norm of what a token that skips misses:
what the block adds, less the map. Both see the hidden states of the dense model. First tokens, which enter anyway, do
not count.

Sums are kept and equations solved in float64, one matrix at a time and by Cholesky: LU of a batch fails in some builds
of MKL once the number of threads is set.

Shapes: T tokens of a sequence, N of them that count, L blocks, D hidden size, R rank of the maps, C capacities.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.packing import Sequences

# Weights decay towards zero by this share of their inputs' mean square: a router's, and a map's.
ROUTER_RIDGE = 0.01
MAP_RIDGE = 0.001
# Capacities, evenly spaced from 0 to 1, at which it is told what is missed.
CAPACITIES = 33


@dataclass(frozen=True)
class Fit:
    """What was fitted to every block.

    Attributes:
        router_LD (torch.Tensor): weights of the routers, whose outputs have a deviation of 1 on the text.
        down_LRD (torch.Tensor | None): the maps' first factors; None without maps.
        up_LDR (torch.Tensor | None): their second factors.
    """

    router_LD: Tensor
    down_LRD: Tensor | None = None
    up_LDR: Tensor | None = None

    def scores(self, layer_idx: int, scaled_ND: Tensor) -> Tensor:
        """By how much a block's router prefers tokens, of shape [N], for states of a root mean square of 1."""
        return scaled_ND @ self.router_LD[layer_idx].to(scaled_ND)

    def missed(self, layer_idx: int, normed_ND: Tensor, delta_ND: Tensor) -> Tensor:
        """What tokens miss that skip a block, of shape [N, D]: what it adds to them, less the map."""
        if self.down_LRD is None or self.up_LDR is None:
            return delta_ND
        down_RD, up_DR = (factor[layer_idx].to(normed_ND) for factor in (self.down_LRD, self.up_LDR))
        return delta_ND - normed_ND @ down_RD.T @ up_DR.T


@torch.no_grad()
def fit_blocks(dense: MoDForCausalLM, sequences: Sequences, end_of_text: int, rank: int = 0, bf16: bool = False) -> Fit:
    """Fits the maps and routers of all blocks; see the file's description.

    Args:
        dense: a model without routed blocks.
        sequences: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        rank: rank of the maps, 0 for none.
        bf16: whether to compute under bf16 autocast.

    Raises:
        ValueError: for sequences of first tokens alone.
    """
    layers, size = _layers(dense), dense.config.hidden_size
    home = precise_device(dense.device)
    # Of the scaled states and a constant 1, for the intercept.
    moments_LDD = torch.zeros(len(layers), size + 1, size + 1, dtype=torch.float64, device=home)
    products_LDD = torch.zeros(len(layers), size + 1, size, dtype=torch.float64, device=home)
    for blocks in passes(dense, sequences, end_of_text, bf16):
        for layer_idx, (hidden_ND, delta_ND) in enumerate(blocks):
            inputs_ND = with_constant(scaled(dense, hidden_ND))
            moments_LDD[layer_idx] += (inputs_ND.T @ inputs_ND).to(home, torch.float64)
            if rank:
                products_LDD[layer_idx] += (inputs_ND.T @ delta_ND).to(home, torch.float64)
    if moments_LDD[0, -1, -1] == 0:
        raise ValueError(
            "sequences have no token to fit the routers to: first tokens of documents do not count, and no other is "
            "there; give longer sequences"
        )
    fit = Fit(torch.zeros(len(layers), size))
    if rank:
        factors = []
        for layer, moments_DD, products_DD in zip(layers, moments_LDD, products_LDD, strict=True):
            # The norm's weights scale the states once more.
            weight_D = layer.input_layernorm.weight.to(home, torch.float64)
            scaled_DD = moments_DD[:-1, :-1] * weight_D[:, None] * weight_D
            factors.append(low_rank_map(scaled_DD, products_DD[:-1] * weight_D[:, None], rank))
        down_LRD, up_LDR = (torch.stack(parts).float() for parts in zip(*factors, strict=True))
        fit = Fit(fit.router_LD, down_LRD, up_LDR)
    targets_LD = torch.zeros(len(layers), size + 1, dtype=torch.float64, device=home)
    for blocks in passes(dense, sequences, end_of_text, bf16):
        for layer_idx, (hidden_ND, delta_ND) in enumerate(blocks):
            missed_ND = fit.missed(layer_idx, _normed(layers[layer_idx], hidden_ND), delta_ND)
            inputs_ND = with_constant(scaled(dense, hidden_ND))
            target_N = missed_ND.norm(dim=-1).clamp(min=1e-6).log()
            targets_LD[layer_idx] += (inputs_ND.T @ target_N).to(home, torch.float64)
    sums = zip(moments_LDD, targets_LD, strict=True)
    routers = [router_weights(moments_DD, products_D) for moments_DD, products_D in sums]
    return Fit(torch.stack(routers).float(), fit.down_LRD, fit.up_LDR)


def low_rank_map(moments_DD: Tensor, products_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors [R, D] and [D, R] of the map of a rank with the least squared error, by sums over tokens.

    Of the map without a bound on its rank, kept is what lies in the directions of its outputs that have the largest
    mean squares: in them least is lost. Factors are scaled alike.

    Args:
        moments_DD (torch.Tensor): sum of the products of inputs with inputs.
        products_DD (torch.Tensor): sum of the products of inputs with outputs.
        rank: the rank.
    """
    decay = MAP_RIDGE * moments_DD.diagonal().mean()
    lower_DD = torch.linalg.cholesky(
        moments_DD + decay * torch.eye(len(moments_DD), dtype=moments_DD.dtype, device=moments_DD.device)
    )
    whole_DD = torch.cholesky_solve(products_DD, lower_DD)
    _, directions_DD = torch.linalg.eigh(products_DD.T @ whole_DD)
    up_DR = directions_DD[:, -rank:]
    down_RD = (whole_DD @ up_DR).T
    scale_R = down_RD.norm(dim=1).clamp(min=1e-12).sqrt()
    return down_RD / scale_R[:, None], up_DR * scale_R


def router_weights(moments_DD: Tensor, products_D: Tensor) -> Tensor:
    """The weights, of shape [D], of the linear map with the least squared error, scaled to a deviation of 1.

    Args:
        moments_DD (torch.Tensor): sum of the products of inputs with inputs, of which the last is a constant 1.
        products_D (torch.Tensor): sum of the products of inputs with the target.
    """
    decay_D = ROUTER_RIDGE * moments_DD.diagonal().mean().repeat(len(products_D))
    # The intercept is not held back.
    decay_D[-1] = 0
    lower_DD = torch.linalg.cholesky(moments_DD + decay_D.diag())
    weight_D = torch.cholesky_solve(products_D[:, None], lower_DD)[:-1, 0]
    count, means_D = moments_DD[-1, -1], moments_DD[-1, :-1] / moments_DD[-1, -1]
    spread_DD = moments_DD[:-1, :-1] / count - means_D[:, None] * means_D
    variance = (weight_D * (spread_DD @ weight_D[:, None])[:, 0]).sum()
    return weight_D / variance.clamp(min=1e-12).sqrt()


@torch.no_grad()
def missed_shares(
    dense: MoDForCausalLM, fit: Fit, sequences: Sequences, end_of_text: int, bf16: bool = False
) -> Tensor:
    """How much of what all tokens would miss by skipping is missed at each of `CAPACITIES` capacities; [L, C].

    The tokens that the fitted routers rank highest enter. What a token misses is the square of its norm over that of
    the token's hidden state, to which it would be added: the norms of later blocks see no more of it.
    """
    layers = _layers(dense)
    scores: list[list[Tensor]] = [[] for _ in layers]
    squares: list[list[Tensor]] = [[] for _ in layers]
    for blocks in passes(dense, sequences, end_of_text, bf16):
        for layer_idx, (hidden_ND, delta_ND) in enumerate(blocks):
            missed_ND = fit.missed(layer_idx, _normed(layers[layer_idx], hidden_ND), delta_ND)
            scores[layer_idx].append(fit.scores(layer_idx, scaled(dense, hidden_ND)).cpu())
            size_N = hidden_ND.square().sum(-1).clamp(min=1e-12)
            squares[layer_idx].append((missed_ND.square().sum(-1) / size_N).cpu().double())
    shares = []
    for scores_of, squares_of in zip(scores, squares, strict=True):
        order_N = torch.cat(scores_of).argsort(descending=True)
        entered_N = F.pad(torch.cat(squares_of)[order_N].cumsum(0), (1, 0))
        counts_C = torch.linspace(0, len(order_N), CAPACITIES).round().long()
        shares.append(1 - entered_N[counts_C] / entered_N[-1].clamp(min=1e-300))
    return torch.stack(shares)


def precise_device(device: torch.device) -> torch.device:
    """Where to compute in float64: on the device, unless it has none."""
    return torch.device("cpu") if device.type == "mps" else device


def _layers(model: MoDForCausalLM) -> list[DecoderLayer]:
    return cast(list[DecoderLayer], list(model.model.layers))


def passes(
    dense: MoDForCausalLM, sequences: Sequences, end_of_text: int, bf16: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of each sequence, and each block, the tokens before it and what it adds to them, each of shape [N, D]."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0] - args[0])))
        for layer in _layers(dense)
    ]
    try:
        for batch in batches(sequences, range(len(sequences)), end_of_text, 1, dense.device):
            with torch.autocast(dense.device.type, torch.bfloat16, enabled=bf16):
                dense.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, routing="top_k")
            counts_BT = batch["position_ids"] != 0
            yield [(precise(hidden[counts_BT]), precise(delta[counts_BT])) for hidden, delta in seen]
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()


def precise(states: Tensor) -> Tensor:
    """The states in float32 at least."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def scaled(model: MoDForCausalLM, hidden_ND: Tensor) -> Tensor:
    """States of a root mean square of 1, as routers read them."""
    return F.rms_norm(hidden_ND, hidden_ND.shape[-1:], eps=model.config.rms_norm_eps)


def _normed(layer: DecoderLayer, hidden_ND: Tensor) -> Tensor:
    """The states that a block's maps read."""
    norm: nn.RMSNorm = layer.input_layernorm
    return F.rms_norm(hidden_ND, hidden_ND.shape[-1:], norm.weight.to(hidden_ND), norm.eps)


def with_constant(inputs_ND: Tensor) -> Tensor:
    return F.pad(inputs_ND, (0, 1), value=1.0)
