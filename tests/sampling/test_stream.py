"""The fast decode step samples the tokens of `generate()`, from prompts it can go on from."""

import gc
from itertools import product
from typing import Any

import psutil
import pytest
import torch
from models import PARTS, greedy, left_padded, tiny, trace_only, with_parts
from peft import LoraConfig, get_peft_model
from torch import nn

from mixture_of_depths import MoDForCausalLM, quantize
from mixture_of_depths.model.flops import cache_bytes
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling import stream as stream_module
from mixture_of_depths.sampling.stream import require_known_layers, stream


def each_pair_once() -> list[Any]:
    """Every causal router with every size of batch and choice of blocks; of the three together half are slow."""
    routers, blocks = ("predictor", "threshold", "auxiliary_loss"), ([0, 2], [0, 1, 2])
    # Without routed blocks there is no router to choose.
    cases = [pytest.param("predictor", [], batch) for batch in (1, 4)]
    for (number, router), (place, routed), batch in product(enumerate(routers), enumerate(blocks), (1, 4)):
        is_slow = (number + place + (batch > 1)) % 2
        cases.append(pytest.param(router, routed, batch, marks=[pytest.mark.slow] if is_slow else []))
    return cases


@pytest.mark.parametrize(("causal_router", "routed", "batch"), each_pair_once())
def test_streamed_tokens_equal_those_of_generate(causal_router: str, routed: list[int], batch: int) -> None:
    model = tiny(routed_layers=routed, causal_router=causal_router, first_token_enters=batch > 1).float().eval()
    for length in (1, 9):
        input_ids, mask = left_padded(batch, length)
        tokens = torch.stack(
            list(stream(model, input_ids, mask, SamplingOptions(max_new_tokens=90, temperature=0))), dim=1
        )
        assert torch.equal(tokens, greedy(model, input_ids, mask, 90))


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [(1, (9, 200)), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, (9, 4090)), (3, (9,))])],
)
def test_the_compiled_step_gives_the_same_tokens_and_compiles_once_for_texts_that_grow(
    batch: int, lengths: tuple[int, ...], compiled_step: None
) -> None:
    torch._dynamo.reset()
    fields: dict[str, Any] = {"query_key_norm": True, "attention_bias": True, "max_position_embeddings": 5000}
    model = tiny(routed_layers=[1], num_hidden_layers=2, **fields).float().eval()
    options = SamplingOptions(max_new_tokens=90, temperature=0)
    torch._dynamo.utils.counters.clear()
    for length in lengths:
        # All enter in the long text, so that the routed block stores as many.
        model.model.layers[1].router.predictor.down_proj.bias.data.fill_(1.0 if length < 100 else 1e6)
        input_ids, mask = left_padded(batch, length)
        tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True)), dim=1)
        assert torch.equal(tokens, greedy(model, input_ids, mask, 90))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_200_random_prompts_give_the_tokens_of_generate_and_of_the_full_causal_forward() -> None:
    count = 0
    for routed in ([1], []):
        model = tiny(routed_layers=routed).float().eval()
        for seed in range(25):
            torch.manual_seed(seed)
            input_ids, mask = left_padded(4, 3 + seed)
            options = SamplingOptions(max_new_tokens=12, temperature=0)
            tokens = torch.stack(list(stream(model, input_ids, mask, options)), dim=1)
            assert torch.equal(tokens, greedy(model, input_ids, mask, 12))
            full = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            logits = model(torch.cat([input_ids, tokens], dim=1), full, use_cache=False, routing="causal").logits
            assert torch.equal(logits[:, input_ids.shape[1] - 1 : -1].argmax(dim=-1), tokens)
            count += len(input_ids)
    assert count == 200


@pytest.mark.slow
def test_1000_tokens_in_a_row_do_not_grow_memory() -> None:
    model = tiny(routed_layers=[1], causal_router="threshold").float().eval()
    input_ids = torch.randint(0, 31, (1, 8))
    held = []
    for number, _ in enumerate(stream(model, input_ids, options=SamplingOptions(max_new_tokens=1000, temperature=0))):
        if number in (200, 999):
            gc.collect()
            held.append(psutil.Process().memory_info().rss)
    # The whole cache takes a quarter of a megabyte, and one copy of it a step would take 200.
    assert cache_bytes(model.config, 1008) < 2**18
    assert held[1] - held[0] < 2**22


@pytest.mark.parametrize(
    ("input_ids", "mask", "message"),
    [
        ([[]], [[]], "empty prompt"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], "empty prompt"),
        ([[1, 31]], [[1, 1]], "holds 31, which is outside the vocabulary of 31"),
        ([[-1, 3]], [[1, 1]], "holds -1, which is outside"),
        ([[1, 2]], [[1, 0]], "pads on the right"),
        ([[1] * 2047], [[1] * 2047], "max_position_embeddings=2048"),
        ([[1, 2]], [[1]], "must both be of shape"),
    ],
)
def test_prompts_the_model_cannot_go_on_from_are_refused(
    input_ids: list[list[int]], mask: list[list[int]], message: str
) -> None:
    model = tiny().float().eval()
    with pytest.raises(ValueError, match=message):
        next(
            stream(
                model,
                torch.tensor(input_ids, dtype=torch.int64),
                torch.tensor(mask, dtype=torch.int64),
                SamplingOptions(max_new_tokens=2),
            )
        )


def test_a_row_that_has_ended_repeats_its_end_while_others_go_on() -> None:
    model = tiny(routed_layers=[1]).float().eval()
    torch.manual_seed(1)
    input_ids = torch.randint(0, 31, (6, 6))
    options = SamplingOptions(max_new_tokens=30, temperature=2.0, top_k=0)
    free = torch.stack(list(stream(model, input_ids, options=options)), dim=1)
    model.generation_config.eos_token_id = end = int(free[0, 4])
    tokens = torch.stack(list(stream(model, input_ids, options=options)), dim=1)
    for before, after in zip(free.tolist(), tokens.tolist(), strict=True):
        stop = before.index(end) if end in before else len(before)
        assert after[:stop] == before[: min(stop, len(after))]
        assert set(after[stop:]) <= {end}
    goes_on = [row for row in free.tolist() if end not in row]
    assert goes_on
    assert tokens.shape[1] == 30


def test_rows_are_ended_by_their_owner_and_a_mask_may_be_of_booleans() -> None:
    model = tiny(routed_layers=[1]).float().eval()
    input_ids, mask = left_padded(2, 6)
    options = SamplingOptions(max_new_tokens=20, temperature=0)
    expected = torch.stack(list(stream(model, input_ids, mask, options)), dim=1)
    active = torch.ones(2, dtype=torch.bool)
    tokens = []
    for token in stream(model, input_ids, mask.bool(), options, active_B=active):
        tokens.append(token)
        active[1] = len(tokens) < 5
        active[0] = len(tokens) < 12
    assert len(tokens) == 12
    assert torch.equal(torch.stack(tokens, dim=1)[0], expected[0, :12])
    assert torch.equal(torch.stack(tokens, dim=1)[1, :5], expected[1, :5])


@pytest.mark.parametrize("way", ["stream", "generate"])
def test_rows_that_skip_a_block_are_not_computed_in_it(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    model = tiny(routed_layers=[1], causal_router="threshold").float().eval()
    layer, sizes = model.model.layers[1], []
    delta = layer.delta

    def counted(hidden: torch.Tensor, *arguments: Any) -> Any:
        sizes.append(tuple(hidden.shape[:2]))
        return delta(hidden, *arguments)

    monkeypatch.setattr(layer, "delta", counted)
    input_ids, mask = left_padded(6, 5)
    logits = model(input_ids, mask, use_cache=False, routing="causal", output_routing=True).routing[1].causal_logits
    layer.router.threshold.add_(logits.quantile(0.8))
    sizes.clear()
    if way == "stream":
        tokens = torch.stack(list(stream(model, input_ids, mask, SamplingOptions(max_new_tokens=40, temperature=0))), 1)
    else:
        tokens = greedy(model, input_ids, mask, 40)
    known = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    monkeypatch.undo()
    whole = model(torch.cat([input_ids, tokens], dim=1), known, use_cache=False, routing="causal", output_routing=True)
    entering = whole.routing[1].entered[:, 5:-1].sum(dim=0)
    assert sizes[1:] == [(count, 1) for count in entering.tolist() if count > 0]
    assert 0 in entering
    assert len(set(sizes[1:])) > 1


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bypass_rank", [0, 4])
def test_generate_and_the_stream_give_the_tokens_of_the_full_causal_forward(parts: Any, bypass_rank: int) -> None:
    for experts in ({}, {"num_experts": 3, "num_experts_per_tok": 2}):
        model = with_parts(parts, bypass_rank, causal_router="threshold", **experts).float().eval()
        for batch, length in ((1, 1), (1, 7), (6, 7)):
            input_ids, mask = left_padded(batch, length)
            options = SamplingOptions(max_new_tokens=12, temperature=0)
            tokens = torch.stack(list(stream(model, input_ids, mask, options)), dim=1)
            assert torch.equal(tokens, greedy(model, input_ids, mask, 12))
            full = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            logits = model(torch.cat([input_ids, tokens], dim=1), full, use_cache=False).logits
            assert torch.equal(logits[:, length - 1 : -1].argmax(dim=-1), tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "batch", "changes"),
    [
        (["block_keep_keys", "mlp"], 1, {}),
        (["block", "block_keep_keys", "mlp"], 3, {}),
        (["block_keep_keys", "mlp"], 3, {"num_experts": 3}),
    ],
)
def test_the_compiled_step_of_routed_parts_gives_the_same_tokens(
    parts: list[str], batch: int, changes: dict[str, Any], compiled_step: None
) -> None:
    torch._dynamo.reset()
    fields = {"causal_router": "threshold", "num_hidden_layers": len(parts), "routed_layers": [*range(len(parts))]}
    model = with_parts(parts, 4, **fields, **changes).float().eval()
    input_ids, mask = left_padded(batch, 9)
    options = SamplingOptions(max_new_tokens=70, temperature=0)
    tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True)), dim=1)
    assert torch.equal(tokens, greedy(model, input_ids, mask, 70))


@pytest.mark.parametrize("compiled", [False, True])
def test_who_watches_sees_which_rows_enter_and_that_an_ended_one_enters_no_routed_block(compiled: bool) -> None:
    model = tiny(routed_layers=[1], causal_router="threshold").float().eval()
    model.model.layers[1].router.threshold.fill_(-1e9)
    input_ids, mask = left_padded(3, 5)
    active, seen = torch.ones(3, dtype=torch.bool), []
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    shown = stream(model, input_ids, mask, options, active_B=active, compiled=compiled, watch=seen.append)
    for number, _ in enumerate(shown):
        active[1] = number < 2
    goes_on, ended = [True, True, True], [True, False, True]
    assert [entered.tolist() for entered in seen] == [[goes_on] * 3] * 2 + [[goes_on, ended, goes_on]] * 3


def test_logits_that_become_no_numbers_later_are_named_before_their_token_is_handed_out() -> None:
    model = tiny(routed_layers=[1]).float().eval()
    tokens = stream(model, torch.ones(2, 3, dtype=torch.long), options=SamplingOptions(max_new_tokens=9))
    for _ in range(3):
        next(tokens)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        next(tokens)


def test_the_fast_step_refuses_adapters_until_they_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["router"])
    adapted = get_peft_model(tiny(routed_layers=[1]).eval(), adapters)
    input_ids = torch.ones(1, 3, dtype=torch.int64)
    for is_graph in (False, True):
        monkeypatch.setattr(stream_module, "is_graph", lambda _, is_graph=is_graph: is_graph)
        # Before a token is computed.
        monkeypatch.setattr(MoDForCausalLM, "forward", None)
        with pytest.raises(ValueError, match=r"q_proj is a peft\..*: merge_and_unload\(\), or sample without"):
            next(stream(adapted.get_base_model(), input_ids, compiled=True))
    require_known_layers(adapted.merge_and_unload())


@pytest.mark.parametrize("name", ["", "lm_head", "model.embed_tokens", "model.layers.1", "model.layers.1.router.proj"])
def test_the_fast_step_refuses_layers_with_hooks(name: str) -> None:
    model = tiny(routed_layers=[1])
    require_known_layers(model)
    layer = model.get_submodule(name)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        handle = register(lambda *_: None)
        with pytest.raises(ValueError, match=f"{name or 'the model'} has hooks"):
            require_known_layers(model)
        handle.remove()
    require_known_layers(model)


def test_the_fast_step_refuses_layers_that_compute_something_else() -> None:
    model = tiny(query_key_norm=True)
    model.model.norm.forward = torch.relu
    with pytest.raises(ValueError, match=r"model\.norm has another forward\(\)"):
        require_known_layers(model)
    model = tiny(query_key_norm=True)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"up_proj is a torch\.nn\.utils\.parametrize"):
        require_known_layers(model)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 3}, {"router_type": "random"}, {"causal_router": "threshold"}])
def test_the_fast_step_knows_every_layer_that_a_model_may_have(changes: dict[str, Any]) -> None:
    model = tiny(query_key_norm=True, bypass_rank=2, **changes)
    require_known_layers(model)
    quantize(model)
    require_known_layers(model)


@pytest.mark.slow
def test_a_process_may_have_many_compiled_steps(monkeypatch: pytest.MonkeyPatch, compiled_step: None) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(stream_module, "choose_fastest", lambda shapes: None)
    trace_only(monkeypatch)
    model = tiny(routed_layers=[], num_hidden_layers=1).float().eval()
    for batch in range(1, 12):
        list(
            stream(
                model, torch.ones(batch, 3, dtype=torch.int64), options=SamplingOptions(max_new_tokens=2), compiled=True
            )
        )
    torch._dynamo.reset()
