"""Mixture of experts in the place of a block's MLP, with no-op experts for Mixture-of-Depths-and-Experts.

With p = softmax(W x) over E experts and N no-ops, a token x gets

    y = sum over the experts e that take it of g_e SwiGLU_e(x).

- Token choice: it asks for the K experts with the largest p. g_e is p_e over the sum of those K, and p_e itself for
  K = 1, whose gradient the sum would take away. A no-op adds nothing and is not computed: a token that asks for one
  keeps its residual (integrated Mixture-of-Depths-and-Experts, arXiv:2404.02258, section 4.3).
- Expert choice: every token asks for every expert, and g_e = p_e (arXiv:2202.09368).

With a capacity each expert takes the C tokens of a sequence that ask for it with the largest p, and drops the others;
C counts the real tokens of the sequence.
That looks ahead; under causal routing it takes those above a threshold instead, a running average of where the
capacity cut in training.

Shapes: B batch, T tokens, E experts, N no-ops, M rows to compute, D hidden size, F width of an expert, I inputs,
O outputs.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.routing import (
    PreciseLinear,
    PreciseModule,
    Routing,
    finite_mean,
    full_precision,
    row_capacity,
)


class ExpertRouting(NamedTuple):
    """What the expert router of one block decided.

    Attributes:
        share (torch.Tensor): how many tokens each expert took and, at the end, each no-op got, over the number of
            tokens times `num_experts_per_tok`; of shape [E + N].
        dropped (torch.Tensor): share of the choices that found their expert full; under expert choice, share of the
            tokens that no expert took.
        boundary (torch.Tensor | None): where the capacity cut, and no number for an expert of which no row tells; of
            shape [E]. None outside top-k routing in training and without a capacity.
        scores (torch.Tensor): p where a token asks for an expert, 0 elsewhere; of shape [B, T, E].
        taken (torch.Tensor): which experts took a token; bool, of shape [B, T, E].
        balance_loss (torch.Tensor | None): 1 when choices and probabilities are spread as they should be; None under
            causal routing and for expert choice, which is balanced by itself.
        z_loss (torch.Tensor | None): mean square of the logits' log-sum-exp; None under causal routing.
    """

    share: Tensor
    dropped: Tensor
    boundary: Tensor | None
    scores: Tensor
    taken: Tensor
    balance_loss: Tensor | None
    z_loss: Tensor | None


class ExpertRouter(PreciseModule):
    """Decides which experts take a token, and with what weight."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = PreciseLinear(config.hidden_size, config.num_experts + config.num_noop_experts, bias=False)
        self.threshold = nn.Buffer(torch.zeros(config.num_experts)) if config.expert_capacity is not None else None
        self.widen()

    def forward(
        self, hidden_BTD: Tensor, real_BT: Tensor | None, routing: Routing
    ) -> tuple[Tensor, Tensor, ExpertRouting]:
        """Chooses the experts of every token.

        Args:
            hidden_BTD (torch.Tensor): normalised hidden states, of shape [B, T, D].
            real_BT (torch.Tensor | None): False for padding, which no expert takes; None when there is none.
            routing: "top_k" or "causal".

        Returns:
            Which experts take a token, bool, and the weights g, 0 where they do not; both of shape [B, T, E].
        """
        config, num_experts = self.config, self.config.num_experts
        with full_precision(hidden_BTD.device):
            logits_BTX = self.proj(hidden_BTD)
        probability_BTX = logits_BTX.softmax(dim=-1)
        is_token_choice, per_token = config.expert_routing == "token_choice", config.num_experts_per_tok
        asked_BTX = torch.ones_like(probability_BTX, dtype=torch.bool)
        if is_token_choice:
            asked_BTX = largest(probability_BTX.detach(), per_token, dim=-1)
        if real_BT is not None:
            asked_BTX = asked_BTX & real_BT[..., None]

        asked_probability_BTX = probability_BTX * asked_BTX
        scores_BTE = asked_probability_BTX[..., :num_experts]
        taken_BTE, boundary_E = asked_BTX[..., :num_experts], None
        if self.threshold is not None:
            if routing == "causal":
                taken_BTE = taken_BTE & (scores_BTE > self.threshold)
            else:
                length = hidden_BTD.shape[1]
                places, places_B = config.expert_places(length), None
                # A row that is too short for a choice has nothing to tell.
                is_cut_B = torch.full(hidden_BTD.shape[:1], places < length, device=hidden_BTD.device)
                if real_BT is not None:
                    tokens_B = real_BT.sum(dim=1)
                    places_B = row_capacity(config.expert_fraction, tokens_B)
                    is_cut_B = places_B < tokens_B
                seen_BTE = taken_BTE & (is_cut_B[:, None, None] | (config.expert_fraction >= 1))
                is_within_BTE = largest(scores_BTE.detach(), places, dim=1, places_B=places_B)
                taken_BTE = taken_BTE & is_within_BTE
                if self.training:
                    boundary_E = capacity_boundary(scores_BTE.detach(), seen_BTE & is_within_BTE)
        weight_BTE = scores_BTE * taken_BTE
        if is_token_choice and per_token > 1:
            weight_BTE = weight_BTE / asked_probability_BTX.sum(dim=-1, keepdim=True).clamp(min=1e-30)

        real_BT1 = torch.ones_like(probability_BTX[..., :1]) if real_BT is None else real_BT[..., None].to(logits_BTX)
        tokens = real_BT1.sum().clamp(min=1)
        asked_X = asked_BTX.sum(dim=(0, 1)) / (tokens * per_token)
        share_X = torch.cat([taken_BTE.sum(dim=(0, 1)) / (tokens * per_token), asked_X[num_experts:]])
        if is_token_choice:
            dropped = (asked_X - share_X).sum()
        else:
            dropped = 1 - (taken_BTE.any(dim=-1) * real_BT1[..., 0]).sum() / tokens
        balance_loss = z_loss = None
        if routing == "top_k":
            z_loss = (logits_BTX.logsumexp(dim=-1, keepdim=True).square() * real_BT1).sum() / tokens
            if is_token_choice:
                mean_X = (probability_BTX * real_BT1).sum(dim=(0, 1)) / tokens
                balance_loss = load_balance_loss(asked_X.to(mean_X.dtype), mean_X, config)
        return (
            taken_BTE,
            weight_BTE,
            ExpertRouting(share_X, dropped, boundary_E, scores_BTE.detach(), taken_BTE, balance_loss, z_loss),
        )


def largest(scores: Tensor, count: int, dim: int, places_B: Tensor | None = None) -> Tensor:
    """True for the `count` largest scores along `dim`; equal ones go to the lower index.

    Args:
        scores (torch.Tensor): of shape [B, T, E].
        count: how many.
        dim: the dimension.
        places_B (torch.Tensor | None): how many of them in each row, along dimension 1; of shape [B].
    """
    order = scores.argsort(dim=dim, descending=True, stable=True).narrow(dim, 0, count)
    is_taken = torch.ones_like(order, dtype=torch.bool)
    if places_B is not None:
        is_taken = is_taken & (torch.arange(count, device=scores.device)[:, None] < places_B[:, None, None])
    return torch.zeros_like(scores, dtype=torch.bool).scatter(dim, order, is_taken)


def capacity_boundary(scores_BTE: Tensor, taken_BTE: Tensor) -> Tensor:
    """Where the capacity cut: midway between the least score taken and the greatest dropped; of shape [E].

    A mean over the rows of which the expert took any, no number without one. A row of which it dropped nothing counts
    with the least it took.
    """
    least_BE = scores_BTE.masked_fill(~taken_BTE, math.inf).amin(dim=1)
    greatest_BE = scores_BTE.masked_fill(taken_BTE, 0).amax(dim=1)
    return finite_mean(torch.where(greatest_BE > 0, (least_BE + greatest_BE) / 2, least_BE), dim=0)


def load_balance_loss(asked_X: Tensor, probability_X: Tensor, config: MoDConfig) -> Tensor:
    """The sum over experts and no-ops of f p / q, for shares f of the choices, mean probabilities p and targets q.

    All real experts are to get the same share, and the no-ops `noop_share` together. With q = 1 / E this is the loss of
    Switch Transformers (arXiv:2101.03961, equation 4). It is 1 at f = p = q, and where f equals p not less than 1.
    """
    target_X = asked_X.new_full(asked_X.shape, (1 - config.target_noop_share) / config.num_experts)
    if config.num_noop_experts:
        target_X[config.num_experts :] = config.target_noop_share / config.num_noop_experts
    return (asked_X * probability_X / target_X).sum()


class GroupedLinear(nn.Module):
    """A linear map for each expert, without bias."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))

    def forward(self, rows_MI: Tensor, ends_E: Tensor) -> Tensor:
        """The products of rows sorted by expert, of shape [M, O]; `ends_E` is where each expert's rows end."""
        return grouped_mm(rows_MI, self.weight, ends_E)


class ExpertMLP(nn.Module):
    """SwiGLU experts behind their router. Rows that no expert takes are not computed."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.config = config
        self.router = ExpertRouter(config)
        self.gate_up_proj = GroupedLinear(config.num_experts, config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = GroupedLinear(config.num_experts, config.intermediate_size, config.hidden_size)

    def forward(self, hidden_BTD: Tensor, real_BT: Tensor | None, routing: Routing) -> tuple[Tensor, ExpertRouting]:
        """The experts' weighted sum for every token, of shape [B, T, D], and what the router decided."""
        taken_BTE, weight_BTE, expert_routing = self.router(hidden_BTD, real_BT, routing)
        batch_size, length = hidden_BTD.shape[:2]
        if routing == "top_k":
            most = batch_size * self.config.expert_rows(length)
        elif hidden_BTD.device.type == "cpu" and not torch.compiler.is_compiling():
            most = int(taken_BTE.sum())
        else:
            # As many as there may be: to count them is to wait for the device, and a graph cannot.
            most = batch_size * length * self.config.most_experts_per_token
        token_M, ends_E, weight_M = dispatch(taken_BTE.flatten(0, 1), weight_BTE.flatten(0, 1), most)
        hidden_ND = hidden_BTD.flatten(0, 1)
        gate_MF, up_MF = self.gate_up_proj(hidden_ND.index_select(0, token_M), ends_E).chunk(2, dim=-1)
        out_MD = self.down_proj(F.silu(gate_MF) * up_MF, ends_E) * weight_M[:, None]
        summed_ND = torch.zeros_like(hidden_ND).index_add(0, token_M, out_MD.to(hidden_ND.dtype))
        return summed_ND.view_as(hidden_BTD), expert_routing


def dispatch(taken_NE: Tensor, weight_NE: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of an expert and a token it takes, sorted by expert, then by token.

    Args:
        taken_NE (torch.Tensor): which experts take a token; of shape [N, E].
        weight_NE (torch.Tensor): the weights; of shape [N, E].
        most: number of rows M to return, not less than the number of pairs. The rows that are left over stand behind
            the last end; they name token 0 with weight 0.

    Returns:
        The tokens, of shape [M]; where each expert's rows end, of shape [E]; and the weights, of shape [M].
    """
    taken_P = taken_NE.t().flatten()
    place_P = (taken_P.cumsum(0) - 1).masked_fill(~taken_P, most)
    pair_M = taken_P.new_full((most + 1,), -1, dtype=torch.int64)
    pair_M = pair_M.scatter(0, place_P, torch.arange(len(taken_P), device=taken_P.device))[:most]
    is_used_M = torch.arange(most, device=taken_P.device) < taken_P.sum()
    pair_M = pair_M.masked_fill(~is_used_M, 0)
    weight_M = weight_NE.t().flatten().index_select(0, pair_M).masked_fill(~is_used_M, 0)
    return pair_M % taken_NE.shape[0], taken_NE.sum(dim=0).cumsum(0), weight_M


@torch.library.custom_op("mixture_of_depths::grouped_mm", mutates_args=())
def grouped_mm(rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Rows sorted by expert times the transposed weights of theirs, of shape [M, O].

    An operator of its own, because the compiler has none of the kind in float32.

    Args:
        rows_MI (torch.Tensor): of shape [M, I].
        weight_EOI (torch.Tensor): of shape [E, O, I].
        ends_E (torch.Tensor): where each expert's rows end, rising; of shape [E]. Rows behind the last end are not
            computed and give 0.
    """
    return _products(rows_MI, weight_EOI.transpose(1, 2), ends_E)


@torch.library.custom_op("mixture_of_depths::grouped_mm_backward", mutates_args=())
def grouped_mm_backward(grad_MO: Tensor, rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `grouped_mm` by its rows, [M, I], and its weights, [E, O, I]."""
    grad_MO = grad_MO.contiguous()
    grad_rows_MI = _products(grad_MO, weight_EOI, ends_E)
    if _has_kernel(rows_MI, weight_EOI):
        return grad_rows_MI, F.grouped_mm(grad_MO.t(), rows_MI, offs=ends_E.int())
    grad_weight_EOI = torch.empty_like(weight_EOI)
    for expert, (start, end) in enumerate(_segments(ends_E)):
        torch.mm(grad_MO[start:end].t(), rows_MI[start:end], out=grad_weight_EOI[expert])
    return grad_rows_MI, grad_weight_EOI


def _products(rows_MI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    if _has_kernel(rows_MI, weight_EIO):
        is_left_M = torch.arange(len(rows_MI), device=rows_MI.device) >= ends_E[-1]
        return F.grouped_mm(rows_MI, weight_EIO, offs=ends_E.int()).masked_fill_(is_left_M[:, None], 0)
    out_MO = rows_MI.new_empty(len(rows_MI), weight_EIO.shape[2])
    for expert, (start, end) in enumerate(_segments(ends_E)):
        torch.mm(rows_MI[start:end], weight_EIO[expert], out=out_MO[start:end])
    out_MO[int(ends_E[-1]) :] = 0
    return out_MO


def _has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether one kernel does it; on the CPU, products one by one are as fast and know every precision and size."""
    sizes = (rows.shape[-1], *weight.shape[1:])
    return rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and all(size % 8 == 0 for size in sizes)


def _segments(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@grouped_mm.register_fake
def _(rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return rows_MI.new_empty(rows_MI.shape[0], weight_EOI.shape[1])


@grouped_mm_backward.register_fake
def _(grad_MO: Tensor, rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    return rows_MI.new_empty(rows_MI.shape), weight_EOI.new_empty(weight_EOI.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*grouped_mm_backward(grad_MO, *ctx.saved_tensors), None)


grouped_mm.register_autograd(_backward, setup_context=_keep_for_backward)
for device in ("cpu", "cuda"):
    grouped_mm.register_autocast(device, torch.bfloat16)


@register_flop_formula(torch.ops.mixture_of_depths.grouped_mm, get_raw=True)
def _(rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * _rows_computed(rows_MI, ends_E) * weight_EOI.shape[1] * weight_EOI.shape[2]


@register_flop_formula(torch.ops.mixture_of_depths.grouped_mm_backward, get_raw=True)
def _(grad_MO: Tensor, rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor, *args: Any, **kwargs: Any) -> int:
    return 4 * _rows_computed(rows_MI, ends_E) * weight_EOI.shape[1] * weight_EOI.shape[2]


def _rows_computed(rows_MI: Tensor, ends_E: Tensor) -> int:
    """All that there is room for, where tensors hold no data."""
    return len(rows_MI) if ends_E.device.type == "meta" else int(ends_E[-1])
