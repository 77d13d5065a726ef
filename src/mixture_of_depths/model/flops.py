"""Analytic floating-point operations and bytes of a Mixture-of-Depths model and of its baseline.

Counted are matrix products, two operations a multiply-add: projections, attention scores and their use, MLP or
experts, routers, predictor, bypass and head. Norms, RoPE, softmax, activations and the embedding's look-up are not.
Attention is counted at its causal half: a token attends to itself and the tokens before it, S (S + 1) / 2 pairs for a
sequence of S tokens. A backward pass costs twice its forward pass, so training is three times the forward count.

A routed block works for its capacity only: C tokens, C (C + 1) / 2 pairs (arXiv:2404.02258, section 3.2). One that
keeps its keys and values computes those of all tokens, and C (S + 1) / 2 pairs, with its C queries spread evenly; of
one that routes its MLP alone, the attention is a dense block's. The bypass is computed for all tokens, and dropped
where they enter. Experts work for the tokens that ask for them, up to their capacity; no-ops are taken to get the share
that is their target.

Shapes: T tokens, L blocks.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np

from mixture_of_depths.model.configuration import MoDConfig


@dataclass(frozen=True)
class FlopCount:
    """Floating-point operations by the part of the model that spends them."""

    projections: float = 0
    attention: float = 0
    mlp: float = 0
    router: float = 0
    predictor: float = 0
    head: float = 0
    bypass: float = 0

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp + self.router + self.predictor + self.head + self.bypass

    def __add__(self, other: "FlopCount") -> "FlopCount":
        return FlopCount(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def scaled(self, factor: float) -> "FlopCount":
        """Every part times `factor`."""
        return FlopCount(*(getattr(self, name) * factor for name in self.__dataclass_fields__))


def _projection_sizes(config: MoDConfig) -> tuple[int, int]:
    """Widths of all queries and of all keys (or values) of a token."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


class Working(NamedTuple):
    """For how many tokens the parts of a block work.

    Attributes:
        queries: tokens with a query, and an output projection of what it finds.
        keys: tokens with a key and a value.
        mlp: tokens that meet the MLP, or the experts' router.
    """

    queries: float
    keys: float
    mlp: float


def working(config: MoDConfig, layer_idx: int, tokens: float, chosen: float) -> Working:
    """What a block works for if `chosen` of `tokens` tokens enter it; in a dense one all of them do."""
    part = config.routed_part(layer_idx)
    return Working(
        queries=tokens if part == "mlp" else chosen,
        keys=tokens if part in ("mlp", "block_keep_keys") else chosen,
        mlp=chosen,
    )


def part_flops(config: MoDConfig, works: Working, pairs: float, expert_rows: float) -> FlopCount:
    """Forward operations of one block, its router and bypass left out.

    Args:
        config: the model.
        works: number of tokens.
        pairs: number of query-key pairs.
        expert_rows: number of products of an expert and a token; not looked at without experts.
    """
    assert config.intermediate_size is not None
    query_size, key_size = _projection_sizes(config)
    rows = expert_rows if config.has_experts else works.mlp
    return FlopCount(
        projections=2 * config.hidden_size * (works.queries * 2 * query_size + works.keys * 2 * key_size),
        attention=pairs * 2 * 2 * query_size,
        mlp=rows * 2 * config.hidden_size * 3 * config.intermediate_size,
        router=works.mlp * 2 * config.hidden_size * _expert_choices(config),
    )


def block_flops(config: MoDConfig, tokens: float, pairs: float, expert_rows: float) -> FlopCount:
    """As `part_flops`, with all parts working for `tokens` tokens."""
    return part_flops(config, Working(tokens, tokens, tokens), pairs, expert_rows)


def _expert_choices(config: MoDConfig) -> int:
    """Number of experts and no-ops that an expert router chooses from; 0 without one."""
    return config.num_experts + config.num_noop_experts if config.has_experts else 0


def expert_rows(config: MoDConfig, tokens: int) -> float:
    """Products of an expert and a token that `tokens` tokens of a sequence are expected to need under top-k routing.

    A capacity may leave places empty where the experts' shares are uneven; they count as taken.
    """
    asked = tokens * config.most_experts_per_token * (1 - config.target_noop_share)
    return min(asked, config.expert_rows(tokens))


def expert_rows_per_token(config: MoDConfig) -> float:
    """Experts that a token is expected to meet in sampling."""
    asked = config.most_experts_per_token * (1 - config.target_noop_share)
    if config.expert_capacity is None:
        return asked
    return min(asked, config.expert_capacity * config.num_experts_per_tok)


def router_flops(config: MoDConfig, tokens: float) -> FlopCount:
    """Forward operations of a routed block's router, predictor and bypass, which see every token."""
    bypass = tokens * 2 * bypass_parameters(config)
    if config.router_type == "random":
        return FlopCount(bypass=bypass)
    predictor = 0.0
    if config.causal_router == "predictor":
        assert config.predictor_hidden_size is not None
        predictor = tokens * 2 * (config.hidden_size + 1) * config.predictor_hidden_size
    return FlopCount(router=tokens * 2 * config.hidden_size, predictor=predictor, bypass=bypass)


def _pairs(works: Working, attention: Literal["causal", "full"]) -> float:
    return works.queries * works.keys if attention == "full" else works.queries * (works.keys + 1) / 2


def forward_flops(
    config: MoDConfig, sequence_length: int, attention: Literal["causal", "full"] = "causal"
) -> FlopCount:
    """Operations of a forward pass over one sequence, as in training and in prefill.

    Args:
        config: the model.
        sequence_length: number of tokens S.
        attention: "causal" counts the pairs a causal mask lets through; "full" all S * S, as kernels that mask
            afterwards compute.
    """
    total = FlopCount(head=sequence_length * 2 * config.hidden_size * config.vocab_size)
    for layer_idx in range(config.num_hidden_layers):
        chosen = config.capacity_tokens(layer_idx, sequence_length)
        works = working(config, layer_idx, sequence_length, chosen)
        total += part_flops(config, works, _pairs(works, attention), expert_rows(config, chosen))
        if config.routed_part(layer_idx) is not None:
            total += router_flops(config, sequence_length)
    return total


def forward_flops_per_token(config: MoDConfig, sequence_length: int) -> float:
    """Forward operations per token of a sequence of `sequence_length` tokens, attention at its causal half."""
    return forward_flops(config, sequence_length).total / sequence_length


def training_flops_per_token(config: MoDConfig, sequence_length: int) -> float:
    """Operations per token of a forward and backward pass: three times the forward count."""
    return 3 * forward_flops_per_token(config, sequence_length)


def token_flops(config: MoDConfig, inside_LT: np.ndarray, experts_met_LT: np.ndarray) -> np.ndarray:
    """Forward operations spent on each token of a text, head included; of shape [T].

    Args:
        config: the model.
        inside_LT: which tokens went through each block, dense ones included; bool, of shape [L, T].
        experts_met_LT: how many experts took each token in each block, of shape [L, T]; not looked at without experts.
    """
    # The cost of a token is that of itself, of the pairs it attends with and of its experts.
    pair = block_flops(config, 0, 1, 0).total
    total = block_flops(config, 0, 0, 1).total * experts_met_LT.sum(axis=0)
    for layer_idx, inside_T in enumerate(inside_LT):
        enters, skips = working(config, layer_idx, 1, 1), working(config, layer_idx, 1, 0)
        fixed_T = np.where(inside_T, part_flops(config, enters, 0, 0).total, part_flops(config, skips, 0, 0).total)
        queries_T = np.where(inside_T, enters.queries, skips.queries)
        keys_T = np.where(inside_T, enters.keys, skips.keys)
        total = total + fixed_T + pair * queries_T * keys_T.cumsum()
    routers = len(config.routed_layers or []) * router_flops(config, 1).total
    return total + routers + 2.0 * config.hidden_size * config.vocab_size


def dense_token_flops(config: MoDConfig, tokens: int) -> np.ndarray:
    """What `token_flops` would be if each of `tokens` tokens entered every block; of shape [T].

    Every choice of an expert then meets one; where experts choose, a token meets as many as on average.
    """
    is_expert_choice = config.expert_routing == "expert_choice"
    most = expert_rows_per_token(config) if is_expert_choice else config.most_experts_per_token
    shape = (config.num_hidden_layers, tokens)
    return token_flops(config, np.ones(shape, dtype=bool), np.full(shape, most))


def share_saved(config: MoDConfig, inside_LT: np.ndarray, experts_met_LT: np.ndarray) -> float:
    """The share of a text's operations that was spared, by what was skipped; for the arguments see `token_flops`."""
    spent_T = token_flops(config, inside_LT, experts_met_LT)
    return float(1 - spent_T.sum() / dense_token_flops(config, len(spent_T)).sum())


def decode_flops(config: MoDConfig, context_length: int) -> FlopCount:
    """Expected operations of one sampling step: one token, attending to `context_length` tokens, itself included.

    A routed block is entered with the probability of its capacity, and then finds that fraction of the context; or all
    of it, where it keeps the keys of all tokens.
    """
    total = FlopCount(head=2 * config.hidden_size * config.vocab_size)
    for layer_idx in range(config.num_hidden_layers):
        fraction = config.capacity_fraction(layer_idx)
        works = working(config, layer_idx, 1, fraction)
        pairs = works.queries * works.keys * context_length
        total += part_flops(config, works, pairs, fraction * expert_rows_per_token(config))
        if config.routed_part(layer_idx) is not None:
            total += router_flops(config, 1)
    return total


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes one sampling step reads, expected over the tokens that skip."""

    weights: float
    cache: float

    @property
    def total(self) -> float:
        return self.weights + self.cache


def block_parameters(config: MoDConfig) -> int:
    """Number of weights of one block, its router and bypass left out."""
    experts = config.num_experts * expert_parameters(config)
    return _query_parameters(config) + _key_parameters(config) + _mlp_parameters(config) + experts


def _query_parameters(config: MoDConfig) -> int:
    """Number of weights of queries and output projection."""
    query_size, _ = _projection_sizes(config)
    biases = query_size + config.hidden_size if config.attention_bias else 0
    return 2 * config.hidden_size * query_size + biases + _head_norm_parameters(config)


def _key_parameters(config: MoDConfig) -> int:
    """Number of weights of keys, values and the norm before them."""
    _, key_size = _projection_sizes(config)
    biases = 2 * key_size if config.attention_bias else 0
    return 2 * config.hidden_size * key_size + biases + _head_norm_parameters(config) + config.hidden_size


def _head_norm_parameters(config: MoDConfig) -> int:
    return cast(int, config.head_dim) if config.query_key_norm else 0


def _mlp_parameters(config: MoDConfig) -> int:
    """Number of weights of the norm before the MLP, and of the experts' router."""
    return config.hidden_size * (1 + _expert_choices(config))


def bypass_parameters(config: MoDConfig) -> int:
    """Number of weights of a routed block's bypass."""
    return 2 * config.hidden_size * config.bypass_rank


def expert_parameters(config: MoDConfig) -> int:
    """Number of weights of one expert, or of the dense MLP."""
    assert config.intermediate_size is not None
    return 3 * config.hidden_size * config.intermediate_size


def router_parameters(config: MoDConfig) -> int:
    """Number of weights of a routed block's router, predictor and bypass."""
    if config.router_type == "random":
        return bypass_parameters(config)
    predictor = 0
    if config.causal_router == "predictor":
        assert config.predictor_hidden_size is not None
        predictor = (config.hidden_size + 2) * config.predictor_hidden_size + 2
    return config.hidden_size + predictor + bypass_parameters(config)


def model_parameters(config: MoDConfig) -> int:
    """Number of weights of the whole model; a shared embedding counts once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    blocks = config.num_hidden_layers * block_parameters(config)
    return embeddings + blocks + len(config.routed_layers or []) * router_parameters(config) + config.hidden_size


def cache_bytes(config: MoDConfig, context_length: int, bytes_per_element: float = 4) -> float:
    """Expected bytes of the keys and values that one sequence of `context_length` tokens leaves in the cache."""
    per_token = 2 * _projection_sizes(config)[1] * bytes_per_element
    layers = range(config.num_hidden_layers)
    stored = sum(working(config, i, context_length, config.capacity_fraction(i) * context_length).keys for i in layers)
    return per_token * stored


def decode_bytes(
    config: MoDConfig, context_length: int, batch_size: int = 1, bytes_per_element: float = 4
) -> DecodeBytes:
    """Expected bytes that one sampling step reads for `batch_size` sequences.

    The weights that tokens skip are read when any row of the batch does not, those of an expert when any row goes to
    it, and the cache for the rows that attend; rows are taken to decide independently, and experts to be as likely as
    one another. Of the embedding one entry per row is read. Maps count as read always; the fast step reads them only
    where a row skips, so that it reads a little less.
    """
    key_size = _projection_sizes(config)[1]
    weights = float(config.hidden_size * (config.vocab_size + batch_size + 1))
    cache = 0.0
    experts = config.num_experts * expert_parameters(config)
    chosen = expert_rows_per_token(config) / config.num_experts if config.has_experts else 1.0
    for layer_idx in range(config.num_hidden_layers):
        fraction, part = config.capacity_fraction(layer_idx), config.routed_part(layer_idx)
        works = working(config, layer_idx, 1, fraction)
        weights += _chance_of_any(works.queries, batch_size) * _query_parameters(config)
        weights += _chance_of_any(works.keys, batch_size) * _key_parameters(config)
        weights += _chance_of_any(works.mlp, batch_size) * _mlp_parameters(config)
        weights += _chance_of_any(fraction * chosen, batch_size) * experts
        if part is not None:
            weights += router_parameters(config)
        if part is not None and config.bypass_rank:
            # It reads the norm before it, whoever enters.
            skipped = works.mlp if part == "mlp" else works.keys
            weights += (1 - _chance_of_any(skipped, batch_size)) * config.hidden_size
        cache += works.queries * batch_size * works.keys * context_length * 2 * key_size
    return DecodeBytes(weights * bytes_per_element, cache * bytes_per_element)


def _chance_of_any(chance: float, rows: int) -> float:
    """The probability that at least one of `rows` independent rows does what each does with probability `chance`."""
    return 1 - (1 - chance) ** rows
