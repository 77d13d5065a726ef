"""The step in C++: it does what the eager step does, token by token, and reads no more than it must."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from models import greedy, left_padded, tiny
from steps import CASES, TWO, logits_of_both, model_of, spoil_routed_parts

from mixture_of_depths import MoDForCausalLM, quantize
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling import own_step
from mixture_of_depths.sampling import stream as stream_module
from mixture_of_depths.sampling.native import FASTEST, require_native
from mixture_of_depths.sampling.own_step import OwnStep, is_own
from mixture_of_depths.sampling.quantization import Int8Linear
from mixture_of_depths.sampling.step import GROWTH, decode_step, grow, prefill, product_shapes
from mixture_of_depths.sampling.stream import CompiledStep, fast_step, stream

# Norms of small states magnify roundings: by so much the logits of the eager step, too, differ from those in float64.
TOLERANCE = 5e-4


@pytest.fixture(autouse=True)
def _always_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_step, "is_native_fastest", lambda weights, rows: True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "changes"), CASES)
def test_logits_and_decisions_are_those_of_the_eager_step(batch: int, changes: dict[str, Any], threads: int) -> None:
    model, before = model_of(**changes), torch.get_num_threads()
    torch.set_num_threads(threads)
    of_tokens = torch.get_rng_state()
    try:
        of_step, of_eager, entered = logits_of_both(OwnStep, model, batch, 6, 20, {1: 1} if batch > 1 else None)
    finally:
        torch.set_num_threads(before)
    # With the same tokens: as far as both may be from a float64 model on opposite sides, by the test below.
    torch.set_rng_state(of_tokens)
    bound = 5 * errors(model, batch, 20)[1] + 1e-4
    torch.testing.assert_close(of_step, of_eager, atol=bound, rtol=0)
    assert bool(entered[:, model.config.routed_layers].any())
    assert not bool(entered[:, model.config.routed_layers].all())


@pytest.mark.parametrize(("batch", "changes"), CASES)
def test_logits_are_as_near_to_those_of_a_float64_model_as_the_eager_steps(batch: int, changes: dict[str, Any]) -> None:
    error, error_of_eager = errors(model_of(**changes), batch, 12)
    assert error <= 4 * error_of_eager + 1e-4


@torch.no_grad()
def errors(model: MoDForCausalLM, batch: int, new: int) -> tuple[float, float]:
    """The largest difference of the step's logits from those of a float64 model, and that of the eager step's."""
    input_ids, mask = left_padded(batch, 6)
    exact = copy.deepcopy(model).double()
    tokens_BT = torch.stack([torch.randint(0, 31, (batch,)) for _ in range(new)], dim=1)
    step, (_, state) = OwnStep(model, input_ids, mask, new), prefill(model, input_ids, mask, new)
    of_step, of_eager = [], []
    for token_B in tokens_BT.unbind(dim=1):
        grow(state)
        of_eager.append(decode_step(model, token_B, torch.ones(batch, dtype=torch.bool), state))
        of_step.append(step(token_B, None).clone())
    whole = torch.cat([input_ids, tokens_BT], dim=1), torch.cat([mask, torch.ones_like(tokens_BT)], dim=1)
    wanted = exact(*whole, use_cache=False, routing="causal").logits[:, 6:]
    error, error_of_eager = ((torch.stack(each, dim=1) - wanted).abs().max().item() for each in (of_step, of_eager))
    return error, error_of_eager


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_8_bits_give_the_logits_of_the_eager_step(
    dtype: torch.dtype, batch: int, nothing_chosen: None
) -> None:
    model = torch.nn.Module.to(model_of(hidden_size=96, intermediate_size=200, attention_bias=True), dtype)
    quantize(model)
    require_native()
    # The library's product would round rows to bf16.
    FASTEST.update(dict.fromkeys(product_shapes(model, batch), "native"))
    of_step, of_eager, _ = logits_of_both(OwnStep, model, batch, 6, 8)
    bound = TOLERANCE if dtype == torch.float32 else 2**-6 * of_eager.abs().max()
    assert (of_step - of_eager).abs().max() <= bound


@pytest.mark.parametrize(("batch", "changes"), CASES)
def test_in_bf16_it_rounds_where_the_eager_step_does(batch: int, changes: dict[str, Any]) -> None:
    model = torch.nn.Module.to(model_of(**{"hidden_size": 40, "intermediate_size": 72, **changes}), torch.bfloat16)
    of_step, of_eager, _ = logits_of_both(OwnStep, model, batch, 6, 8)
    # Sums in another order seldom reach the last bit, but then all later tokens of the row see it.
    assert (of_step == of_eager).float().mean() > 0.5
    # Some ten roundings in each of four blocks, of 1/256 at most.
    assert (of_step - of_eager).abs().max() <= 2**-4 * of_eager.abs().max()


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_every_kind_of_rope_turns_as_in_the_eager_step(rope_type: str) -> None:
    numbers: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    if rope_type == "llama3":
        numbers |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = model_of(**TWO, parts="block", rope_parameters={"rope_type": rope_type, **numbers})
    of_step, of_eager, _ = logits_of_both(OwnStep, model, 2, 6, 4)
    torch.testing.assert_close(of_step, of_eager, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_that_no_row_enters_is_not_read(batch: int) -> None:
    model = model_of(bypass_rank=0)
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.threshold.fill_(1e9)
    input_ids, mask = left_padded(batch, 5)
    step = OwnStep(model, input_ids, mask, 4)
    spoil_routed_parts(model)
    keys = step.state.layers[0].keys.clone(), step.state.layers[0].values.clone()
    for _ in range(2):
        assert bool(step(torch.randint(0, 31, (batch,)), None).isfinite().all())
        assert step.entered().tolist() == [[False] * batch, [True] * batch, [False] * batch, [False] * batch]
    assert torch.equal(step.state.layers[0].keys, keys[0])
    assert torch.equal(step.state.layers[0].values, keys[1])
    # It is read as soon as one does.
    model.model.layers[0].router.threshold.fill_(-1e9)
    assert not bool(step(torch.randint(0, 31, (batch,)), None).isfinite().any())


def test_slots_that_are_not_in_use_are_not_read() -> None:
    model = model_of()
    input_ids, mask = left_padded(3, 6)
    whole, step = (OwnStep(model, input_ids, mask, 4) for _ in range(2))
    for layer, block in zip(step.state.layers, model.model.layers, strict=True):
        slot_S = torch.arange(layer.keys.shape[2])
        unread_BS = slot_S >= layer.length_B[:, None]
        if block.part != "block":
            unread_BS |= slot_S < (input_ids.shape[1] - step.state.position_B)[:, None]
        for stored in (layer.keys, layer.values):
            stored.masked_fill_(unread_BS[:, None, :, None], torch.nan)
    for _ in range(3):
        token_B = torch.randint(0, 31, (3,))
        assert torch.equal(step(token_B, None), whole(token_B, None))


@pytest.mark.parametrize("changes", [{}, {"router_type": "random", "parts": "block"}])
def test_the_stream_by_it_gives_the_tokens_of_generate_in_buffers_that_grow(changes: dict[str, Any]) -> None:
    model, (input_ids, mask), seen = model_of(**changes), left_padded(3, 9), []
    options = SamplingOptions(max_new_tokens=GROWTH + 20, temperature=0)
    assert isinstance(fast_step(model, input_ids, mask, 3), OwnStep)
    tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True, watch=seen.append)), dim=1)
    assert torch.equal(tokens, greedy(model, input_ids, mask, GROWTH + 20))
    whole = model(
        torch.cat([input_ids, tokens], dim=1),
        torch.cat([mask, torch.ones_like(tokens)], dim=1),
        use_cache=False,
        output_routing=True,
    )
    for number in model.config.routed_layers:
        entered = torch.stack([entered_LB[number] for entered_LB in seen], dim=1)
        assert torch.equal(entered, whole.routing[number].entered[:, 9:-1])


def test_a_block_that_all_enter_grows_as_tokens_do() -> None:
    model = model_of(**TWO, parts="block")
    for layer in model.model.layers:
        layer.router.threshold.fill_(-1e9)
    of_step, of_eager, entered = logits_of_both(OwnStep, model, 2, 6, 2 * GROWTH)
    torch.testing.assert_close(of_step, of_eager, atol=TOLERANCE, rtol=0)
    assert bool(entered.all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_no_number_reaches_the_logits(value: float) -> None:
    for name in ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"):
        for dtype in (torch.float32, torch.bfloat16):
            model = torch.nn.Module.to(model_of("block", 0, routed_layers=[]), dtype)
            input_ids, mask = left_padded(1, 4)
            step = OwnStep(model, input_ids, mask, 2)
            dict(model.model.layers[1].named_modules())[
                f"self_attn.{name}" if name in ("q_proj", "v_proj") else f"mlp.{name}"
            ].weight.data.fill_(value)
            assert not bool(step(torch.tensor([3]), None).isfinite().any()), (name, dtype)


def test_what_is_not_written_in_cpp_takes_the_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = model_of()
    quantize(rounded)
    assert all(is_own(model, 3) for model in (model_of(), model_of().bfloat16(), rounded))
    transposed, embedded, precise, mixed, mixed_mlp = (model_of() for _ in range(5))
    for layer in (transposed.model.layers[1].mlp.up_proj, embedded.model.embed_tokens):
        layer.weight.data = layer.weight.data.t().contiguous().t()
    precise.model.layers[0].router.double()
    mixed.model.layers[1].self_attn.k_proj = Int8Linear(mixed.model.layers[1].self_attn.k_proj)
    mixed_mlp.model.layers[1].mlp.up_proj.bfloat16()
    others = [model_of(num_experts=3), model_of().double(), model_of().half()]
    others += [transposed, embedded, precise, mixed, mixed_mlp]
    assert not any(is_own(model, 3) for model in others)
    input_ids = torch.ones(1, 2, dtype=torch.int64)
    monkeypatch.setattr(stream_module, "choose_fastest", lambda shapes: None)
    assert isinstance(fast_step(others[0], input_ids, torch.ones_like(input_ids), 2), CompiledStep)
    monkeypatch.setattr(own_step, "is_native_fastest", lambda weights, rows: rows < 3)
    assert [is_own(model_of(), rows) for rows in (1, 2, 3)] == [True, True, False]


def test_a_step_and_its_buffers_go_with_whoever_holds_it() -> None:
    input_ids, mask = left_padded(1, 4)
    gc.disable()
    try:
        step = OwnStep(tiny().float().eval(), input_ids, mask, 2)
        step(torch.tensor([1]), None)
        held = weakref.ref(step.state.layers[0].keys)
        del step
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("changes", [{}, {"router_type": "random", "parts": "block"}])
def test_a_default_precision_changes_nothing(changes: dict[str, Any], dtype: torch.dtype) -> None:
    model, (input_ids, mask) = model_of(**changes), left_padded(2, 6)
    options = SamplingOptions(max_new_tokens=12, temperature=0)
    wanted = torch.stack(list(stream(model, input_ids, mask, options, compiled=True)))
    torch.set_default_dtype(dtype)
    try:
        tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(tokens, wanted)


def test_what_autocast_stored_is_read_as_it_is() -> None:
    model, (input_ids, mask) = model_of(), left_padded(2, 6)
    token_B = torch.tensor([3, 4])
    wanted = OwnStep(model, input_ids, mask, 2)(token_B, None)
    with torch.autocast("cpu", torch.bfloat16):
        logits = OwnStep(model, input_ids, mask, 2)(token_B, None)
    assert (logits - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_weights_that_are_replaced_later_are_still_read() -> None:
    model, (input_ids, mask) = model_of(), left_padded(1, 6)
    step, same = (OwnStep(model, input_ids, mask, 2) for _ in range(2))
    token_B = torch.tensor([3])
    wanted = same(token_B, None).clone()
    for weight in model.parameters():
        weight.data = torch.full_like(weight, torch.nan)
    gc.collect()
    assert torch.equal(step(token_B, None), wanted)


def test_an_end_of_text_outside_the_vocabulary_is_never_read() -> None:
    model, (input_ids, mask) = model_of(), left_padded(2, 6)
    model.generation_config.eos_token_id = 50_256
    active_B = torch.tensor([True, False])
    options = SamplingOptions(max_new_tokens=4, temperature=0)
    for compiled in (False, True):
        shown = stream(model, input_ids, mask, options, active_B=active_B, compiled=compiled)
        assert len(list(shown)) == 4


def test_a_router_that_gives_no_number_reaches_the_logits() -> None:
    model, (input_ids, mask) = model_of(**TWO, parts="block", router_activation="straight_through"), left_padded(1, 6)
    step = OwnStep(model, input_ids, mask, 2)
    model.model.layers[0].router.proj.weight.data.mul_(1e38)
    model.model.layers[0].router.threshold.fill_(-1e9)
    model.model.layers[1].router.threshold.fill_(1e9)
    model.model.embed_tokens.weight.data.fill_(1e3)
    of_pass = model(torch.tensor([[3]]), use_cache=False, routing="causal").logits
    assert bool(step(torch.tensor([3]), None).isfinite().all()) == bool(of_pass.isfinite().all())
