"""Documents packed in rows: where they lie, and the fused attention within each of them.

A mask [B, 1, T, T] tells documents apart anywhere, but no fused kernel of a GPU computes under one. PyTorch's kernel
for sequences of different lengths takes in its place the tokens of all rows one after another, and where each document
starts. `runs_fused` says where it serves; everywhere else the mask does (see `attention.py`).

Shapes: B batch, T tokens, N documents in the batch, K chosen tokens per row, R rows of which tokens are chosen, H
heads, h head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from mixture_of_depths.compiler import any_length
from mixture_of_depths.model.routing import Selection, flat_index

# What the kernel takes at most. Wider heads have no backward pass on some GPUs.
WIDEST_HEAD = 192
MOST_DOCUMENTS = 65_535
# Its backward pass holds gradients of queries in float32, for 128 tokens more a document than there are. At 16 tokens a
# document that is 9 times what the tokens need, and at one, as which padding of position 0 counts, 129 times.
SHORTEST_DOCUMENTS = 16


@dataclass
class Packing:
    """Where the documents of a batch lie in its tokens, which are counted through from row to row.

    Attributes:
        starts (torch.Tensor): the first token of each document, and the number of tokens; int32, of shape [N + 1].
            Documents may be empty.
        longest (int): the tokens of the longest document, or more.
    """

    starts: Tensor
    longest: int

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Packing":
        """The same on another device."""
        return Packing(self.starts.to(device, non_blocking=non_blocking), self.longest)

    def of(self, selection: Selection, sequence_length: int) -> "Packing":
        """Where the documents lie in the chosen tokens, [R * K], of rows of length `sequence_length`."""
        if selection.valid_RK is not None:
            # Entries that only fill the rectangle are the last of their row. As the last tokens of its last document
            # they attend to something, and no other token attends to them.
            index_RK = selection.index_RK.masked_fill(~selection.valid_RK, sequence_length - 1)
            selection = selection._replace(index_RK=index_RK)
        index = flat_index(selection, sequence_length).int()
        starts = torch.searchsorted(index, self.starts, out_int32=True)
        return Packing(starts, selection.index_RK.shape[1])


def packed_positions(cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """Positions of the documents packed in one row, each from 0; of shape [1, T].

    Args:
        cu_seq_lens (torch.Tensor): where they begin, and where the last one ends; of shape [documents + 1].
        num_tokens: how many tokens the row has.
    """
    slots_T = torch.arange(num_tokens, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    document_T = torch.searchsorted(cu_seq_lens, slots_T, right=True) - 1
    return (slots_T - cu_seq_lens[document_T]).long()[None]


def documents_of(
    position_BT: Tensor, batch_size: int, cu_seq_lens: Tensor | None = None
) -> tuple[Tensor | None, Packing | None]:
    """Which of the documents packed in its row each token belongs to, [B, T] or [1, T], and where they lie.

    Both are None when no row holds several. A device is waited for, once. A compiled graph cannot look at the data: it
    takes rows for such that hold several, and is not told where they lie.

    Args:
        position_BT (torch.Tensor): positions, of shape [B, T], or [1, T] for all rows. A document starts wherever one
            is not the one before plus one.
        batch_size: the number of rows.
        cu_seq_lens (torch.Tensor | None): what the positions were made of, if of this.

    Raises:
        ValueError: if `cu_seq_lens` does not rise from 0 to T.
    """
    is_start_BT = F.pad(position_BT.diff(dim=1) != 1, (1, 0), value=True)
    documents_BT = is_start_BT.cumsum(dim=1)
    if torch.compiler.is_compiling():
        return documents_BT, None
    document = is_start_BT.expand(batch_size, -1).flatten().cumsum(dim=0) - 1
    lengths = torch.zeros_like(document).index_add_(0, document, torch.ones_like(document))
    num_tokens, number = position_BT.shape[1], document[-1] + 1
    facts = [number, lengths.max()]
    if cu_seq_lens is not None:
        facts += [cu_seq_lens[0], cu_seq_lens[-1], (cu_seq_lens.diff() < 0).any()]
    number, longest, *told = torch.stack([fact.long() for fact in facts]).tolist()
    if told and told != [0, num_tokens, False]:
        first, last, falls = told
        raise ValueError(
            f"cu_seq_lens_q goes from {first} to {last}{', and falls between,' if falls else ''} where the row has "
            f"{num_tokens} tokens; begin it with 0, end it with the number of tokens, and let it never fall"
        )
    if number == batch_size:
        return None, None
    starts = F.pad(lengths[:number].cumsum(dim=0), (1, 0)).int()
    any_length(starts, 0)
    return documents_BT, Packing(starts, longest)


def runs_fused(packing: Packing, num_tokens: int, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention within packed documents runs fused, for hidden states in `dtype`, and else under a mask.

    `num_tokens` are those of the whole batch. In a routed block fewer enter, which needs no more memory.
    """
    if device.type != "cuda":
        return False
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return (
        dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= WIDEST_HEAD
        and packing.starts.shape[0] - 1 <= min(MOST_DOCUMENTS, num_tokens // SHORTEST_DOCUMENTS)
        # The same name stands for GPUs of AMD, whose kernel is another.
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
        # What `torch.nn.attention.sdpa_kernel` switches off and on.
        and torch.backends.cuda.flash_sdp_enabled()
    )


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    """Causal attention within each document, for queries [B, H, T, h], of their shape, and as many keys and values.

    Queries and keys are the same tokens: where a document has fewer queries than keys, the kernel would take these for
    its last tokens.
    """
    num_groups = query.shape[1] // key.shape[1]
    batch_size, num_tokens = query.shape[0], query.shape[2]
    # RoPE leaves autocast's type, to which autocast brings only what it knows.
    query, key, value = (states.to(value.dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if num_groups > 1:
        # The kernel's function in torch 2.11 has no word for keys that are shared.
        key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    # A graph that knew the length would be compiled anew for another.
    longest = num_tokens if torch.compiler.is_compiling() else packing.longest
    starts = packing.starts
    attended = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0))
    assert isinstance(attended, Tensor)
    return attended.unflatten(0, (batch_size, num_tokens)).transpose(1, 2)
