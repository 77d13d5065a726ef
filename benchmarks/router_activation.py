"""Which router activation trains best: the same MoD model, to the same training FLOPs, with each of them.

    python benchmarks/router_activation.py --max-flops 1e13 --seeds 0 1 2 --out results/router-activation.jsonl

Appends one JSON line a run to --out and prints a table of means over the seeds. Runs already in --out are not repeated.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import get_args

from rich.console import Console

from mixture_of_depths import DataOptions, ModelOptions, TrainOptions, model_config, prepare, train
from mixture_of_depths.options import RouterActivation
from mixture_of_depths.provenance import provenance

ACTIVATIONS: tuple[RouterActivation, ...] = get_args(RouterActivation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-flops", type=float, default=1e13)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    corpus = prepare(DataOptions())
    base = ModelOptions(hidden_size=128, num_hidden_layers=8, num_attention_heads=4)
    records = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    done = {(r["router_activation"], r["seed"], r["max_flops"]) for r in records}
    for seed in arguments.seeds:
        for activation in ACTIVATIONS:
            if (activation, seed, arguments.max_flops) in done:
                continue
            config = model_config(replace(base, router_activation=activation), corpus.tokenizer, 256)
            with tempfile.TemporaryDirectory() as folder:
                options = TrainOptions(max_flops=arguments.max_flops, batch_size=4, learning_rate=4e-3, seed=seed)
                _, result = train(config, corpus, options, Path(folder) / "run", console=Console(quiet=True))
            assert result.evaluation is not None
            record = {
                "router_activation": activation,
                "seed": seed,
                "max_flops": arguments.max_flops,
                "steps": result.steps,
                "parameters": result.parameters,
                "train_seconds": result.train_seconds,
                **result.evaluation.as_dict(),
                **provenance(),
            }
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            records.append(record)
    for activation in ACTIVATIONS:
        runs = [r for r in records if r["router_activation"] == activation and r["max_flops"] == arguments.max_flops]
        top_k, causal = mean(r["loss_top_k"] for r in runs), mean(r["loss_causal"] for r in runs)
        print(f"{activation:8} {len(runs)} seeds  top-k {top_k:.4f}  causal {causal:.4f}")


if __name__ == "__main__":
    main()
