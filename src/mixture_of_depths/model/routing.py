"""Mixture-of-Depths routing: which tokens enter a block, and how the block's result returns to the residual stream.

A routed block f with router weights r maps the hidden states x of a sequence to

    x'_i = x_i + r_i f(X)_i   for the chosen tokens i,    x'_i = x_i + b(x_i)   for all others,

where X are the chosen tokens only and b is 0 (arXiv:2404.02258, section 3.4, equation 1), or with `bypass_rank` the
bypass b(x) = U V norm(x), by the norm of the part that is skipped. What that is, `routed_parts` says:

- "block": the equation as it stands.
- "block_keep_keys": a chosen token attends to the keys and values of all tokens up to itself, chosen or not.
- "mlp": all tokens attend, h_i = x_i + a(x)_i. The equation then holds for h and the MLP in the place of x and f, and
  the router reads h.

Two ways of choosing the tokens:

- top-k (expert choice): the C tokens of the sequence with the largest weights. C is fixed, so shapes are static. It
  looks ahead, and so serves training and the paper's evaluation, not sampling.
- causal: each token is chosen by its own hidden state alone. It serves sampling and honest evaluation.

C counts the real tokens of a row, so that a row is routed alike whatever it is padded to or batched with. What decides
is computed in float32 at least, whatever the model is in: in bf16 most rows would tie where they are cut.

Shapes: B batch, T tokens, K chosen tokens per row (the largest number in the batch), R rows of a selection, D hidden
size, I inputs, O outputs.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.configuration import MoDConfig, capacity_tokens

Routing = Literal["top_k", "causal"]


class Selection(NamedTuple):
    """The tokens of each row that enter a block, in the order of the sequence.

    Attributes:
        index_RK (torch.Tensor): their indices in the row, rising; of shape [R, K].
        valid_RK (torch.Tensor | None): False where a row has fewer than K chosen tokens and the entry only fills the
            rectangle; None when every entry is a chosen token.
        row_R (torch.Tensor | None): which rows of the batch these are, when those of which no token enters are left
            out; of shape [R]. None when they are all there.
    """

    index_RK: Tensor
    valid_RK: Tensor | None
    row_R: Tensor | None = None


class LayerRouting(NamedTuple):
    """What the router of one block decided.

    Attributes:
        entered (torch.Tensor): which tokens entered the block; bool, of shape [B, T].
        enters_by_itself (torch.Tensor): which tokens causal routing lets in, the first one included where it always
            enters; bool, of shape [B, T].
        router_logits (torch.Tensor): the router's output before its activation; of shape [B, T].
        causal_logits (torch.Tensor): positive where the causal router lets the token in; of shape [B, T].
        loss (torch.Tensor | None): binary cross-entropy of the causal decision against the top-k choice, a mean over
            the tokens that had a choice; None under causal routing, for thresholds and for random routers.
        boundary (torch.Tensor | None): where top-k cut, or in training by the threshold would have cut, a scalar, and
            no number where no row had a choice; None in other causal routing, outside training and for random routers.
    """

    entered: Tensor
    enters_by_itself: Tensor
    router_logits: Tensor
    causal_logits: Tensor
    loss: Tensor | None
    boundary: Tensor | None


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether a kind of device has autocast, which the compiler of torch 2.11 cannot look up by itself."""
    return torch.amp.autocast_mode.is_autocast_available(device_type)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switches autocast off."""
    if not has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class PreciseModule(nn.Module):
    """Its weights and buffers, and those of modules in it, stay in float32 at least, whatever the model is cast to."""

    def widen(self) -> None:
        """Makes float32 of what was made in less, as under a default type: the last step of making such a module."""
        self._apply(lambda tensor: tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def precise(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if applied.dtype not in (torch.float16, torch.bfloat16):
                return applied
            return tensor.to(applied.device, torch.float32)

        return super()._apply(precise, recurse)


class PreciseLinear(nn.Linear):
    """A linear map in float32 at least, whatever its input and its weights are in."""

    def forward(self, input: Tensor) -> Tensor:
        """The products, of shape [*, O], of inputs [*, I]."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class Predictor(nn.Module):
    """The small MLP that predicts, from a token alone, whether top-k would choose it (section 3.5).

    It reads the router's input and output behind a stop-gradient, so it leaves the language model alone. The router's
    output enters as a learned multiple: what is left for the MLP is where the threshold lies.
    """

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        assert config.predictor_hidden_size is not None
        self.up_proj = PreciseLinear(config.hidden_size, config.predictor_hidden_size)
        self.down_proj = PreciseLinear(config.predictor_hidden_size, 1)
        self.router_scale = nn.Parameter(torch.ones(1))
        self.eps = config.rms_norm_eps

    def forward(self, hidden_BTD: Tensor, router_logits_BT: Tensor) -> Tensor:
        """The logits of entering, of shape [B, T]; for hidden states [B, T, D] and the router's logits [B, T]."""
        hidden_BTD = hidden_BTD.detach().to(router_logits_BT.dtype)
        normed_BTD = F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=self.eps)
        mlp_BT = self.down_proj(F.silu(self.up_proj(normed_BTD))).squeeze(-1)
        return mlp_BT + self.router_scale * router_logits_BT.detach()


class Router(PreciseModule):
    """Gives every token of a routed block its weight r_i = w · x_i, and chooses the tokens that enter."""

    def __init__(self, config: MoDConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        # Kept here: looked up by the block's index, it would have every block compiled by itself.
        self.capacity = config.capacity_fraction(layer_idx)
        # Where all attend they become different: no two have the same tokens before them.
        self.meets_equal_tokens = config.routed_part(layer_idx) != "mlp" and all(
            config.routed_part(before) in ("block", "block_keep_keys") for before in range(layer_idx)
        )
        self.is_random = config.router_type == "random"
        if not self.is_random:
            self.proj = PreciseLinear(config.hidden_size, 1, bias=False)
            self.predictor = Predictor(config) if config.causal_router == "predictor" else None
            self.threshold = nn.Buffer(torch.zeros(1))
        self.widen()

    def input_of(self, hidden_BTD: Tensor) -> Tensor:
        """What the router's weights are multiplied with, of the shape of the hidden states."""
        hidden_BTD = hidden_BTD.to(torch.promote_types(hidden_BTD.dtype, torch.float32))
        if self.config.router_activation == "straight_through":
            # The factor does not change with the hidden states: only the router's weights are to learn from it.
            hidden_BTD = hidden_BTD.detach()
        if not self.config.router_norm:
            return hidden_BTD
        return F.rms_norm(hidden_BTD, hidden_BTD.shape[-1:], eps=self.config.rms_norm_eps)

    def logits(self, hidden_BTD: Tensor, position_BT: Tensor, routing: Routing = "causal") -> tuple[Tensor, Tensor]:
        """Returns the router's logits and the causal logits, both of shape [B, T], in float32 at least."""
        if self.is_random:
            is_fresh = self.training and routing == "top_k"
            router_logits_BT = self._random_logits(hidden_BTD, position_BT, is_fresh)
            return router_logits_BT, router_logits_BT - normal_quantile(1 - self.capacity)
        with full_precision(hidden_BTD.device):
            router_logits_BT = self.proj(self.input_of(hidden_BTD)).squeeze(-1)
            match self.config.causal_router:
                case "predictor":
                    assert self.predictor is not None
                    return router_logits_BT, self.predictor(hidden_BTD, router_logits_BT)
                case "threshold":
                    return router_logits_BT, router_logits_BT - self.threshold
                case _:
                    return router_logits_BT, router_logits_BT

    def _random_logits(self, hidden_BTD: Tensor, position_BT: Tensor, is_fresh: bool) -> Tensor:
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        if is_fresh:
            return torch.randn(hidden_BTD.shape[:2], dtype=dtype, device=hidden_BTD.device)
        # Drawn from the position: decoding token by token must repeat the decisions of the full forward pass, and
        # evaluation must not disturb the generator that training uses.
        bits_BT = position_BT + (self.config.router_seed * 10_007 + self.layer_idx + 1) * 1_000_003
        for multiplier in (-49064778989728563, -4265267296055464877):
            bits_BT = (bits_BT ^ (bits_BT >> 30)) * multiplier
        uniform_BT = (((bits_BT >> 24) & 0xFFFFFF).double() + 0.5) / 2**24
        normal_BT = math.sqrt(2) * torch.erfinv(2 * uniform_BT - 1)
        return normal_BT.to(dtype).expand(hidden_BTD.shape[:2])

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

    def forward(
        self, hidden_BTD: Tensor, position_BT: Tensor, real_BT: Tensor | None, routing: Routing
    ) -> tuple[Selection, LayerRouting]:
        """Chooses the tokens that enter.

        Args:
            hidden_BTD (torch.Tensor): hidden states, of shape [B, T, D].
            position_BT (torch.Tensor): positions in the sequence, of shape [B, T] or [1, T].
            real_BT (torch.Tensor | None): False for padding, which is never chosen; None when there is none.
            routing: "top_k" or "causal".
        """
        router_logits_BT, causal_logits_BT = self.logits(hidden_BTD, position_BT, routing)
        is_first_BT = (position_BT == 0).expand_as(router_logits_BT) if self.config.first_token_enters else None
        causal_BT = causal_logits_BT > 0
        if is_first_BT is not None:
            causal_BT = causal_BT | is_first_BT
        if real_BT is not None:
            causal_BT = causal_BT & real_BT
        if routing == "causal":
            # In training every weight gets a gradient, if one of 0: processes that average them wait for each.
            selection, boundary = select_entered(causal_BT, least=1 if self.training else 0), None
            if self.training:
                if self.config.training_routing == "threshold":
                    _, _, boundary, _ = self._top_k(hidden_BTD, router_logits_BT, is_first_BT, real_BT)
                router_logits_BT = router_logits_BT + 0 * causal_logits_BT
            return selection, LayerRouting(causal_BT, causal_BT, router_logits_BT, causal_logits_BT, None, boundary)

        selection, entered_BT, boundary, choice_BT = self._top_k(hidden_BTD, router_logits_BT, is_first_BT, real_BT)
        loss = None
        if not self.is_random and self.config.causal_router != "threshold":
            loss = membership_loss(causal_logits_BT, entered_BT, choice_BT)
        return selection, LayerRouting(entered_BT, causal_BT, router_logits_BT, causal_logits_BT, loss, boundary)

    def _top_k(
        self, hidden_BTD: Tensor, router_logits_BT: Tensor, is_first_BT: Tensor | None, real_BT: Tensor | None
    ) -> tuple[Selection, Tensor, Tensor | None, Tensor | None]:
        """What top-k chooses: the selection, as a mask, too; where it cuts, in training; and the tokens with a choice.

        The last two are None for random routing, and the last one where all tokens had a choice.
        """
        scores_BT = self._scores(hidden_BTD, router_logits_BT)
        if is_first_BT is not None:
            scores_BT = scores_BT.masked_fill(is_first_BT, math.inf)
        selection = select_top_k(scores_BT, self.capacity, real_BT)
        entered_BT = membership(selection, scores_BT.shape)
        if self.is_random:
            return selection, entered_BT, None, None
        choice_BT = self._choice(entered_BT, is_first_BT, real_BT)
        boundary = top_k_boundary(scores_BT, entered_BT, choice_BT) if self.training else None
        return selection, entered_BT, boundary, choice_BT

    @torch.no_grad()
    def _scores(self, hidden_BTD: Tensor, router_logits_BT: Tensor) -> Tensor:
        """What top-k compares: the router's logits, and equal ones for equal tokens; of shape [B, T].

        Tokens of one word are equal until they enter a block. A matrix product gives them logits whose last bit depends
        on where they stand, so that padding would tell which of them enter.
        """
        if not self.meets_equal_tokens or self.is_random or not isinstance(self.proj, PreciseLinear):
            return router_logits_BT
        with full_precision(hidden_BTD.device):
            return (self.input_of(hidden_BTD) * self.proj.weight[0]).sum(dim=-1)

    def _choice(self, entered_BT: Tensor, is_first_BT: Tensor | None, real_BT: Tensor | None) -> Tensor | None:
        """The tokens about which top-k had a choice, from which alone there is something to learn; None for all."""
        choice_BT = real_BT
        if is_first_BT is not None:
            choice_BT = ~is_first_BT if real_BT is None else ~is_first_BT & real_BT
        length = entered_BT.shape[1]
        # A row of which everything entered, since no row has less than one place.
        if self.capacity < 1 and (real_BT is not None or capacity_tokens(self.capacity, length) == length):
            is_left_BT = ~entered_BT if real_BT is None else ~entered_BT & real_BT
            is_cut_B1 = is_left_BT.any(dim=1, keepdim=True)
            choice_BT = is_cut_B1.expand_as(entered_BT) if choice_BT is None else choice_BT & is_cut_B1
        return choice_BT


class ZeroLinear(nn.Linear):
    """A linear map that begins as 0."""


class Bypass(nn.Module):
    """What a token that skips takes in the place of the routed part: a linear map of low rank of its normed state.

    It begins as 0, so that a skipped token first keeps its residual alone, as in the paper, and a model that gets
    bypasses does what it did. It learns all the same, since `down` does not begin as 0.
    """

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.bypass_rank, bias=False)
        self.up = ZeroLinear(config.bypass_rank, config.hidden_size, bias=False)

    def forward(self, normed_BTD: Tensor, entered_BT: Tensor) -> Tensor:
        """U V times the normed states of the tokens that skip, 0 for those that entered; of shape [B, T, D]."""
        return self.up(self.down(normed_BTD).masked_fill(entered_BT[..., None], 0))


@torch.compiler.assume_constant_result
def normal_quantile(share: float) -> float:
    """The number that a standard Gaussian stays below with probability `share`; far below all of them for 0."""
    return NormalDist().inv_cdf(max(share, 1e-12))


def row_capacity(fraction: float, tokens_B: Tensor) -> Tensor:
    """`capacity_tokens` of every row, for rows of `tokens_B` tokens; of shape [B]."""
    return (fraction * tokens_B.double() + 1e-9).floor().clamp(min=1).long()


def select_top_k(router_logits_BT: Tensor, fraction: float, real_BT: Tensor | None = None) -> Selection:
    """Expert choice: the tokens of each row with the largest logits, in the order of the sequence.

    Equal logits, as equal tokens have in the first block, go to the earlier token.

    Args:
        router_logits_BT (torch.Tensor): of shape [B, T].
        fraction: the capacity, as a fraction of each row's real tokens; K is what it makes of T tokens.
        real_BT (torch.Tensor | None): False for padding. Entries for which a row has no place are not valid.
    """
    if real_BT is not None:
        router_logits_BT = router_logits_BT.masked_fill(~real_BT, -math.inf)
    # Not topk: it breaks ties as it likes, differently on each device.
    order_BT = router_logits_BT.argsort(dim=1, descending=True, stable=True)
    index_BK, rank_BK = order_BT[:, : capacity_tokens(fraction, router_logits_BT.shape[1])].sort(dim=1)
    if real_BT is None:
        return Selection(index_BK, None)
    capacity_B1 = row_capacity(fraction, real_BT.sum(dim=1, keepdim=True))
    return Selection(index_BK, real_BT.gather(1, index_BK) & (rank_BK < capacity_B1))


def top_k_boundary(router_logits_BT: Tensor, entered_BT: Tensor, choice_BT: Tensor | None) -> Tensor:
    """Where the top-k choice cut: midway between the least chosen and the greatest other logit, a mean over rows.

    Only rows with a choice count, and a row that has a place for all of its tokens with the least of them.

    Args:
        router_logits_BT (torch.Tensor): of shape [B, T].
        entered_BT (torch.Tensor): the chosen tokens; bool, of shape [B, T].
        choice_BT (torch.Tensor | None): the tokens about which there was a choice; None for all.

    Returns:
        A scalar; no number when no row had a choice.
    """
    chosen_BT = entered_BT if choice_BT is None else entered_BT & choice_BT
    others_BT = ~entered_BT if choice_BT is None else ~entered_BT & choice_BT
    least_B = router_logits_BT.masked_fill(~chosen_BT, math.inf).amin(dim=1)
    greatest_B = router_logits_BT.masked_fill(~others_BT, -math.inf).amax(dim=1)
    greatest_B = torch.where(others_BT.any(dim=1), greatest_B, least_B)
    return finite_mean((least_B + greatest_B) / 2, dim=0)


def finite_mean(values: Tensor, dim: int) -> Tensor:
    """The mean of the finite values along `dim`; no number where there is none."""
    is_finite = values.isfinite()
    return values.masked_fill(~is_finite, 0).sum(dim) / is_finite.sum(dim)


def select_entered(entered_BT: Tensor, least: int = 0) -> Selection:
    """The tokens marked in `entered_BT` (bool, [B, T]), in the order of the sequence, as a rectangle [R, K].

    K is the largest number of marked tokens in a row, or `least`. Rows without any are left out, unless `least` has
    them take part or no row has one. Both sizes depend on the data: a device is waited for, once.
    """
    count_R, row_R = entered_BT.sum(dim=1), None
    counts = count_R.tolist()
    number_of_rows = sum(count > 0 for count in counts)
    if least == 0 and 0 < number_of_rows < len(counts):
        row_R = (count_R > 0).int().argsort(descending=True, stable=True)[:number_of_rows]
        entered_BT, count_R = entered_BT.index_select(0, row_R), count_R.index_select(0, row_R)
        counts = [count for count in counts if count > 0]
    largest = max(*counts, least)
    index_RK = entered_BT.int().argsort(dim=1, descending=True, stable=True)[:, :largest]
    if min(counts) == largest:
        return Selection(index_RK, None, row_R)
    return Selection(index_RK, torch.arange(largest, device=count_R.device) < count_R[:, None], row_R)


def membership(selection: Selection, shape: tuple[int, ...]) -> Tensor:
    """The selection as a mask over the batch, of the given shape [B, T]; bool."""
    nothing = torch.zeros(math.prod(shape), dtype=torch.bool, device=selection.index_RK.device)
    index = flat_index(selection, shape[1])
    if selection.valid_RK is None:
        return nothing.scatter(0, index, True).view(shape)
    return nothing.scatter(0, index, selection.valid_RK.flatten()).view(shape)


def membership_loss(causal_logits_BT: Tensor, entered_BT: Tensor, choice_BT: Tensor | None) -> Tensor:
    """Binary cross-entropy with the top-k membership as target, a mean over the tokens that had a choice (section 3.5).

    Args:
        causal_logits_BT (torch.Tensor): of shape [B, T].
        entered_BT (torch.Tensor): the chosen tokens; bool, of shape [B, T].
        choice_BT (torch.Tensor | None): the tokens about which there was a choice; None for all.
    """
    logits_BT = causal_logits_BT.to(torch.promote_types(causal_logits_BT.dtype, torch.float32))
    loss_BT = F.binary_cross_entropy_with_logits(logits_BT, entered_BT.to(logits_BT.dtype), reduction="none")
    if choice_BT is None:
        return loss_BT.mean()
    return loss_BT.masked_fill(~choice_BT, 0).sum() / choice_BT.sum().clamp(min=1)


def flat_index(selection: Selection, sequence_length: int) -> Tensor:
    """The selection as indices into all B * T tokens of rows of length `sequence_length`; of shape [R * K]."""
    index_RK, _, row_R = selection
    if row_R is None:
        row_R = torch.arange(index_RK.shape[0], device=index_RK.device)
    return (index_RK + row_R[:, None] * sequence_length).flatten()


def gather_tokens(hidden_BTD: Tensor, selection: Selection) -> Tensor:
    """The chosen tokens, of shape [R, K, D]. Works for any [B, T, *] tensor."""
    chosen = hidden_BTD.flatten(0, 1).index_select(0, flat_index(selection, hidden_BTD.shape[1]))
    return chosen.view(*selection.index_RK.shape, *hidden_BTD.shape[2:])


def add_weighted(hidden_BTD: Tensor, selection: Selection, delta_RKD: Tensor, weight_RK: Tensor) -> Tensor:
    """Adds weight times delta to the chosen tokens and leaves all others as they are; of shape [B, T, D]."""
    if selection.valid_RK is not None:
        weight_RK = weight_RK.masked_fill(~selection.valid_RK, 0)
    update_RKD = (weight_RK[..., None] * delta_RKD).to(hidden_BTD.dtype)
    index = flat_index(selection, hidden_BTD.shape[1])
    return hidden_BTD.flatten(0, 1).index_add(0, index, update_RKD.flatten(0, 1)).view_as(hidden_BTD)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(hidden_BTD: Tensor, loss: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_BTD.view_as(hidden_BTD), loss.view_as(loss)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_BTD, grad_loss), (factor,) = grad_outputs, ctx.saved_tensors
        # A loss that is thrown away, multiplied by 0, gives the hidden states no gradient either.
        unseen = (factor * (grad_BTD != 0).any()).to(grad_loss.dtype)
        return grad_BTD, torch.where(grad_loss == 0, unseen, grad_loss), None


def with_loss(hidden_BTD: Tensor, loss: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Ties a loss to hidden states, both unchanged, so that a backward pass through them reaches the loss, too.

    Whoever adds the returned loss to one of their own gets its gradient with the factor they gave it. Whoever computes
    a loss from what comes of the hidden states alone gets it with the factor `factor`, a scalar, unless their gradient
    is 0 everywhere.
    """
    return _WithLoss.apply(hidden_BTD, loss, factor)  # pyright: ignore[reportReturnType]
