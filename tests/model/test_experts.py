"""Experts against their per-token oracle, the dense MLP, transformers' Mixtral, and the model's own other ways."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import check_gradients, distinct_tokens, greedy, layout, left_padded, tiny, trace_only
from reference import reference_forward
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from mixture_of_depths import MoDConfig
from mixture_of_depths.model.experts import (
    ExpertMLP,
    capacity_boundary,
    dispatch,
    grouped_mm,
    largest,
    load_balance_loss,
)
from mixture_of_depths.model.modeling import MLP
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stream import stream

KINDS: dict[str, dict[str, Any]] = {
    "one of four": {"num_experts": 4},
    "two of four": {"num_experts": 4, "num_experts_per_tok": 2},
    "capacity": {"num_experts": 4, "num_experts_per_tok": 2, "expert_capacity": 0.6},
    "expert choice": {"num_experts": 4, "expert_routing": "expert_choice"},
    "expert choice, two": {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "expert_routing": "expert_choice",
        "expert_capacity": 0.7,
    },
    "integrated": {"num_experts": 3, "num_noop_experts": 2, "noop_share": 0.4},
    "integrated, two": {"num_experts": 3, "num_noop_experts": 1, "num_experts_per_tok": 2, "expert_capacity": 1.0},
    "more asked than there are": {
        "num_experts": 2,
        "num_noop_experts": 2,
        "num_experts_per_tok": 3,
        "load_balance_loss_weight": 0.1,
    },
    "one and a no-op": {"num_experts": 1, "num_noop_experts": 1},
}


def config_of(**changes: Any) -> MoDConfig:
    return MoDConfig(hidden_size=16, intermediate_size=24, num_attention_heads=4, routed_layers=[], **changes)


def block_of(**changes: Any) -> ExpertMLP:
    """The experts of one block by themselves, in float64, with large weights."""
    mlp = ExpertMLP(config_of(**changes)).double()
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
    return mlp


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    length=st.integers(1, 11),
    padding=st.sampled_from(["plain", "left", "right", "packed"]),
    routing=st.sampled_from(["top_k", "causal"]),
    kind=st.sampled_from(sorted(KINDS)),
    routed=st.sampled_from([[], [1], [0, 2]]),
    tied=st.booleans(),
)
def test_forward_losses_and_gradients_equal_the_per_token_oracle(
    seed: int, batch: int, length: int, padding: str, routing: Any, kind: str, routed: list[int], tied: bool
) -> None:
    torch.manual_seed(seed)
    # Outside training the routers' losses are no part of the gradients of logits.
    model = tiny(routed_layers=routed, capacity=0.5, **KINDS[kind]).train(routing == "top_k")
    for layer in model.model.layers:
        if layer.mlp.router.threshold is not None:
            layer.mlp.router.threshold.uniform_(0, 0.6)
        if tied:
            # All tokens give all experts the same weight.
            layer.mlp.router.proj.weight.data.zero_()
    input_ids = distinct_tokens(batch, length)
    mask, position_ids, *lists = layout(padding, batch, length, torch.Generator().manual_seed(seed))
    real = torch.tensor(lists[0])
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids, "use_cache": False}

    output = model(input_ids, labels=input_ids, routing=routing, **given)
    expected = reference_forward(model, input_ids, *lists, routing=routing)
    assert (output.logits - expected.logits)[real].abs().max() < 1e-9
    weights = torch.randn_like(output.logits) * real[..., None]
    loss, reference_loss = (output.logits * weights).sum(), (expected.logits * weights).sum()
    if routing == "top_k":
        assert output.expert_z_loss.item() == pytest.approx(expected.z_loss.item(), rel=1e-9)
        reference_loss = reference_loss + model.config.expert_z_loss_weight * expected.z_loss
        if routed:
            reference_loss = reference_loss + model.config.router_loss_weight * expected.router_loss
        if "expert choice" in kind:
            assert output.balance_loss is None
        else:
            assert output.balance_loss.item() == pytest.approx(expected.balance_loss.item(), rel=1e-9)
            reference_loss = reference_loss + model.config.load_balance_loss_weight * expected.balance_loss

    check_gradients(model, loss, reference_loss)


def test_the_loss_holds_the_weighted_losses_of_the_experts() -> None:
    changes = {"load_balance_loss_weight": 0.3, "expert_z_loss_weight": 0.7, "predictor_loss_weight": 0.2}
    model = tiny(routed_layers=[1], num_experts=3, **changes).train()
    input_ids = torch.randint(0, 31, (2, 9))
    found = model(input_ids, labels=input_ids)
    expected = found.lm_loss + 0.3 * found.balance_loss + 0.7 * found.expert_z_loss + 0.2 * found.router_loss
    assert found.loss.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("routing", ["top_k", "causal"])
def test_one_expert_is_the_dense_mlp(routing: Any) -> None:
    experts = block_of()
    dense = MLP(config_of()).double()
    gate, up = experts.gate_up_proj.weight.data[0].chunk(2)
    for linear, weight in (
        (dense.gate_proj, gate),
        (dense.up_proj, up),
        (dense.down_proj, experts.down_proj.weight[0]),
    ):
        linear.weight.data.copy_(weight)
    hidden = torch.randn(2, 7, 16, dtype=torch.float64)
    found, info = experts(hidden, None, routing)
    assert (found - dense(hidden)).abs().max() < 1e-12
    assert info.share.tolist() == [1]
    assert info.dropped == 0


@pytest.mark.parametrize("per_token", [2, 3])
def test_token_choice_of_several_experts_equals_mixtral(per_token: int) -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_experts_per_tok": per_token}
    mixtral = MixtralSparseMoeBlock(MixtralConfig(**shape, num_local_experts=5))
    ours = ExpertMLP(config_of(num_experts=5, num_experts_per_tok=per_token))
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    mixtral.gate.weight.data.copy_(ours.router.proj.weight)
    mixtral.experts.gate_up_proj.data.copy_(ours.gate_up_proj.weight)
    mixtral.experts.down_proj.data.copy_(ours.down_proj.weight)
    hidden = torch.randn(3, 8, 16)
    assert (ours(hidden, None, "causal")[0] - mixtral(hidden)).abs().max() < 1e-5


def test_a_token_that_asks_for_a_no_op_keeps_its_residual_and_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = block_of(num_experts=2, num_noop_experts=1)
    mlp.router.proj.weight.data.zero_()
    mlp.router.proj.weight.data[2, 0] = 1.0
    hidden = torch.rand(2, 6, 16, dtype=torch.float64)
    hidden[:, ::2, 0] = -5.0
    rows = []
    multiply = torch.mm

    def counted(left: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        rows.append(left.shape[0])
        return multiply(left, *others, **more)

    monkeypatch.setattr(torch, "mm", counted)
    found, info = mlp(hidden, None, "top_k")
    assert (found[:, 1::2] == 0).all()
    assert (found[:, ::2] != 0).any(dim=-1).all()
    assert info.share.tolist() == [0.5, 0, 0.5]
    # Two products, of each expert.
    assert rows == [6, 0, 6, 0]


def test_drops_are_counted_and_the_least_wanted_tokens_are_dropped() -> None:
    mlp = block_of(num_experts=2, expert_capacity=0.5)
    mlp.router.proj.weight.data.zero_()
    mlp.router.proj.weight.data[0, 0] = 1.0
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    hidden[0, :, 0] = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6], dtype=torch.float64)
    found, info = mlp(hidden, None, "top_k")
    # All ask for the first expert, which has two places.
    assert (found != 0).any(dim=-1).nonzero()[:, 1].tolist() == [5, 7]
    assert info.share.tolist() == [0.25, 0]
    assert info.dropped == 0.75


def test_a_uniform_router_has_the_least_balance_loss() -> None:
    for changes in ({"num_experts": 4}, {"num_experts": 3, "num_noop_experts": 2, "noop_share": 0.3}):
        config = config_of(**changes)
        spread = torch.full((config.num_experts,), (1 - config.target_noop_share) / config.num_experts)
        if config.num_noop_experts:
            rest = torch.full((config.num_noop_experts,), config.target_noop_share / config.num_noop_experts)
            spread = torch.cat([spread, rest])
        least = load_balance_loss(spread, spread, config)
        assert least.item() == pytest.approx(1)
        for seed in range(200):
            torch.manual_seed(seed)
            # Routers that are sure of themselves: the shares of the choices are the mean probabilities.
            other = torch.randn(len(spread)).mul(seed / 20).softmax(dim=0)
            assert load_balance_loss(other, other, config) >= least - 1e-6


def test_the_balance_loss_of_an_even_router_is_one() -> None:
    mlp = block_of(num_experts=4)
    mlp.router.proj.weight.data.zero_()
    hidden = torch.randn(2, 8, 16, dtype=torch.float64)
    assert mlp(hidden, None, "top_k")[1].balance_loss.item() == pytest.approx(1)


def test_the_balance_loss_brings_the_no_ops_to_their_share() -> None:
    torch.manual_seed(0)
    mlp = block_of(num_experts=3, num_noop_experts=1, noop_share=0.25)
    mlp.router.proj.weight.data.mul_(0.1)
    hidden = torch.randn(4, 64, 16, dtype=torch.float64)
    optimizer = torch.optim.Adam(mlp.router.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        info = mlp(hidden, None, "top_k")[1]
        info.balance_loss.backward()
        optimizer.step()
    assert info.share.tolist() == pytest.approx([0.25] * 4, abs=0.06)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("routed", [[], [1]])
def test_padding_changes_nothing_for_real_tokens(kind: str, routed: list[int]) -> None:
    model = tiny(routed_layers=routed, **KINDS[kind]).eval()
    input_ids = torch.randint(0, 31, (1, 8))
    padded = torch.cat([torch.randint(0, 31, (1, 3)), input_ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    alone = model(input_ids, use_cache=False, routing="causal").logits
    among = model(padded, attention_mask=mask, use_cache=False, routing="causal").logits[:, 3:]
    assert (alone - among).abs().max() < 1e-9


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("routed", [[], [1]])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_stream_generate_and_the_full_causal_forward_give_the_same_tokens(
    kind: str, routed: list[int], batch: int
) -> None:
    torch.manual_seed(3)
    model = tiny(routed_layers=routed, **KINDS[kind]).float().eval()
    for layer in model.model.layers:
        if layer.mlp.router.threshold is not None:
            layer.mlp.router.threshold.fill_(0.3)
    input_ids, mask = left_padded(batch, 7)
    tokens = torch.stack(list(stream(model, input_ids, mask, SamplingOptions(max_new_tokens=25, temperature=0))), dim=1)
    assert torch.equal(tokens, greedy(model, input_ids, mask, 25))
    full = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    logits = model(torch.cat([input_ids, tokens], dim=1), full, use_cache=False, routing="causal").logits
    assert torch.equal(logits[:, input_ids.shape[1] - 1 : -1].argmax(dim=-1), tokens)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "batch", "routed"), [("two of four", 1, [1]), ("integrated", 2, []), ("one of four", 5, [])]
)
def test_the_compiled_step_gives_the_same_tokens_with_experts(
    kind: str, batch: int, routed: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    if backend == "eager":
        trace_only(monkeypatch)
    model = tiny(routed_layers=routed, num_hidden_layers=1 + len(routed), **KINDS[kind]).float().eval()
    input_ids, mask = left_padded(batch, 9)
    options = SamplingOptions(max_new_tokens=70, temperature=0)
    tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True)), dim=1)
    assert torch.equal(tokens, greedy(model, input_ids, mask, 70))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["one of four", "capacity", "expert choice"])
def test_a_compiled_block_gives_the_same_loss_and_gradients_without_a_graph_break(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    model = tiny(routed_layers=[1], num_hidden_layers=2, **KINDS[kind]).float().train()
    input_ids = torch.randint(0, 31, (2, 8))
    plain = model(input_ids, labels=input_ids).loss
    wanted = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)
    found = model(input_ids, labels=input_ids).loss
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
    got = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        if b is not None:
            assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(
    "changes", [{"expert_routing": "expert_choice", "expert_capacity": 0.5}, {"expert_capacity": 0.6}]
)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_thresholds_follow_where_the_capacity_cuts_once_a_training_pass(
    changes: dict[str, Any], checkpointed: bool
) -> None:
    model = tiny(routed_layers=[], num_experts=4, threshold_decay=0.7, **changes)
    router = model.model.layers[1].mlp.router
    if checkpointed:
        model.gradient_checkpointing_enable()
    input_ids = torch.randint(0, 31, (4, 16))
    model.eval()(input_ids, routing="top_k", use_cache=False)
    assert (router.threshold == 0).all()
    output = model.train()(input_ids, labels=input_ids, output_routing=True)
    output.loss.backward()
    info = output.expert_routing[1]
    assert (info.boundary > 0).any()
    assert torch.allclose(router.threshold, 0.3 * info.boundary)


def test_rows_too_short_for_a_choice_leave_the_thresholds_of_experts() -> None:
    # Each expert takes one of the tokens, and has no choice where there is only one.
    mlp = block_of(num_experts=4, expert_capacity=0.5).train()
    hidden = torch.randn(5, 1, 16, dtype=torch.float64)
    assert mlp(hidden, None, "top_k")[1].boundary.isnan().all()
    padded = torch.cat([hidden, torch.zeros_like(hidden)], dim=1)
    real = torch.tensor([[True, False]]).expand(5, 2)
    assert mlp(padded, real, "top_k")[1].boundary.isnan().all()
    longer = torch.randn(5, 2, 16, dtype=torch.float64)
    expected = mlp(longer, None, "top_k")[1].boundary
    assert expected.isfinite().any()
    mixed = torch.cat([padded, longer])
    real = torch.cat([real, torch.ones_like(real)])
    torch.testing.assert_close(mlp(mixed, real, "top_k")[1].boundary, expected, equal_nan=True)


def test_the_boundary_lies_midway_and_rows_without_any_taken_do_not_count() -> None:
    scores = torch.tensor([[[0.9, 0.2], [0.5, 0.4], [0.3, 0.0]], [[0.8, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    taken = torch.tensor(
        [[[True, False], [True, True], [False, False]], [[True, False], [False, False], [False, False]]]
    )
    # The first expert: midway in the first row, the least taken in the second, which dropped nothing.
    assert capacity_boundary(scores, taken).tolist() == pytest.approx([(0.4 + 0.8) / 2, 0.3])
    of_one = capacity_boundary(scores[1:], taken[1:])
    assert of_one[0].item() == pytest.approx(0.8)
    assert of_one[1].isnan()


@pytest.mark.parametrize("changes", [{"expert_routing": "expert_choice"}, {"expert_capacity": 0.7}])
def test_in_sampling_as_much_is_dropped_as_in_training(changes: dict[str, Any]) -> None:
    mlp = block_of(num_experts=4, **changes).train()
    mlp.router.proj.weight.data.mul_(0.3)
    threshold = mlp.router.threshold
    hidden = torch.randn(64, 128, 16, dtype=torch.float64)
    top_k = mlp(hidden, None, "top_k")[1]
    threshold.copy_(top_k.boundary)
    causal = mlp(hidden, None, "causal")[1]
    assert causal.share.tolist() == pytest.approx(top_k.share.tolist(), abs=0.03)
    assert causal.dropped.item() == pytest.approx(top_k.dropped.item(), abs=0.03)


def test_of_expert_choice_the_tokens_that_none_takes_are_dropped() -> None:
    mlp = block_of(num_experts=2, expert_routing="expert_choice", expert_capacity=0.5)
    hidden = torch.randn(1, 8, 16, dtype=torch.float64)
    found, info = mlp(hidden, None, "top_k")
    assert info.dropped.item() == pytest.approx((found == 0).all(dim=-1).double().mean().item())
    assert 0.5 <= info.dropped < 1


def test_experts_compute_in_bf16_under_autocast() -> None:
    mlp = ExpertMLP(config_of(num_experts=2))
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
    rows, ends = torch.randn(4, 16), torch.tensor([2, 4])
    with torch.autocast("cpu", torch.bfloat16):
        assert mlp.gate_up_proj(rows, ends).dtype == torch.bfloat16
        assert mlp(rows[None], None, "causal")[0].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    left=st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_grouped_products_and_their_gradients_equal_those_one_by_one(
    seed: int, counts: list[int], left: int, sizes: tuple[int, int]
) -> None:
    torch.manual_seed(seed)
    rows = torch.randn(sum(counts) + left, sizes[0], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), sizes[1], sizes[0], dtype=torch.float64, requires_grad=True)
    parts = [F.linear(part, one) for part, one in zip(rows.split([*counts, left])[:-1], weight, strict=True)]
    expected = torch.cat([*parts, rows.new_zeros(left, sizes[1])])
    found = grouped_mm(rows, weight, torch.tensor(counts).cumsum(0))
    assert torch.allclose(found, expected)
    grad = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, (rows, weight), grad),
        torch.autograd.grad(expected, (rows, weight), grad),
        strict=True,
    ):
        assert torch.allclose(a, b)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 9), experts=st.integers(1, 5), room=st.integers(0, 4))
def test_dispatch_lists_every_pair_once(seed: int, tokens: int, experts: int, room: int) -> None:
    torch.manual_seed(seed)
    taken = torch.rand(tokens, experts) < 0.4
    weight = torch.rand(tokens, experts) * taken
    pairs = int(taken.sum())
    token, ends, weights = dispatch(taken, weight, pairs + room)
    expected = [(e, n) for e in range(experts) for n in range(tokens) if taken[n, e]]
    owners = [e for e in range(experts) for _ in range(int(taken[:, e].sum()))]
    assert list(zip(owners, token.tolist(), strict=False)) == expected
    assert ends.tolist() == taken.sum(dim=0).cumsum(0).tolist()
    assert weights[:pairs].tolist() == [weight[n, e].item() for e, n in expected]
    assert weights[pairs:].tolist() == [0] * room


def test_equal_scores_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert largest(scores, 2, dim=1).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_under_autocast_and_in_bf16_routers_of_experts_compute_in_float32() -> None:
    router, hidden = ExpertMLP(config_of(num_experts=4, expert_capacity=0.7)).router, torch.randn(1, 2048, 16)
    expected = router(hidden, None, "top_k")
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(hidden, None, "top_k")
    of_rounded = router.bfloat16()(hidden.bfloat16(), None, "top_k")
    exact = router(hidden.bfloat16().float(), None, "top_k")
    for (_, weight, decided), (_, exact_weight, exactly) in ((under_autocast, expected), (of_rounded, exact)):
        assert torch.equal(weight, exact_weight)
        for name in ("scores", "balance_loss", "z_loss"):
            assert torch.equal(getattr(decided, name), getattr(exactly, name))
    # In bf16 some hundreds would be left.
    assert expected[2].scores.unique().numel() > 2000
