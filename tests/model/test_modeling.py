"""The model against its per-token oracle, Llama, and itself under another order of evaluation."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LLAMA, TINY, TOKENIZER, check_gradients, distinct_tokens, layout, model_with, tiny
from reference import reference_forward
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDCache, MoDConfig, MoDForCausalLM
from mixture_of_depths.model.attention import Placement, rotary_factors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    length=st.integers(1, 13),
    kind=st.sampled_from(["plain", "left", "right", "packed"]),
    routing=st.sampled_from(["top_k", "causal"]),
    activation=st.sampled_from(["none", "sigmoid", "tanh", "straight_through"]),
    causal_router=st.sampled_from(["predictor", "auxiliary_loss", "threshold"]),
    capacity=st.sampled_from([0.125, 0.3, 0.5, 0.95, 1.0]),
    extras=st.booleans(),
    first=st.booleans(),
)
def test_forward_and_gradients_equal_the_per_token_oracle(
    seed: int,
    batch: int,
    length: int,
    kind: str,
    routing: Any,
    activation: str,
    causal_router: str,
    capacity: float,
    extras: bool,
    first: bool,
) -> None:
    torch.manual_seed(seed)
    model = tiny(
        first_token_enters=first,
        routed_layers=[0, 2],
        capacity=[capacity, 0.5],
        router_activation=activation,
        causal_router=causal_router,
        query_key_norm=extras,
        attention_bias=extras,
        router_norm=extras,
        tie_word_embeddings=extras,
    ).train()
    input_ids = distinct_tokens(batch, length)
    mask, position_ids, *lists = layout(kind, batch, length, torch.Generator().manual_seed(seed))
    real = torch.tensor(lists[0])

    output = model(
        input_ids, attention_mask=mask, position_ids=position_ids, labels=input_ids, use_cache=False, routing=routing
    )
    expected, expected_loss, *_ = reference_forward(model, input_ids, *lists, routing=routing)
    assert (output.logits - expected)[real].abs().max() < 1e-9
    with torch.no_grad():
        evaluated = model.eval()(
            input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False, routing=routing
        )
    assert (evaluated.logits - expected)[real].abs().max() < 1e-9
    weights = torch.randn_like(expected) * real[..., None]
    loss, reference_loss = (output.logits * weights).sum(), (expected * weights).sum()
    if routing == "top_k" and causal_router != "threshold":
        assert output.router_loss.item() == pytest.approx(expected_loss.item(), abs=1e-9)
        # It reaches the routers whatever the loss is.
        reference_loss = reference_loss + model.config.router_loss_weight * expected_loss
    else:
        assert output.router_loss is None

    check_gradients(model, loss, reference_loss)


def test_gradients_of_the_router_loss_equal_the_oracle() -> None:
    for causal_router in ("predictor", "auxiliary_loss"):
        model = tiny(routed_layers=[0, 2], capacity=0.5, causal_router=causal_router).train()
        input_ids = torch.randint(0, 31, (2, 8))
        _, _, *lists = layout("plain", 2, 8, torch.Generator())
        parameters = list(model.parameters())
        got = torch.autograd.grad(model.model(input_ids).routers_loss, parameters, allow_unused=True)
        expected = reference_forward(model, input_ids, *lists, routing="top_k").router_loss
        expected = model.config.router_loss_weight * expected
        wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
        for (name, _), a, b in zip(model.named_parameters(), got, wanted, strict=True):
            if b is None or b.abs().max() == 0:
                assert a is None or a.abs().max() == 0, name
            else:
                assert (a - b).abs().max() < 1e-9, name


def test_predictor_loss_reaches_nothing_but_the_predictors() -> None:
    model = tiny(routed_layers=[0, 2]).train()
    input_ids = torch.randint(0, 31, (2, 8))
    model.model(input_ids).routers_loss.backward()
    touched = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert touched
    assert all(".predictor." in name for name in touched)


def test_auxiliary_loss_reaches_the_language_model() -> None:
    model = tiny(routed_layers=[2], causal_router="auxiliary_loss").train()
    input_ids = torch.randint(0, 31, (2, 8))
    model.model(input_ids).routers_loss.backward()
    grad = model.model.embed_tokens.weight.grad
    assert grad is not None
    assert grad.abs().max() > 0


def test_the_router_is_on_the_gradient_path_of_the_language_model() -> None:
    model = tiny(routed_layers=[0, 2]).train()
    input_ids = torch.randint(0, 31, (2, 8))
    model(input_ids, labels=input_ids).lm_loss.backward()
    for layer_idx in (0, 2):
        assert model.model.layers[layer_idx].router.proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("routing", ["top_k", "causal"])
def test_a_routed_block_with_capacity_one_and_weight_one_equals_the_dense_block(routing: Any) -> None:
    routed = tiny(routed_layers=[0, 1, 2], capacity=1.0, router_activation="sigmoid").eval()
    dense = tiny(routed_layers=[]).eval()
    dense.load_state_dict({k: v for k, v in routed.state_dict().items() if ".router." not in k})
    for layer in routed.model.layers:
        layer.router.gate = torch.ones_like
        layer.router.predictor.down_proj.bias.data.fill_(1e6)
    input_ids = torch.randint(0, 31, (2, 9))
    difference = routed(input_ids, routing=routing, use_cache=False).logits - dense(input_ids).logits
    assert difference.abs().max() < 1e-9


def llama_pair(**changes: Any) -> tuple[LlamaForCausalLM, MoDForCausalLM]:
    shape = {**LLAMA, **changes}
    llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ours = MoDForCausalLM(MoDConfig(**shape, routed_layers=[])).eval()
    ours.load_state_dict(llama.state_dict())
    return llama, ours


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
)
def test_without_routed_blocks_it_gives_the_logits_of_llama(changes: dict[str, Any]) -> None:
    llama, ours = llama_pair(**changes)
    input_ids = torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(ours(input_ids).logits, llama(input_ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_the_angles_of_late_positions_are_exact_in_a_bf16_model(changes: dict[str, Any]) -> None:
    config = MoDConfig(hidden_size=64, num_attention_heads=1, rope_parameters={"rope_theta": 10000.0, **changes})
    positions = torch.arange(4000, 4096)[None]
    exact = rotary_factors(config, positions, torch.float64)
    for factors, exactly in zip(rotary_factors(config, positions, torch.bfloat16), exact, strict=True):
        assert factors.dtype == torch.bfloat16
        torch.testing.assert_close(factors.double(), exactly, atol=2.5e-3, rtol=0)


def test_left_padded_batches_and_greedy_tokens_equal_llama() -> None:
    llama, ours = llama_pair()
    input_ids = torch.randint(0, 97, (3, 12))
    mask = torch.ones_like(input_ids)
    mask[1, :4] = 0
    mask[2, :9] = 0
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(input_ids, **arguments), llama.generate(input_ids, **arguments))


def test_top_k_takes_exactly_the_capacity_of_every_sequence() -> None:
    model = tiny(routed_layers=[0, 1, 2], capacity=[0.125, 0.3, 0.95]).eval()
    for length in (1, 2, 7, 8, 10, 40):
        input_ids = torch.randint(0, 31, (3, length))
        routing = model(input_ids, routing="top_k", output_routing=True).routing
        for layer, capacity in zip(routing, (0.125, 0.3, 0.95), strict=True):
            assert layer.entered.sum(1).tolist() == [max(1, math.floor(capacity * length))] * 3


def test_padding_never_enters_a_routed_block() -> None:
    model = tiny(routed_layers=[0, 1, 2], capacity=0.5).eval()
    input_ids = torch.randint(0, 31, (3, 12))
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    mask[2, 1:] = 0
    for routing in ("top_k", "causal"):
        for layer in model(input_ids, attention_mask=mask, routing=routing, output_routing=True).routing:
            assert not layer.entered[mask == 0].any()
            if routing == "top_k":
                # The capacity of each row's own tokens.
                assert layer.entered.sum(1).tolist() == [6, 3, 1]


@pytest.mark.parametrize("causal_router", ["predictor", "auxiliary_loss", "threshold"])
@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_later_tokens_change_nothing_before_them_under_causal_routing(causal_router: str, router_type: str) -> None:
    model = tiny(routed_layers=[0, 2], causal_router=causal_router, router_type=router_type, capacity=0.5).eval()
    first = torch.randint(0, 31, (2, 20))
    second = first.clone()
    second[:, 12:] = torch.randint(0, 31, (2, 8))
    difference = model(first).logits - model(second).logits
    assert difference[:, :12].abs().max() < 1e-12
    assert difference[:, 12:].abs().max() > 1e-3


def test_later_tokens_do_change_those_before_them_under_top_k() -> None:
    model = tiny(routed_layers=[0, 2], capacity=0.25).eval()
    first = torch.randint(0, 31, (8, 20))
    second = first.clone()
    second[:, 12:] = torch.randint(0, 31, (8, 8))
    difference = model(first, routing="top_k").logits - model(second, routing="top_k").logits
    assert difference[:, :12].abs().max() > 1e-3


def test_rows_of_a_batch_do_not_touch_one_another() -> None:
    model = tiny(routed_layers=[0, 1, 2], capacity=0.5).eval()
    input_ids = torch.randint(0, 31, (3, 10))
    for routing in ("top_k", "causal"):
        together = model(input_ids, routing=routing, use_cache=False).logits
        alone = torch.cat([model(row[None], routing=routing, use_cache=False).logits for row in input_ids])
        assert (together - alone).abs().max() < 1e-12


def test_packed_documents_give_the_logits_of_each_alone_under_causal_routing() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    first, second = torch.randint(0, 31, (1, 7)), torch.randint(0, 31, (1, 9))
    packed = torch.cat([first, second], dim=1)
    position_ids = torch.cat([torch.arange(7), torch.arange(9)])[None]
    together = model(packed, position_ids=position_ids).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    assert (together - alone).abs().max() < 1e-9


def test_default_routing_is_top_k_in_training_and_causal_outside_it() -> None:
    model = tiny()
    input_ids = torch.randint(0, 31, (2, 10))
    assert torch.equal(model.train()(input_ids).logits, model(input_ids, routing="top_k", use_cache=False).logits)
    assert torch.equal(model.eval()(input_ids).logits, model(input_ids, routing="causal").logits)


def test_random_routing_is_fresh_in_training_and_repeats_with_the_seed() -> None:
    model = tiny(router_type="random", routed_layers=[0, 1, 2], capacity=0.25).train()
    input_ids = torch.randint(0, 31, (2, 16))

    def entered() -> torch.Tensor:
        return torch.stack([layer.entered for layer in model(input_ids, output_routing=True).routing])

    torch.manual_seed(1)
    first, second = entered(), entered()
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, entered())
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(entered(), entered())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(".router." in name for name, _ in model.named_parameters())


def test_random_routing_lets_the_capacity_in_when_causal() -> None:
    model = tiny(router_type="random", routed_layers=[0, 1, 2], capacity=0.125, max_position_embeddings=4096).eval()
    routing = model(torch.randint(0, 31, (1, 4096)), output_routing=True).routing
    for layer in routing:
        assert layer.entered.float().mean().item() == pytest.approx(0.125, abs=0.02)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    for router_type in ("learned", "random"):
        model = tiny(router_type=router_type).train()
        input_ids = torch.randint(0, 31, (2, 10))

        def gradients(model: MoDForCausalLM, input_ids: torch.Tensor) -> list[torch.Tensor]:
            torch.manual_seed(3)
            model.zero_grad()
            model(input_ids, labels=input_ids).loss.backward()
            return [weight.grad.clone() for weight in model.parameters()]

        plain = gradients(model, input_ids)
        model.gradient_checkpointing_enable()
        for a, b in zip(plain, gradients(model, input_ids), strict=True):
            assert torch.equal(a, b)


def test_loss_parts_add_up_and_a_batch_given_in_parts_sums_to_the_whole() -> None:
    model = tiny(predictor_loss_weight=0.3).train()
    input_ids = torch.randint(0, 31, (4, 10))
    whole = model(input_ids, labels=input_ids)
    assert whole.loss.item() == pytest.approx((whole.lm_loss + 0.3 * whole.router_loss).item())
    parts = [model(row, labels=row, num_items_in_batch=4 * 9).loss for row in input_ids.split(2)]
    assert sum(parts).item() == pytest.approx(whole.loss.item(), rel=1e-6)


def test_saving_and_loading_through_the_auto_classes_keeps_logits(tmp_path: Any) -> None:
    one_block: dict[str, Any] = {"tie_word_embeddings": True, "capacity": [0.5], "routed_layers": [1]}
    for changes in ({}, {"router_type": "random"}, one_block):
        model = MoDForCausalLM(MoDConfig(**{**TINY, **changes})).eval()
        model.save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert isinstance(loaded, MoDForCausalLM)
        kept = AutoConfig.from_pretrained(tmp_path).to_dict()
        for name, value in model.config.to_dict().items():
            if name not in ("dtype", "_name_or_path"):
                assert kept[name] == value, name
        input_ids = torch.randint(0, 31, (2, 10))
        for routing in ("top_k", "causal"):
            a, b = (m(input_ids, routing=routing, use_cache=False).logits for m in (model, loaded))
            assert torch.equal(a, b)


def test_blocks_are_compiled_once_a_kind_however_many_there_are() -> None:
    model = tiny(num_hidden_layers=20).train()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=keep, fullgraph=True, dynamic=False)
    model(torch.zeros(2, 8, dtype=torch.int64), labels=torch.zeros(2, 8, dtype=torch.int64)).loss.backward()
    assert len(graphs) == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_training_step_compiles_without_a_graph_break(backend: str) -> None:
    model = MoDForCausalLM(MoDConfig(**TINY)).train()
    input_ids = torch.randint(0, 31, (2, 16))
    position_ids = torch.arange(16).expand(2, 16)
    eager = model(input_ids, position_ids=position_ids, labels=input_ids).loss
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    loss = compiled(input_ids=input_ids, position_ids=position_ids, labels=input_ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(eager.item(), rel=1e-5)


@pytest.mark.parametrize("change", [{"router_type": "random"}, {"causal_router": "threshold"}, {"num_experts": 2}])
def test_every_kind_of_router_is_traced_without_a_graph_break(change: dict[str, Any]) -> None:
    model = MoDForCausalLM(MoDConfig(**TINY | change)).eval()
    input_ids = torch.randint(0, 31, (2, 16))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    arguments = {"input_ids": input_ids, "routing": "top_k", "use_cache": False}
    torch.testing.assert_close(compiled(**arguments).logits, model(**arguments).logits)


def test_contradicting_arguments_are_refused_by_name() -> None:
    model = tiny().eval()
    input_ids = torch.randint(0, 31, (2, 6))
    with pytest.raises(ValueError, match="routing='top_k' looks ahead"):
        model(input_ids, routing="top_k", use_cache=True)
    with pytest.raises(ValueError, match="routing='sometimes' is unknown"):
        model(input_ids, routing="sometimes")
    with pytest.raises(ValueError, match="output_attentions"):
        model(input_ids, output_attentions=True)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\)"):
        model(input_ids, attention_mask=torch.ones(2, 5))
    other = MoDCache(config=MoDConfig(**{**TINY, "routed_layers": [0]}))
    with pytest.raises(ValueError, match="build it with MoDCache"):
        model(input_ids, cache=other)


def test_packed_documents_are_refused_with_a_cache() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (1, 6))
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert model(input_ids, position_ids=packed).cache is None
    with pytest.raises(ValueError, match="documents packed in one row cannot be used with a cache"):
        model(input_ids, position_ids=packed, use_cache=True)
    past = model(input_ids[:, :3]).cache
    with pytest.raises(ValueError, match="documents packed in one row cannot be used with a cache"):
        model(input_ids[:, 3:], position_ids=torch.tensor([[3, 0, 1]]), cache=past)


def test_right_padding_and_holes_in_the_mask_equal_llama() -> None:
    llama, ours = llama_pair()
    input_ids = torch.randint(0, 97, (2, 10))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    arguments = {"attention_mask": mask, "position_ids": position_ids}
    difference = ours(input_ids, **arguments).logits - llama(input_ids, **arguments).logits
    assert difference[mask.bool()].abs().max() < 1e-4


def test_random_routing_has_no_longest_sequence_and_looks_gaussian() -> None:
    model = tiny(router_type="random", routed_layers=[0, 1, 2], max_position_embeddings=64).eval()
    routing = model(torch.randint(0, 31, (1, 5000)), output_routing=True).routing
    logits = torch.stack([layer.router_logits[0] for layer in routing])
    assert logits.mean(1).abs().max() < 0.06
    assert (logits.std(1) - 1).abs().max() < 0.04
    assert torch.corrcoef(logits).fill_diagonal_(0).abs().max() < 0.06
    assert abs(torch.corrcoef(torch.stack([logits[0, :-1], logits[0, 1:]]))[0, 1].item()) < 0.06


def test_generate_starts_from_embeddings() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(1, 31, (1, 6))
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    by_embedding = model.generate(inputs_embeds=model.model.embed_tokens(input_ids), **arguments)
    assert torch.equal(by_embedding, model.generate(input_ids, **arguments)[:, 6:])


def test_logits_can_be_kept_for_the_last_or_for_chosen_positions() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (2, 8))
    whole = model(input_ids).logits
    assert torch.allclose(model(input_ids, logits_to_keep=3).logits, whole[:, -3:])
    assert torch.allclose(model(input_ids, logits_to_keep=torch.tensor([1, 6])).logits, whole[:, [1, 6]])
    of_each_row = model(input_ids, logits_to_keep=torch.tensor([[1, 6], [0, 3]])).logits
    assert torch.allclose(of_each_row, torch.stack([whole[0, [1, 6]], whole[1, [0, 3]]]))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, 2], mask[1, 5] = True, True
    assert torch.allclose(model(input_ids, logits_to_keep=mask).logits, torch.stack([whole[0, 2], whole[1, 5]]))


def test_documents_packed_for_other_attention_kernels_are_told_apart() -> None:
    model = tiny().train()
    input_ids = torch.randint(0, 31, (1, 12))
    position_ids = torch.tensor([[*range(5), *range(7)]])
    lengths = {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "cu_seq_lens_k": torch.tensor([0, 5, 12])}
    expected = model(input_ids, position_ids=position_ids).logits
    assert torch.equal(model(input_ids, max_length_q=7, max_length_k=7, **lengths).logits, expected)
    hidden = model.model(input_ids, max_length_q=7, max_length_k=7, **lengths).last_hidden_state
    assert torch.equal(model.lm_head(hidden), expected)
    assert torch.equal(model(input_ids, position_ids=position_ids, **lengths).logits, expected)
    assert not torch.equal(model(input_ids).logits, expected)


def test_a_static_cache_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="cache_implementation='static' has room for every token"):
        tiny().generate(torch.randint(0, 31, (1, 4)), max_new_tokens=2, cache_implementation="static")


def test_sampling_stops_at_strings_of_a_tokenizer() -> None:
    model = model_with()
    prompt = TOKENIZER("the quick", return_tensors="pt")
    free = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    new = TOKENIZER.decode(free[prompt["input_ids"].shape[1] :])
    stopped = model.generate(**prompt, max_new_tokens=8, do_sample=False, stop_strings=[new[2]], tokenizer=TOKENIZER)
    assert stopped.shape[1] < len(free)


def test_what_a_block_is_given_moves_to_its_device() -> None:
    real = torch.tensor([[True, False]])
    placement = Placement(torch.rand(1, 2, 4), torch.rand(1, 2, 4), torch.arange(2)[None], None, None, real)
    moved = send_to_device({"placement": placement}, torch.device("meta"))["placement"]
    assert {value.device.type for value in vars(moved).values() if value is not None} == {"meta"}
    assert moved.documents is None
    assert placement.cos.device.type == "cpu"


def test_blocks_on_several_devices_give_the_losses_of_one(tmp_path: Path) -> None:
    model = tiny(num_experts=2).float()
    input_ids = torch.randint(0, 31, (2, 12))
    expected = model.eval()(input_ids, labels=input_ids, routing="top_k")
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    places = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu")
    output = dispatched(input_ids, labels=input_ids, routing="top_k")
    assert output.loss.item() == pytest.approx(expected.loss.item())
    assert torch.equal(output.logits, expected.logits)


def test_tuning_under_causal_routing_trains_what_is_sampled() -> None:
    model = tiny(training_routing="causal", num_experts=2, expert_capacity=0.7)
    input_ids = torch.randint(0, 31, (2, 12))
    sampled = model.eval()(input_ids, use_cache=False).logits
    output = model.train()(input_ids, labels=input_ids)
    assert torch.equal(output.logits, sampled)
    assert output.router_loss is None
    output.loss.backward()
    assert model.model.layers[1].router.proj.weight.grad.abs().max() > 0
    assert all(buffer.eq(0).all() for name, buffer in model.named_buffers() if name.endswith("threshold"))


def test_random_routing_is_tuned_as_it_is_sampled_under_causal_routing() -> None:
    model = tiny(router_type="random", training_routing="causal")
    input_ids = torch.randint(0, 31, (2, 24))
    assert torch.equal(model.train()(input_ids).logits, model.eval()(input_ids, use_cache=False).logits)


def test_thresholds_that_are_offloaded_are_loaded_with_their_routers(tmp_path: Path) -> None:
    model = tiny(causal_router="threshold").float().eval()
    model.model.layers[1].router.threshold.fill_(0.3)
    input_ids = torch.randint(0, 31, (2, 24))
    expected = model(input_ids, use_cache=False).logits
    layers = {f"model.layers.{layer}": "disk" for layer in range(3)}
    places = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "lm_head": "cpu"}
    dispatched = dispatch_model(model, places, offload_dir=tmp_path, offload_buffers=True, main_device="cpu")
    assert torch.equal(dispatched(input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_saved_weights_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        tiny().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == mode
