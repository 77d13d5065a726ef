"""Decoding with the cache equals the full causal pass, and the cache holds what entered, no more."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import left_padded, tiny
from torch.nn import functional as F
from transformers import DynamicCache

from mixture_of_depths import MoDCache, MoDConfig, MoDForCausalLM
from mixture_of_depths.model.cache import RoutedCacheLayer
from mixture_of_depths.model.flops import cache_bytes


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 4),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    causal_router=st.sampled_from(["predictor", "auxiliary_loss", "threshold"]),
    router_type=st.sampled_from(["learned", "random"]),
    routed=st.sampled_from([[0], [1], [0, 1, 2], []]),
)
def test_a_sequence_given_in_pieces_gives_the_logits_of_the_whole(
    seed: int, batch: int, cuts: list[int], causal_router: str, router_type: str, routed: list[int]
) -> None:
    torch.manual_seed(seed)
    model = tiny(routed_layers=routed, causal_router=causal_router, router_type=router_type, capacity=0.5).eval()
    input_ids, mask = left_padded(batch, sum(cuts))
    whole = model(input_ids, attention_mask=mask, use_cache=False, output_routing=True)
    past = MoDCache(config=model.config)
    done = 0
    for cut in cuts:
        seen = slice(done, done + cut)
        piece = model(input_ids[:, seen], attention_mask=mask[:, : done + cut], cache=past)
        done += cut
        real = mask[:, seen].bool()
        assert (piece.logits - whole.logits[:, seen])[real].abs().max() < 1e-9
        assert past.get_seq_length() == done
    for layer_idx in routed:
        stored = past.layers[layer_idx].num_stored()
        entered = whole.routing[layer_idx].entered.sum(1)
        assert stored.tolist() == entered.tolist()


def test_a_prompt_is_attended_without_a_mask_and_what_follows_it_in_routed_blocks_under_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, library, masks = tiny(routed_layers=[1]).eval(), F.scaled_dot_product_attention, []

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        masks.append(options["attn_mask"])
        return library(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    past = MoDCache(config=model.config)
    input_ids = torch.randint(1, model.config.vocab_size, (1, 40))
    model(input_ids[:, :20], cache=past)
    assert len(masks) == model.config.num_hidden_layers
    assert all(mask is None for mask in masks)
    masks.clear()
    model(input_ids[:, 20:], cache=past)
    assert len(masks) == model.config.num_hidden_layers
    assert all(mask is not None for mask in masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_generate_with_cache_equals_the_full_causal_pass_at_every_step(dtype: torch.dtype) -> None:
    model = tiny(routed_layers=[0, 2]).to(dtype).eval()
    input_ids, mask = left_padded(4, 9)
    out = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    full_mask = torch.cat([mask, torch.ones(4, 12, dtype=mask.dtype)], dim=1)
    full = model(out.sequences, attention_mask=full_mask, use_cache=False).logits
    for step, logits in enumerate(out.logits):
        # generate() hands out float32 logits; the float64 comparison is that of a sequence given in pieces.
        assert (logits - full[:, 8 + step].float()).abs().max() < (1e-5 if dtype == torch.float64 else 1e-4)
        assert torch.equal(out.sequences[:, 9 + step], full[:, 8 + step].argmax(-1))


def test_generate_in_training_mode_does_not_look_ahead() -> None:
    model = tiny(routed_layers=[0, 2]).train()
    input_ids = torch.randint(0, 31, (2, 6))
    mask = torch.ones_like(input_ids)
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    in_training = model.generate(input_ids, **arguments)
    assert torch.equal(in_training, model.eval().generate(input_ids, **arguments))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_and_without_cache_agree(num_beams: int) -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids, mask = left_padded(3, 7)
    arguments: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "num_beams": num_beams,
    }
    assert torch.equal(
        model.generate(input_ids, use_cache=True, **arguments), model.generate(input_ids, use_cache=False, **arguments)
    )


def test_a_conversation_goes_on_from_a_returned_cache() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    first = torch.randint(0, 31, (1, 6))
    arguments: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    out = model.generate(first, return_dict_in_generate=True, **arguments)
    second = torch.cat([out.sequences, torch.randint(0, 31, (1, 4))], dim=1)
    arguments["attention_mask"] = torch.ones_like(second)
    # The name that every release of transformers knows.
    continued = model.generate(second, past_key_values=out.past_key_values, **arguments)
    assert torch.equal(continued, model.generate(second, **arguments))


@given(length=st.integers(2, 20), removed=st.integers(1, 19), batch=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_crop_leaves_the_cache_as_it_was_before_the_forgotten_tokens(length: int, removed: int, batch: int) -> None:
    torch.manual_seed(length * 100 + removed)
    removed = min(removed, length - 1)
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (batch, length))
    cropped = model(input_ids).cache
    cropped.crop(-removed)
    short = model(input_ids[:, : length - removed]).cache
    assert cropped.get_seq_length() == short.get_seq_length() == length - removed
    assert cropped.num_bytes() == short.num_bytes()
    following = torch.randint(0, 31, (batch, 3))
    a, b = (model(following, cache=past).logits for past in (cropped, short))
    assert (a - b).abs().max() < 1e-9


def test_rows_can_be_reordered_repeated_and_selected() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (3, 10))
    following = torch.randint(0, 31, (1, 1))
    for change, rows in (
        (lambda past: past.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda past: past.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda past: past.batch_select_indices(torch.tensor([1])), [1]),
    ):
        past = model(input_ids).cache
        change(past)
        again = model(input_ids[rows]).cache
        assert past.num_bytes() == again.num_bytes()
        token = following.expand(len(rows), 1)
        difference = model(token, cache=past).logits - model(token, cache=again).logits
        assert difference.abs().max() < 1e-9


def test_bytes_held_are_those_of_the_tokens_that_entered() -> None:
    config = MoDConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, router_type="random", capacity=0.125
    )
    model = MoDForCausalLM(config).eval()
    past = model(torch.randint(0, 31, (3, 2000))).cache
    dense = 2 * 4 * 4 * 4 * 2000 * 3
    entered = sum(int(past.layers[i].num_stored().sum()) for i in (1, 3))
    assert past.num_bytes() == 2 * dense + 2 * 4 * 4 * 4 * entered
    assert past.num_bytes() == pytest.approx(3 * cache_bytes(config, 2000), rel=0.03)


def test_a_block_that_no_token_enters_stores_none_of_each_row_on_the_device_of_the_model() -> None:
    model = tiny(routed_layers=[0]).eval()
    torch.nn.init.constant_(model.model.layers[0].router.predictor.down_proj.bias, -1e9)
    past = model(torch.randint(0, 31, (3, 4))).cache
    assert past.layers[0].num_stored().tolist() == [0, 0, 0]
    past.reorder_cache(torch.tensor([2, 0]))
    past.crop(-1)
    assert past.layers[0].num_stored().tolist() == [0, 0]
    assert past.get_seq_length() == 3
    layer = RoutedCacheLayer()
    layer.see(torch.empty(3, 4, 8, device="meta"))
    assert layer.num_stored().device.type == "meta"


def test_reset_empties_the_cache() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (2, 10))
    past = model(input_ids).cache
    past.reset()
    assert past.get_seq_length() == 0
    assert past.num_bytes() == 0
    assert torch.equal(model(input_ids, cache=past).logits, model(input_ids).logits)


def test_the_librarys_cache_takes_the_routed_layers_from_the_configuration() -> None:
    cache = DynamicCache(config=tiny(routed_layers=[0, 2]).config)
    assert [isinstance(layer, RoutedCacheLayer) for layer in cache.layers] == [True, False, True]


def test_a_positive_crop_is_refused() -> None:
    model = tiny(routed_layers=[0]).eval()
    past = model(torch.randint(0, 31, (1, 4))).cache
    with pytest.raises(ValueError, match="tokens_to_remove=2 must be negative"):
        past.crop(2)


@torch.no_grad()
def test_the_earlier_name_of_the_cache_is_still_taken() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    past = model(torch.randint(0, 31, (1, 4))).cache
    following = torch.randint(0, 31, (1, 1))
    by_name = model(following, cache=copy.deepcopy(past)).logits
    assert torch.equal(by_name, model(following, past_key_values=past).logits)


def test_an_output_has_its_cache_under_the_earlier_name_too() -> None:
    output = tiny(routed_layers=[0, 2]).eval()(torch.randint(0, 31, (1, 4)))
    assert output.past_key_values is output.cache is not None


def test_a_cache_under_both_names_is_refused() -> None:
    model = tiny(routed_layers=[0, 2]).eval()
    input_ids = torch.randint(0, 31, (1, 4))
    past = model(input_ids).cache
    with pytest.raises(ValueError, match="cache= is past_key_values= in generate"):
        model.prepare_inputs_for_generation(input_ids, past_key_values=past, cache=past)
