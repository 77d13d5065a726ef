"""What the chosen tokens go through, each by one kernel of vLLM.

vLLM leaves norms, RoPE and activations to the compiler that traces the model. How many tokens enter a block is known
in the step alone, so that their part is not traced; there the same layers would be many small operators, which
together take longer than the products of a few tokens.
"""

# pyright: reportMissingImports=false

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import _custom_ops as kernels
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

# Kernels of norms and activations take whole vectors, whose widest have so many elements.
VECTOR = 16
# A number of rows has at most so many leading bits that are not zeros.
LEADING_BITS = 4


def normed(states: Tensor, norm: RMSNorm) -> Tensor:
    """States, of shape [*, D], by their norm."""
    if states.shape[-1] % VECTOR:
        return norm.forward_native(states)
    states = states.contiguous()
    normed = torch.empty_like(states)
    kernels.rms_norm(normed, states, norm.weight.data, norm.variance_epsilon)
    return normed


def turn(rotary: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None) -> None:
    """Turns queries and keys, of shape [K, H * h], by RoPE, in place."""
    # For a CPU vLLM calls the same kernel.
    rotary.forward_cuda(positions, query, key)


class Activation(nn.Module):
    """That of vLLM's Llama: SiLU of the gates, times what they let through."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Of shape [K, F], for gates and values side by side, of shape [K, 2 * F]."""
        width = gate_and_up.shape[-1] // 2
        if width % VECTOR:
            gate, up = gate_and_up.split(width, dim=-1)
            return functional.silu(gate) * up
        activated = gate_and_up.new_empty(*gate_and_up.shape[:-1], width)
        torch.ops._C.silu_and_mul(activated, gate_and_up)
        return activated


def num_rows(count: int) -> int:
    """The number of rows to multiply, at least `count`, of which there are few different ones.

    On a CPU, oneDNN makes a kernel for every number of rows that it meets, which takes about a millisecond for each
    matrix. Rounded up, it soon has met them all, and at most one row in eight is for nothing.
    """
    step = 1 << max(0, (count - 1).bit_length() - LEADING_BITS)
    return -(-count // step) * step
