"""A retrofitted model starts as the dense one, routes what measuring finds cheapest, and tunes what it is told to."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from models import SENTENCE, TEMPLATE, sentence_tokenizer, write_chats, write_numbers
from models import options as data_options
from runs import QUIET, ROUTING, dense_for
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from mixture_of_depths import MoDForCausalLM, prepare, prepare_shards
from mixture_of_depths.evaluation.loss import evaluate
from mixture_of_depths.options import RetrofitOptions, TrainOptions
from mixture_of_depths.retrofitting import tune as retrofit_module
from mixture_of_depths.retrofitting.choose import decode_share, flops_share
from mixture_of_depths.retrofitting.fit import fit_blocks
from mixture_of_depths.retrofitting.measure import routed_from, routers_of
from mixture_of_depths.retrofitting.skipping import fit_to_skipping
from mixture_of_depths.retrofitting.tune import (
    CapacitySchedule,
    DistillationTrainer,
    check_retrofit_ready,
    fitted_start,
    retrofit,
)
from mixture_of_depths.text.batches import batches, spread
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training import run as run_module
from mixture_of_depths.training.run import train

TUNING = TrainOptions(max_steps=6, batch_size=4, learning_rate=1e-2, save_every=2, eval_sequences=2)
MEASURING = RetrofitOptions(capacity=(0.25,), fit_sequences=4, measure_sequences=2)


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


@pytest.mark.slow
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


def test_a_folder_where_a_kill_came_before_anything_was_measured_is_as_good_as_new(tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "facts.json.part").write_text("{")
    check_retrofit_ready(tmp_path, resume=False)
    (tmp_path / "measured" / "facts.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        check_retrofit_ready(tmp_path, resume=False)
    check_retrofit_ready(tmp_path, resume=True)


@pytest.mark.parametrize("tune", ["routers", "lora", "all"])
def test_only_the_part_asked_for_is_tuned(corpus: Corpus, tmp_path: Path, tune: Any) -> None:
    dense = dense_for(corpus)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    routing = replace(ROUTING, tune=tune, **({"lora_rank": 2} if tune == "lora" else {}))
    model, _ = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "out", console=QUIET)
    assert all(torch.equal(weight, dense.state_dict()[name]) for name, weight in before.items())
    after = model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    projections = {name for name in before if name.endswith("proj.weight")}
    assert changed == {"routers": set(), "lora": projections, "all": set(before)}[tune]
    assert set(after) == set(before) | {name for name in after if ".router." in name or ".bypass." in name}

    loaded = MoDForCausalLM.from_pretrained(tmp_path / "out")
    input_ids = torch.randint(0, 99, (2, 16))
    assert torch.equal(loaded(input_ids).logits, model.eval()(input_ids).logits)
    record = json.loads((tmp_path / "out" / "retrofit.json").read_text())
    assert record["routed_layers"] == [1, 2] == loaded.config.routed_layers
    assert record["flops_share"] == flops_share(model.config, dense.config, 16)
    assert record["decode_share"] == decode_share(model.config, dense.config, 16)
    assert record["capacity"] == [0.25, 0.25] == model.config.capacity
    # The first of the four places of 16 tokens is the first token's.
    assert record["others_entering"] == [3 / 15] * 2
    assert set(record["shares"]) == {"128", "512", "2048"}
    assert set(record["kinds"]) == {"text"}
    assert record["kinds"]["text"]["loss"] == record["retrofitted"]["loss_causal"]
    assert model.config.routed_parts == "block_keep_keys"
    assert model.config.bypass_rank == 4
    calibrated = corpus.validation.select(range(0, len(corpus.validation), 2))
    found = evaluate(model, calibrated, corpus.end_of_text, 1.0)
    for share in found.causal_routers["threshold"].share_entering.values():
        assert share == pytest.approx(0.25, abs=0.005)


def test_tuning_begins_with_maps_that_are_fitted_to_the_tokens_that_skip(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, begun = dense_for(corpus), []

    def beginning(*arguments: Any) -> Any:
        begun.append(arguments[6].model)
        raise KeyboardInterrupt

    monkeypatch.setattr(retrofit_module, "train", beginning)
    with pytest.raises(KeyboardInterrupt):
        retrofit(dense, "dense", corpus, ROUTING, TUNING, tmp_path / "out", console=QUIET)
    text = spread(corpus.train, ROUTING.fit_sequences)
    fit = fit_blocks(dense, text, corpus.end_of_text, 4)
    expected = fitted_start(dense, fit, ROUTING, {1: 0.25, 2: 0.25})
    fit_to_skipping(expected, text, corpus.end_of_text)
    for block in (1, 2):
        layer, expected_layer = begun[0].model.layers[block], expected.model.layers[block]
        assert not torch.equal(layer.bypass.up.weight, fit.up_LDR[block])
        assert torch.equal(layer.bypass.up.weight, expected_layer.bypass.up.weight)
        assert torch.equal(layer.bypass.down.weight, expected_layer.bypass.down.weight)
        assert torch.equal(layer.router.proj.weight[0], fit.router_LD[block])


def test_what_calibrates_and_what_is_compared_are_the_two_halves_of_the_held_out_text(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {"calibrate": [], "evaluate": []}
    for name, module in (("calibrate", run_module), ("evaluate", retrofit_module)):
        function = getattr(module, name)

        def recorded(
            model: Any, sequences: Any, *others: Any, name: str = name, function: Any = function, **kw: Any
        ) -> Any:
            seen[name].append(sequences["input_ids"])
            return function(model, sequences, *others, **kw)

        monkeypatch.setattr(module, name, recorded)
    retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path / "out", console=QUIET)
    # Before tuning another part is calibrated on, of the training text.
    (calibrated,), (of_dense, of_retrofitted) = seen["calibrate"], seen["evaluate"]
    assert of_dense == of_retrofitted
    assert sorted([*calibrated, *of_dense]) == sorted(corpus.validation["input_ids"])
    seen["evaluate"].clear()
    as_tuned = replace(TUNING, calibrate=False)
    retrofit(dense_for(corpus), "dense", corpus, ROUTING, as_tuned, tmp_path / "as-tuned", console=QUIET)
    assert len(seen["calibrate"]) == 1
    assert seen["evaluate"] == [corpus.validation["input_ids"]] * 2


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_stopped_retrofit_goes_on_as_if_nothing_had_happened(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_checkpoint: bool
) -> None:
    dense = dense_for(corpus)
    routing = RetrofitOptions(
        flops_share=0.9,
        capacity=(0.25,),
        tune="lora",
        lora_rank=2,
        distillation=0.5,
        fit_sequences=4,
        measure_sequences=2,
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
    assert 0.85 < result.flops_share <= 0.9
    # What is measured once is not measured again.
    monkeypatch.setattr(retrofit_module, "measure_importance", None)
    monkeypatch.setattr(retrofit_module, "fit_blocks", None)
    if not has_checkpoint:
        for checkpoint in (tmp_path / "parts").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    else:
        monkeypatch.setattr(retrofit_module, "fit_to_skipping", None)
    _, again = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "parts", resume=True, console=QUIET)
    assert replace(again, tuning_minutes=0) == replace(result, tuning_minutes=0)
    for name, weight in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert torch.equal(weight, load_file(tmp_path / "parts" / "model.safetensors")[name]), name
    with pytest.raises(ValueError, match=r"distillation=0\.25 differs from 0\.5 of the run"):
        retrofit(dense, "dense", corpus, replace(routing, distillation=0.25), TUNING, tmp_path / "parts", True, QUIET)


@pytest.mark.parametrize("removed", ["measured/blocks.json", "measured"])
def test_what_was_measured_may_be_removed_and_is_measured_again_as_before(
    corpus: Corpus, tmp_path: Path, removed: str
) -> None:
    dense, routing = dense_for(corpus), replace(ROUTING, routed_layers=None, flops_share=0.9, measure_sequences=2)
    routing = replace(routing, capacity=(0.25,))
    _, result = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path, console=QUIET)
    path = tmp_path / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = {path.name for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"flops_share=0\.8 differs from 0\.9 of the run"):
        retrofit(dense, "dense", corpus, replace(routing, flops_share=0.8), TUNING, tmp_path, True, QUIET)
    with pytest.raises(ValueError, match=r"learning_rate=0\.5 differs from .* of the run"):
        retrofit(dense, "dense", corpus, routing, replace(TUNING, learning_rate=0.5), tmp_path, True, QUIET)
    assert {path.name for path in tmp_path.rglob("*")} == left
    _, again = retrofit(dense, "./dense", corpus, routing, TUNING, tmp_path, resume=True, console=QUIET)
    assert again.importance == result.importance
    assert replace(again, tuning_minutes=0) == replace(result, tuning_minutes=0)


def test_a_retrofit_does_not_go_on_with_other_weights_under_the_name_of_its_source(
    corpus: Corpus, tmp_path: Path
) -> None:
    dense = dense_for(corpus)
    retrofit(dense, "dense", corpus, ROUTING, TUNING, tmp_path, console=QUIET)
    with torch.no_grad():
        dense.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="source=dense is another model than dense was when the run"):
        retrofit(dense, "dense", corpus, ROUTING, TUNING, tmp_path, resume=True, console=QUIET)
    shutil.rmtree(tmp_path / "measured")
    with pytest.raises(ValueError, match="source=dense is another model than dense was when the run"):
        retrofit(dense, "dense", corpus, ROUTING, TUNING, tmp_path, resume=True, console=QUIET)


def test_a_run_that_was_tuned_otherwise_is_no_retrofit_to_resume(tmp_path: Path) -> None:
    run = {"model": {}, "train": {}, "text": {"key": "", "options": {}}, "tuning": {"router": "MLP"}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="holds no retrofit to resume"):
        check_retrofit_ready(tmp_path, resume=True)


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


def test_a_retrofit_that_is_killed_while_measuring_goes_on_with_the_next_block(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, routing = dense_for(corpus), replace(MEASURING, flops_share=0.9)
    _, whole = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "whole", console=QUIET)
    measure, done = retrofit_module.measure_importance, []

    def killed(*arguments: Any) -> Any:
        done.append([*arguments[6]])
        for block in measure(*arguments):
            if len(done) == 1 and len(done[0]) == 2:
                raise KeyboardInterrupt
            done[-1].append(block)
            yield block

    with monkeypatch.context() as patch:
        patch.setattr(retrofit_module, "measure_importance", killed)
        with pytest.raises(KeyboardInterrupt):
            retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "parts", console=QUIET)
        with pytest.raises(ValueError, match="is not empty"):
            retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "parts", console=QUIET)
        patch.setattr(retrofit_module, "fit_blocks", None)
        # The same model by another spelling.
        _, result = retrofit(dense, "./dense", corpus, routing, TUNING, tmp_path / "parts", True, QUIET)
    assert done[0] == whole.importance[:2]
    assert done[1] == whole.importance
    assert replace(result, tuning_minutes=0) == replace(whole, tuning_minutes=0)


def test_a_retrofit_begun_with_maps_of_another_rank_is_refused_by_that_name(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(retrofit_module, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, out, console=QUIET)
    # As where another version has another default.
    monkeypatch.setattr(retrofit_module, "routed_kind", lambda dense, options: {"bypass_rank": 3})
    with pytest.raises(ValueError, match="bypass_rank=3 differs from 4 of the run"):
        retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, out, resume=True, console=QUIET)


def test_a_second_run_in_the_same_folder_is_refused_before_it_measures(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, tried = retrofit_module.fit_blocks, []

    def fitting(*arguments: Any) -> Any:
        for resume in (True, False):
            with pytest.raises(ValueError, match="is in use by another run"):
                retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path / "out", resume, QUIET)
            tried.append(resume)
        return fit(*arguments)

    monkeypatch.setattr(retrofit_module, "fit_blocks", fitting)
    _, result = retrofit(dense_for(corpus), "dense", corpus, ROUTING, TUNING, tmp_path / "out", console=QUIET)
    assert result.finished
    assert tried == [True, False]


@pytest.mark.parametrize("parts", ["block", "block_keep_keys"])
def test_the_model_of_the_old_kind_is_still_made_and_loaded(corpus: Corpus, tmp_path: Path, parts: Any) -> None:
    routing = replace(ROUTING, routed_parts=parts, bypass_rank=0, capacity=(0.25, 0.5))
    model, result = retrofit(dense_for(corpus), "dense", corpus, routing, TUNING, tmp_path / "out", console=QUIET)
    if parts == "block":
        # Neither field had a name when this was the only kind.
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config.pop("routed_parts"), config.pop("bypass_rank")) == ("block", 0)
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    loaded = MoDForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.config.routed_parts, loaded.config.bypass_rank) == (parts, 0)
    assert loaded.config.capacity == [0.25, 0.5] == result.capacity
    assert not any("bypass" in name for name in loaded.state_dict())
    input_ids = torch.randint(0, 99, (2, 16))
    assert torch.equal(loaded(input_ids).logits, model.eval()(input_ids).logits)


@pytest.mark.parametrize("in_shards", [False, True])
def test_texts_and_conversations_are_tuned_on_together_and_told_apart(in_shards: bool, tmp_path: Path) -> None:
    tokenizer = sentence_tokenizer()
    tokenizer.chat_template = TEMPLATE
    write_numbers(tmp_path)
    write_chats(tmp_path, 60)
    texts, chats = str(tmp_path / "*.txt"), str(tmp_path / "chats.jsonl")
    sources = (texts, chats)
    if in_shards:
        prepare_shards(data_options(tmp_path, texts, tokenizer="its own"), tmp_path / "texts", tokenizer, 1)
        sources = (f"{tmp_path}/texts:0.5", f"{chats}:0.5")
    corpus = prepare(data_options(tmp_path, *sources, tokenizer="its own"), tokenizer)
    dense = dense_for(corpus)
    routing = replace(ROUTING, distillation=0.5)
    model, result = retrofit(dense, "dense", corpus, routing, TUNING, tmp_path / "out", console=QUIET)
    assert set(result.kinds) == {"text", "conversations"}
    thresholds = {block: router.threshold.item() for block, router in routers_of(model).items()}
    for kind in result.kinds.values():
        assert set(kind.entering) == set(kind.thresholds) == {1, 2}
        assert kind.thresholds != thresholds
    of_text, of_chats = result.kinds["text"], result.kinds["conversations"]
    assert of_text.thresholds != of_chats.thresholds
    assert result.retrofitted is not None
    assert min(of_text.loss, of_chats.loss) < result.retrofitted.loss_causal < max(of_text.loss, of_chats.loss)


def distillation_of(dense: MoDForCausalLM, model: MoDForCausalLM, corpus: Corpus, folder: Path) -> DistillationTrainer:
    """A trainer of which 0.3 of the loss is the divergence from the dense model."""
    return DistillationTrainer(
        corpus,
        TUNING,
        teacher=dense,
        share=0.3,
        model=model,
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[]),
        train_dataset=corpus.train,
    )


def test_distillation_adds_the_divergence_from_the_dense_model(corpus: Corpus, tmp_path: Path) -> None:
    dense = dense_for(corpus)
    model = routed_from(dense, routed_layers=[1], capacity=0.25)
    trainer = distillation_of(dense, model, corpus, tmp_path)
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


def test_the_share_of_distillation_is_the_same_in_several_processes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_for(corpus)
    model = routed_from(dense, routed_layers=[1, 2], capacity=0.25).train()
    trainer = distillation_of(dense, model, corpus, tmp_path)

    def gradients(*parts: dict[str, Any], count: int) -> list[torch.Tensor]:
        """The mean over the processes, each of which has a part of the batch."""
        model.zero_grad()
        for part in parts:
            (trainer.compute_loss(model, dict(part), num_items_in_batch=count) / len(parts)).backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    whole = next(batches(corpus.train, range(4), corpus.end_of_text, 4, model.device))
    # As many labels in either part: the routers' losses count by their share of them.
    whole["labels"][::2, 4:9] = -100
    count = int((whole["labels"][:, 1:] != -100).sum())
    expected = gradients(whole, count=count)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    found = gradients(
        *({name: value[rows] for name, value in whole.items()} for rows in (slice(2), slice(2, 4))), count=count
    )
    for mean, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({"routed_layers": [1]}, {}, r"routed_layers=\[1\] of the source, which must be a dense model"),
        ({}, {"max_steps": None, "max_flops": 1e9}, "max_flops=1e\\+09 cannot be kept while the capacity falls"),
        ({}, {"max_steps": None}, "exactly one of max_steps and max_tokens; given: none"),
        ({}, {"max_tokens": 1e4}, "exactly one of max_steps and max_tokens; given: max_steps, max_tokens"),
        ({}, {"learning_rate": 0.0}, r"learning_rate=0\.0 is out of range: it must be greater than 0"),
        ({"num_hidden_layers": 2}, {}, r"routed_layers=\[1, 2\]"),
        ({"max_position_embeddings": 15}, {}, "sequence_length=16 is more than the model's max_position_embeddings=15"),
        ({}, {"capacity": (0.124,)}, "capacity=0.124 of sequence_length=16 is one token"),
        ({"num_experts": 2}, {"tune": "lora"}, "tune=lora cannot adapt num_experts=2"),
    ],
)
def test_what_cannot_be_retrofitted_is_refused_before_anything_is_measured(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, changes: Any, message: str
) -> None:
    monkeypatch.setattr(retrofit_module, "fit_blocks", None)
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
    monkeypatch.setattr(retrofit_module, "fit_blocks", None)
    other = replace(ROUTING, capacity=(0.5,))
    for options, name, resume, message in (
        (ROUTING, "file", False, r"file is a file\); name another"),
        (ROUTING, "run", False, "is not empty"),
        (other, "run", True, r"capacity=\[0.5\] differs from \[0.25\] of the run"),
        (ROUTING, "nowhere", True, "holds no run to resume"),
    ):
        with pytest.raises(ValueError, match=message):
            retrofit(dense, "dense", corpus, options, TUNING, tmp_path / name, resume, QUIET)


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


@pytest.mark.parametrize(
    ("changes", "is_fitted_again"), [({"router_type": "random"}, True), ({"bypass_rank": 0}, False)]
)
def test_maps_of_random_routing_are_fitted_again_and_none_where_there_is_none(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_fitted_again: bool
) -> None:
    fitted: list[MoDForCausalLM] = []

    def recorded(model: MoDForCausalLM, *arguments: Any) -> None:
        fitted.append(model)
        fit_to_skipping(model, *arguments)

    monkeypatch.setattr(retrofit_module, "fit_to_skipping", recorded)
    routing = replace(ROUTING, **changes)
    retrofit(dense_for(corpus), "dense", corpus, routing, replace(TUNING, max_steps=1), tmp_path / "out", console=QUIET)
    assert len(fitted) == is_fitted_again
