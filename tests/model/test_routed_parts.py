"""What of a block is routed, and what a token that skips takes instead, against the per-token oracle and each other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PARTS, check_gradients, distinct_tokens, layout, left_padded, tiny, with_parts
from reference import reference_forward

from mixture_of_depths import MoDCache, MoDConfig, MoDForCausalLM
from mixture_of_depths.model.cache import RoutedCacheLayer


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    length=st.integers(1, 10),
    kind=st.sampled_from(["plain", "left", "right", "packed"]),
    routing=st.sampled_from(["top_k", "causal"]),
    parts=st.sampled_from(PARTS),
    bypass_rank=st.sampled_from([0, 4]),
    activation=st.sampled_from(["sigmoid", "tanh", "straight_through", "none"]),
    causal_router=st.sampled_from(["predictor", "auxiliary_loss", "threshold"]),
    capacity=st.sampled_from([0.125, 0.5, 0.95, 1.0]),
    experts=st.sampled_from(
        [
            {},
            {"num_experts": 3, "num_experts_per_tok": 2, "num_noop_experts": 1, "expert_capacity": 0.8},
            {"num_experts": 3, "expert_routing": "expert_choice", "expert_capacity": 0.7},
        ]
    ),
    extras=st.booleans(),
)
def test_forward_and_gradients_equal_the_per_token_oracle(
    seed: int,
    batch: int,
    length: int,
    kind: str,
    routing: Any,
    parts: Any,
    bypass_rank: int,
    activation: str,
    causal_router: str,
    capacity: float,
    experts: dict[str, Any],
    extras: bool,
) -> None:
    torch.manual_seed(seed)
    model = with_parts(
        parts,
        bypass_rank,
        capacity=[capacity, 0.5],
        causal_router=causal_router,
        router_activation=activation,
        first_token_enters=extras,
        query_key_norm=extras,
        attention_bias=extras,
        router_norm=extras,
        **experts,
    ).train()
    input_ids = distinct_tokens(batch, length)
    mask, position_ids, *lists = layout(kind, batch, length, torch.Generator().manual_seed(seed))
    real = torch.tensor(lists[0])
    given_tokens: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}

    output = model(**given_tokens, labels=input_ids, use_cache=False, routing=routing)
    expected = reference_forward(model, input_ids, *lists, routing=routing)
    assert (output.logits - expected.logits)[real].abs().max() < 1e-9
    with torch.no_grad():
        evaluated = model.eval()(**given_tokens, use_cache=False, routing=routing)
    assert (evaluated.logits - expected.logits)[real].abs().max() < 1e-9
    weights = torch.randn_like(expected.logits) * real[..., None]
    loss, reference_loss = (output.logits * weights).sum(), (expected.logits * weights).sum()
    if routing == "top_k":
        # They reach the routers whatever the loss is.
        reference_loss = reference_loss + model.config.router_loss_weight * expected.router_loss
        if experts:
            reference_loss = reference_loss + model.config.load_balance_loss_weight * expected.balance_loss
            reference_loss = reference_loss + model.config.expert_z_loss_weight * expected.z_loss
    check_gradients(model, loss, reference_loss)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("capacity", [0.5, 1e-9])
def test_a_sequence_given_in_pieces_gives_the_logits_of_the_whole(parts: Any, capacity: float) -> None:
    model = with_parts(parts, 4, causal_router="threshold").eval()
    if capacity < 0.5:
        # Pieces and whole texts that nobody enters.
        for layer_idx in (0, 2):
            model.model.layers[layer_idx].router.threshold.fill_(1e6)
    cuts = (1, 4, 1, 1, 3)
    input_ids, mask = left_padded(3, sum(cuts))
    whole = model(input_ids, attention_mask=mask, use_cache=False, output_routing=True)
    past, done = MoDCache(config=model.config), 0
    for cut in cuts:
        seen = slice(done, done + cut)
        done += cut
        piece = model(input_ids[:, seen], attention_mask=mask[:, :done], cache=past, output_routing=True)
        real = mask[:, seen].bool()
        assert (piece.logits - whole.logits[:, seen])[real].abs().max() < 1e-9
        for ours, all_of_it in zip(piece.routing, whole.routing, strict=True):
            assert ours is None or torch.equal(ours.entered, all_of_it.entered[:, seen])
        assert past.get_seq_length() == done
    for layer_idx, layer in enumerate(past.layers):
        assert isinstance(layer, RoutedCacheLayer) == (model.config.routed_part(layer_idx) == "block")
        assert isinstance(layer, RoutedCacheLayer) or layer.keys.shape[2] == done


@pytest.mark.parametrize("parts", PARTS)
def test_a_cache_can_be_cropped_and_one_of_other_parts_is_refused(parts: Any) -> None:
    model = with_parts(parts, 2).eval()
    input_ids, following = torch.randint(0, 31, (2, 9)), torch.randint(0, 31, (2, 3))
    past = model(input_ids).cache
    past.crop(-4)
    whole = torch.cat([input_ids[:, :5], following], dim=1)
    assert (model(following, cache=past).logits - model(whole).logits[:, 5:]).abs().max() < 1e-9
    other = MoDCache(config=MoDConfig(num_hidden_layers=3, routed_layers=[1]))
    with pytest.raises(ValueError, match="has routed layers"):
        model(input_ids, cache=other)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parts", PARTS[1:4])
def test_gradient_checkpointing_changes_no_gradient(parts: Any, reentrant: bool) -> None:
    model = with_parts(parts, 4, num_experts=2, expert_capacity=1.0).train()
    input_ids = torch.randint(0, 31, (2, 8))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = gradients()
    assert len(plain) == len(again)
    assert max((a - b).abs().max().item() for a, b in zip(plain, again, strict=True)) < 1e-12


def test_a_bypass_begins_as_nothing_learns_from_the_first_step_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with_bypass = tiny(bypass_rank=3, routed_layers=[0, 2]).train()
    without = tiny(routed_layers=[0, 2]).train()
    without.load_state_dict({k: v for k, v in with_bypass.state_dict().items() if ".bypass." not in k})
    input_ids = torch.randint(0, 31, (2, 9))
    output = with_bypass(input_ids, labels=input_ids)
    assert torch.equal(output.logits, without(input_ids).logits)
    output.loss.backward()
    bypass = with_bypass.model.layers[0].bypass
    assert bypass.up.weight.grad.abs().max() > 0
    torch.nn.init.normal_(bypass.up.weight)
    with_bypass.save_pretrained(tmp_path)
    loaded = MoDForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded(input_ids).logits - with_bypass.eval()(input_ids).logits).abs().max() < 1e-12
    # A model without one takes it on as nothing.
    without.save_pretrained(tmp_path)
    grown = MoDForCausalLM.from_pretrained(tmp_path, bypass_rank=3).eval()
    assert (grown(input_ids).logits - without.eval()(input_ids).logits).abs().max() < 1e-12


@pytest.mark.parametrize("parts", ["block_keep_keys", "mlp"])
@pytest.mark.parametrize("routing", ["top_k", "causal"])
def test_where_all_enter_with_weight_one_every_part_equals_the_dense_block(parts: Any, routing: Any) -> None:
    routed = with_parts(parts, 4, routed_layers=[0, 1, 2], capacity=1.0, router_activation="straight_through").eval()
    dense = tiny(routed_layers=[]).eval()
    dense.load_state_dict({k: v for k, v in routed.state_dict().items() if not {"router", "bypass"} & {*k.split(".")}})
    for layer in routed.model.layers:
        layer.router.predictor.down_proj.bias.data.fill_(1e6)
    input_ids = torch.randint(0, 31, (2, 9))
    assert (routed(input_ids, routing=routing, use_cache=False).logits - dense(input_ids).logits).abs().max() < 1e-9
