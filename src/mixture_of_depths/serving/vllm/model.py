"""The model for vLLM: its Llama, in which only some tokens of a step enter a routed block.

Dense blocks, embedding, final norm and head are vLLM's own; so are the products, norms and attention of routed blocks.
What is added is the choice of tokens, by the checkpoint's router under causal routing (`model/routing.py`), and where
their keys lie (`places.py`). It computes what `model/modeling.py` computes.

Shapes: N tokens of the step, K tokens that enter, S tokens that skip, D hidden size, H heads of this process, h head
width.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.routing import Router
from mixture_of_depths.serving.vllm.places import Step, routed_backend


class Attention(LlamaAttention):
    """vLLM's, with norms of queries and keys where the checkpoint has them."""

    def __init__(self, config: MoDConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.query_key_norm else None

    def by_head(self, states: Tensor) -> Tensor:
        """Of shape [*, H, h], for states [*, H * h]."""
        return states.unflatten(-1, (-1, self.head_dim))

    def normed(self, states: Tensor, norm: RMSNorm | None) -> Tensor:
        """Queries or keys, of shape [*, H * h], with their norm if there is one."""
        return states if norm is None else norm(self.by_head(states)).flatten(-2)

    def turned(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of the same tokens, with their norms, and turned by RoPE."""
        return self.rotary_emb(positions, self.normed(query, self.q_norm), self.normed(key, self.k_norm))

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """What all tokens get from those they attend to, of shape [N, D], for normed hidden states of that shape."""
        query, key, value = self.qkv_proj(hidden_states)[0].split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query, key = self.turned(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class ChosenAttention(Attention):
    """Attention of tokens that are chosen; which they are, differs from step to step."""

    def __init__(self, config: MoDConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        self.attn.attn_backend = routed_backend(self.attn.attn_backend)

    def chosen(self, positions: Tensor, hidden_ND: Tensor, index_K: Tensor, norm: RMSNorm, step: Step | None) -> Tensor:
        """What the chosen tokens get from those they attend to, of shape [K, D].

        Args:
            positions (torch.Tensor): positions in the sequence, of shape [N].
            hidden_ND (torch.Tensor): the residual stream of all tokens.
            index_K (torch.Tensor): which tokens are chosen, rising.
            norm: the norm before attention.
            step: what is known of the step; None when vLLM tries how much memory it takes, and nothing is stored.
        """
        query, key, value = self.qkv_proj(norm(hidden_ND.index_select(0, index_K)))[0].split(
            [self.q_size, self.kv_size, self.kv_size], dim=-1
        )
        query, key = self.turned(positions.index_select(0, index_K), query, key)
        if step is None:
            return self.o_proj(torch.zeros_like(query))[0]
        metadata, slots = step.side_by_side(self.attn.layer_name, index_K)
        self.store(key, value, slots)
        return self.o_proj(self.attend(query, key, value, metadata))[0]

    def store(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Puts keys and values, of shape [*, H * h], into slots of the cache."""
        key, value = self.by_head(key), self.by_head(value)
        self.attn.impl.do_kv_cache_update(self.attn, key, value, self.attn.kv_cache, slots)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: Any) -> Tensor:
        """Attention of queries, of shape [K, H * h], to what is stored."""
        attended = torch.empty_like(self.by_head(query), memory_format=torch.contiguous_format)
        states = [self.by_head(states) for states in (query, key, value)]
        self.attn.impl.forward(self.attn, *states, self.attn.kv_cache, metadata, output=attended)
        return attended.flatten(-2)


class AskingAttention(ChosenAttention):
    """Attention of tokens that are chosen to the keys and values of all tokens."""

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

    def chosen(self, positions: Tensor, hidden_ND: Tensor, index_K: Tensor, norm: RMSNorm, step: Step | None) -> Tensor:
        """As above; no token may be chosen at all."""
        normed_ND = norm(hidden_ND)
        key, value = self.key_value_proj(normed_ND)[0].split([self.kv_size, self.kv_size], dim=-1)
        key, _ = self.rotary_emb(positions, self.normed(key, self.k_norm))
        if step is not None:
            self.store(key, value, step.common.slot_mapping)
        if len(index_K) == 0:
            return hidden_ND[:0]
        query = self.normed(self.query_proj(normed_ND.index_select(0, index_K))[0], self.q_norm)
        query, _ = self.rotary_emb(positions.index_select(0, index_K), query)
        if step is None:
            return self.o_proj(torch.zeros_like(query))[0]
        return self.o_proj(self.attend(query, key, value, step.one_by_one(positions, index_K)))[0]


class Bypass(nn.Module):
    """What a token that skips takes in the place of the routed part (`model/routing.py`)."""

    def __init__(self, config: MoDConfig, prefix: str) -> None:
        super().__init__()
        width, rank = config.hidden_size, config.bypass_rank
        self.down = ReplicatedLinear(width, rank, bias=False, prefix=f"{prefix}.down")
        self.up = ReplicatedLinear(rank, width, bias=False, prefix=f"{prefix}.up")

    def forward(self, normed_SD: Tensor) -> Tensor:
        """Of the shape of the normed hidden states."""
        return self.up(self.down(normed_SD)[0])[0]


class RoutedBlock(LlamaDecoderLayer):
    """A block of which only some tokens enter the routed part."""

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
        # Where the operator below finds the block.
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns what the routed part adds, and the residual stream it is added to; both of shape [N, D].

        So do vLLM's blocks, of which the next one's norm takes the sum. The stream given is such a sum, too.
        """
        if residual is None:
            residual = torch.zeros_like(hidden_states)
        if self.part == "mlp":
            normed, residual = self.input_layernorm(hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=normed)
        return torch.ops.mixture_of_depths.routed_part(hidden_states, residual, positions, self.name)

    def entered(self, hidden_ND: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens enter, bool, and the factor of what the routed part adds to them; both of shape [N]."""
        logits_1N, causal_logits_1N = self.router.logits(hidden_ND[None], positions[None])
        entered_N = causal_logits_1N[0] > 0
        if self.first_token_enters:
            entered_N = entered_N | (positions == 0)
        return entered_N, self.router.gate(logits_1N[0])

    def route(self, hidden_ND: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The routed part: what it adds, and the residual stream with the bypass of the tokens that skip."""
        entered_N, gate_N = self.entered(hidden_ND, positions)
        metadata = get_forward_context().attn_metadata
        step = None
        if metadata is None:
            # As many as can ever enter.
            entered_N = torch.ones_like(entered_N)
        elif self.part != "mlp":
            step = metadata[self.self_attn.attn.layer_name]
            entered_N[step.common.num_actual_tokens :] = False
        index_K = entered_N.nonzero().flatten()
        added_ND = torch.zeros_like(hidden_ND)
        if len(index_K) or self.part == "block_keep_keys":
            delta_KD = self.delta(positions, hidden_ND, index_K, step)
            gate_K1 = gate_N.index_select(0, index_K)[:, None]
            added_ND.index_copy_(0, index_K, (gate_K1 * delta_KD).to(added_ND.dtype))
        if self.bypass is not None and len(index_K) < len(hidden_ND):
            norm = self.post_attention_layernorm if self.part == "mlp" else self.input_layernorm
            index_S = (~entered_N).nonzero().flatten()
            bypass_SD = self.bypass(norm(hidden_ND.index_select(0, index_S)))
            hidden_ND = hidden_ND.index_add(0, index_S, bypass_SD)
        return added_ND, hidden_ND

    def delta(self, positions: Tensor, hidden_ND: Tensor, index_K: Tensor, step: Step | None) -> Tensor:
        """What the routed part would add to the tokens that enter, of shape [K, D]."""
        if self.part == "mlp":
            return self.mlp(self.post_attention_layernorm(hidden_ND.index_select(0, index_K)))
        attended_KD = self.self_attn.chosen(positions, hidden_ND, index_K, self.input_layernorm, step)
        if len(index_K) == 0:
            return attended_KD
        chosen_KD = hidden_ND.index_select(0, index_K)
        return attended_KD + self.mlp(self.post_attention_layernorm(chosen_KD + attended_KD))


def routed_part(added: Tensor, residual: Tensor, positions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """One operator for the compiler, since the number of tokens that enter is known in the step alone."""
    block = get_forward_context().no_compile_layers[name]
    return block.route(added + residual, positions)


def as_shaped(added: Tensor, residual: Tensor, positions: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Tensors of the operator's shapes."""
    return torch.empty_like(added), torch.empty_like(residual)


library = Library("mixture_of_depths", "FRAGMENT")
direct_register_custom_op("routed_part", routed_part, fake_impl=as_shaped, target_lib=library)


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
