"""What a configuration derives, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_depths import MoDConfig


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({}, [1, 3, 5, 7]),
        ({"route_every": 2}, [1, 3, 5, 7]),
        ({"route_every": 2, "route_from": 0}, [0, 2, 4, 6]),
        ({"route_every": 3, "route_from": 1}, [1, 4, 7]),
        ({"route_every": 1}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"routed_layers": [2, 5]}, [2, 5]),
        ({"routed_layers": []}, []),
    ],
)
def test_routed_layers_are_a_list_or_come_from_route_every_and_route_from(
    arguments: dict[str, Any], layers: list[int]
) -> None:
    assert MoDConfig(num_hidden_layers=8, **arguments).routed_layers == layers


def test_defaults_are_the_papers_best() -> None:
    config = MoDConfig()
    assert config.routed_layers == [1, 3, 5, 7]
    assert config.capacity == 0.125
    assert config.intermediate_size == 1408
    assert (config.router_activation, config.causal_router, config.training_routing) == (
        "sigmoid",
        "predictor",
        "top_k",
    )
    flags = ("router_norm", "first_token_enters", "query_key_norm", "attention_bias")
    assert [name for name in flags if getattr(config, name)] == []
    assert (config.predictor_loss_weight, config.auxiliary_loss_weight, config.threshold_decay) == (0.1, 0.01, 0.99)


@given(capacity=st.floats(0.001, 1.0), length=st.integers(1, 4096))
def test_capacity_is_at_least_one_token_and_at_most_all(capacity: float, length: int) -> None:
    tokens = MoDConfig(num_hidden_layers=2, capacity=capacity).capacity_tokens(1, length)
    assert 1 <= tokens <= length
    assert tokens <= max(1, capacity * length + 1e-6)


def test_capacity_is_not_cut_by_rounding() -> None:
    for hundredths in range(1, 101):
        config = MoDConfig(num_hidden_layers=2, capacity=hundredths / 100)
        assert config.capacity_tokens(1, 100) == hundredths
        assert config.capacity_tokens(0, 100) == 100


def test_capacity_may_differ_by_block() -> None:
    config = MoDConfig(num_hidden_layers=4, capacity=[0.5, 0.25])
    assert [config.capacity_tokens(i, 16) for i in range(4)] == [16, 8, 16, 4]


def test_routed_parts_may_differ_by_block_and_are_spelt_one_way(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 4, "bypass_rank": 2}
    config = MoDConfig(**shape, routed_parts=["mlp", "block_keep_keys"])
    assert [config.routed_part(i) for i in range(4)] == [None, "mlp", None, "block_keep_keys"]
    assert config.layer_types == ["full_attention"] * 4
    assert MoDConfig(num_hidden_layers=2).layer_types == ["full_attention", "mixture_of_depths_routed"]
    config.save_pretrained(tmp_path)
    assert MoDConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert MoDConfig(**shape, routed_parts=["mlp", "mlp"]).to_dict() == MoDConfig(**shape, routed_parts="mlp").to_dict()
    assert MoDConfig(routed_layers=[], routed_parts=[]).routed_parts == "block"


@given(
    tokens=st.integers(1, 300),
    experts=st.integers(1, 9),
    per_token=st.integers(1, 3),
    capacity=st.floats(0.01, 4) | st.none(),
    choice=st.sampled_from(["token_choice", "expert_choice"]),
)
def test_experts_have_places_for_their_capacity(
    tokens: int, experts: int, per_token: int, capacity: float | None, choice: str
) -> None:
    experts = max(experts, per_token, 2)
    config = MoDConfig(
        num_experts=experts, num_experts_per_tok=per_token, expert_capacity=capacity, expert_routing=choice
    )
    rows = config.expert_rows(tokens)
    assert 1 <= rows <= tokens * config.most_experts_per_token
    if config.expert_capacity is None:
        assert rows == tokens * per_token
    else:
        places = config.expert_places(tokens)
        assert 1 <= places <= tokens
        assert places <= max(1, config.expert_capacity * tokens * per_token / experts + 1e-6)
        assert rows <= experts * places


def test_expert_choice_has_a_capacity_of_one_by_default() -> None:
    assert MoDConfig(num_experts=4, expert_routing="expert_choice").expert_capacity == 1.0
    assert MoDConfig(num_experts=4).expert_capacity is None
    assert not MoDConfig().has_experts
    assert MoDConfig(num_noop_experts=1).has_experts
    config = MoDConfig(num_experts=4)
    config.expert_routing = "expert_choice"
    with pytest.raises(ValueError, match="expert_capacity=None needs"):
        config.validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size=10 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=8"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"capacity": 0}, "capacity=0 must be a share of the tokens, above 0 and at most 1"),
        ({"capacity": 1.5}, "capacity=1.5 must be a share of the tokens, above 0 and at most 1"),
        ({"capacity": float("nan")}, "capacity=nan must be a share of the tokens, above 0 and at most 1"),
        ({"capacity": [0.5, 0.5]}, r"capacity=\[0.5, 0.5\] has 2 entries for 4 routed blocks"),
        (
            {"routed_parts": "attention"},
            "routed_parts='attention' is out of range: it must be 'block', 'block_keep_keys' or 'mlp'",
        ),
        (
            {"routed_parts": ["mlp", "mlp"]},
            r"routed_parts=\['mlp', 'mlp'\] has 2 entries for 4 .* give one word",
        ),
        ({"routed_parts": ["mlp", "all", "mlp", "mlp"]}, r"routed_parts=\['mlp', 'all', .* must be 'block'"),
        ({"bypass_rank": -1}, "bypass_rank=-1"),
        ({"bypass_rank": 513}, "bypass_rank=513 is more than hidden_size=512, .* lower it"),
        ({"routed_layers": [8]}, r"routed_layers=\[8\] names a block that is not there"),
        ({"routed_layers": [-1]}, r"routed_layers=\[-1\] names a block"),
        ({"routed_layers": [3, 1]}, r"routed_layers=\[3, 1\] must be in rising order"),
        ({"routed_layers": [1, 1]}, r"routed_layers=\[1, 1\] must be in rising order"),
        ({"routed_layers": [1.5]}, r"routed_layers=\[1.5\] is out of range: it must be a valid integer"),
        ({"routed_layers": [1], "route_every": 2}, "either the list or route_every and route_from"),
        ({"route_every": 0}, "route_every=0"),
        ({"every": 3}, "every=3 is no field; give route_every"),
        ({"offset": 0}, "offset=0 is no field; give route_from"),
        ({"route_every": 20}, "route_from=19"),
        ({"route_from": 8}, "route_from=8"),
        ({"router_type": "hash"}, "router_type='hash' is out of range: it must be 'learned' or 'random'"),
        ({"router_activation": "softmax"}, "router_activation='softmax'"),
        ({"causal_router": "oracle"}, "causal_router='oracle'"),
        ({"predictor_loss_weight": -1}, "predictor_loss_weight=-1"),
        ({"router_seed": -1}, "router_seed=-1"),
        ({"tie_word_embeddings": 3}, "tie_word_embeddings=3"),
        ({"initializer_range": 0}, "initializer_range=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts and 0 no-ops"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok=2 is more than the 1 experts"),
        ({"num_experts": 4, "expert_capacity": 0}, "expert_capacity=0 is out of range: it must be greater than 0"),
        ({"num_experts": 4, "expert_capacity": float("inf")}, "expert_capacity=inf"),
        (
            {"num_experts": 4, "expert_routing": "random"},
            "expert_routing='random' is out of range: it must be 'token_choice' or 'expert_choice'",
        ),
        ({"expert_capacity": 1.0}, "expert_capacity=1.0 needs experts; give num_experts"),
        ({"expert_routing": "expert_choice"}, "expert_routing='expert_choice' needs experts"),
        ({"num_noop_experts": -1}, "num_noop_experts=-1"),
        (
            {"num_experts": 4, "num_noop_experts": 1, "expert_routing": "expert_choice"},
            "num_noop_experts=1 needs expert_routing='token_choice'",
        ),
        (
            {"num_experts": 4, "num_noop_experts": 1, "noop_share": 1.0},
            "noop_share=1.0 is out of range: it must be less than 1",
        ),
        ({"load_balance_loss_weight": -1}, "load_balance_loss_weight=-1"),
        ({"load_balance_loss_weight": 0.5}, "load_balance_loss_weight=0.5 needs experts"),
        ({"noop_share": 0.3}, "noop_share=0.3 needs experts"),
        (
            {"num_experts": 4, "num_noop_experts": 1, "num_experts_per_tok": 4, "noop_share": 0.9},
            "noop_share=0.9 cannot be reached: .* between 0 and 0.25",
        ),
        ({"rope_parameters": {"rope_theta": 0.0}}, r"rope_parameters has rope_theta=0\.0; give a positive number"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters has rope_theta=-1"),
        ({"rope_parameters": {"rope_theta": math.nan}}, "rope_parameters has rope_theta=nan"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters has rope_theta='x'"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_parameters has rope_theta=None"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": math.inf}}, "has factor=inf"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": -4.0}}, r"has factor=-4\.0"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
    ],
)
def test_what_cannot_work_is_refused_naming_the_field(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoDConfig(**arguments)


def test_a_changed_configuration_keeps_all_other_fields_and_is_checked() -> None:
    config = MoDConfig(hidden_size=64, num_attention_heads=4, capacity=0.25, routed_layers=[1, 3])

    changed = config.changed(capacity=0.5)

    differing = {name for name, value in changed.to_dict().items() if value != config.to_dict()[name]}
    assert differing == {"capacity"}
    with pytest.raises(ValueError, match="num_hidden_layers=2"):
        config.changed(num_hidden_layers=2)
