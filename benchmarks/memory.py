"""Resident memory of long runs: 10,000 tokens sampled from a tiny model, and 2,000 steps of its training.

    python benchmarks/memory.py        # writes results/reliability/memory.json and memory.png

Cases, each in a process of its own:

- `one text`: a single text, of as many tokens; the keys and values of its tokens are part of what grows.
- `many texts`: requests as a server gets them, one after another: prompts of 1 to 64 tokens, 1 to 128 new ones, one row
  or four, greedy or not, and one in four given up in the middle.
- the same two with the compiled step.
- `generate()`: such requests to transformers' sampling loop, none given up.
- `training`: `train`, with an evaluation every 50 steps and a checkpoint every 100.

Memory is read 200 times, at equal numbers of steps; of `training`, the steps' last moment. The first fifth is warm-up:
allocators, caches and, where the step is compiled, the compiler. `rss_growth_mb` of a case is the median of the last
tenth of the readings less the median of the tenth after the first fifth, in MB of 1e6 bytes; that of the record is the
largest.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import psutil
import torch
from rich.console import Console
from train_step import in_fresh_process
from transformers import TrainerCallback, TrainerControl, TrainerState

from mixture_of_depths import (
    DataOptions,
    MoDConfig,
    ModelOptions,
    MoDForCausalLM,
    SamplingOptions,
    TrainOptions,
    Tuning,
    model_config,
    prepare,
    stream,
    train,
)
from mixture_of_depths.provenance import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent.parent / "results" / "reliability"
READINGS = 200
VOCABULARY, LONGEST_PROMPT, LONGEST_ANSWER = 512, 64, 128


def growth_mb(readings: list[float]) -> float:
    """From the tenth after the first fifth to the last tenth of the readings, by their medians."""
    tenth = len(readings) // 10
    assert tenth > 0, "at least ten readings"
    return median(readings[-tenth:]) - median(readings[2 * tenth : 3 * tenth])


class Meter:
    """Reads this process' resident memory after every `steps // READINGS` steps."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // READINGS)
        self.process = psutil.Process()
        self.step = 0
        self.readings: list[float] = []

    def count(self) -> None:
        self.step += 1
        if self.step % self.every == 0:
            self.readings.append(self.process.memory_info().rss / 1e6)


def tiny_model(longest: int, **fields: Any) -> MoDForCausalLM:
    torch.manual_seed(0)
    config = MoDConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=longest,
        initializer_range=0.3,
        **fields,
    )
    return MoDForCausalLM(config).eval()


def random_prompt(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens))


def one_text(steps: int, compiled: bool) -> list[float]:
    meter, options = Meter(steps), SamplingOptions(max_new_tokens=steps, temperature=0.8)
    for _ in stream(tiny_model(steps + 1), random_prompt(1, 1), options=options, compiled=compiled):
        meter.count()
    return meter.readings


def many_texts(steps: int, compiled: bool) -> list[float]:
    meter, model, draw = Meter(steps), tiny_model(LONGEST_PROMPT + LONGEST_ANSWER), random.Random(0)
    while meter.step < steps:
        prompt = random_prompt(draw.choice([1, 4]), draw.randint(1, LONGEST_PROMPT))
        tokens = draw.randint(1, LONGEST_ANSWER)
        options = SamplingOptions(tokens, repetition_penalty=draw.choice([1.0, 1.2]), temperature=draw.choice([0, 1]))
        wanted = draw.randint(1, tokens) if draw.random() < 0.25 else tokens
        for _ in islice(stream(model, prompt, options=options, compiled=compiled), min(wanted, steps - meter.step)):
            meter.count()
    return meter.readings


def many_generates(steps: int) -> list[float]:
    meter, model, draw = Meter(steps), tiny_model(LONGEST_PROMPT + LONGEST_ANSWER), random.Random(0)
    while meter.step < steps:
        prompt = random_prompt(draw.choice([1, 4]), draw.randint(1, LONGEST_PROMPT))
        tokens = min(draw.randint(1, LONGEST_ANSWER), steps - meter.step)
        # The mixin annotates itself with a private protocol that no public class satisfies.
        model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=draw.random() < 0.5,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        for _ in range(tokens):
            meter.count()
    return meter.readings


class CountSteps(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.meter.count()


def training(steps: int) -> list[float]:
    meter = Meter(steps)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        data = DataOptions(max_characters=1_000_000, vocab_size=VOCABULARY, sequence_length=64, cache_dir=cache)
        corpus = prepare(data)
        shape = ModelOptions(hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
        config = model_config(shape, corpus.tokenizer, data.sequence_length)
        options = TrainOptions(max_steps=steps, batch_size=8, eval_every=50, eval_sequences=16, save_every=100)
        tuning = Tuning(MoDForCausalLM(config), {}, callbacks=(CountSteps(meter),))
        train(config, corpus, options, Path(folder) / "run", console=Console(quiet=True), tuning=tuning)
    return meter.readings


def in_one_thread(case: Callable[[], list[float]]) -> list[float]:
    torch.set_num_threads(1)
    return case()


def draw(readings: dict[str, list[float]], steps: dict[str, int], out: Path) -> None:
    """Memory over that of the warm-up's end against the share of the steps done."""
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    axes.axvspan(0, 0.2, color="0.93", label="warm-up")
    colours = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#CC79A7", "#009E73")
    for (name, rss_mb), colour in zip(readings.items(), colours, strict=True):
        tenth = len(rss_mb) // 10
        start = median(rss_mb[2 * tenth : 3 * tenth])
        share = [(number + 1) / len(rss_mb) for number in range(len(rss_mb))]
        label = f"{name}, {steps[name]:,} steps: {growth_mb(rss_mb):+.1f} MB"
        axes.plot(share, [value - start for value in rss_mb], color=colour, lw=1.2, label=label)
    axes.set_xlabel("share of the steps done")
    axes.set_ylabel("resident memory over that after the warm-up (MB)")
    axes.set_xlim(0, 1)
    axes.set_ylim(-20, 30)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode-steps", type=int, default=10_000)
    parser.add_argument("--training-steps", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    decode, out = arguments.decode_steps, arguments.out
    cases: dict[str, tuple[int, Callable[[], list[float]]]] = {
        "one text": (decode, partial(one_text, decode, False)),
        "many texts": (decode, partial(many_texts, decode, False)),
        "one text, compiled": (decode, partial(one_text, decode, True)),
        "many texts, compiled": (decode, partial(many_texts, decode, True)),
        "generate()": (decode, partial(many_generates, decode)),
        "training": (arguments.training_steps, partial(training, arguments.training_steps)),
    }
    readings = {name: in_fresh_process(in_one_thread, case) for name, (_, case) in cases.items()}
    by_case = {
        name: {
            "steps": cases[name][0],
            "rss_growth_mb": round(growth_mb(values), 2),
            "rss_mb": [round(value, 2) for value in values],
        }
        for name, values in readings.items()
    }
    growth = max(case["rss_growth_mb"] for case in by_case.values())
    out.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "memory", "rss_growth_mb": growth, "cases": by_case, **provenance()}
    (out / "memory.json").write_text(json.dumps(record) + "\n")
    draw(readings, {name: steps for name, (steps, _) in cases.items()}, out / "memory.png")
    print(json.dumps({name: case["rss_growth_mb"] for name, case in by_case.items()}))


if __name__ == "__main__":
    main()
