"""Muon: the matrices of the blocks take orthogonal steps, all other weights those of AdamW.

The momentum of a matrix's gradients is brought near to the orthogonal matrix that is closest to it, by a Newton-Schulz
iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Scaled to a root mean square of 0.2 the step
is about as large as one of AdamW (Liu et al. 2025, arXiv:2502.16982), so that both have one learning rate and decay.

It is AdamW's own class with further groups, as the trainer knows one optimiser. `torch.optim.Muon` iterates in bf16
everywhere, which is slow on processors without units for it: here only GPUs do.

Shapes: matrices of shape [..., M, N], those of experts one beside the other; S stacked in one weight, [..., S * M, N].
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.modeling import MoDForCausalLM

MOMENTUM = 0.95
# Of the odd polynomial of degree 5 that is iterated: it lifts small singular values fast, and leaves all near to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2


class Muon(AdamW):
    """AdamW, and Muon for groups with `is_orthogonal`, of weights of shape [..., S * M, N].

    Args:
        groups: weights, with `weight_decay`, `is_orthogonal` and, where that is true, `stacked`: the number S of
            matrices in each weight.
        learning_rate: of all groups.
        betas: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=learning_rate, betas=betas)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all weights that have a gradient."""
        groups = self.param_groups
        # AdamW's own step; hooks on steps run in it once more.
        self.param_groups = [group for group in groups if not group["is_orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["is_orthogonal"]:
                for weight in cast(list[Tensor], group["params"]):
                    if weight.grad is not None:
                        self._step(weight, weight.grad, group)
        return loss

    def _step(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum" not in state:
            # AdamW looks for its count in the state of every weight when that is loaded.
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(grad))
        momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        matrices = (tensor.chunk(group["stacked"], dim=-2) for tensor in (weight, grad, momentum))
        for weight_MN, grad_MN, momentum_MN in zip(*matrices, strict=True):
            # Nesterov's.
            update_MN = orthogonal(grad_MN.lerp(momentum_MN, MOMENTUM))
            weight_MN.mul_(1 - group["lr"] * group["weight_decay"])
            # A step has one size, whatever the gradient's: an expert that no token reached takes none.
            update_MN *= grad_MN.ne(0).any(dim=(-2, -1), keepdim=True)
            weight_MN.add_(update_MN, alpha=-group["lr"] * RMS * max(weight_MN.shape[-2:]) ** 0.5)


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """Nearly the closest orthogonal matrix: singular values between 0.7 and 1.2, but for those that were near to 0."""
    is_tall = matrix_MN.shape[-2] > matrix_MN.shape[-1]
    x_MN = matrix_MN.mT if is_tall else matrix_MN
    x_MN = x_MN.bfloat16() if x_MN.is_cuda else x_MN
    x_MN = x_MN / x_MN.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram_MM = x_MN @ x_MN.mT
        x_MN = a * x_MN + (b * gram_MM + c * gram_MM @ gram_MM) @ x_MN
    return (x_MN.mT if is_tall else x_MN).to(matrix_MN)


def muon_flops(config: MoDConfig) -> int:
    """FLOPs of a step's iterations: in each two products of M x M with M x N, M <= N, and one of M x M with itself."""
    with torch.device("meta"):
        model = MoDForCausalLM(config)
    flops = 0
    for group in muon_groups(model, weight_decay=0.0):
        for weight in group["params"] if group["is_orthogonal"] else ():
            for matrix in weight.chunk(group["stacked"], dim=-2):
                (small, large), count = sorted(matrix.shape[-2:]), math.prod(matrix.shape[:-2])
                flops += ITERATIONS * count * (4 * small**2 * large + 2 * small**3)
    return flops


def decays(name: str, weight: Tensor) -> bool:
    """Whether a weight is a matrix of the language model; routers, predictors, norms and biases are not."""
    return weight.ndim >= 2 and ".router." not in name


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of a model's weights: the blocks' matrices, pairs of them, what else decays, and what does not."""
    blocks: list[Tensor] = []
    pairs: list[Tensor] = []
    others: list[Tensor] = []
    not_decaying: list[Tensor] = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if not decays(name, weight):
            not_decaying.append(weight)
        elif ".layers." not in name:
            others.append(weight)
        elif name.endswith(".gate_up_proj.weight"):
            pairs.append(weight)
        else:
            blocks.append(weight)
    return [
        {"params": blocks, "weight_decay": weight_decay, "is_orthogonal": True, "stacked": 1},
        {"params": pairs, "weight_decay": weight_decay, "is_orthogonal": True, "stacked": 2},
        {"params": others, "weight_decay": weight_decay, "is_orthogonal": False},
        {"params": not_decaying, "weight_decay": 0.0, "is_orthogonal": False},
    ]
