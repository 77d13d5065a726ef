"""trl's trainers take the model: ten steps each, with the right first value, and routers that learn."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from models import TEMPLATE, TOKENIZER, model_with
from peft import LoraConfig

from mixture_of_depths import MoDForCausalLM

pytestmark = pytest.mark.slow
COUNT = 40
PROMPTS = ["the quick brown fox" * (row % 3 + 1) for row in range(COUNT)]
ANSWERS = [" jumps over the lazy dog" * (row % 4 + 1) for row in range(COUNT)]
TEXTS = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]


def tokenizer() -> Any:
    own = copy.deepcopy(TOKENIZER)
    own.chat_template = TEMPLATE
    own.pad_token = own.eos_token
    return own


def common(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def new_model(**changes: Any) -> MoDForCausalLM:
    torch.manual_seed(0)
    eos = TOKENIZER.eos_token_id
    return model_with(eos_token_id=eos, pad_token_id=eos, **changes)


def train(trainer: Any) -> tuple[list[dict[str, float]], set[str]]:
    """Ten steps; what was logged of each, and the weights of routers that moved."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert len(records) == 10
    return records, {name.rpartition("router.")[2] for name in moved if ".router." in name}


ROUTERS: list[tuple[dict[str, Any], str]] = [
    ({"causal_router": "predictor"}, "predictor.down_proj.weight"),
    ({"causal_router": "auxiliary_loss"}, "proj.weight"),
    ({"causal_router": "threshold", "num_experts": 4}, "proj.weight"),
]


@pytest.mark.parametrize("kind", ["packed", "wrapped", "padded", "completion-only", "padding-free"])
@pytest.mark.parametrize(("changes", "learner"), ROUTERS)
def test_supervised_tuning(tmp_path: Path, kind: str, changes: dict[str, Any], learner: str) -> None:
    from trl import SFTConfig, SFTTrainer

    columns = {"prompt": PROMPTS, "completion": ANSWERS} if kind == "completion-only" else {"text": TEXTS}
    model = new_model(**changes)
    # Before the trainer puts its own forward pass into it.
    untrained = copy.deepcopy(model).train()
    length = None if kind == "padding-free" else 64
    packing: dict[str, Any] = {"packing": kind in ("packed", "wrapped"), "padding_free": kind == "padding-free"}
    if kind == "wrapped":
        packing["packing_strategy"] = "wrapped"
    trainer = SFTTrainer(
        model,
        SFTConfig(max_length=length, **packing, **common(tmp_path)),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(),
    )
    batches: list[dict[str, Any]] = []
    compute_loss = trainer.compute_loss

    def keep_batch(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep_batch
    records, moved = train(trainer)
    assert learner in moved
    assert records[-1]["loss"] < records[0]["loss"]
    # Whose tokens share a capacity.
    assert len(batches[0]["input_ids"]) == (1 if kind in ("packed", "padding-free") else 2)
    # It takes the loss of the language model from hidden states.
    assert records[0]["loss"] == pytest.approx(untrained(**batches[0]).lm_loss.item(), rel=1e-4)
    if kind in ("padded", "completion-only"):
        # Each row for itself, without its padding.
        losses, counts = [], []
        rows = zip(*(batches[0][name] for name in ("input_ids", "attention_mask", "labels")), strict=True)
        for input_ids, mask, labels in rows:
            real = mask.bool()
            losses.append(untrained(input_ids[real][None], labels=labels[real][None]).lm_loss.item())
            counts.append((labels[real][1:] != -100).sum().item())
        mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        assert untrained(**batches[0]).lm_loss.item() == pytest.approx(mean, rel=1e-5)


def preferences() -> datasets.Dataset:
    rejected = [" jumps" * (row % 5 + 1) for row in range(COUNT)]
    return datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": ANSWERS, "rejected": rejected})


@pytest.mark.parametrize("reference", ["explicit", "default", "precomputed", "path", "adapters"])
def test_preferences_start_where_policy_and_reference_are_one(tmp_path: Path, reference: str) -> None:
    from trl import DPOConfig, DPOTrainer

    model = new_model(training_routing="causal", num_experts=2, expert_capacity=1.5)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(str(tmp_path / "model"))
    loaded = MoDForCausalLM.from_pretrained(tmp_path / "model")
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["router"])
    trainer = DPOTrainer(
        str(tmp_path / "model") if reference == "path" else loaded,
        ref_model=copy.deepcopy(model) if reference == "explicit" else None,
        args=DPOConfig(precompute_ref_log_probs=reference == "precomputed", max_length=64, **common(tmp_path)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=adapters if reference == "adapters" else None,
    )
    records, moved = train(trainer)
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert records[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert any(name.endswith("proj.weight") for name in moved)
    assert records[-1]["loss"] < 0.69


def test_online_tuning_by_rewards(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def variety(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text))) for text in completions]

    new_model(training_routing="causal").save_pretrained(tmp_path / "model")
    trainer = GRPOTrainer(
        MoDForCausalLM.from_pretrained(tmp_path / "model"),
        reward_funcs=variety,
        args=GRPOConfig(num_generations=2, max_completion_length=16, beta=0.1, **common(tmp_path)),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
    )
    records, moved = train(trainer)
    # Advantages of a group add up to nothing, and so does the divergence from a reference that is the policy itself.
    assert records[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(torch.tensor(record["reward"]).isfinite() for record in records)
    assert "proj.weight" in moved
