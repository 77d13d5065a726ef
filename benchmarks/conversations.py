"""What a retrofitted instruction model answers: as it was left, calibrated on conversations, and tuned on them.

    python benchmarks/conversations.py SmolLM2-135M-Instruct.Q4_1.gguf runs/retrofit --out results/retrofit

The dense model answers 250 questions; nine tenths of these conversations are tuned on with trl's SFTTrainer, 50 steps
of 4 x 512 tokens, and some of them calibrated on. `--out`/conversations.json has for each state the loss on the last
tenth in nats per token, under causal routing, and the greedy answers to questions that none of the 250 is about.
Needs trl.
"""

import argparse
import copy
import json
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from retrofit_questions import questions_to_tune_on
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from mixture_of_depths import MoDForCausalLM, calibrate, evaluate, load_dense, pack
from mixture_of_depths.provenance import provenance

LENGTH = 512
# No token is this, so that positions go on from one turn to the next.
NO_END = -1
UNSEEN = (
    "What is the capital of France?",
    "What is the capital of Italy?",
    "Explain magnets to a child.",
    "Why is exercise important?",
    "Write a short story about a dragon.",
    "Give me three facts about whales.",
)

Conversation = list[dict[str, str]]


def answers(
    model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: list[str], **options: Any
) -> list[Conversation]:
    asked = [[{"role": "user", "content": question}] for question in questions]
    prompts: Any = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    sampler: Any = model.eval()
    replies = sampler.generate(**prompts, **options)[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    return [[*turns, {"role": "assistant", "content": text}] for turns, text in zip(asked, texts, strict=True)]


def packed(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    rows: Any = tokenizer.apply_chat_template(conversations, return_dict=True)
    return pack(np.array(list(chain.from_iterable(rows["input_ids"])), dtype=np.int32), LENGTH, "conversations")


def tune(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=50,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            per_device_train_batch_size=4,
            max_length=LENGTH,
            packing=True,
            packing_strategy="wrapped",
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
        )
        text = datasets.Dataset.from_dict({"messages": conversations})
        SFTTrainer(model, arguments, train_dataset=text, processing_class=tokenizer).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the dense model: folder, hub name or GGUF file")
    parser.add_argument("retrofitted", type=Path, help="folder that `mod retrofit` left of it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dense, tokenizer = load_dense(arguments.source)
    # The conversations are answered together, and end where sampling begins.
    tokenizer.padding_side = "left"
    states: dict[str, dict[str, Any]] = {}

    questions = questions_to_tune_on()
    rounded = copy.deepcopy(dense)
    torch.nn.Module.to(rounded, torch.bfloat16)
    sampling = {"max_new_tokens": 180, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    answered = [answers(rounded, tokenizer, questions[i : i + 50], **sampling) for i in range(0, len(questions), 50)]
    conversations = list(chain.from_iterable(answered))
    share = len(conversations) // 10
    tuning, held_out = conversations[:-share], packed(conversations[-share:], tokenizer)
    calibration = packed(tuning[:80], tokenizer)

    def report(state: str, model: MoDForCausalLM) -> None:
        evaluation = evaluate(model, held_out, NO_END, 1.0, all_causal_routers=False)
        said = answers(model, tokenizer, list(UNSEEN), max_new_tokens=50, do_sample=False)
        states[state] = {
            "loss": evaluation.loss_causal,
            "share_entering": {name: router.share_entering for name, router in evaluation.causal_routers.items()},
            "answers": {question["content"]: answer["content"] for question, answer in said},
        }
        print(json.dumps({state: states[state]}, indent=2), flush=True)

    report("dense", dense)
    model = MoDForCausalLM.from_pretrained(arguments.retrofitted)
    report("as left", model)
    calibrate(model, calibration, NO_END)
    report("calibrated", model)
    model = MoDForCausalLM.from_pretrained(arguments.retrofitted)
    started = time.monotonic()
    tune(model.train(), tokenizer, tuning)
    minutes = (time.monotonic() - started) / 60
    calibrate(model, calibration, NO_END)
    report("tuned and calibrated", model)
    record = {
        "states": states,
        "tuning_minutes": minutes,
        "held_out_tokens": held_out.num_rows * LENGTH,
        **provenance(model.device),
    }
    (arguments.out / "conversations.json").write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
