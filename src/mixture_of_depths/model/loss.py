"""The loss of the next token, without the logits of the whole vocabulary for all tokens in memory.

Shapes: B batch, T tokens given, S tokens known (past and given), N tokens of all rows, n those of a part, D hidden
size, V vocabulary.
"""

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import fixed_cross_entropy

from mixture_of_depths.model.routing import full_precision, has_autocast

# Tokens of which the head's logits are in memory at once, where they serve the loss alone.
HEAD_TOKENS = 256
HAS_LINEAR_CROSS_ENTROPY = Version(torch.__version__) >= Version("2.13")


def next_tokens(labels_BT: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
    """What each token is to predict, of shape [B, T]; -100 for nothing, as padding has it and the last token."""
    target_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    if attention_mask_BS is None:
        return target_BT
    # The first token after padding on the left would be predicted from padding.
    return target_BT.masked_fill(attention_mask_BS[:, -labels_BT.shape[1] :] == 0, -100)


def float64_loss(logits_BTV: Tensor, target_BT: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy of the next token in nats, as the library has it, of logits in float64 without a cast.

    Args:
        logits_BTV (torch.Tensor): of shape [B, T, V].
        target_BT (torch.Tensor): what each token is to predict, -100 for nothing; of shape [B, T].
        num_items_in_batch: the number of predictions to average over; None for those there are.
    """
    target_N = target_BT.flatten().to(logits_BTV.device)
    return fixed_cross_entropy(logits_BTV.flatten(0, 1), target_N, num_items_in_batch)  # pyright: ignore[reportArgumentType]


def chunked_loss(
    hidden_BTD: Tensor, head_VD: Tensor, target_BT: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Cross-entropy of the next token in nats, of which the logits of a few tokens at a time are in memory.

    In float32 and float64 it serves one backward pass: the gradients are computed with it, and used up.

    Args:
        hidden_BTD (torch.Tensor): hidden states after the final norm, of shape [B, T, D].
        head_VD (torch.Tensor): the head's weight, of shape [V, D].
        target_BT (torch.Tensor): what each token is to predict, -100 for nothing; of shape [B, T].
        num_items_in_batch: the number of predictions to average over; None for those there are.
    """
    hidden_ND, target_N = hidden_BTD.flatten(0, 1), target_BT.flatten().to(hidden_BTD.device)
    dtype = _precision_of_products(hidden_ND)
    if dtype in (torch.float16, torch.bfloat16) or not HAS_LINEAR_CROSS_ENTROPY:
        # PyTorch's own would return the loss in this precision, which has three digits. The parts cast the head, each
        # for itself, so that their gradients are summed in float32.
        precise = torch.promote_types(dtype, torch.float32)
        head_VD = head_VD.to(precise)

        def summed(hidden_ND: Tensor, target_N: Tensor) -> Tensor:
            logits_NV = F.linear(hidden_ND.to(dtype), head_VD.to(dtype))
            return F.cross_entropy(logits_NV.to(precise), target_N, reduction="sum")

        parts = zip(hidden_ND.split(HEAD_TOKENS), target_N.split(HEAD_TOKENS), strict=True)
        loss = torch.stack([checkpoint(summed, *part, use_reentrant=False) for part in parts]).sum()
    else:
        # A compiled graph has its own way of not holding the logits.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=HEAD_TOKENS, chunking_method=None)
        options = None if torch.compiler.is_compiling() else options
        if not torch.is_grad_enabled():
            # Gradients are computed together with the loss, for what asks for them.
            head_VD = head_VD.detach()
        loss = F.linear_cross_entropy(hidden_ND, head_VD, target_N, reduction="sum", options=options)
    return _averaged(loss, target_N, num_items_in_batch)


def distilled_loss(
    hidden_BTD: Tensor,
    head_VD: Tensor,
    target_BT: Tensor,
    num_items_in_batch: Tensor | int | None,
    teacher_BTD: Tensor,
    teacher_head_VD: Tensor,
    share: float,
) -> Tensor:
    """Cross-entropy of the next token, of which a share is the divergence from a teacher's predictions, in nats.

    (1 - share) * cross-entropy + share * KL(teacher || model), of which the logits of a few tokens at a time are in
    memory. The gradients are computed with it, serve one backward pass, and do not reach the teacher.

    Args:
        hidden_BTD (torch.Tensor): hidden states after the final norm, of shape [B, T, D].
        head_VD (torch.Tensor): the head's weight, of shape [V, D].
        target_BT (torch.Tensor): what each token is to predict, -100 for nothing; of shape [B, T].
        num_items_in_batch: the number of predictions to average over; None for those there are.
        teacher_BTD (torch.Tensor): the teacher's hidden states; of shape [B, T, its hidden size].
        teacher_head_VD (torch.Tensor): the weight of its head; of shape [V, its hidden size].
        share: the divergence's share of the loss.
    """
    target_N = target_BT.flatten().to(hidden_BTD.device)
    loss = _DistilledSum.apply(
        hidden_BTD.flatten(0, 1), head_VD, target_N, teacher_BTD.flatten(0, 1), teacher_head_VD, share
    )
    return _averaged(loss, target_N, num_items_in_batch)


class _DistilledSum(Function):
    """The sum of the loss over all tokens that predict something."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        target_N: Tensor,
        teacher_ND: Tensor,
        teacher_head_VD: Tensor,
        share: float,
    ) -> Tensor:
        dtype = _precision_of_products(hidden_ND)
        precise = torch.promote_types(dtype, torch.float32)
        head_VD, teacher_head_VD = head_VD.to(dtype), teacher_head_VD.to(dtype)
        loss = hidden_ND.new_zeros((), dtype=precise)
        gradient_ND = torch.empty_like(hidden_ND)
        # None where the head is not tuned.
        gradient_VD = torch.zeros_like(head_VD, dtype=precise) if ctx.needs_input_grad[1] else None
        with full_precision(hidden_ND.device):
            for start in range(0, len(hidden_ND), HEAD_TOKENS):
                part = slice(start, start + HEAD_TOKENS)
                target_n = target_N[part, None]
                kept_n = target_n != -100
                hidden_nD = hidden_ND[part].to(dtype)
                log_p_nV = F.linear(hidden_nD, head_VD).to(precise).log_softmax(dim=-1)
                teacher_log_p_nV = F.linear(teacher_ND[part].to(dtype), teacher_head_VD).to(precise).log_softmax(dim=-1)
                teacher_p_nV = teacher_log_p_nV.exp()
                surprise_n = -log_p_nV.gather(1, target_n.clamp(min=0))
                divergence_n = (teacher_p_nV * (teacher_log_p_nV - log_p_nV)).sum(dim=-1, keepdim=True)
                loss += ((1 - share) * surprise_n + share * divergence_n).masked_fill(~kept_n, 0).sum()
                # The gradient of the logits.
                gradient_nV = log_p_nV.exp_().sub_(teacher_p_nV, alpha=share)
                gradient_nV.scatter_add_(1, target_n.clamp(min=0), gradient_nV.new_full(target_n.shape, share - 1))
                gradient_nV = gradient_nV.masked_fill_(~kept_n, 0).to(dtype)
                gradient_ND[part] = gradient_nV @ head_VD
                if gradient_VD is not None:
                    gradient_VD += gradient_nV.T @ hidden_nD
        ctx.save_for_backward(gradient_ND, gradient_VD)
        return loss

    @staticmethod
    @once_differentiable
    # The decorator hides the names of the arguments.
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        gradient_ND, gradient_VD = ctx.saved_tensors
        of_head_VD = None if gradient_VD is None else gradient_VD * gradient
        return gradient_ND * gradient, of_head_VD, None, None, None, None


def _precision_of_products(hidden_ND: Tensor) -> torch.dtype:
    """That of the logits' products; autocast leaves float64 as it is."""
    device, dtype = hidden_ND.device.type, hidden_ND.dtype
    is_autocast = has_autocast(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_autocast and dtype != torch.float64 else dtype


def _averaged(loss: Tensor, target_N: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is not None:
        return loss / num_items_in_batch
    count = (target_N != -100).sum()
    # No number where there is nothing to predict, as the library's mean has it, and gradients of 0.
    return (loss / count.clamp(min=1)).masked_fill(count == 0, torch.nan)
