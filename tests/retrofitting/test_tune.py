"""A retrofitted model starts as the dense one, routes what measuring finds cheapest, and tunes what it is told to."""

import copy
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from models import QUIET, SENTENCE
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import TrainingArguments

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.evaluation.loss import evaluate
from mixture_of_depths.options import RetrofitOptions, TrainOptions
from mixture_of_depths.retrofitting import tune as retrofit_module
from mixture_of_depths.retrofitting.choose import choose_blocks, flops_share, full_capacity
from mixture_of_depths.retrofitting.measure import (
    RIDGE,
    BlockImportance,
    fit_routers,
    measure_importance,
    routed_from,
    routers_of,
    set_routers,
)
from mixture_of_depths.retrofitting.tune import CapacitySchedule, DistillationTrainer, retrofit
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.run import train

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "routed_layers": [],
}
TUNING = TrainOptions(max_steps=6, batch_size=4, learning_rate=1e-2, save_every=2, eval_sequences=2)
ROUTING = RetrofitOptions(capacity=0.25, routed_layers=(1, 2), fit_sequences=4, measure_sequences=2)


def dense_for(corpus: Corpus, **changes: Any) -> MoDForCausalLM:
    torch.manual_seed(1)
    end = corpus.end_of_text
    config = MoDConfig(vocab_size=len(corpus.tokenizer), eos_token_id=end, pad_token_id=end, **{**SMALL, **changes})
    return MoDForCausalLM(config).eval()


def some_sequences(dense: MoDForCausalLM, count: int = 6, length: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": torch.randint(1, dense.config.vocab_size, (count, length)).tolist()}
    )


@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_at_capacity_one_the_retrofitted_model_is_the_dense_one(corpus: Corpus, router_type: str) -> None:
    dense = dense_for(corpus).double()
    model = routed_from(dense, routed_layers=[0, 2, 3], capacity=1.0, router_type=router_type)
    input_ids = torch.randint(0, dense.config.vocab_size, (2, 16))
    difference = model(input_ids, routing="top_k", use_cache=False).logits - dense(input_ids).logits
    assert difference.abs().max() < 1e-12


def test_fitted_routers_are_the_least_squares_of_how_much_a_block_adds(corpus: Corpus) -> None:
    dense = dense_for(corpus).double()
    # A document ends within a row: the first tokens of both do not count.
    sequences = datasets.Dataset.from_dict(
        {"input_ids": [[*row[:7], 0, *row[8:]] for row in some_sequences(dense)["input_ids"]]}
    )
    fitted = fit_routers(dense, sequences, 0)

    for layer_idx in (2, dense.config.num_hidden_layers - 1):
        inputs, norms = [], []
        shorter = copy.deepcopy(dense)
        shorter.model.layers = shorter.model.layers[: layer_idx + 1]
        shorter.model.norm = nn.Identity()
        for batch in batches(sequences, range(len(sequences)), 0, 1, dense.device):
            before_TD, after_TD = shorter(**batch, use_cache=False, output_hidden_states=True).hidden_states[-2:]
            for token in (*range(1, 8), *range(9, 12)):
                inputs.append(F.rms_norm(before_TD[0, token], (16,), eps=dense.config.rms_norm_eps))
                norms.append((after_TD - before_TD)[0, token].norm())
        x_ND = torch.stack(inputs).detach()
        mean_square = (x_ND.square().sum(dim=0).sum() + len(x_ND)) / 17
        x_ND, y_N = x_ND - x_ND.mean(dim=0), torch.stack(norms).detach()
        # The intercept is not held back; the weights are, by the mean square of the inputs, the intercept's included.
        ridge = RIDGE * mean_square * torch.eye(16, dtype=torch.float64)
        weight_D = torch.linalg.solve(x_ND.T @ x_ND + ridge, x_ND.T @ (y_N - y_N.mean()))
        weight_D = weight_D / (x_ND @ weight_D).std(correction=0)
        assert torch.allclose(fitted[layer_idx].double(), weight_D, atol=1e-3)


def test_importance_is_what_the_loss_rises_by(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    weights_LD = fit_routers(dense, sequences, 0)
    found = measure_importance(dense, weights_LD, 0.25, sequences, 0, console=QUIET)

    given = next(batches(sequences, range(len(sequences)), 0, len(sequences), dense.device))
    before = dense(**given, use_cache=False).lm_loss.item()
    shorter = MoDForCausalLM(MoDConfig(**{**dense.config.to_dict(), "num_hidden_layers": 3})).eval()
    renamed = {
        name.replace("layers.3.", "layers.2."): w for name, w in dense.state_dict().items() if "layers.2." not in name
    }
    shorter.load_state_dict(renamed)
    assert found[2].bypassed == pytest.approx(shorter(**given, use_cache=False).lm_loss.item() - before, abs=1e-5)
    routed = routed_from(dense, routed_layers=[2], capacity=0.25).eval()
    set_routers(routed, weights_LD)
    loss = routed(**given, use_cache=False, routing="top_k").lm_loss.item()
    assert found[2].lower_ranked == pytest.approx(loss - before, abs=1e-5)


def test_the_fewest_of_the_cheapest_blocks_are_chosen(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    importance = [BlockImportance(0, cost) for cost in (0.4, 0.1, 0.3, 0.2)]
    both = flops_share(dense, [1, 3], ROUTING, 16)
    assert choose_blocks(importance, dense, replace(ROUTING, flops_share=both), 16) == [1, 3]
    assert choose_blocks(importance, dense, replace(ROUTING, flops_share=both - 1e-6), 16) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"flops_share=0\.01 cannot be reached with capacity=0\.25: .* share is 0\."):
        choose_blocks(importance, dense, replace(ROUTING, flops_share=0.01), 16)


@pytest.mark.parametrize("entering", [4, 5, 11, 15])
def test_the_capacity_is_raised_until_the_share_is_used_in_full(corpus: Corpus, entering: int) -> None:
    dense = dense_for(corpus).config
    share = flops_share(dense, [1, 3], replace(ROUTING, capacity=entering / 16), 16)
    assert full_capacity(dense, [1, 3], replace(ROUTING, flops_share=share), 16) == entering / 16
    assert full_capacity(dense, [1, 3], replace(ROUTING, flops_share=share + 1e-6), 16) == entering / 16


def test_a_capacity_that_fills_the_share_is_kept(corpus: Corpus) -> None:
    dense = dense_for(corpus).config
    exact = replace(ROUTING, capacity=0.27)
    routing = replace(exact, flops_share=flops_share(dense, [1, 3], exact, 16))
    assert full_capacity(dense, [1, 3], routing, 16) == 0.27


def test_the_capacity_falls_from_one_to_its_target(corpus: Corpus) -> None:
    model = routed_from(dense_for(corpus), routed_layers=[1, 2], capacity=[0.25, 0.5])
    schedule = CapacitySchedule(model, 0.5)
    seen = []
    for step in range(32):
        state: Any = type("State", (), {"global_step": step, "max_steps": 32})
        schedule.on_step_begin(None, state, None)  # pyright: ignore[reportArgumentType]
        seen.append([router.capacity for router in routers_of(model).values()])
    assert seen[0] == [1, 1]
    assert seen[16:] == [[0.25, 0.5]] * 16
    assert all(later <= earlier for (earlier, _), (later, _) in pairwise(seen))
    assert len({first for first, _ in seen}) == retrofit_module.LEVELS + 1


def test_a_compiled_retrofit_goes_through_all_capacities(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled(self, backend="eager", **options))
    routing, tuning = replace(ROUTING, lowering_fraction=0.9), replace(TUNING, max_steps=20, compile=True)
    _, result = retrofit(dense_for(corpus), "dense", corpus, routing, tuning, tmp_path / "out", console=QUIET)
    assert result.finished


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_measured(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    with pytest.raises(ValueError, match="is not empty"):
        retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path, console=QUIET)
    (tmp_path / "other").unlink()
    train(dense_for(corpus).config, corpus, replace(TUNING, max_steps=2), tmp_path, console=QUIET)
    with pytest.raises(ValueError, match="holds no retrofit to resume"):
        retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path, resume=True, console=QUIET)


@pytest.mark.parametrize("tune", ["routers", "lora", "all"])
def test_only_the_part_asked_for_is_tuned(corpus: Corpus, tmp_path: Path, tune: Any) -> None:
    dense = dense_for(corpus)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    routing = replace(ROUTING, tune=tune, lora_rank=2)
    model, _ = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "out", console=QUIET)
    assert all(torch.equal(weight, dense.state_dict()[name]) for name, weight in before.items())
    after = model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    projections = {name for name in before if name.endswith("proj.weight")}
    assert changed == {"routers": set(), "lora": projections, "all": set(before)}[tune]
    assert set(after) == set(before) | {name for name in after if ".router." in name}

    loaded = MoDForCausalLM.from_pretrained(tmp_path / "out")
    input_ids = torch.randint(0, 99, (2, 16))
    assert torch.equal(loaded(input_ids).logits, model.eval()(input_ids).logits)
    record = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert record["routed_layers"] == [1, 2] == loaded.config.routed_layers
    assert record["flops_share"] == flops_share(dense.config, [1, 2], routing, 16)
    assert record["capacity"] == routing.capacity
    calibrated = corpus.validation.select(range(0, len(corpus.validation), 2))
    found = evaluate(model, calibrated, corpus.end_of_text, 1.0)
    for share in found.causal_routers["threshold"].share_entering.values():
        assert share == pytest.approx(0.25, abs=0.005)


def test_what_calibrates_and_what_is_compared_are_the_two_halves_of_the_held_out_text(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"calibrate": [], "evaluate": []}
    for name in seen:
        function = getattr(retrofit_module, name)

        def recorded(
            model: Any, sequences: Any, *others: Any, name: str = name, function: Any = function, **kw: Any
        ) -> Any:
            seen[name].append(sequences["input_ids"])
            return function(model, sequences, *others, **kw)

        monkeypatch.setattr(retrofit_module, name, recorded)
    retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path / "out", console=QUIET)
    (calibrated,), (of_dense, of_retrofitted) = seen["calibrate"], seen["evaluate"]
    assert of_dense == of_retrofitted
    assert sorted([*calibrated, *of_dense]) == sorted(corpus.validation["input_ids"])


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_stopped_retrofit_goes_on_as_if_nothing_had_happened(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_checkpoint: bool
) -> None:
    dense = dense_for(corpus)
    routing = RetrofitOptions(
        flops_share=0.9, capacity=0.25, tune="lora", lora_rank=2, distillation=0.5, fit_sequences=4, measure_sequences=2
    )
    _, result = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "whole", console=QUIET)
    with monkeypatch.context() as patch:
        schedule = CapacitySchedule.on_step_begin

        def stopping(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            schedule(self, args, state, control, **kwargs)
            control.should_training_stop = state.global_step == 3

        patch.setattr(CapacitySchedule, "on_step_begin", stopping)
        _, stopped = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "parts", console=QUIET)
        assert not stopped.finished
    assert routing.capacity < result.capacity
    assert result.flops_share <= 0.9
    # What is measured once is not measured again.
    monkeypatch.setattr(retrofit_module, "measure_importance", None)
    if has_checkpoint:
        monkeypatch.setattr(retrofit_module, "fit_routers", None)
    else:
        for checkpoint in (tmp_path / "parts").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    _, again = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "parts", resume=True, console=QUIET)
    assert replace(again, tuning_minutes=0) == replace(result, tuning_minutes=0)
    for name, weight in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "parts" / "model.safetensors")[name]), name
    with pytest.raises(ValueError, match=r"distillation=0\.25 differs from 0\.5 of the run"):
        retrofit(dense, "dense", corpus, replace(routing, distillation=0.25), TUNING, tmp_path / "parts", True, QUIET)


def test_a_finished_retrofit_is_compared_in_the_precision_of_its_tuning_when_it_is_asked_for_again(
    corpus: Corpus, tmp_path: Path
) -> None:
    dense, tuning = dense_for(corpus), replace(TUNING, precision="bf16")
    model, result = retrofit(dense, "dense", corpus, ROUTING, tuning, tmp_path / "out", console=QUIET)
    _, again = retrofit(dense, "dense", corpus, ROUTING, tuning, tmp_path / "out", resume=True, console=QUIET)
    assert again == result
    input_ids = torch.randint(0, 99, (2, 16))
    loaded = MoDForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.eval()(input_ids).logits, loaded(input_ids).logits)


def test_a_damaged_record_of_what_was_measured_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    dense, out = dense_for(corpus), tmp_path / "out"
    retrofit(dense, "dense", corpus, ROUTING, TUNING, out, console=QUIET)
    whole = json.loads((out / "run.json").read_text())
    for damage in ({"importance": [{"bypassed": 1.0}]}, {"importance": []}):
        (out / "run.json").write_text(json.dumps({**whole, "tuning": damage}))
        with pytest.raises(ValueError, match=r"run\.json is damaged: it does not describe a retrofit"):
            retrofit(dense, "dense", corpus, ROUTING, TUNING, out, resume=True, console=QUIET)


def test_distillation_adds_the_divergence_from_the_dense_model(corpus: Corpus, tmp_path: Path) -> None:
    dense = dense_for(corpus)
    model = routed_from(dense, routed_layers=[1], capacity=0.25)
    trainer = DistillationTrainer(
        corpus,
        TUNING,
        teacher=dense,
        share=0.3,
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=corpus.train,
    )
    batch = next(batches(corpus.train, range(3), corpus.end_of_text, 3, model.device))
    batch["labels"][0, 4:9] = -100
    model.train()
    loss = trainer.compute_loss(model, batch)
    output = model(**batch, use_cache=False)
    kept = batch["labels"][:, 1:] != -100
    log_p = dense(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1].log_softmax(-1)
    log_q = output.logits[:, :-1].log_softmax(-1)
    divergence = ((log_p.exp() * (log_p - log_q)).sum(-1) * kept).sum() / kept.sum()
    expected = 0.7 * output.lm_loss + 0.3 * divergence + 0.1 * output.router_loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({"routed_layers": [1]}, {}, r"routed_layers=\[1\] of the source: it must be a dense model"),
        ({}, {"max_steps": None, "max_flops": 1e9}, "max_flops=1e\\+09 cannot be kept while the capacity falls"),
        ({}, {"max_steps": None}, "exactly one of max_steps"),
        ({}, {"learning_rate": 0.0}, r"learning_rate=0\.0 is out of range: it must be greater than 0"),
        ({"num_hidden_layers": 2}, {}, r"routed_layers=\[1, 2\]"),
        ({"max_position_embeddings": 15}, {}, "sequence_length=16 is more than the model's max_position_embeddings=15"),
        ({}, {"capacity": 0.124}, "capacity=0.124 of sequence_length=16 is one token"),
        ({"num_experts": 2}, {"tune": "lora"}, "tune=lora cannot adapt num_experts=2"),
    ],
)
def test_what_cannot_be_retrofitted_is_refused_before_anything_is_measured(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, changes: Any, message: str
) -> None:
    monkeypatch.setattr(retrofit_module, "fit_routers", None)
    dense = dense_for(corpus, **source)
    routing = replace(ROUTING, **{name: value for name, value in changes.items() if hasattr(ROUTING, name)})
    tuning = replace(TUNING, **{name: value for name, value in changes.items() if hasattr(TUNING, name)})
    with pytest.raises(ValueError, match=message):
        retrofit(dense, "dense", corpus, routing, tuning, tmp_path / "out", console=QUIET)


def test_a_folder_that_does_not_fit_is_refused_before_anything_is_measured(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_for(corpus)
    retrofit(dense, "dense", corpus, ROUTING, replace(TUNING, max_steps=1), tmp_path / "run", console=QUIET)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(retrofit_module, "fit_routers", None)
    other = replace(ROUTING, capacity=0.5)
    for options, name, resume, message in (
        (ROUTING, "file", False, "file is a file; name a folder"),
        (ROUTING, "run", False, "is not empty"),
        (other, "run", True, "capacity=0.5 differs from 0.25 of the run"),
        (ROUTING, "nowhere", True, "holds no run to resume"),
    ):
        with pytest.raises(ValueError, match=message):
            retrofit(dense, "dense", corpus, options, TUNING, tmp_path / name, resume, QUIET)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_share": 1.0}, r"flops_share=1\.0 is out of range"),
        ({"capacity": 0.0}, r"capacity=0\.0"),
        ({"routed_layers": ()}, "routed_layers="),
        ({"distillation": 1.5}, r"distillation=1\.5"),
        ({"lowering_fraction": 1.0}, r"lowering_fraction=1\.0"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"measure_sequences": 0}, "measure_sequences=0"),
        ({"fit_sequences": 0}, "fit_sequences=0"),
        ({"tune": "routers", "router_type": "random"}, "tune=routers leaves nothing to tune with router_type=random"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrofitOptions(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_the_supervised_trainer_of_trl_takes_the_model(corpus: Corpus, tmp_path: Path, adapters: bool) -> None:
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model = routed_from(dense_for(corpus), routed_layers=[1, 2], capacity=0.25)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    text = datasets.Dataset.from_dict({"text": [f"{SENTENCE} {i}" for i in range(40)]})
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=10,
            learning_rate=1e-2,
            max_length=64,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
        ),
        train_dataset=text,
        processing_class=corpus.tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", modules_to_save=["router"]) if adapters else None,
    )
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    if adapters:
        trainer.model.merge_and_unload()
    after = model.state_dict()
    changed = {name for name, weight in before.items() if name in after and not torch.equal(weight, after[name])}
    assert any("mlp" in name for name in changed)
    assert any("router" in name for name in changed)
    trainer.save_model(str(tmp_path / "out"))
