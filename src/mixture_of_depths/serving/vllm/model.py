"""The model for vLLM: its Llama, in which only some tokens of a step enter a routed block.

Dense blocks, embedding, final norm and head are vLLM's own; so are the products, norms and attention of routed blocks.
What is added is the choice of tokens, by the checkpoint's router under causal routing (`model/routing.py`), and where
their keys lie (`places.py`). It computes what `model/modeling.py` computes.

Shapes: N tokens of the step, K tokens that enter, R rows of their products (K, and some for nothing if fewer than N),
D hidden size, H heads of this process, h head width.
"""

# pyright: reportMissingImports=false

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.library import Library
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from mixture_of_depths.compiler import trace_unknown_sizes
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.routing import Router
from mixture_of_depths.serving.vllm.places import Step, routed_backend

# A number of rows has at most so many leading bits that are not zeros.
LEADING_BITS = 4


class Attention(LlamaAttention):
    """vLLM's, with norms of queries and keys where the checkpoint has them."""

    def __init__(self, config: MoDConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else None

    def by_head(self, states: Tensor) -> Tensor:
        """Of shape [*, H, h], for states [*, H * h]."""
        return states.unflatten(-1, (-1, self.head_dim))

    def by_norm(self, states: Tensor, norm: RMSNorm | None) -> Tensor:
        """Queries or keys, of shape [*, H * h], with their norm if there is one."""
        return states if norm is None else norm(self.by_head(states)).flatten(-2)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """What all tokens get from those they attend to, of shape [N, D], for normed hidden states of that shape."""
        query, key, value = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.by_norm(query, self.q_norm), self.by_norm(key, self.k_norm)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class ChosenAttention(Attention):
    """Attention of chosen tokens to one another; which they are differs from step to step."""

    def __init__(self, config: MoDConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.attn.attn_backend = routed_backend(self.attn.attn_backend)

    def chosen(self, positions: Tensor, normed_ND: Tensor, entered_N: Tensor, index_R: Tensor, name: str) -> Tensor:
        """What the chosen tokens get from those they attend to, of shape [R, D].

        Args:
            positions (torch.Tensor): positions in the sequence, of shape [N].
            normed_ND (torch.Tensor): normed hidden states.
            entered_N (torch.Tensor): which tokens enter.
            index_R (torch.Tensor): the tokens whose rows are multiplied.
            name: the block's name.
        """
        query, key, value = self.projected(positions, normed_ND, normed_ND.index_select(0, index_R))
        positions_R = positions.index_select(0, index_R)
        attended = torch.ops.mixture_of_depths.chosen_attention(positions_R, query, key, value, entered_N, name)
        return self.o_proj(attended)[0]

    def projected(self, positions: Tensor, normed_ND: Tensor, normed_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the chosen tokens, without RoPE; of shape [R, H * h]."""
        query, key, value = self.qkv_proj(normed_RD)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        return self.by_norm(query, self.q_norm), self.by_norm(key, self.k_norm), value

    def attend_in_step(
        self, positions_R: Tensor, query: Tensor, key: Tensor, value: Tensor, index_K: Tensor, step: Step
    ) -> Tensor:
        """What is attended to, of the shape of the queries; rows behind the chosen tokens' mean nothing.

        Args:
            positions_R (torch.Tensor): positions in the sequence.
            query, key, value (torch.Tensor): as `projected`.
            index_K (torch.Tensor): the tokens of the step that enter, rising.
            step: what is known of the step.
        """
        if len(index_K) == 0:
            return torch.zeros_like(query, memory_format=torch.contiguous_format)
        query, key = self.turned(positions_R, query, key)
        metadata, slots = step.side_by_side(self.attn.layer_name, index_K)
        self.store(key[: len(index_K)], value[: len(index_K)], slots)
        return self.attend(query, metadata)

    def turned(self, positions: Tensor, *queries_and_keys: Tensor) -> tuple[Tensor, ...]:
        """Queries, and keys if they are given, by RoPE; of shape [R, H * h]."""
        turned = tuple(states.clone(memory_format=torch.contiguous_format) for states in queries_and_keys)
        # One kernel, in place; on a CPU vLLM calls the same.
        self.rotary_emb.forward_cuda(positions, *turned)
        return turned

    def store(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Puts keys and values, of shape [*, H * h], into slots of the cache."""
        key, value = self.by_head(key), self.by_head(value)
        self.attn.impl.do_kv_cache_update(self.attn, key, value, self.attn.kv_cache, slots)

    def attend(self, query: Tensor, metadata: Any) -> Tensor:
        """Attention of queries, of shape [R, H * h], to what is stored; 0 for rows of which nothing is told."""
        query = self.by_head(query)
        attended = torch.zeros_like(query, memory_format=torch.contiguous_format)
        # Keys and values are in the cache already, and given for their number of heads alone.
        given = query[:, : self.num_kv_heads]
        self.attn.impl.forward(self.attn, query, given, given, self.attn.kv_cache, metadata, output=attended)
        return attended.flatten(-2)


class AskingAttention(ChosenAttention):
    """Attention of chosen tokens to the keys and values of all tokens."""

    def __init__(self, config: MoDConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        # Those that skip have no queries: two products in the place of one.
        del self.qkv_proj
        shared = {"bias": kwargs["bias"], "quant_config": kwargs["quant_config"]}
        prefix, width = kwargs["prefix"], self.total_num_kv_heads * self.head_dim
        self.query_proj = ColumnParallelLinear(
            self.hidden_size, self.total_num_heads * self.head_dim, prefix=f"{prefix}.query_proj", **shared
        )
        self.key_value_proj = MergedColumnParallelLinear(
            self.hidden_size, [width, width], prefix=f"{prefix}.key_value_proj", **shared
        )

    def projected(self, positions: Tensor, normed_ND: Tensor, normed_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the chosen tokens, without RoPE, and keys, with it, and values of all tokens."""
        query = self.by_norm(self.query_proj(normed_RD)[0], self.q_norm)
        key, value = self.key_value_proj(normed_ND)[0].split([self.kv_size, self.kv_size], dim=-1)
        return query, self.rotary_emb(positions, self.by_norm(key, self.k_norm))[0], value

    def attend_in_step(
        self, positions_R: Tensor, query: Tensor, key: Tensor, value: Tensor, index_K: Tensor, step: Step
    ) -> Tensor:
        """As above, for keys and values of all tokens."""
        self.store(key, value, step.common.slot_mapping)
        if len(index_K) == 0:
            return torch.zeros_like(query, memory_format=torch.contiguous_format)
        (query,) = self.turned(positions_R, query)
        return self.attend(query, step.one_by_one(positions_R[: len(index_K)], index_K))


class Bypass(nn.Module):
    """What a token that skips takes in the place of the routed part (`model/routing.py`)."""

    def __init__(self, config: MoDConfig, prefix: str) -> None:
        super().__init__()
        width, rank = config.hidden_size, config.bypass_rank
        self.down = ReplicatedLinear(width, rank, bias=False, prefix=f"{prefix}.down")
        self.up = ReplicatedLinear(rank, width, bias=False, prefix=f"{prefix}.up")

    def forward(self, normed_ND: Tensor, entered_N: Tensor) -> Tensor:
        """Of the shape of the normed hidden states; 0 for tokens that entered."""
        return self.up(self.down(normed_ND)[0].masked_fill(entered_N[:, None], 0))[0]


class RoutedBlock(LlamaDecoderLayer):
    """A block of which only some tokens enter the routed part.

    How many is known in the step alone. Two operators see the tokens themselves; all else is traced, once for any
    number of them.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        config: MoDConfig = vllm_config.model_config.hf_config
        layer_idx = extract_layer_index(prefix)
        part = config.routed_part(layer_idx)
        assert part is not None
        kinds = {"block": ChosenAttention, "block_keep_keys": AskingAttention, "mlp": Attention}
        super().__init__(vllm_config, prefix, attn_layer_type=kinds[part])
        self.part, self.name = part, prefix
        self.first_token_enters = config.first_token_enters
        self.router = Router(config, layer_idx).eval()
        self.bypass = Bypass(config, f"{prefix}.bypass") if config.bypass_rank else None
        # Where the operators below find the block.
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns what the routed part adds, and the residual stream it is added to; both of shape [N, D].

        So do vLLM's blocks, of which the next one's norm takes the sum. The stream given is such a sum, too.
        """
        hidden_ND = hidden_states if residual is None else hidden_states + residual
        attention = self.self_attn
        if self.part == "mlp":
            attended_ND = attention(positions=positions, hidden_states=self.input_layernorm(hidden_ND))
            hidden_ND = hidden_ND + attended_ND
        normed_ND = (self.post_attention_layernorm if self.part == "mlp" else self.input_layernorm)(hidden_ND)
        entered_N, gate_N = self.entered(hidden_ND, positions)
        index_R, row_N = torch.ops.mixture_of_depths.rows(entered_N, self.name)
        if isinstance(attention, ChosenAttention):
            attended_RD = attention.chosen(positions, normed_ND, entered_N, index_R, self.name)
            middle_RD = self.post_attention_layernorm(hidden_ND.index_select(0, index_R) + attended_RD)
            delta_RD = attended_RD + self.mlp(middle_RD)
        else:
            delta_RD = self.mlp(normed_ND.index_select(0, index_R))
        added_RD = (gate_N.index_select(0, index_R)[:, None] * delta_RD).to(hidden_ND.dtype)
        # Tokens that skip take the last row.
        added_ND = torch.cat([added_RD, torch.zeros_like(hidden_ND[:1])]).index_select(0, row_N)
        if self.bypass is not None:
            hidden_ND = hidden_ND + self.bypass(normed_ND, entered_N)
        return added_ND, hidden_ND

    def entered(self, hidden_ND: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens enter, bool, and the factor of what the routed part adds to them; both of shape [N]."""
        logits_1N, causal_logits_1N = self.router.logits(hidden_ND[None], positions[None])
        entered_N = causal_logits_1N[0] > 0
        if self.first_token_enters:
            entered_N = entered_N | (positions == 0)
        return entered_N, self.router.gate(logits_1N[0])

    def step(self) -> Any:
        """What attention is told of the step, which is a `Step` where attention is routed.

        None when vLLM tries how much memory a step takes, and nothing is stored.
        """
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self.self_attn.attn.layer_name]


def block_of(name: str) -> RoutedBlock:
    """The block of that name."""
    return get_forward_context().no_compile_layers[name]


def rows(entered_N: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The tokens whose rows are multiplied, of shape [R], and which of these rows each token takes, of shape [N].

    The last row, R, is that of the tokens that skip. When vLLM tries how much memory a step takes, all tokens enter.
    """
    step = block_of(name).step()
    row_N = torch.empty_like(entered_N, dtype=torch.int64)
    if step is None:
        entered_N = torch.ones_like(entered_N)
    elif isinstance(step, Step):
        entered_N = step.taken(entered_N)
    index_K = entered_N.nonzero().flatten()
    count = len(index_K)
    num_rows = rounded_up(count) if entered_N.is_cpu else count
    row_N.fill_(num_rows).index_copy_(0, index_K, torch.arange(count, device=row_N.device))
    index_R = functional.pad(index_K, (0, num_rows - count)) if num_rows > count else index_K
    return index_R, row_N


def rounded_up(count: int) -> int:
    """The number of rows to multiply, at least `count`, of which there are few different ones.

    On a CPU, oneDNN makes a kernel for every number of rows that it meets, which takes about a millisecond for each
    matrix. Rounded up, it soon has met them all, and at most one row in eight is for nothing.
    """
    step = 1 << max(0, (count - 1).bit_length() - LEADING_BITS)
    return -(-count // step) * step


def rows_as_shaped(entered_N: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Tensors of the operator's shapes, for the compiler."""
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return entered_N.new_empty(num_rows, dtype=torch.int64), torch.empty_like(entered_N, dtype=torch.int64)


def chosen_attention(
    positions_R: Tensor, query: Tensor, key: Tensor, value: Tensor, entered_N: Tensor, name: str
) -> Tensor:
    """`ChosenAttention.attend_in_step` of the block of that name.

    It writes to the cache and counts, which vLLM's own operator for that does not declare either: its result is used,
    and no other operator sees what it writes.
    """
    block = block_of(name)
    step = block.step()
    if step is None:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    assert isinstance(block.self_attn, ChosenAttention)
    index_K = step.taken(entered_N).nonzero().flatten()
    return block.self_attn.attend_in_step(positions_R, query, key, value, index_K, step)


def attention_as_shaped(
    positions_R: Tensor, query: Tensor, key: Tensor, value: Tensor, entered_N: Tensor, name: str
) -> Tensor:
    """A tensor of the operator's shape, for the compiler."""
    return torch.empty_like(query, memory_format=torch.contiguous_format)


library = Library("mixture_of_depths", "FRAGMENT")
direct_register_custom_op("rows", rows, fake_impl=rows_as_shaped, target_lib=library)
direct_register_custom_op("chosen_attention", chosen_attention, fake_impl=attention_as_shaped, target_lib=library)
trace_unknown_sizes()


def block(vllm_config: VllmConfig, prefix: str) -> LlamaDecoderLayer:
    """The block of the given name, routed or dense."""
    config: MoDConfig = vllm_config.model_config.hf_config
    if config.routed_part(extract_layer_index(prefix)) is None:
        return LlamaDecoderLayer(vllm_config, prefix, attn_layer_type=Attention)
    return RoutedBlock(vllm_config, prefix)


class MoDForCausalLM(LlamaForCausalLM):
    """vLLM's Llama with routed blocks, by the weights of this package's checkpoints."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=block)  # pyright: ignore

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint, and returns the names of what was loaded."""
        loaders = self.own_loaders()
        loaded = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if name not in loaders:
                    yield name, weight
                    continue
                own_name, load = loaders[name]
                load(loaded_weight=weight)
                loaded.add(own_name)

        return super().load_weights(others()) | loaded

    def own_loaders(self) -> dict[str, tuple[str, Callable[..., None]]]:
        """What vLLM's Llama would take for its own: by the checkpoint's name the name here, and what loads it."""
        loaders: dict[str, tuple[str, Callable[..., None]]] = {}
        for name, module in self.named_modules():
            if isinstance(module, Router):
                for kind, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    loaders[f"{name}.{kind}"] = f"{name}.{kind}", partial(default_weight_loader, tensor)
            if isinstance(module, AskingAttention):
                products = {"q": ("query_proj", {}), "k": ("key_value_proj", {"loaded_shard_id": 0})}
                products["v"] = ("key_value_proj", {"loaded_shard_id": 1})
                for letter, (product, part) in products.items():
                    for kind, tensor in module.get_submodule(product).named_parameters():
                        load = partial(cast(Any, tensor).weight_loader, tensor, **part)
                        loaders[f"{name}.{letter}_proj.{kind}"] = f"{name}.{product}.{kind}", load
        return loaders
