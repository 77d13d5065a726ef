"""A trace says what the model did: the cache's counts, the oracle's FLOPs, the loss of evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from models import TEXT, TOKENIZER, model_with

from mixture_of_depths import MoDCache
from mixture_of_depths.inspect.trace import Trace, trace, trace_tokens
from mixture_of_depths.model.flops import block_flops, forward_flops, router_flops


def test_the_entries_of_each_block_are_those_the_cache_stored() -> None:
    model = model_with()
    found = trace(model, TOKENIZER, TEXT)
    cache = MoDCache(model.config)
    model(torch.tensor([found.token_ids.tolist()]), cache=cache, use_cache=True)
    stored: Any = [cache.layers[i] for i in found.routed_layers]
    assert found.routed_layers == [1, 3]
    assert found.entered.sum(axis=1).tolist() == [int(layer.num_stored()) for layer in stored]
    assert np.array_equal(found.entered, found.enters_by_itself)
    assert found.blocks_used.sum() == 2 * len(found.pieces) + found.entered.sum()


@pytest.mark.parametrize("routing", ["top_k", "causal"])
def test_a_first_token_that_enters_anyway_is_no_wrong_decision(routing: Any) -> None:
    model = model_with(first_token_enters=True, causal_router="threshold")
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.threshold.fill_(1e9)
    found = trace(model, TOKENIZER, TEXT, routing)
    assert found.enters_by_itself.sum(axis=1).tolist() == [1, 1]
    assert found.enters_by_itself[:, 0].all()
    assert found.entered[:, 0].all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routed_layers": []},
        {"router_type": "random"},
        {"capacity": [0.5, 0.125]},
        {"bypass_rank": 4},
        {"routed_parts": "mlp", "bypass_rank": 4},
        {"routed_parts": ["mlp", "block_keep_keys"], "capacity": [0.25, 1.0]},
    ],
)
def test_the_flops_of_all_tokens_are_those_of_the_forward_pass(changes: dict[str, Any]) -> None:
    model = model_with(**changes)
    found = trace(model, TOKENIZER, TEXT, "top_k")
    assert found.flops.sum() == pytest.approx(forward_flops(model.config, len(found.pieces)).total)
    assert (found.flops <= found.dense_flops).all()


def test_loss_entropy_and_probabilities_are_the_models() -> None:
    model = model_with()
    found = trace(model, TOKENIZER, TEXT)
    input_ids = torch.tensor([found.token_ids.tolist()])
    output = model(input_ids, labels=input_ids, output_routing=True, use_cache=False)
    assert np.nanmean(found.loss) == pytest.approx(output.lm_loss.item(), rel=1e-5)
    entropy = torch.distributions.Categorical(logits=output.logits[0]).entropy()
    assert found.entropy == pytest.approx(entropy.detach().numpy(), rel=1e-4)
    assert found.predictor_probability[0] == pytest.approx(
        output.routing[1].causal_logits[0].sigmoid().detach().numpy(), rel=1e-5
    )
    assert np.isnan(trace(model_with(causal_router="threshold"), TOKENIZER, TEXT).predictor_probability).all()


def test_json_and_parquet_hold_the_trace(tmp_path: Path) -> None:
    found = trace(model_with(), TOKENIZER, TEXT, "top_k")
    found.write_json(tmp_path / "trace.json")
    read = json.loads((tmp_path / "trace.json").read_text())
    assert "".join(read["pieces"]) == TEXT
    assert read["entered"] == found.entered.tolist()
    assert read["loss"][0] is None
    found.write_parquet(tmp_path / "trace.parquet")
    table = parquet.read_table(tmp_path / "trace.parquet")
    assert table["piece"].to_pylist() == found.pieces
    assert np.array_equal(np.array(table["entered"].to_pylist()).T, found.entered)
    assert json.loads(table.schema.metadata[b"mixture_of_depths"]) == {
        "routing": "top_k",
        "routed_layers": [1, 3],
        "capacity": [0.25, 0.25],
        "routed_parts": ["block", "block"],
        "bypass_rank": 0,
        "router_activation": "sigmoid",
    }


def test_where_all_weigh_one_the_causal_logit_tells_tokens_apart() -> None:
    changes = {"router_activation": "straight_through", "causal_router": "threshold", "first_token_enters": True}
    found = trace(model_with(**changes), TOKENIZER, TEXT)
    assert (found.router_weight == 1).all()
    assert found.told_apart_by == "causal_logit"
    assert np.array_equal(found.causal_logit[:, 1:] > 0, found.entered[:, 1:])
    assert found.entered[:, 0].all()
    assert trace(model_with(), TOKENIZER, TEXT).told_apart_by == "router_weight"


def test_a_text_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(ValueError, match="text='' is empty"):
        trace(model_with(), TOKENIZER, "")
    with pytest.raises(ValueError, match="tokens, more than the model's max_position_embeddings=8"):
        trace(model_with(max_position_embeddings=8), TOKENIZER, TEXT)


def test_a_model_without_routed_blocks_is_traced_too() -> None:
    found = trace_tokens(model_with(routed_layers=[]), TOKENIZER, [1, 2, 3])
    assert isinstance(found, Trace)
    assert found.entered.shape == (0, 3)
    assert found.blocks_used.tolist() == [4, 4, 4]


def test_the_name_of_a_special_token_is_text_as_in_training() -> None:
    found = trace(model_with(), TOKENIZER, "fox<|endoftext|>dog")
    assert TOKENIZER.eos_token_id not in found.token_ids
    assert "".join(found.pieces) == "fox<|endoftext|>dog"


EXPERTS: list[dict[str, Any]] = [
    {"num_experts": 3},
    {"num_experts": 3, "routed_layers": []},
    {"num_experts": 3, "num_experts_per_tok": 2, "num_noop_experts": 2, "noop_share": 0.4},
    {"num_experts": 3, "routed_layers": [], "num_noop_experts": 1, "noop_share": 0.4},
    {"num_experts": 3, "expert_capacity": 0.5},
    {"num_experts": 3, "expert_capacity": 0.5, "expert_routing": "expert_choice"},
]


@pytest.mark.parametrize("routing", ["top_k", "causal"])
@pytest.mark.parametrize("changes", EXPERTS)
def test_the_experts_a_token_met_and_their_flops_are_the_models(changes: dict[str, Any], routing: Any) -> None:
    model = model_with(**changes)
    config = model.config
    found = trace(model, TOKENIZER, TEXT, routing)
    input_ids = torch.tensor([found.token_ids.tolist()])
    output = model(input_ids, routing=routing, output_routing=True, use_cache=False)
    shares: Any = [experts.share[:3].sum().item() for experts in output.expert_routing]
    inside = found.inside.sum(axis=1)
    met = np.array(shares) * inside * config.num_experts_per_tok
    if found.experts_met is None:
        assert config.num_noop_experts == 0
        assert config.expert_capacity is None
        assert met == pytest.approx(inside)
        assert found.engagement.tolist() == found.blocks_used.tolist()
    else:
        assert found.experts_met.sum(axis=1) == pytest.approx(met)
        assert not found.experts_met[~found.inside].any()
        assert (found.engagement <= found.blocks_used).all()
    expert = block_flops(config, 0, 0, 1).total
    without = sum(
        block_flops(config, int(count), int(count) * (int(count) + 1) / 2, 0).total for count in inside
    ) + len(found.pieces) * (
        2 * config.hidden_size * config.vocab_size + len(found.routed_layers) * router_flops(config, 1).total
    )
    assert found.flops.sum() == pytest.approx(without + expert * met.sum())


def test_json_and_parquet_hold_the_experts(tmp_path: Path) -> None:
    found = trace(model_with(**EXPERTS[2]), TOKENIZER, TEXT)
    assert found.experts_met is not None
    assert found.experts_met.max() <= 2
    found.write_json(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["experts_met"] == found.experts_met.tolist()
    found.write_parquet(tmp_path / "trace.parquet")
    column = parquet.read_table(tmp_path / "trace.parquet")["experts_met"].to_pylist()
    assert np.array_equal(np.array(column).T, found.experts_met)
