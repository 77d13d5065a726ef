"""The formulas against PyTorch's counter, the model's own weights, and the cache it fills."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.model.flops import (
    block_flops,
    cache_bytes,
    decode_bytes,
    decode_flops,
    dense_token_flops,
    forward_flops,
    forward_flops_per_token,
    model_parameters,
    share_saved,
    token_flops,
    training_flops_per_token,
)

CONFIGS: list[dict[str, Any]] = [
    {"routed_layers": []},
    {"routed_layers": [], "num_key_value_heads": 2, "head_dim": 32},
    {},
    {"causal_router": "auxiliary_loss"},
    {"router_type": "random"},
    {"route_every": 1, "capacity": 0.5},
    {"routed_layers": [0, 3], "capacity": [0.3, 0.95], "num_key_value_heads": 1},
    {"num_experts": 8},
    {"num_experts": 4, "num_experts_per_tok": 2, "routed_layers": []},
    {"num_experts": 4, "num_experts_per_tok": 2, "expert_capacity": 0.7},
    {"num_experts": 3, "expert_routing": "expert_choice", "expert_capacity": 1.5, "route_every": 1, "capacity": 0.3},
    {"routed_parts": "block_keep_keys", "num_key_value_heads": 2},
    {"routed_parts": "mlp", "bypass_rank": 5, "router_type": "random"},
    {"routed_parts": ["mlp", "block_keep_keys"], "bypass_rank": 8, "num_experts": 3, "attention_bias": True},
    {"bypass_rank": 3, "query_key_norm": True},
    {"predictor_hidden_size": 33, "tie_word_embeddings": True, "attention_bias": True, "query_key_norm": True},
]


def config_of(changes: dict[str, Any]) -> MoDConfig:
    return MoDConfig(vocab_size=101, hidden_size=64, num_hidden_layers=5, num_attention_heads=4, **changes)


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("length", [16, 100])
def test_forward_flops_equal_the_counter_on_meta(changes: dict[str, Any], length: int) -> None:
    config = config_of(changes)
    with torch.device("meta"):
        model = MoDForCausalLM(config).train()
        input_ids = torch.zeros(3, length, dtype=torch.int64)
    # The counter sees only matrix products, and only as such: attention as its two, over all pairs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(input_ids, routing="top_k")
    assert counter.get_total_flops() == 3 * forward_flops(config, length, attention="full").total


def test_bytes_of_experts_rise_with_the_rows_and_stay_below_the_whole() -> None:
    config = config_of({"num_noop_experts": 1, "num_experts_per_tok": 2, "noop_share": 0.5})
    read = [decode_bytes(config, 20, rows, 1).weights for rows in (1, 2, 3)]
    assert read == sorted(read)
    assert config.expert_rows(10) == 10


def test_no_ops_take_their_share_of_the_experts_work() -> None:
    shape: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "num_noop_experts": 2}
    config = config_of(shape)
    model = MoDForCausalLM(config).eval()
    input_ids = torch.randint(0, 101, (2, 40))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(input_ids, routing="top_k", use_cache=False, output_routing=True)
    rows = sum(
        layer.share[:3].sum().item() * tokens * 2
        for layer, tokens in zip(output.expert_routing, [40, 5, 40, 5, 40], strict=True)
    )
    expert = 2 * 64 * 3 * 192
    expected = forward_flops(config, 40, attention="full")
    assert counter.get_total_flops() == pytest.approx(2 * (expected.total - expected.mlp + rows * expert))
    # As many of the choices as is wanted.
    assert expected.mlp == pytest.approx((3 * 40 + 2 * 5) * 2 * 0.5 * expert)


def test_a_sampling_step_reads_the_experts_it_meets() -> None:
    config = config_of({"num_experts": 4, "routed_layers": []})
    model = MoDForCausalLM(config).eval()
    past = model(torch.randint(0, 101, (1, 19))).cache
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(0, 101, (1, 1)), cache=past)
    assert counter.get_total_flops() == decode_flops(config, 20).total
    expert, unread = 3 * 64 * 192, 101 * 64 - 64
    for rows, part in ((1, 0.75), (2, 0.75**2)):
        read = model_parameters(config) - unread + (rows - 1) * 64 - 5 * 4 * expert * part
        assert decode_bytes(config, 20, rows, bytes_per_element=1).weights == pytest.approx(read)
    chosen = config_of({"num_experts": 4, "expert_routing": "expert_choice", "expert_capacity": 2.0})
    assert decode_flops(chosen, 20).mlp == (3 + 2 * 0.125) * 2 * 2 * expert


def test_causal_attention_is_half_of_full_and_training_three_times_forward() -> None:
    config = config_of({})
    full, causal = forward_flops(config, 100, "full"), forward_flops(config, 100)
    pairs_full, pairs_causal = 3 * 100**2 + 2 * 12**2, 3 * 100 * 101 / 2 + 2 * 12 * 13 / 2
    assert causal.attention / full.attention == pytest.approx(pairs_causal / pairs_full)
    assert causal.total - causal.attention == full.total - full.attention
    assert training_flops_per_token(config, 100) == pytest.approx(3 * forward_flops_per_token(config, 100))


def test_half_capacity_costs_half_the_mlp_and_a_quarter_of_the_scores() -> None:
    dense = forward_flops(config_of({"routed_layers": []}), 64, "full")
    half = forward_flops(config_of({"route_every": 1, "capacity": 0.5}), 64, "full")
    assert half.mlp == dense.mlp / 2
    assert half.attention == dense.attention / 4


@pytest.mark.parametrize("changes", CONFIGS)
def test_parameters_equal_those_of_the_model(changes: dict[str, Any]) -> None:
    config = config_of(changes)
    with torch.device("meta"):
        model = MoDForCausalLM(config)
    assert model_parameters(config) == sum(weight.numel() for weight in model.parameters())


def test_decode_step_of_a_dense_model_equals_the_counter_and_its_weights() -> None:
    config = config_of({"routed_layers": []})
    model = MoDForCausalLM(config).eval()
    past = model(torch.randint(0, 101, (1, 19))).cache
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(0, 101, (1, 1)), cache=past)
    assert counter.get_total_flops() == decode_flops(config, 20).total
    read = decode_bytes(config, 20)
    embedding = config.vocab_size * config.hidden_size
    assert read.weights == 4 * (model_parameters(config) - embedding + config.hidden_size)
    assert read.cache == past.num_bytes() == cache_bytes(config, 20)


def test_decoding_expects_a_routed_block_at_its_capacity() -> None:
    config = config_of({"routed_layers": [2], "capacity": 0.25})
    without_heads = config_of({"routed_layers": []})
    projections, mlp = 2 * 64 * 4 * 64, 2 * 64 * 3 * 192
    router, predictor = 2 * 64, 2 * 65 * 16
    found, dense = decode_flops(config, 100), decode_flops(without_heads, 100)
    assert dense.projections == 5 * projections
    assert found.projections == 4.25 * projections
    assert found.mlp == 4.25 * mlp
    assert found.attention == dense.attention / 5 * (4 + 0.25 * 0.25)
    assert (found.router, found.predictor) == (router, predictor)
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    for rows in (1, 3):
        expected = 64 * (101 + rows + 1) + (4 + 1 - 0.75**rows) * block + 64 + (64 + 2) * 16 + 2
        assert decode_bytes(config, 100, batch_size=rows, bytes_per_element=1).weights == pytest.approx(expected)
        read = decode_bytes(config, 100, batch_size=rows, bytes_per_element=1).cache
        assert read == rows * 2 * 64 * 100 * (4 + 0.25 * 0.25)


@pytest.mark.parametrize("parts", ["block_keep_keys", "mlp", ["mlp", "block_keep_keys"]])
@pytest.mark.parametrize("bypass_rank", [0, 8])
def test_a_sampling_step_costs_what_the_counter_counts_when_all_enter_and_when_none_does(
    parts: Any, bypass_rank: int
) -> None:
    shape: dict[str, Any] = {"routed_parts": parts, "bypass_rank": bypass_rank, "num_key_value_heads": 2}
    config = config_of({**shape, "capacity": 0.25, "num_experts": 3})
    model = MoDForCausalLM(config).eval()
    counted = []
    for bias in (1e6, -1e6):
        for layer_idx in (1, 3):
            model.model.layers[layer_idx].router.predictor.down_proj.bias.data.fill_(bias)
        past = model(torch.randint(0, 101, (1, 19))).cache
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.randint(0, 101, (1, 1)), cache=past)
        counted.append(counter.get_total_flops())
        assert past.num_bytes() == cache_bytes(config, 20)
    every, none = counted
    assert decode_flops(config, 20).total == pytest.approx(0.25 * every + 0.75 * none)


def test_a_sampling_step_reads_what_its_parts_need_whoever_enters() -> None:
    shape: dict[str, Any] = {"routed_layers": [2], "capacity": 0.25, "bypass_rank": 3, "causal_router": "threshold"}
    block, keys, mlp = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64, 2 * 64 * 64 + 64, 3 * 64 * 192 + 64
    for rows in (1, 3):
        some = 1 - 0.75**rows
        ends = 64 * (101 + rows + 1) + 4 * block + 64 + 2 * 64 * 3
        for part, read, cached in (
            # The bypass reads the norm before it.
            ("block", some * block + (1 - some) * 64, 0.25 * 0.25),
            ("block_keep_keys", keys + some * (block - keys), 0.25),
            ("mlp", block - mlp + some * mlp + (1 - some) * 64, 1.0),
        ):
            found = decode_bytes(config_of({**shape, "routed_parts": part}), 100, rows, bytes_per_element=1)
            assert found.weights == pytest.approx(ends + read)
            assert found.cache == pytest.approx(rows * 2 * 64 * 100 * (4 + cached))


def test_the_operations_of_a_text_are_those_of_its_tokens_whatever_is_routed() -> None:
    inside_LT = np.ones((5, 10), dtype=bool)
    met_LT = np.zeros_like(inside_LT)
    for part in ("block", "block_keep_keys", "mlp"):
        config = config_of({"routed_parts": part, "capacity": 1.0, "bypass_rank": 2})
        assert token_flops(config, inside_LT, met_LT).sum() == pytest.approx(forward_flops(config, 10).total)
    config = config_of({"routed_parts": ["block_keep_keys", "mlp"], "bypass_rank": 2})
    inside_LT[1, [0, 4, 5]] = inside_LT[3, 4:] = False
    projections, pair, mlp = 2 * 64 * 2 * 64, 4 * 64, 2 * 64 * 3 * 192
    skipped = 3 * (projections + mlp) + pair * (1 + 5 + 6) + 6 * mlp
    assert sum(dense_token_flops(config, 10) - token_flops(config, inside_LT, met_LT)) == pytest.approx(skipped)


def test_a_routed_block_is_read_when_any_row_enters() -> None:
    config, dense = config_of({}), config_of({"routed_layers": []})
    one, four = decode_bytes(config, 100), decode_bytes(config, 100, batch_size=4)
    assert one.weights < four.weights < decode_bytes(dense, 100, batch_size=4).weights + 4 * 2 * 5000
    assert cache_bytes(config, 100) == pytest.approx(cache_bytes(dense, 100) * (3 + 2 * 0.125) / 5)
    assert decode_bytes(config, 100, bytes_per_element=2).total == one.total / 2


def test_what_skipping_saves_counts_projections_attention_and_mlp_of_who_skips() -> None:
    config = config_of({"route_every": 2})
    inside_LT = np.ones((config.num_hidden_layers, 10), dtype=bool)
    met_LT = np.zeros_like(inside_LT)
    assert share_saved(config, inside_LT, met_LT) == 0
    assert token_flops(config, inside_LT, met_LT) == pytest.approx(dense_token_flops(config, 10))
    inside_LT[1, 4:] = False
    everything = sum(dense_token_flops(config, 10))
    skipped = block_flops(config, 6, 10 * 11 / 2 - 4 * 5 / 2, 0).total
    assert share_saved(config, inside_LT, met_LT) == pytest.approx(skipped / everything)
