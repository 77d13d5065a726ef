"""Weights of 8 bits: a quarter of float32's bytes for a step that is bound by reading them.

Shapes: E experts, M rows, I inputs, O outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.experts import GroupedLinear, grouped_mm
from mixture_of_depths.sampling.native import grouped_native, is_native

# Of more, the library's product is faster than ours.
FEW_ROWS = 64


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and what to multiply those of each output by; [..., O, I] and [..., O]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=-1).clamp(min=1e-12) / 127
    return (weight / scale[..., None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear map whose weights are whole numbers from -127 to 127, times a scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI, scale_O = _rounded(linear.weight)
        self.weight, self.scale = nn.Buffer(weight_OI), nn.Buffer(scale_O)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # In float32, as a step multiplies: rounded to bf16 first, weights would be others than those it decodes with.
        dtype = torch.promote_types(x.dtype, torch.float32)
        products = F.linear(x.to(dtype), self.weight.to(dtype)) * self.scale.to(dtype)
        return (products if self.bias is None else products + self.bias.to(dtype)).to(x.dtype)


class Int8GroupedLinear(nn.Module):
    """A linear map for each expert with such weights."""

    def __init__(self, linear: GroupedLinear) -> None:
        super().__init__()
        weight_EOI, scale_EO = _rounded(linear.weight)
        self.weight, self.scale = nn.Buffer(weight_EOI), nn.Buffer(scale_EO)

    def forward(self, rows_MI: Tensor, ends_E: Tensor) -> Tensor:
        dtype = torch.promote_types(rows_MI.dtype, torch.float32)
        if dtype == torch.float32 and is_native(self.weight) and len(rows_MI) <= FEW_ROWS:
            # Read as they are: made wider first, all experts would be read nine times over.
            expert_M = torch.searchsorted(ends_E, torch.arange(len(rows_MI)), right=True).clamp(max=len(ends_E) - 1)
            products_MO = grouped_native(self.weight, rows_MI.float().contiguous(), ends_E)
            return (products_MO * self.scale[expert_M]).to(rows_MI.dtype)
        weight_EOI = self.weight.to(dtype) * self.scale[..., None].to(dtype)
        return grouped_mm(rows_MI.to(dtype), weight_EOI, ends_E).to(rows_MI.dtype)


def quantize(model: nn.Module) -> None:
    """Rounds the weights of every block and of the head to 8 bits, in place. Routers, norms and embeddings stay.

    A head that shares its weights with the embedding gets its own.
    """
    for name, module in list(model.named_modules()):
        if ".router." in name or not isinstance(module, nn.Linear | GroupedLinear):
            continue
        parent, _, leaf = name.rpartition(".")
        rounded = Int8Linear(module) if isinstance(module, nn.Linear) else Int8GroupedLinear(module)
        setattr(model.get_submodule(parent), leaf, rounded)
