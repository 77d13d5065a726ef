"""The choice of tokens and their way out of and back into the residual stream."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TINY, routed_model
from transformers import AutoModelForCausalLM

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.model.configuration import capacity_tokens
from mixture_of_depths.model.routing import (
    Selection,
    add_weighted,
    gather_tokens,
    membership,
    membership_loss,
    row_capacity,
    select_entered,
    select_top_k,
    top_k_boundary,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 17), st.integers(0, 10_000))


@given(shape=shapes, fraction=st.floats(0, 1))
def test_top_k_takes_the_largest_in_order_and_ties_go_to_the_earlier(
    shape: tuple[int, int, int], fraction: float
) -> None:
    batch, length, seed = shape
    logits = torch.randint(0, 4, (batch, length), generator=torch.Generator().manual_seed(seed)).float()
    capacity = capacity_tokens(fraction, length)
    index_BK, valid_BK, _ = select_top_k(logits, fraction)
    assert valid_BK is None
    for row, chosen in zip(logits.tolist(), index_BK.tolist(), strict=True):
        assert chosen == sorted(sorted(range(length), key=lambda i: (-row[i], i))[:capacity])


@given(shape=shapes, fraction=st.floats(0, 1))
def test_top_k_takes_the_capacity_of_a_rows_own_tokens_and_never_padding(
    shape: tuple[int, int, int], fraction: float
) -> None:
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    logits, real = torch.randn(batch, length, generator=generator), torch.rand(batch, length, generator=generator) < 0.6
    entered = membership(select_top_k(logits, fraction, real), logits.shape)
    assert not (entered & ~real).any()
    for row in range(batch):
        own = logits[row, real[row]]
        if len(own):
            alone = membership(select_top_k(own[None], fraction), (1, len(own)))[0]
            assert torch.equal(entered[row, real[row]], alone)


def test_the_capacity_of_a_row_is_that_of_its_length_to_the_last_token() -> None:
    for fraction in (0.125, 0.29, 1 / 3, 0.07, 0.999, 1.0):
        lengths = range(1, 400)
        expected = [capacity_tokens(fraction, length) for length in lengths]
        assert row_capacity(fraction, torch.tensor(lengths)).tolist() == expected


@given(shape=shapes, share=st.floats(0, 1))
def test_a_causal_selection_is_the_mask_it_came_from(shape: tuple[int, int, int], share: float) -> None:
    batch, length, seed = shape
    entered = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    selection = select_entered(entered)
    assert torch.equal(membership(selection, entered.shape), entered)
    assert selection.index_RK.shape[1] == entered.sum(1).max()


@given(shape=shapes, share=st.floats(0.1, 1))
def test_the_delta_is_weighted_and_the_residual_is_not(shape: tuple[int, int, int], share: float) -> None:
    batch, length, seed = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    entered = torch.rand(batch, length, generator=generator) < share
    selection = select_entered(entered)
    chosen = gather_tokens(hidden, selection)
    result = add_weighted(hidden, selection, 2 * chosen, gather_tokens(weight, selection))
    for b in range(batch):
        for i in range(length):
            factor = 1 + 2 * weight[b, i] if entered[b, i] else 1
            assert torch.allclose(result[b, i], factor * hidden[b, i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_is_multiplied_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    hidden, delta, weight = torch.randn(2, 64, 16).to(dtype), torch.randn(2, 64, 16).to(dtype), torch.randn(2, 64)
    every = select_entered(torch.ones(2, 64, dtype=torch.bool))
    result = add_weighted(hidden, every, delta, weight)
    assert torch.equal(result, hidden + (weight.double()[..., None] * delta.double()).float().to(dtype))


def test_rows_keep_their_own_tokens() -> None:
    hidden = torch.arange(12.0).view(2, 6, 1)
    selection = Selection(torch.tensor([[0, 5], [2, 3]]), None)
    assert gather_tokens(hidden, selection).flatten().tolist() == [0, 5, 8, 9]


def test_membership_loss_is_the_mean_over_real_tokens() -> None:
    logits, entered = torch.tensor([[0.0, 50.0, 3.0]]), torch.tensor([[True, True, False]])
    real = torch.tensor([[True, True, False]])
    assert membership_loss(logits, entered, real).item() == pytest.approx(0.5 * 0.693147, rel=1e-5)
    assert membership_loss(logits, entered, None).item() == pytest.approx((0.693147 + 3.048587) / 3, rel=1e-5)


def test_the_boundary_lies_between_the_least_chosen_and_the_greatest_other() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 2.0], [0.0, -4.0, 9.0, 8.0]])
    entered = membership(select_top_k(logits, 0.5), logits.shape)
    assert top_k_boundary(logits, entered, None).item() == ((3 + 2) / 2 + (8 + 0) / 2) / 2
    real = torch.tensor([[True, True, True, False], [False] * 4])
    entered = membership(select_top_k(logits, 0.7, real), logits.shape)
    assert top_k_boundary(logits, entered, real).item() == (3 + 1) / 2
    assert top_k_boundary(logits, entered, real & False).isnan()
    whole = torch.ones_like(entered)
    assert top_k_boundary(logits, whole, None).item() == (1 + -4) / 2


def test_the_threshold_is_a_running_average_over_training_steps_only() -> None:
    model = routed_model(causal_router="threshold", threshold_decay=0.5, capacity=0.25)
    router = model.model.layers[0].router
    input_ids = torch.randint(0, 31, (2, 16))

    def boundary() -> torch.Tensor:
        layer = model.eval()(input_ids, routing="top_k", output_routing=True).routing[0]
        return top_k_boundary(layer.router_logits, layer.entered, None)

    model.eval()(input_ids, routing="top_k")
    model(input_ids)
    assert router.threshold.item() == 0
    for _ in range(2):
        model.train()(input_ids)
    assert router.threshold.item() == pytest.approx(0.75 * boundary().item(), rel=1e-5)


def test_a_threshold_router_has_no_loss_and_no_predictor() -> None:
    model = routed_model(causal_router="threshold").train()
    input_ids = torch.randint(0, 31, (2, 16))
    output = model(input_ids, labels=input_ids)
    assert output.router_loss is None
    assert torch.equal(output.loss, output.lm_loss)
    assert not any("predictor" in name for name, _ in model.named_parameters())


EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_capacity": 0.7}
HALVES = [torch.bfloat16, torch.float16]


def router_state(model: MoDForCausalLM) -> dict[str, torch.Tensor]:
    """Weights and buffers of the routers of blocks and of experts."""
    return {name: value.clone() for name, value in model.state_dict().items() if ".router." in name}


@pytest.mark.parametrize("dtype", HALVES)
def test_routers_stay_in_float32_through_casts_saving_and_loading(tmp_path: Path, dtype: torch.dtype) -> None:
    model = routed_model(**EXPERTS)
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.uniform_()
    before = router_state(model)
    assert {name.rpartition(".")[2] for name in before} == {"weight", "bias", "router_scale", "threshold"}
    model.to(dtype).save_pretrained(tmp_path)
    assert model.dtype == dtype
    for changes in ({}, {"dtype": dtype}, {"dtype": "auto"}, {"dtype": torch.float32}):
        loaded = MoDForCausalLM.from_pretrained(tmp_path, **changes)
        after = router_state(loaded)
        assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in after.items())
        assert after.keys() == before.keys()
        assert loaded.dtype == changes.get("dtype", dtype) or changes == {"dtype": "auto"}
    assert all(value.dtype == torch.float64 for value in router_state(model.double()).values())
    assert all(value.dtype == torch.float32 for value in router_state(model.bfloat16()).values())


@pytest.mark.parametrize("dtype", HALVES)
def test_routers_of_a_model_made_in_half_precision_are_in_float32(dtype: torch.dtype) -> None:
    config = MoDConfig(**{**TINY, "routed_layers": [0, 2], **EXPERTS})
    made = [AutoModelForCausalLM.from_config(config, dtype=dtype)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made.append(MoDForCausalLM(config))
    finally:
        torch.set_default_dtype(before)
    for model in made:
        assert model.lm_head.weight.dtype == dtype
        state = router_state(model)
        assert {name.rpartition(".")[2] for name in state} == {"weight", "bias", "router_scale", "threshold"}
        assert {value.dtype for value in state.values()} == {torch.float32}
        input_ids = torch.randint(0, 31, (2, 9))
        model.train()(input_ids, labels=input_ids).loss.backward()


@pytest.mark.parametrize("router_norm", [False, True])
@pytest.mark.parametrize("causal_router", ["predictor", "auxiliary_loss", "threshold"])
def test_under_autocast_and_in_bf16_routers_compute_in_float32(causal_router: str, router_norm: bool) -> None:
    model = routed_model(causal_router=causal_router, router_norm=router_norm, **EXPERTS).train()
    router = model.model.layers[0].router
    hidden, positions = torch.randn(1, 2048, 16), torch.arange(2048)[None]
    expected = router.logits(hidden, positions)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router.logits(hidden, positions)
    model.bfloat16()
    of_rounded = router.logits(hidden.bfloat16(), positions)
    exact = router.logits(hidden.bfloat16().float(), positions)
    for logits in zip(expected, under_autocast, of_rounded, exact, strict=True):
        assert all(each.dtype == torch.float32 for each in logits)
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[2], logits[3])
    # In bf16 about 1,000 would be left.
    assert expected[0].unique().numel() > 2000


def test_a_threshold_of_a_bf16_model_follows_its_cuts() -> None:
    model = routed_model(causal_router="threshold").bfloat16().train()
    router = model.model.layers[0].router
    input_ids = torch.randint(0, 31, (4, 32))
    boundaries = [model(input_ids, output_routing=True).routing[0].boundary.item() for _ in range(400)]
    assert router.threshold.item() == pytest.approx(sum(boundaries) / len(boundaries), rel=0.03)


def test_training_by_the_threshold_chooses_as_in_sampling_and_follows_where_top_k_would_have_cut() -> None:
    fields = {"causal_router": "threshold", "threshold_decay": 0.5, "capacity": 0.25}
    model = routed_model(training_routing="threshold", **fields)
    twin = routed_model(**fields)
    twin.load_state_dict(model.state_dict())
    input_ids = torch.randint(0, 31, (3, 24))
    sampled = model.eval()(input_ids, use_cache=False, output_routing=True)
    output = model.train()(input_ids, labels=input_ids, output_routing=True)
    assert torch.equal(output.logits, sampled.logits)
    router = model.model.layers[0].router
    # The same tokens meet the first routed block of the twin, which is trained by top-k.
    boundary = twin.train()(input_ids, output_routing=True).routing[0].boundary
    assert output.routing[0].boundary.item() == pytest.approx(boundary.item())
    # The first cut is taken as it is, and later ones are averaged.
    assert router.threshold.item() == pytest.approx(boundary.item())
    output.loss.backward()
    assert router.proj.weight.grad.abs().max() > 0
    others = torch.randint(0, 31, (3, 24))
    boundary_there = twin(others, output_routing=True).routing[0].boundary
    model(others)
    assert router.threshold.item() == pytest.approx((boundary + boundary_there).item() / 2, rel=1e-4)


def test_training_by_the_threshold_lets_in_the_capacity_in_the_mean() -> None:
    torch.manual_seed(0)
    model = routed_model(causal_router="threshold", training_routing="threshold", capacity=0.25).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    entering = []
    for _ in range(60):
        input_ids = torch.randint(0, 31, (8, 32))
        output = model(input_ids, labels=input_ids, output_routing=True)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        entering.append(output.routing[0].entered.float().mean().item())
    # The first batch meets a threshold of 0.
    assert sum(entering[1:]) / 59 == pytest.approx(0.25, abs=0.03)


def test_training_by_the_threshold_refuses_gradient_checkpointing() -> None:
    model = routed_model(causal_router="threshold", training_routing="threshold").train()
    model.gradient_checkpointing_enable()
    input_ids = torch.randint(0, 31, (2, 16))
    with pytest.raises(ValueError, match="training_routing='threshold' cannot be used with gradient checkpointing"):
        model(input_ids, labels=input_ids)
    assert model.eval()(input_ids).logits.isfinite().all()


def test_training_by_the_threshold_does_not_look_ahead() -> None:
    model = routed_model(causal_router="threshold", training_routing="threshold", capacity=0.25).train()
    input_ids = torch.randint(0, 31, (2, 24))
    changed = input_ids.clone()
    changed[:, 12:] = 30 - changed[:, 12:]
    # With thresholds of their own, which each call moves.
    first, again = copy.deepcopy(model)(input_ids).logits, model(changed).logits
    torch.testing.assert_close(again[:, :12], first[:, :12])
    assert not torch.allclose(again[:, 12:], first[:, 12:])


@pytest.mark.parametrize(
    "changes", [{"causal_router": "predictor"}, {"router_type": "random"}, {"num_experts": 2}, {"num_noop_experts": 1}]
)
def test_training_by_a_threshold_that_nothing_moves_is_refused(changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"training_routing='threshold' needs {name}="):
        MoDConfig(**{**TINY, "causal_router": "threshold", "training_routing": "threshold", **changes})
