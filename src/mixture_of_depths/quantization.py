"""Weights of 8 bits: a quarter of float32's bytes for a step that is bound by reading them.

Shapes: D inputs, O outputs.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear map whose weights are whole numbers from -127 to 127, times a scale for each output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OD = linear.weight.detach().float()
        scale_O = weight_OD.abs().amax(dim=1).clamp(min=1e-12) / 127
        self.weight = nn.Buffer((weight_OD / scale_O[:, None]).round().to(torch.int8))
        self.scale = nn.Buffer(scale_O)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight_OD = (self.weight.float() * self.scale[:, None]).to(x.dtype)
        return F.linear(x, weight_OD, None if self.bias is None else self.bias.to(x.dtype))


def quantize(model: nn.Module) -> None:
    """Rounds the weights of every block and of the head to 8 bits, in place. Routers, norms and embeddings stay.

    A head that shares its weights with the embedding gets its own.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".router." not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module))
