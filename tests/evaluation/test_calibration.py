"""Calibration makes the capacity's share of the tokens enter, and the threshold follows the top-k choice."""

import argparse
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import dispatch_model
from models import left_padded, model_with, routed_model, some_sequences
from peft import LoraConfig, LoraModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.evaluation.calibration import calibrate, using_causal_router
from mixture_of_depths.evaluation.loss import evaluate


@pytest.mark.parametrize("causal_router", ["predictor", "threshold", "auxiliary_loss"])
def test_after_calibration_the_capacity_enters_every_block(causal_router: str) -> None:
    model, sequences = routed_model(causal_router=causal_router), some_sequences()
    calibrate(model, sequences, end_of_text=0)
    found = evaluate(model, sequences, 0, 1.0).causal_routers
    assert list(found) == list(model.config.causal_routers)
    for name, figures in found.items():
        if name != "auxiliary_loss":
            assert figures.share_entering[2] == pytest.approx(0.125, abs=2e-3)
            # Equal tokens have equal weights in the first block, so its share moves in steps of their frequency.
            assert figures.share_entering[0] == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("causal_router", ["predictor", "threshold"])
def test_first_tokens_that_enter_anyway_count_in_the_capacity(causal_router: str) -> None:
    model = routed_model(causal_router=causal_router, first_token_enters=True)
    # Three documents a row, and at last as many as there are places.
    sequences = [[0 if token % 20 == 19 else 1 + (7 * token * row) % 30 for token in range(64)] for row in range(1, 13)]
    calibrate(model, datasets.Dataset.from_dict({"input_ids": sequences}), end_of_text=0)
    found = evaluate(model, datasets.Dataset.from_dict({"input_ids": sequences}), 0, 1.0).causal_routers[causal_router]
    assert found.share_entering[2] == pytest.approx(0.125, abs=2e-3)
    crowded = datasets.Dataset.from_dict({"input_ids": [[3, 5, 7, 0] * 16] * 4})
    calibrate(model, crowded, end_of_text=0)
    assert evaluate(model, crowded, 0, 1.0).causal_routers[causal_router].share_entering == {0: 0.25, 2: 0.25}


@pytest.mark.parametrize("causal_router", ["auxiliary_loss", "threshold"])
def test_experts_are_calibrated_for_the_configured_router(causal_router: str) -> None:
    model = routed_model(causal_router=causal_router, num_experts=4, expert_routing="expert_choice")
    sequences = some_sequences()
    calibrate(model, sequences, end_of_text=0)
    for figures in evaluate(model, sequences, 0, 1.0, batch_size=12).experts["causal"].values():
        assert sum(figures.share) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("routed", [[], [0, 2]])
@pytest.mark.parametrize(
    "experts",
    [
        {"expert_routing": "expert_choice", "expert_capacity": 0.6},
        {"num_experts_per_tok": 2, "expert_capacity": 0.5},
    ],
)
def test_after_calibration_experts_take_at_most_their_capacity(routed: list[int], experts: dict[str, Any]) -> None:
    model, sequences = routed_model(routed_layers=routed, capacity=0.5, num_experts=4, **experts), some_sequences()
    per_token = model.config.num_experts_per_tok
    calibrate(model, sequences, end_of_text=0)
    found = evaluate(model, sequences, 0, 1.0, batch_size=12).experts
    assert set(found) == {"top_k", "causal"}
    for figures in found["causal"].values():
        limit = model.config.expert_capacity * per_token / 4 / per_token
        assert all(share <= limit + 0.02 for share in figures.share)
        assert sum(figures.share) > 0.25
        if "expert_routing" in experts:
            assert sum(figures.share) == pytest.approx(0.6, abs=0.03)


def test_calibration_is_stored_in_the_checkpoint(tmp_path: Any) -> None:
    model, sequences = routed_model(), some_sequences()
    calibrate(model, sequences, end_of_text=0)
    model.save_pretrained(tmp_path)
    loaded = MoDForCausalLM.from_pretrained(tmp_path)
    assert evaluate(loaded, sequences, 0, 1.0) == evaluate(model, sequences, 0, 1.0)
    assert loaded.model.layers[0].router.threshold.item() != 0


def test_a_router_the_model_was_not_trained_for_is_refused() -> None:
    model = routed_model(causal_router="threshold")
    with (
        pytest.raises(ValueError, match="causal_router=predictor is not among"),
        using_causal_router(model, "predictor"),
    ):
        pass
    assert routed_model(router_type="random").config.causal_routers == ()


def shares(model: MoDForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[int, float]:
    """The share of the tokens, padding aside, that enters each routed block."""
    model.eval()
    entered, tokens = {0: 0, 2: 0}, 0
    for batch in batches:
        routing = model(**batch, use_cache=False, output_routing=True).routing
        tokens += int(batch["attention_mask"].sum())
        for layer_idx in entered:
            entered[layer_idx] += int(routing[layer_idx].entered.sum())
    return {layer_idx: count / tokens for layer_idx, count in entered.items()}


@pytest.mark.parametrize("causal_router", ["predictor", "threshold"])
@pytest.mark.parametrize("first_token_enters", [False, True])
def test_padding_does_not_count_in_what_enters(causal_router: str, first_token_enters: bool) -> None:
    model = routed_model(causal_router=causal_router, first_token_enters=first_token_enters)
    padded = [dict(zip(("input_ids", "attention_mask"), left_padded(8, 64), strict=True)) for _ in range(2)]
    for batch in padded:
        batch["attention_mask"][5:, :40] = 0
    calibrate(model, iter(padded))
    found = shares(model, padded)
    assert found[2] == pytest.approx(0.125, abs=2e-3)
    assert found[0] == pytest.approx(0.25, abs=0.04)
    # Each row by itself, without padding, gives the same.
    moved = {name: value for name, value in model.state_dict().items() if "router" in name}
    again = routed_model(causal_router=causal_router, first_token_enters=first_token_enters)
    again.load_state_dict(model.state_dict())
    rows = [
        {"input_ids": ids[mask.bool()][None]}
        for batch in padded
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    calibrate(again, rows)
    for name, value in moved.items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-4, rtol=1e-4)


def test_experts_of_padded_batches_take_their_share_of_the_text() -> None:
    fields: dict[str, Any] = {"num_experts": 4, "expert_routing": "expert_choice", "expert_capacity": 0.6}
    model = routed_model(routed_layers=[], capacity=0.5, **fields).eval()
    ids, mask = left_padded(8, 64)
    mask[4:, :48] = 0
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    experts = model(input_ids=ids, attention_mask=mask, use_cache=False, output_routing=True).expert_routing
    for layer in experts:
        assert layer.share.sum().item() == pytest.approx(0.6, abs=0.03)


def test_no_more_than_the_first_rows_of_many_batches_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixture_of_depths.evaluation.calibration.MAX_SEQUENCES", 5)
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(2)
            yield {"input_ids": torch.randint(1, 31, (2, 16)), "labels": torch.zeros(2, 16)}

    model = routed_model()
    rows: list[int] = []
    model.model.layers[2].register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    calibrate(model, endless())
    assert len(taken) == 3
    assert set(rows) == {2, 1}


@pytest.mark.parametrize(
    ("text", "end_of_text", "message"),
    [
        (some_sequences(2), None, "end_of_text=None: give the token"),
        ([{"input_ids": torch.ones(1, 4)}], 0, "end_of_text=0 has no use with batches"),
        ([{"labels": torch.ones(1, 4)}], None, r"a batch of \['labels'\]; give input_ids"),
        ([], None, "sequences holds no text"),
    ],
)
def test_text_that_cannot_serve_is_refused(text: Any, end_of_text: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(routed_model(), text, end_of_text)


@pytest.mark.parametrize(
    ("causal_router", "saved"),
    [
        ("predictor", None),
        ("predictor", ["router"]),
        ("predictor", ["predictor"]),
        ("threshold", None),
        ("threshold", ["router"]),
    ],
)
def test_a_model_under_adapters_is_calibrated_with_them(causal_router: str, saved: list[str] | None) -> None:
    model, sequences = routed_model(causal_router=causal_router), some_sequences()
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], modules_to_save=saved, init_lora_weights=False)
    adapted = get_peft_model(model, config)
    without = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    calibrate(adapted, sequences, end_of_text=0)
    found = evaluate(adapted, sequences, 0, 1.0)
    assert list(found.causal_routers) == list(model.config.causal_routers)
    for figures in found.causal_routers.values():
        assert figures.share_entering[2] == pytest.approx(0.125, abs=2e-3)
        assert figures.share_entering[0] == pytest.approx(0.25, abs=0.04)
    if saved:
        # What lies under an active copy is left alone.
        assert all(
            torch.equal(model.state_dict()[name], value) for name, value in without.items() if "original" in name
        )
    # The adapters decided with the rest.
    with adapted.disable_adapter():
        assert evaluate(adapted, sequences, 0, 1.0).loss_causal != found.loss_causal


def test_biases_that_an_adapter_trains_are_ones_that_it_keeps(recwarn: pytest.WarningsRecorder) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    calibrate(get_peft_model(routed_model(), config), some_sequences(), end_of_text=0)
    (warned,) = [str(one.message) for one in recwarn if "does not keep" in str(one.message)]
    assert "does not keep model.layers.0.router.threshold and 1 more" in warned


def test_adapters_put_in_place_are_calibrated_and_others_refused() -> None:
    sequences = some_sequences()
    lora = LoraModel(routed_model(), LoraConfig(r=2, target_modules=["q_proj"]), "default")
    calibrate(lora, sequences, end_of_text=0)
    share = evaluate(lora, sequences, 0, 1.0).causal_routers["predictor"].share_entering[2]
    assert share == pytest.approx(0.125, abs=2e-3)
    prompted = get_peft_model(routed_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="puts tokens before the text"):
        calibrate(prompted, sequences, end_of_text=0)
    with pytest.raises(ValueError, match="model=Linear has no routers"):
        evaluate(torch.nn.Linear(2, 2), sequences, 0, 1.0)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal_router", ["predictor", "auxiliary_loss", "threshold"])
def test_after_400_padded_steps_the_capacity_enters_text_that_was_not_trained_on(causal_router: Any, side: str) -> None:
    model = model_with(vocab_size=256, initializer_range=0.1, capacity=0.125, causal_router=causal_router).train()
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()

    def batch_of(first: int, last: int) -> dict[str, torch.Tensor]:
        """Eight pieces of the text between two places, of 8 to 64 bytes, padded."""
        lengths = torch.randint(8, 65, (8, 1))
        starts = torch.randint(first, last - 64, (8, 1))
        slots = torch.arange(64)
        mask = slots < lengths if side == "right" else slots >= 64 - lengths
        return {"input_ids": text[starts + slots] * mask, "attention_mask": mask.long()}

    cut = len(text) * 3 // 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        batch = batch_of(0, cut)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    calibrate(model, [batch_of(cut, len(text)) for _ in range(16)])
    model.eval()
    deciding = "threshold" if causal_router == "auxiliary_loss" else causal_router
    with using_causal_router(model, deciding), torch.no_grad():
        passes = [
            (batch["attention_mask"].bool(), model(**batch, use_cache=False, output_routing=True).routing)
            for batch in (batch_of(cut, len(text)) for _ in range(16))
        ]
    for layer in model.config.routed_layers:
        entered = torch.cat([routing[layer].entered[real] for real, routing in passes])
        assert entered.float().mean().item() == pytest.approx(0.125, rel=0.2)


EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_capacity": 0.6}


@pytest.mark.parametrize("causal_router", ["predictor", "threshold"])
@pytest.mark.parametrize(
    ("adapters", "experts"),
    [
        ({}, {}),
        ({"target_modules": "all-linear"}, {}),
        ({"target_parameters": ["router.proj.weight"]}, {}),
        ({"modules_to_save": ["router.proj"]}, {}),
        ({"modules_to_save": ["layers.2.router"]}, {}),
        ({"modules_to_save": ["mlp"]}, EXPERTS),
    ],
)
def test_an_adapter_that_does_not_keep_all_that_moves_is_warned_of(
    causal_router: str, adapters: dict[str, Any], experts: dict[str, Any]
) -> None:
    model = routed_model(causal_router=causal_router, **experts)
    adapted = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj"], **adapters}))
    with pytest.warns(UserWarning, match=r'does not keep model\.layers\.0\.router.* modules_to_save=\["router"\]'):
        calibrate(adapted, [{"input_ids": torch.randint(0, 31, (4, 32))}])


def test_an_adapter_that_keeps_the_routers_of_blocks_but_not_of_experts_is_warned_of() -> None:
    saved = ["layers.0.router", "layers.2.router"]
    model = get_peft_model(routed_model(**EXPERTS), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    with pytest.warns(UserWarning, match=r"does not keep model\.layers\.0\.mlp\.router\.threshold and 2 more"):
        calibrate(model, [{"input_ids": torch.randint(0, 31, (4, 32))}])


def test_adapters_in_the_layers_of_a_model_are_warned_of() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), routed_model())
    with pytest.warns(UserWarning, match="the adapter does not keep") as warned:
        calibrate(model, [{"input_ids": torch.randint(0, 31, (4, 32))}])
    # It points at the caller.
    assert [warning.filename for warning in warned if warning.category is UserWarning] == [__file__]


@pytest.mark.parametrize("experts", [{}, EXPERTS])
def test_what_keeps_all_that_moves_is_not_warned_of(experts: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"])
    keeping = get_peft_model(routed_model(**experts), config).requires_grad_(False)
    merged = get_peft_model(routed_model(**experts), LoraConfig(r=2, target_modules=["q_proj"])).merge_and_unload()
    for model in (keeping, merged, routed_model(**experts)):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            calibrate(model, [{"input_ids": torch.randint(0, 31, (4, 32))}])


@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize("other_keeps", [True, False])
def test_calibrating_one_of_two_adapters_leaves_the_other_and_the_model_alone(
    other_keeps: bool, experts: dict[str, Any]
) -> None:
    keeping = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"], init_lora_weights=False)
    without = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(routed_model(**experts), keeping, adapter_name="one")
    model.add_adapter("two", keeping if other_keeps else without)
    batches = [{"input_ids": torch.randint(0, 31, (4, 32))}]
    before = {name: values.clone() for name, values in model.state_dict().items()}
    calibrate(model, batches)
    moved = {name for name, values in model.state_dict().items() if not torch.equal(values, before[name])}
    assert moved
    assert all(".modules_to_save.one." in name for name in moved)
    model.set_adapter("two")
    if other_keeps:
        calibrate(model, batches)
    else:
        with pytest.warns(UserWarning, match="moves in the model that all adapters share"):
            calibrate(model, batches)
    again = {name for name, values in model.state_dict().items() if not torch.equal(values, before[name])} - moved
    assert again
    assert all((".modules_to_save.two." if other_keeps else ".original_module.") in name for name in again)


def test_a_model_of_which_blocks_are_offloaded_is_refused(tmp_path: Path) -> None:
    layers = {f"model.layers.{layer}": "disk" for layer in range(3)}
    places = {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "lm_head": "cpu"}
    model = dispatch_model(routed_model(), places, offload_dir=tmp_path, main_device="cpu")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.router is offloaded"):
        calibrate(model, [{"input_ids": torch.randint(0, 31, (4, 32))}])
