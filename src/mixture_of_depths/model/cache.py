"""Keys and values of past tokens. A routed block stores only the tokens that entered it, per row of the batch.

A *slot* is a token's place in the padded row, counted from 0; left padding has slots too. A routed block's storage is
a rectangle as wide as its fullest row, and the unused entries of other rows hold the slot `EMPTY`, which lies behind
every token, so causal attention never sees them.

Shapes: B batch, R rows of which tokens entered, H key-value heads, K stored tokens, N new tokens, T tokens given, D
hidden size, h head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mixture_of_depths.model.configuration import MoDConfig

EMPTY = torch.iinfo(torch.int64).max


class RoutedCacheLayer(DynamicLayer):
    """The cache of one routed block. `generate()` builds it from the configuration's `layer_types`."""

    _layer_type = "mixture_of_depths_routed"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slots_BK: Tensor | None = None
        self.num_tokens_seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the tokens that entered.

        Args:
            key_states (torch.Tensor): of shape [R, H, N, h].
            value_states (torch.Tensor): of shape [R, H, N, h].
            slots (torch.Tensor): keyword; the slots of the new tokens, rising, and `EMPTY` where a row has fewer than
                N; of shape [R, N].
            rows (torch.Tensor | None): keyword; which rows of the batch these are, None for all; of shape [R].

        Returns:
            The keys and values of all stored tokens of these rows, each of shape [R, H, K, h]; `slots_of` tells where
            they stand.
        """
        rows: Tensor | None = kwargs["rows"]
        slots_BK, new_slots_BN = self.slots_BK, self._in_batch(kwargs["slots"], rows, EMPTY)
        assert slots_BK is not None
        new_keys, new_values = (self._in_batch(states, rows, 0) for states in (key_states, value_states))
        if self.keys is None:
            self.lazy_initialization(new_keys, new_values)
            self.keys, self.values, self.slots_BK = new_keys, new_values, new_slots_BN
        else:
            assert self.values is not None
            self.keys = torch.cat([self.keys, new_keys], dim=2)
            self.values = torch.cat([self.values, new_values], dim=2)
            self.slots_BK = torch.cat([slots_BK, new_slots_BN], dim=1)
            self._compact()
        assert self.keys is not None and self.values is not None
        if rows is None:
            return self.keys, self.values
        return self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def see(self, hidden_BTD: Tensor) -> None:
        """Counts the tokens the model is given, those that skip the block included; before any of them is stored."""
        if self.slots_BK is None:
            self.slots_BK = torch.empty(hidden_BTD.shape[0], 0, dtype=torch.int64, device=hidden_BTD.device)
        self.num_tokens_seen += hidden_BTD.shape[1]

    def slots_of(self, rows: Tensor | None) -> Tensor:
        """The slots of what is stored of these rows, None for all; of shape [R, K]."""
        assert self.slots_BK is not None
        return self.slots_BK if rows is None else self.slots_BK.index_select(0, rows)

    def _in_batch(self, states: Tensor, rows: Tensor | None, fill: int) -> Tensor:
        """The states of the whole batch, `fill` for rows that are left out."""
        if rows is None:
            return states
        assert self.slots_BK is not None
        whole = states.new_full((self.slots_BK.shape[0], *states.shape[1:]), fill)
        return whole.index_copy(0, rows, states)

    def _compact(self) -> None:
        """Sorts each row by slot, so that empty entries come last, and cuts the rectangle to the fullest row."""
        assert self.keys is not None and self.values is not None and self.slots_BK is not None
        if self.slots_BK.shape[0] == 1 and not bool((self.slots_BK == EMPTY).any()):
            return
        self.slots_BK, order_BK = self.slots_BK.sort(dim=1, stable=True)
        width = int((self.slots_BK != EMPTY).sum(dim=1).max())
        self.slots_BK = self.slots_BK[:, :width]
        index_BHKh = order_BK[:, None, :width, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys, self.values = self.keys.gather(2, index_BHKh), self.values.gather(2, index_BHKh)

    def get_seq_length(self) -> int:
        """The number of tokens the model was given, those that skipped this block included."""
        return self.num_tokens_seen

    def num_stored(self) -> Tensor:
        """The number of tokens that entered the block, per row; of shape [B], once the model was given any token."""
        assert self.slots_BK is not None
        return (self.slots_BK != EMPTY).sum(dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of the sequence, of which this block stored only some."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove={tokens_to_remove} must be negative: the number of tokens to forget")
        self.num_tokens_seen += tokens_to_remove
        if tokens_to_remove == 0 or self.keys is None:
            return
        assert self.slots_BK is not None
        self.slots_BK = self.slots_BK.masked_fill(self.slots_BK >= self.num_tokens_seen, EMPTY)
        self._compact()

    def reset(self) -> None:
        """Forgets everything."""
        super().reset()
        self.slots_BK, self.num_tokens_seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the rows for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if self.slots_BK is not None:
            rows = torch.arange(self.slots_BK.shape[0], device=self.slots_BK.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`, in that order."""
        if self.slots_BK is not None:
            self.slots_BK = self.slots_BK[indices]
        if self.keys is not None:
            assert self.values is not None
            self.keys, self.values = self.keys[indices], self.values[indices]
            self._compact()


class MoDCache(DynamicCache):
    """The cache of a Mixture-of-Depths model: every token in a dense block, those that entered in a routed one."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__(config=config)

    def num_bytes(self) -> int:
        """Bytes of the stored keys and values; entries that only fill a routed block's rectangle are not counted."""
        total = 0
        for layer in self.layers:
            if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
                continue
            size = layer.keys.nbytes + layer.values.nbytes
            if isinstance(layer, RoutedCacheLayer):
                stored, slots = int(layer.num_stored().sum()), layer.slots_BK
                size = size * stored // max(1, slots.numel() if slots is not None else 0)
            total += size
        return total
