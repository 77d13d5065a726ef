"""Where the keys of tokens lie that entered a block, and what vLLM's attention is told of them.

A block whose tokens skip attention as well (`routed_parts="block"`) must not show the keys of those that skipped to
later ones. Its tokens that enter take places 0, 1, 2 … of the request's own pages, in the order of the sequence, so
that attention sees a shorter sequence, and nothing is masked. RoPE has been applied when a key is stored, so that its
place is free.

How many tokens of a request have entered a block is known by the request's first page, which is its own as long as it
runs. A request that begins, or begins again because its pages were taken from it, has not computed anything yet.

Shapes: N tokens of the step, R requests, K tokens that enter, Q requests of which tokens enter, P pages of a request.
"""

# pyright: reportMissingImports=false

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)


@dataclass
class Step:
    """What a routed block is told of a step: vLLM's facts about it, and how to tell its attention of other tokens.

    Attributes:
        common: the facts, of all tokens.
        build: makes the attention's metadata of such facts.
        page_size: tokens in a page.
        num_entered: how many tokens of a request have entered a block, by the block's name; of shape [pages], at the
            request's first page.
    """

    common: CommonAttentionMetadata
    build: Callable[[CommonAttentionMetadata], Any]
    page_size: int
    num_entered: dict[str, Tensor]

    @functools.cached_property
    def first_page(self) -> Tensor:
        """The first page of each request; of shape [R]."""
        return self.common.block_table_tensor[:, 0].long()

    @functools.cached_property
    def request_of(self) -> Tensor:
        """The request of each token; of shape [N]."""
        start = self.common.query_start_loc
        requests = torch.arange(len(start) - 1, device=start.device)
        return requests.repeat_interleave(start.diff(), output_size=self.common.num_actual_tokens)

    @functools.cached_property
    def counting(self) -> Tensor:
        """0, 1 … N, as starts of requests of one token each."""
        return torch.arange(self.common.num_actual_tokens + 1, dtype=torch.int32, device=self.common.seq_lens.device)

    def taken(self, entered_N: Tensor) -> Tensor:
        """Without what is behind the tokens of the step and fills it up."""
        return entered_N[: self.common.num_actual_tokens]

    def told(self, request_K: Tensor, **facts: Any) -> Any:
        """The attention's metadata with other facts, of which the requests of tokens K are the last."""
        common = self.common.replace(
            num_actual_tokens=len(request_K),
            seq_lens_cpu_upper_bound=None,
            positions=None,
            is_prefilling=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
            **facts,
        )
        return self.build(common)

    def side_by_side(self, block: str, index_K: Tensor) -> tuple[Any, Tensor]:
        """Gives tokens that enter a block the next places of their requests.

        Args:
            block: the block's name.
            index_K (torch.Tensor): which tokens of the step enter, rising; at least one.

        Returns:
            The attention's metadata of these tokens, which see those of their request that entered before, and the
            slots of the cache that their keys take, of shape [K].
        """
        table_RP, num_entered = self.common.block_table_tensor, self.num_entered[block]
        request_K = self.request_of.index_select(0, index_K)
        count_R = request_K.bincount(minlength=len(table_RP))
        before_R = num_entered.index_select(0, self.first_page)
        after_R = before_R + count_R
        num_entered.index_copy_(0, self.first_page, after_R)
        # A token's place among those of its request that enter in this step.
        rank_K = torch.arange(len(index_K), device=index_K.device) - (count_R.cumsum(0) - count_R)[request_K]
        place_K = before_R[request_K] + rank_K
        page_K = table_RP[request_K, place_K // self.page_size]
        slot_K = page_K * self.page_size + place_K % self.page_size
        request_Q = count_R.nonzero().flatten()
        start = torch.zeros(len(request_Q) + 1, dtype=torch.int32, device=index_K.device)
        start[1:] = count_R[request_Q].cumsum(0)
        length_Q = after_R[request_Q].int()
        metadata = self.told(
            request_K,
            query_start_loc=start,
            query_start_loc_cpu=start.cpu(),
            seq_lens=length_Q,
            num_reqs=len(request_Q),
            max_query_len=int(count_R.max()),
            max_seq_len=int(length_Q.max()),
            block_table_tensor=table_RP.index_select(0, request_Q),
            slot_mapping=slot_K,
        )
        return metadata, slot_K

    @functools.cached_property
    def whole(self) -> Any:
        """The attention's metadata of all tokens."""
        return self.build(self.common)

    def one_by_one(self, position_K: Tensor, index_K: Tensor) -> Any:
        """The attention's metadata of tokens that see all tokens of their request up to themselves.

        Each is a request of its own: those between them do not ask, and attention takes the tokens that ask for the
        last of a sequence.

        Args:
            position_K (torch.Tensor): their positions in the sequence.
            index_K (torch.Tensor): which tokens of the step they are, rising; at least one.
        """
        each_is_a_request = self.common.num_actual_tokens == self.common.num_reqs
        if each_is_a_request and len(index_K) == self.common.num_reqs:
            return self.whole
        request_K = index_K if each_is_a_request else self.request_of.index_select(0, index_K)
        start = self.counting[: len(index_K) + 1]
        return self.told(
            request_K,
            query_start_loc=start,
            query_start_loc_cpu=start.cpu(),
            seq_lens=(position_K + 1).int(),
            num_reqs=len(index_K),
            max_query_len=1,
            max_seq_len=self.common.max_seq_len,
            block_table_tensor=self.common.block_table_tensor.index_select(0, request_K),
            slot_mapping=self.common.slot_mapping.index_select(0, index_K),
        )


@functools.cache
def routed_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """An attention backend that tells its blocks of the step, and leaves it to them who of the tokens takes part."""

    class Builder(backend.get_builder_cls()):
        # How many tokens enter differs from step to step.
        _cudagraph_support = AttentionCGSupport.NEVER

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Step:
            """The facts of a step; of requests that begin with it, no token has entered yet."""
            build = functools.partial(super().build, 0)
            step = Step(common_attn_metadata, build, self.kv_cache_spec.block_size, self.num_entered)
            start, length_R = common_attn_metadata.query_start_loc, common_attn_metadata.seq_lens
            begins_R = length_R == start.diff()
            for num_entered in self.num_entered.values():
                num_entered.index_fill_(0, step.first_page[begins_R], 0)
            return step

        @functools.cached_property
        def num_entered(self) -> dict[str, Tensor]:
            """As in `Step`."""
            cache = self.vllm_config.cache_config
            assert cache.num_gpu_blocks is not None
            # A backend may have pages that are parts of vLLM's.
            pages = cache.num_gpu_blocks * cache.block_size // self.kv_cache_spec.block_size
            return {name: torch.zeros(pages, dtype=torch.int64, device=self.device) for name in self.layer_names}

    return subclass_attention_backend("Routed", backend, Builder)
