"""Attention of the tokens that a block is given, and where they stand.

Shapes: B batch, T tokens given, S tokens known (past and given), K chosen tokens per row, R rows of which tokens are
chosen, Q queries, D hidden size, H heads, h head width. A slot is a token's place in the padded row (see `cache.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mixture_of_depths.model.cache import EMPTY, RoutedCacheLayer
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.packed import Packing, attend_packed
from mixture_of_depths.model.routing import Selection, gather_tokens


@dataclass
class Placement:
    """Where the tokens of a block stand in their rows, and what they may attend to.

    Attributes:
        cos, sin (torch.Tensor): RoPE's factors at the original positions; of shape [B, T, h] or [1, T, h].
        slots (torch.Tensor): slots, `EMPTY` for padding; of shape [B, T] or [1, T].
        documents (torch.Tensor | None): which of the documents packed in the row a token belongs to; of shape [B, T].
        mask (torch.Tensor | None): True where a query may attend to a key; of shape [B, 1, Q, S]. None when every
            token attends to all tokens up to itself, or those of its document where there is a packing.
        real (torch.Tensor | None): False for padding; of shape [B, T]. None when there is none.
        rows (torch.Tensor | None): which rows of the batch these are, where others are left out; of shape [B].
        packing (Packing | None): where documents lie, when attention within them runs fused; then there is no mask.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    documents: Tensor | None
    mask: Tensor | None
    real: Tensor | None
    rows: Tensor | None = None
    packing: Packing | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Placement":
        """The same on another device, as accelerate asks of what a block is given when blocks lie on several."""
        fields: dict[str, Any] = {
            name: None if values is None else values.to(device, non_blocking=non_blocking)
            for name, values in vars(self).items()
        }
        return Placement(**fields)

    def of(self, selection: Selection, batch_size: int) -> "Placement":
        """The placement of the tokens chosen of a batch, which attend to one another only."""
        valid_RK = selection.valid_RK

        def chosen(values: Tensor) -> Tensor:
            return gather_tokens(values.expand(batch_size, *values.shape[1:]), selection)

        slots_RK = chosen(self.slots)
        if valid_RK is not None:
            slots_RK = slots_RK.masked_fill(~valid_RK, EMPTY)
        documents_RK = None if self.documents is None else chosen(self.documents)
        mask = packing = None
        if self.packing is not None:
            packing = self.packing.of(selection, self.slots.shape[1])
        elif self.mask is not None or valid_RK is not None:
            mask = visible(slots_RK, slots_RK, documents_RK, documents_RK)
        cos_RKh, sin_RKh = chosen(self.cos), chosen(self.sin)
        return Placement(cos_RKh, sin_RKh, slots_RK, documents_RK, mask, valid_RK, selection.row_R, packing)

    def asking(self, selection: Selection, batch_size: int) -> "Placement":
        """The placement of the tokens chosen of a batch, which attend to all tokens.

        Under a mask even where others have a packing: the fused attention takes the queries of a document for its last
        tokens.
        """
        chosen, mask = self.of(selection, batch_size), None
        if self.mask is not None:
            mask_BTS = self.mask[:, 0].expand(batch_size, -1, -1)
            mask = gather_tokens(mask_BTS, selection)[:, None]
        elif self.slots.shape[1] > 1:
            documents_BT = self.documents
            if documents_BT is not None and selection.row_R is not None:
                documents_BT = documents_BT.expand(batch_size, -1).index_select(0, selection.row_R)
            mask = visible(chosen.slots, self.slots, chosen.documents, documents_BT)
        return replace(chosen, mask=mask, packing=None)


def visible(
    query_slots_BQ: Tensor,
    key_slots_BS: Tensor,
    query_documents_BQ: Tensor | None = None,
    key_documents_BS: Tensor | None = None,
) -> Tensor:
    """True where a query may attend to a key: at or before it, and of the same document; of shape [B, 1, Q, S]."""
    mask_BQS = key_slots_BS[:, None, :] <= query_slots_BQ[:, :, None]
    if query_documents_BQ is not None and key_documents_BS is not None:
        mask_BQS = mask_BQS & (key_documents_BS[:, None, :] == query_documents_BQ[:, :, None])
    return mask_BQS[:, None]


def rotary_factors(config: MoDConfig, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and sines, each of shape [B, T, h]; computed in float32, or float64 for a float64 model."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    assert config.rope_parameters is not None and config.head_dim is not None
    rope_type, scaling = config.rope_parameters["rope_type"], 1.0
    if rope_type == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=precise, device=position_BT.device) / config.head_dim
        frequency = 1.0 / (config.rope_parameters["rope_theta"] ** exponent)
    else:
        frequency, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, position_BT.device)
    angle = position_BT[..., None].to(precise) * frequency.to(precise)
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def rotate(states_BTHh: Tensor, cos_BTh: Tensor, sin_BTh: Tensor) -> Tensor:
    """Applies RoPE, rotating the first half of a head against the second as Llama does."""
    first, second = states_BTHh.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return states_BTHh * cos_BTh[:, :, None] + turned * sin_BTh[:, :, None]


class HeadNorm(nn.RMSNorm):
    """The norm of a head's query or key, which begins with another weight than the norms of whole tokens."""

    def initial_weight(self) -> float:
        """With this weight a query scores 16 with a key of its own direction.

        With a weight of 1 it scores the root of the head's width: in a narrow head too little to single out one token
        of many.
        """
        return 4 / self.normalized_shape[0] ** 0.25


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: MoDConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = HeadNorm(config.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else nn.Identity()

    def forward(
        self, hidden_BTD: Tensor, placement: Placement, past: Cache | None, asking: Selection | None = None
    ) -> Tensor:
        """What each token gets from those it attends to, of shape [B, T, D]; with `asking` only these, [R, K, D]."""
        asking_RKD, asking_from = hidden_BTD, placement
        if asking is not None:
            asking_RKD, asking_from = gather_tokens(hidden_BTD, asking), placement.asking(asking, hidden_BTD.shape[0])
        head_shape = (*hidden_BTD.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(asking_RKD).unflatten(-1, (-1, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_BTD).view(head_shape))
        value = self.v_proj(hidden_BTD).view(head_shape).transpose(1, 2)
        query = rotate(query, asking_from.cos, asking_from.sin).transpose(1, 2)
        key = rotate(key, placement.cos, placement.sin).transpose(1, 2)

        mask = asking_from.mask
        is_causal = mask is None and query.shape[2] > 1
        if past is not None:
            layer = past.layers[self.layer_idx]
            # What is stored first are the tokens that are asked for themselves.
            is_empty = isinstance(layer, RoutedCacheLayer) and layer.keys is None
            key, value = past.update(key, value, self.layer_idx, slots=placement.slots, rows=placement.rows)
            if isinstance(layer, RoutedCacheLayer) and not is_empty:
                is_causal, mask = False, visible(placement.slots, layer.slots_of(placement.rows))
        if asking is not None and asking.row_R is not None:
            key, value = key.index_select(0, asking.row_R), value.index_select(0, asking.row_R)
        if asking_from.packing is not None:
            attended = attend_packed(query, key, value, asking_from.packing)
        else:
            attended = attend(query, key, value, mask, is_causal)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention of queries [B, H, Q, h] to keys and values, which neighbouring heads share; of the queries' shape."""
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1 and query.shape[2] == 1:
        # The queries that share keys are so many rows of one attention, as a mask of one row is all of theirs.
        grouped = F.scaled_dot_product_attention(query.view(*key.shape[:2], num_groups, -1), key, value, attn_mask=mask)
        # Not a view: each kernel lays out its result as it likes.
        return grouped.reshape(query.shape)
    is_half = value.dtype in (torch.bfloat16, torch.float16)
    if num_groups > 1 and query.device.type == "cuda" and (mask is not None or not is_half):
        # There no fused kernel takes keys that are shared together with a mask, or in float32.
        key, value = (states.repeat_interleave(num_groups, dim=1) for states in (key, value))
    is_shared = key.shape[1] != query.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=is_shared)
