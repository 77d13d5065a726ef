"""The comparison that `mod demo` runs: a baseline and a Mixture-of-Depths model at equal training FLOPs."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mixture_of_depths.inspect.curves import training_curve
from mixture_of_depths.inspect.depth import coloured
from mixture_of_depths.inspect.report import held_out_report
from mixture_of_depths.model.flops import forward_flops_per_token
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import DataOptions, ModelOptions, SamplingOptions, TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.sampling.bench import generate_tokens_per_second
from mixture_of_depths.sampling.texts import begin, sample_texts
from mixture_of_depths.text.corpus import Corpus, prepare
from mixture_of_depths.training.run import TrainResult, train
from mixture_of_depths.training.settings import model_config

PROMPT = "def read_file(path, encoding=None):\n    "
SAMPLED = 96

# A routed block costs about an eighth of a dense one; the paper finds that the saving is best spent on depth.
SIZES = {
    "baseline": ModelOptions(hidden_size=128, num_attention_heads=4, num_hidden_layers=6, routed=False),
    "MoD": ModelOptions(hidden_size=128, num_attention_heads=4, num_hidden_layers=8, capacity=(0.125,), route_every=2),
}


def run(out: Path, max_flops: float, data: DataOptions, seed: int, resume: bool, device: torch.device) -> None:
    """Trains both models in `out`; prints a table and samples, and writes curves.png, demo.json and report.html.

    Raises:
        ValueError: for a folder that holds a demo, unless it is resumed, unusable text, or a budget below one step.
    """
    console = Console(highlight=False)
    for name in SIZES:
        if not resume and (out / name).exists():
            raise ValueError(f"out={out} holds a demo; name another folder, or go on with it by --resume")
    corpus = prepare(data)
    console.print(str(corpus.facts))
    options = TrainOptions(max_flops=max_flops, batch_size=4, learning_rate=4e-3, seed=seed)
    models: dict[str, MoDForCausalLM] = {}
    results: dict[str, TrainResult] = {}
    for name, size in SIZES.items():
        config = model_config(size, corpus.tokenizer, data.sequence_length)
        console.print(f"[bold]{name}[/bold]: training to {max_flops:.3g} FLOPs")
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
    speeds = _speeds(models, corpus)
    rows = {name: _row(models[name], results[name], speeds[name], data.sequence_length) for name in models}
    console.print(_table(rows, max_flops))
    for name, model in models.items():
        console.print(f"\n[bold]{name}[/bold], the same prompt and seed, tokens coloured by the blocks they used:\n")
        options = SamplingOptions(max_new_tokens=SAMPLED, seed=seed)
        (sample,) = sample_texts(model.eval(), corpus.tokenizer, [PROMPT], options)
        console.print(coloured(model, corpus.tokenizer, sample.tokens))
    training_curve({name: out / name / "metrics.jsonl" for name in models}, out / "curves.png")
    (out / "demo.json").write_text(json.dumps({"max_flops": max_flops, "models": rows, **provenance(device)}, indent=2))
    held_out_report(models["MoD"], corpus, out / "report.html")
    console.print(f"\ncurves: {out / 'curves.png'}   figures: {out / 'demo.json'}   routing: {out / 'report.html'}")


def _speeds(models: dict[str, MoDForCausalLM], corpus: Corpus, repeats: int = 3) -> dict[str, float]:
    """Tokens per second of each model, taken in turns after a warm-up; the median."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            model.eval()
            input_ids = torch.tensor([begin(corpus.tokenizer, [PROMPT])[0].tokens], device=model.device)
            speed = generate_tokens_per_second(model, input_ids, SAMPLED)
            if repeat > 0:
                speeds[name].append(speed)
    return {name: median(turns) for name, turns in speeds.items()}


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
    table = Table(title=f"Equal training FLOPs ({max_flops:.3g} each)")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right")
    lines: list[tuple[str, Any]] = [
        ("held-out loss, causal routing", lambda row: f"{row['evaluation']['loss_causal']:.4f}"),
        ("held-out loss, top-k routing (looks ahead)", lambda row: f"{row['evaluation']['loss_top_k']:.4f}"),
        ("bits per byte, causal routing", lambda row: f"{row['evaluation']['bits_per_byte']:.4f}"),
        ("blocks (of them routed)", lambda row: f"{row['blocks']} ({row['routed_blocks']})"),
        ("parameters", lambda row: f"{row['parameters'] / 1e6:.2f} M"),
        ("forward FLOPs per token", lambda row: f"{row['forward_flops_per_token'] / 1e6:.2f} M"),
        ("training FLOPs", lambda row: f"{row['flops']:.4g}"),
        ("training tokens", lambda row: f"{row['tokens']:,}"),
        ("training time", lambda row: f"{row['train_seconds']:.0f} s"),
        ("sampling, generate(), batch 1", lambda row: f"{row['sampling_tokens_per_second']:.1f} tokens/s"),
    ]
    for label, show in lines:
        table.add_row(label, *(show(row) for row in rows.values()))
    return table
