"""The comparison that `mod demo` runs: the paper's three claims, each as a baseline against a Mixture-of-Depths model.

Both models have the same width and depth and are trained alike, to the same training FLOPs. In the Mixture-of-Depths
model a fixed share of the tokens enters every other block. So a token costs it less, and it sees more of them.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixture_of_depths.compiler import missing_compiler
from mixture_of_depths.inspect.curves import training_curve
from mixture_of_depths.inspect.depth import coloured
from mixture_of_depths.inspect.report import held_out_report
from mixture_of_depths.model.flops import forward_flops_per_token
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import BUILTIN, DataOptions, ModelOptions, SamplingOptions, TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.sampling.bench import decode_seconds, in_precision
from mixture_of_depths.sampling.stream import compile_step
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.text.corpus import Corpus, prepare
from mixture_of_depths.training.run import TrainResult, train
from mixture_of_depths.training.settings import model_config

PROMPT = "def read_file(path, encoding=None):\n    "
SAMPLED = 96
# Of these tokens of held-out text sampling goes on, each time another text; the first turn only warms up.
PROMPT_TOKENS, TURNS = 64, 12
# After fewer the losses say nothing yet.
COMPARABLE_STEPS = 100
# With more entries the head would be most of the compute of models this small.
VOCABULARY = 1024
# As the studies' ladder makes them: weights of a deviation of 0.02 are too small for models this narrow.
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "initializer_range": 0.625 / 128**0.5,
}
MODELS = {
    "baseline": ModelOptions(**SHAPE, routed=False),
    "MoD": ModelOptions(**SHAPE, capacity=(0.125,), route_every=2),
}
NAMES = tuple(MODELS)


def run(out: Path, max_flops: float, data: DataOptions, seed: int, resume: bool, device: torch.device) -> None:
    """Trains both models in `out`; prints a table and a sample, and writes curves.png, demo.json and report.html.

    Raises:
        ValueError: for a folder that holds a demo, unless it is resumed, unusable text, or a budget below one step.
    """
    console = Console(highlight=False)
    for name in NAMES:
        if not resume and (out / name).exists():
            raise ValueError(f"out={out} holds a demo; name another folder, or go on with it by --resume")
    if data.data == (BUILTIN,) and data.tokenizer is None and data.vocab_size is None:
        data = replace(data, vocab_size=VOCABULARY)
    corpus = prepare(data)
    console.print(str(corpus.facts))
    options = TrainOptions(max_flops=max_flops, batch_size=4, learning_rate=4e-3, seed=seed)
    models: dict[str, MoDForCausalLM] = {}
    results: dict[str, TrainResult] = {}
    for number, (name, size) in enumerate(MODELS.items(), start=1):
        config = model_config(size, corpus.tokenizer, data.sequence_length)
        console.print(f"[bold]{name}[/bold], model {number} of 2: training to {max_flops:.3g} FLOPs")
        models[name], results[name] = train(
            config,
            corpus,
            options,
            out / name,
            resume=(out / name / "run.json").exists(),
            console=console,
            device=device,
        )
        if not results[name].finished:
            console.print("stopped; go on with the same command and --resume")
            raise SystemExit(130)
    missing = missing_compiler(device)
    console.print(
        "sampling from both in turns; the fast step is compiled first, the first time for half a minute"
        if missing is None
        else f"sampling from both in turns, without the fast step, which needs {missing}"
    )
    speeds = sampling_speeds(models, corpus, missing is None)
    rows = {name: _row(models[name], results[name], speeds[name], data.sequence_length) for name in models}
    console.print(_table(rows, max_flops))
    sampling = SamplingOptions(max_new_tokens=SAMPLED, seed=seed)
    (sample,) = sample_texts(models["MoD"].eval(), corpus.tokenizer, [PROMPT], sampling)
    console.print("\nText of the MoD model; each token has the colour of the number of blocks it used:\n")
    console.print(coloured(models["MoD"], corpus.tokenizer, sample.tokens))
    training_curve({name: out / name / "metrics.jsonl" for name in models}, out / "curves.png")
    record = {"max_flops": max_flops, "models": rows, "fast_step": missing is None, **provenance(device)}
    (out / "demo.json").write_text(json.dumps(record, indent=2))
    held_out_report(models["MoD"], corpus, out / "report.html")
    console.print(f"\ncurves: {out / 'curves.png'}   figures: {out / 'demo.json'}", soft_wrap=True)
    console.print(
        Text(f"where the compute went, token by token; open {(out / 'report.html').absolute().as_uri()}"),
        soft_wrap=True,
    )


def sampling_speeds(models: dict[str, MoDForCausalLM], corpus: Corpus, compiled: bool) -> dict[str, float]:
    """Tokens per second of each model after held-out texts of its kind, one row, all in turns; medians."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    endless = {name: in_precision(model, "fp32") for name, model in models.items()}
    for model in endless.values():
        if compiled:
            compile_step(model)
    for turn in range(TURNS + 1):
        tokens = corpus.validation[turn % len(corpus.validation)]["input_ids"][:PROMPT_TOKENS]
        options = SamplingOptions(max_new_tokens=SAMPLED, seed=turn)
        for name in sorted(endless, reverse=bool(turn % 2)):
            model = endless[name]
            taken = decode_seconds(model, torch.tensor([tokens], device=model.device), options, compiled)
            if turn > 0:
                seconds[name].append(taken)
    return {name: 1 / median(taken) for name, taken in seconds.items()}


def _row(model: MoDForCausalLM, result: TrainResult, speed: float, sequence_length: int) -> dict[str, Any]:
    assert result.evaluation is not None
    return {
        **asdict(result),
        "blocks": model.config.num_hidden_layers,
        "routed_blocks": len(model.config.routed_layers or []),
        "forward_flops_per_token": forward_flops_per_token(model.config, sequence_length),
        "sampling_tokens_per_second": speed,
    }


def _table(rows: dict[str, dict[str, Any]], max_flops: float) -> Table:
    baseline, mod = (rows[name] for name in NAMES)
    width, blocks, routed = SHAPE["hidden_size"], mod["blocks"], mod["routed_blocks"]
    (capacity,) = MODELS["MoD"].capacity
    fewest = min(baseline["steps"], mod["steps"])
    table = Table(
        title=f"Two models, each trained with {max_flops:.3g} FLOPs, {width} wide and {blocks} blocks deep",
        caption=("" if fewest >= COMPARABLE_STEPS else f"{fewest} steps are too few to compare: give more FLOPs. ")
        + f"baseline: every token goes through every block. MoD: {100 * capacity:g} % of the tokens go through "
        f"{routed} of the {blocks} blocks, and all through the others. Loss: nats per token of held-out text, where "
        "each token decides by itself. Sampling: one text at a time, in turns. Each kind may be better at another "
        "size; mod isoflop compares the best.",
        caption_justify="left",
    )
    table.add_column("")
    for name in ("MoD", "baseline", "MoD / baseline"):
        table.add_column(name, justify="right")

    def add(label: str, shown: str, of: Any, unit: float = 1, **style: Any) -> None:
        ours, theirs = of(mod), of(baseline)
        table.add_row(label, f"{ours / unit:{shown}}", f"{theirs / unit:{shown}}", f"{ours / theirs:.3g}", **style)

    add("held-out loss at equal training FLOPs", ".3f", lambda row: row["evaluation"]["loss_causal"], style="bold")
    add("FLOPs per token, millions", ".2f", lambda row: row["forward_flops_per_token"], 1e6, style="bold")
    add("sampling, tokens/s", ",.0f", lambda row: row["sampling_tokens_per_second"], style="bold", end_section=True)
    add("training tokens, thousands", ",.0f", lambda row: row["tokens"], 1e3)
    add("training, seconds", ".0f", lambda row: row["train_seconds"])
    add("parameters, millions", ".2f", lambda row: row["parameters"], 1e6)
    return table
