"""A task of lm-evaluation-harness gives the figures that the model's own logits give."""

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from models import TASK, make_checkpoint

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.evaluation import harness
from mixture_of_depths.evaluation.harness import evaluate_tasks
from mixture_of_depths.text.tokenizer import load_tokenizer


def test_a_local_task_is_answered_with_the_models_own_likelihoods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else it looks through thousands of files of its own each time.
    monkeypatch.setattr(harness, "TaskManager", cache(partial(harness.TaskManager, include_defaults=False)))
    make_checkpoint(tmp_path)
    model, tokenizer = MoDForCausalLM.from_pretrained(tmp_path).eval(), load_tokenizer(str(tmp_path))
    examples = [
        {"question": "the quick brown " * (1 + i % 3) + str(i), "choices": ["fox", "dog jumps", "lazy"]}
        for i in range(12)
    ]
    for number, example in enumerate(examples):
        scores = []
        for choice in example["choices"]:
            context = tokenizer(example["question"])["input_ids"]
            whole = tokenizer(f"{example['question']} {choice}")["input_ids"]
            assert whole[: len(context)] == context
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
            scores.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        # The model's own choice, but for three.
        best = scores.index(max(scores))
        example["answer"] = best if number > 2 else (best + 1) % 3
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(example) for example in examples))
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    found = evaluate_tasks(model, tokenizer, ("local_choice",), tmp_path)
    assert found["local_choice"]["acc,none"] == pytest.approx(9 / 12)
    with pytest.raises(ValueError, match="tasks=nowhere is unknown"):
        evaluate_tasks(model, tokenizer, ("nowhere",), tmp_path)
    (tmp_path / "local.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl").replace("question", "qestion"))
    with pytest.raises(ValueError, match="tasks=local_choice cannot be run"):
        evaluate_tasks(model, tokenizer, ("local_choice",), tmp_path)
