"""Mixture-of-Depths routing: which tokens enter a block, and how the block's result returns to the residual stream.

A routed block f with router weights r maps the hidden states x of a sequence to

    x'_i = x_i + r_i f(X)_i   for the chosen tokens i,    x'_i = x_i   for all others,

where X are the chosen tokens only (arXiv:2404.02258, section 3.4, equation 1). Two ways of choosing them:

- top-k (expert choice): the C tokens of the sequence with the largest weights. C is fixed, so shapes are static. It
  looks ahead, and so serves training and the paper's evaluation, not sampling.
- causal: each token is chosen by its own hidden state alone. It serves sampling and honest evaluation.

Shapes: B batch, T tokens, K chosen tokens per row (the largest number in the batch), D hidden size.
"""

import math
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.configuration import MoDConfig, capacity_tokens

Routing = Literal["top_k", "causal"]


class Selection(NamedTuple):
    """The tokens of each row that enter a block, in the order of the sequence.

    Attributes:
        index_BK (torch.Tensor): their indices in the row, rising; of shape [B, K].
        valid_BK (torch.Tensor | None): False where a row has fewer than K chosen tokens and the entry only fills the
            rectangle; None when every entry is a chosen token.
    """

    index_BK: Tensor
    valid_BK: Tensor | None


class LayerRouting(NamedTuple):
    """What the router of one block decided.

    Attributes:
        entered (torch.Tensor): which tokens entered the block; bool, of shape [B, T].
        router_logits (torch.Tensor): the router's output before its activation; of shape [B, T].
        causal_logits (torch.Tensor): positive where causal routing lets the token in; of shape [B, T].
        loss (torch.Tensor | None): binary cross-entropy of the causal decision against the top-k choice, a mean over
            real tokens; None under causal routing, for thresholds and for random routers.
        boundary (torch.Tensor | None): where top-k cut, a scalar; None outside top-k routing in training and for random
            routers.
    """

    entered: Tensor
    router_logits: Tensor
    causal_logits: Tensor
    loss: Tensor | None
    boundary: Tensor | None


class Predictor(nn.Module):
    """The small MLP that predicts, from a token alone, whether top-k would choose it (section 3.5).

    It reads the router's input and output behind a stop-gradient, so it leaves the language model alone. The router's
    output enters as a learned multiple: what is left for the MLP is where the threshold lies.
    """

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        assert config.predictor_hidden_size is not None
        self.up_proj = nn.Linear(config.hidden_size, config.predictor_hidden_size)
        self.down_proj = nn.Linear(config.predictor_hidden_size, 1)
        self.router_scale = nn.Parameter(torch.ones(1))
        self.eps = config.rms_norm_eps

    def forward(self, hidden_BTD: Tensor, router_logits_BT: Tensor) -> Tensor:
        """The logits of entering, of shape [B, T]; for hidden states [B, T, D] and the router's logits [B, T]."""
        hidden_BTD = hidden_BTD.detach()
        normed_BTD = F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=self.eps)
        mlp_BT = self.down_proj(F.silu(self.up_proj(normed_BTD))).squeeze(-1)
        return mlp_BT + self.router_scale * router_logits_BT.detach()


class Router(nn.Module):
    """Gives every token of a routed block its weight r_i = w · x_i, and chooses the tokens that enter."""

    def __init__(self, config: MoDConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # Kept here: looked up by the block's index, it would have every block compiled by itself.
        self.capacity = config.capacity_fraction(layer_idx)
        self.is_random = config.router_type == "random"
        if not self.is_random:
            self.proj = nn.Linear(config.hidden_size, 1, bias=False)
            self.predictor = Predictor(config) if config.causal_router == "predictor" else None
            self.threshold = nn.Buffer(torch.zeros(1))

    def input_of(self, hidden_BTD: Tensor) -> Tensor:
        """What the router's weights are multiplied with, of the shape of the hidden states."""
        if self.config.router_activation == "straight_through":
            # The factor does not change with the hidden states: only the router's weights are to learn from it.
            hidden_BTD = hidden_BTD.detach()
        if not self.config.router_norm:
            return hidden_BTD
        return F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=self.config.rms_norm_eps)

    def logits(self, hidden_BTD: Tensor, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the router's logits and the causal logits, both of shape [B, T]."""
        if self.is_random:
            router_logits_BT = self._random_logits(hidden_BTD, position_BT)
            return router_logits_BT, router_logits_BT - normal_quantile(1 - self.capacity)
        router_logits_BT = self.proj(self.input_of(hidden_BTD)).squeeze(-1)
        match self.config.causal_router:
            case "predictor":
                assert self.predictor is not None
                return router_logits_BT, self.predictor(hidden_BTD, router_logits_BT)
            case "threshold":
                return router_logits_BT, router_logits_BT - self.threshold
            case _:
                return router_logits_BT, router_logits_BT

    def _random_logits(self, hidden_BTD: Tensor, position_BT: Tensor) -> Tensor:
        if self.training:
            return torch.randn(hidden_BTD.shape[:2], dtype=hidden_BTD.dtype, device=hidden_BTD.device)
        # Drawn from the position: decoding token by token must repeat the decisions of the full forward pass, and
        # evaluation must not disturb the generator that training uses.
        bits_BT = position_BT + (self.config.router_seed * 10_007 + self.layer_idx + 1) * 1_000_003
        for multiplier in (-49064778989728563, -4265267296055464877):
            bits_BT = (bits_BT ^ (bits_BT >> 30)) * multiplier
        uniform_BT = (((bits_BT >> 24) & 0xFFFFFF).double() + 0.5) / 2**24
        normal_BT = math.sqrt(2) * torch.erfinv(2 * uniform_BT - 1)
        return normal_BT.to(hidden_BTD.dtype).expand(hidden_BTD.shape[:2])

    def gate(self, router_logits: Tensor) -> Tensor:
        """The factor of the block's delta, of the logits' shape."""
        match self.config.router_activation:
            case "sigmoid":
                return torch.sigmoid(router_logits)
            case "tanh":
                return torch.tanh(router_logits)
            case "straight_through":
                return 1 + (router_logits - router_logits.detach())
            case _:
                return router_logits

    def select(
        self, hidden_BTD: Tensor, position_BT: Tensor, real_BT: Tensor | None, routing: Routing
    ) -> tuple[Selection, LayerRouting]:
        """Chooses the tokens that enter.

        Args:
            hidden_BTD (torch.Tensor): hidden states, of shape [B, T, D].
            position_BT (torch.Tensor): positions in the sequence, of shape [B, T] or [1, T].
            real_BT (torch.Tensor | None): False for padding, which is never chosen; None when there is none.
            routing: "top_k" or "causal".
        """
        router_logits_BT, causal_logits_BT = self.logits(hidden_BTD, position_BT)
        is_first_BT = (position_BT == 0).expand_as(router_logits_BT) if self.config.first_token_enters else None
        if routing == "causal":
            entered_BT = causal_logits_BT > 0
            if is_first_BT is not None:
                entered_BT = entered_BT | is_first_BT
            if real_BT is not None:
                entered_BT = entered_BT & real_BT
            return select_entered(entered_BT), LayerRouting(entered_BT, router_logits_BT, causal_logits_BT, None, None)

        capacity = capacity_tokens(self.capacity, hidden_BTD.shape[1])
        scores_BT, choice_BT = router_logits_BT.detach(), real_BT
        if is_first_BT is not None:
            scores_BT = scores_BT.masked_fill(is_first_BT, math.inf)
            # There is nothing to learn from who had no choice.
            choice_BT = ~is_first_BT if real_BT is None else ~is_first_BT & real_BT
        selection = select_top_k(scores_BT, capacity, real_BT)
        entered_BT = membership(selection, hidden_BTD.shape[1])
        loss = boundary = None
        if not self.is_random and self.config.causal_router != "threshold":
            loss = membership_loss(causal_logits_BT, entered_BT, choice_BT)
        if not self.is_random and self.training:
            boundary = top_k_boundary(scores_BT, entered_BT, choice_BT)
        return selection, LayerRouting(entered_BT, router_logits_BT, causal_logits_BT, loss, boundary)


@torch.compiler.assume_constant_result
def normal_quantile(share: float) -> float:
    """The number that a standard Gaussian stays below with probability `share`; far below all of them for 0."""
    return NormalDist().inv_cdf(max(share, 1e-12))


def select_top_k(router_logits_BT: Tensor, capacity: int, real_BT: Tensor | None = None) -> Selection:
    """Expert choice: the `capacity` tokens of each row with the largest logits, in the order of the sequence.

    Equal logits, as equal tokens have in the first block, go to the earlier token.

    Args:
        router_logits_BT (torch.Tensor): of shape [B, T].
        capacity: number of tokens to choose, at most T.
        real_BT (torch.Tensor | None): False for padding. A row with fewer real tokens than `capacity` has all of them
            chosen and the rest of its entries marked as not valid.
    """
    if real_BT is None:
        return Selection(_largest(router_logits_BT, capacity), None)
    index_BK = _largest(router_logits_BT.masked_fill(~real_BT, -math.inf), capacity)
    return Selection(index_BK, real_BT.gather(1, index_BK))


def _largest(scores_BT: Tensor, capacity: int) -> Tensor:
    # Not topk: it breaks ties as it likes, differently on each device.
    return scores_BT.argsort(dim=1, descending=True, stable=True)[:, :capacity].sort(dim=1).values


def top_k_boundary(router_logits_BT: Tensor, entered_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Where the top-k choice cut: midway between the least chosen and the greatest other logit, a mean over rows."""
    others_BT = ~entered_BT if real_BT is None else ~entered_BT & real_BT
    least_B = router_logits_BT.masked_fill(~entered_BT, math.inf).amin(dim=1)
    greatest_B = router_logits_BT.masked_fill(~others_BT, -math.inf).amax(dim=1)
    # A row may have been chosen whole, or be padding altogether.
    greatest_B = torch.where(greatest_B.isinf(), least_B, greatest_B)
    middle_B = (least_B + greatest_B) / 2
    usable_B = middle_B.isfinite()
    return middle_B.masked_fill(~usable_B, 0).sum() / usable_B.sum().clamp(min=1)


def select_entered(entered_BT: Tensor) -> Selection:
    """The tokens marked in `entered_BT` (bool, [B, T]), in the order of the sequence, as a rectangle [B, K].

    K is the largest number of marked tokens in a row; it depends on the data.
    """
    count_B = entered_BT.sum(dim=1)
    largest = int(count_B.max())
    index_BK = entered_BT.int().argsort(dim=1, descending=True, stable=True)[:, :largest]
    if bool((count_B == largest).all()):
        return Selection(index_BK, None)
    return Selection(index_BK, torch.arange(largest, device=count_B.device) < count_B[:, None])


def membership(selection: Selection, sequence_length: int) -> Tensor:
    """The selection as a mask over the sequence: bool, of shape [B, T]."""
    index_BK, valid_BK = selection
    entered_BT = torch.zeros(index_BK.shape[0], sequence_length, dtype=torch.bool, device=index_BK.device)
    if valid_BK is None:
        return entered_BT.scatter(1, index_BK, True)
    return entered_BT.scatter(1, index_BK, valid_BK)


def membership_loss(causal_logits_BT: Tensor, entered_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Binary cross-entropy with the top-k membership as target, a mean over real tokens (section 3.5)."""
    logits_BT = causal_logits_BT.to(torch.promote_types(causal_logits_BT.dtype, torch.float32))
    loss_BT = F.binary_cross_entropy_with_logits(logits_BT, entered_BT.to(logits_BT.dtype), reduction="none")
    if real_BT is None:
        return loss_BT.mean()
    return loss_BT.masked_fill(~real_BT, 0).sum() / real_BT.sum().clamp(min=1)


def flat_index(index_BK: Tensor, sequence_length: int) -> Tensor:
    """The indices of [B, K] into rows of length `sequence_length`, as indices into all B * T tokens; shape [B * K]."""
    row_B = torch.arange(index_BK.shape[0], device=index_BK.device) * sequence_length
    return (index_BK + row_B[:, None]).flatten()


def gather_tokens(hidden_BTD: Tensor, selection: Selection) -> Tensor:
    """The chosen tokens, of shape [B, K, D]. Works for any [B, T, *] tensor."""
    index = flat_index(selection.index_BK, hidden_BTD.shape[1])
    chosen = hidden_BTD.flatten(0, 1).index_select(0, index)
    return chosen.view(*selection.index_BK.shape, *hidden_BTD.shape[2:])


def add_weighted(hidden_BTD: Tensor, selection: Selection, delta_BKD: Tensor, weight_BK: Tensor) -> Tensor:
    """Adds weight times delta to the chosen tokens and leaves all others as they are; of shape [B, T, D]."""
    if selection.valid_BK is not None:
        weight_BK = weight_BK.masked_fill(~selection.valid_BK, 0)
    update_BKD = (weight_BK[..., None] * delta_BKD).to(hidden_BTD.dtype)
    index = flat_index(selection.index_BK, hidden_BTD.shape[1])
    return hidden_BTD.flatten(0, 1).index_add(0, index, update_BKD.flatten(0, 1)).view_as(hidden_BTD)
