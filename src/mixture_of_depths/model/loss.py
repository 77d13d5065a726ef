"""The loss of the next token, without the logits of the whole vocabulary for all tokens in memory.

Shapes: B batch, T tokens given, S tokens known (past and given), N tokens of all rows, D hidden size, V vocabulary.
"""

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import fixed_cross_entropy

from mixture_of_depths.model.routing import has_autocast

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
    device, dtype = hidden_ND.device.type, hidden_ND.dtype
    is_autocast = has_autocast(device) and torch.is_autocast_enabled(device)
    # Autocast leaves float64 as it is.
    if is_autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)

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
    if num_items_in_batch is not None:
        return loss / num_items_in_batch
    count = (target_N != -100).sum()
    # No number where there is nothing to predict, as the library's mean has it, and gradients of 0.
    return (loss / count.clamp(min=1)).masked_fill(count == 0, torch.nan)
