"""What a pretrained model loses by skipping before any tuning, kind by kind.

    python benchmarks/retrofit_probe.py SmolLM2-135M-Instruct.Q4_1.gguf --fit wikitext2_valid.txt \\
        --test wikitext=wikitext2_test.txt --out results/retrofit/probe.jsonl --work runs/probe

Maps and routers are fitted to `--fit` and as many characters of the built-in corpus' training part, and blocks measured
on it. Each row is a line of `--out`, with the perplexity on evenly spread windows of 512 tokens of `--test` and of the
built-in corpus' held-out part, under top-k routing and, once thresholds are set on the fitting text of each kind, under
causal routing. A row that is there is not made again: another model or text needs an `--out` of its own.
"""

import argparse
import json
from math import exp
from pathlib import Path
from typing import Any, cast

import torch
from retrofit import existing, test_file
from retrofit_sides import METHOD, Sides, texts_of, without

from mixture_of_depths import MoDForCausalLM, RetrofitOptions, calibrate, evaluate, load_dense
from mixture_of_depths.files import read_records
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.choose import decode_share, flops_share
from mixture_of_depths.retrofitting.tune import fitted_start
from mixture_of_depths.text.batches import spread
from mixture_of_depths.text.tokenizer import checked

LENGTH = 512
# Sequences that set the thresholds.
CALIBRATING = 8
WINDOWS = {"wikitext": 12, "code": 8}
KEPT = {"routed_parts": "block_keep_keys"}
# By the row's name: number of blocks, those that cost least when routed in this way, their capacity, and their kind.
UNIFORM: dict[str, tuple[int, float, dict[str, Any]]] = {
    "9 blocks at 18 %, keys dropped": (9, 0.18, {"routed_parts": "block", "bypass_rank": 0}),
    "9 blocks at 18 %, keys kept": (9, 0.18, {**KEPT, "bypass_rank": 0}),
    "16 blocks at 50 %, keys kept": (16, 0.50, {**KEPT, "bypass_rank": 0}),
    "16 blocks at 48 %, keys kept, map": (16, 0.48, KEPT),
    "16 blocks at 48 %, keys dropped, map": (16, 0.48, {"routed_parts": "block"}),
}
SPREAD: dict[str, dict[str, Any]] = {
    "spread, 80 % of the FLOPs": {"flops_share": 0.8},
    "spread, 65 % of the FLOPs": {"flops_share": 0.65},
    "spread, 80 % of the bytes": {"decode_share": 0.8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--fit", type=existing, nargs="+", required=True)
    parser.add_argument("--test", type=test_file, nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--fit-sequences", type=int, default=RetrofitOptions.fit_sequences)
    parser.add_argument("--measure-sequences", type=int, default=RetrofitOptions.measure_sequences)
    parser.add_argument("--bypass-rank", type=int, help="rank of the maps; by default that of mod retrofit")
    parser.add_argument("--dropped", nargs="+", type=int, help="blocks to drop, instead of those that measuring finds")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows", nargs="+")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    bf16 = arguments.precision == "bf16"
    dense, loaded = load_dense(arguments.source)
    tests = {name: str(file) for name, file in arguments.test}
    tokenizer = checked(loaded, arguments.source)
    texts = texts_of(
        [str(file) for file in arguments.fit],
        None,
        tests,
        tokenizer,
        LENGTH,
        LENGTH,
        max(WINDOWS.values()),
        arguments.work,
    )
    rank = arguments.bypass_rank
    options = RetrofitOptions(
        fit_sequences=arguments.fit_sequences, measure_sequences=arguments.measure_sequences, bypass_rank=rank
    )
    sides = Sides(dense, Path(arguments.source).name, texts, arguments.work, options, bf16)
    settings = {name: getattr(arguments, name) for name in ("fit_sequences", "measure_sequences", "precision")}
    done = {
        (record["row"], record.get("bypass_rank", 0))
        for record in read_records(arguments.out)
        if {name: record[name] for name in settings} == settings
    }

    def keep(row: str, model: MoDForCausalLM, **facts: Any) -> None:
        perplexity: dict[str, dict[str, float]] = {"top_k": {}, "causal": {}}
        for name, window in texts.windows.items():
            if model.config.causal_routers:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    calibrate(model, spread(texts.kinds[name], CALIBRATING), texts.corpus.end_of_text)
            chosen = spread(window, WINDOWS.get(name, len(window)))
            found = evaluate(model.eval(), chosen, texts.corpus.end_of_text, 1.0, batch_size=2, bf16=bf16)
            perplexity["top_k"][name] = exp(found.loss_top_k)
            perplexity["causal"][name] = exp(found.loss_causal)
        record = {
            "row": row,
            "perplexity": perplexity,
            "flops_ratio": flops_share(model.config, dense.config, LENGTH),
            "decode_ratio": decode_share(model.config, dense.config, LENGTH),
            "bypass_rank": model.config.bypass_rank,
            **facts,
            **settings,
            **provenance(dense.device),
        }
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(
            json.dumps({name: record[name] for name in ("row", "perplexity", "flops_ratio", "decode_ratio")}),
            flush=True,
        )

    def wanted(row: str, map_rank: int = sides.rank) -> bool:
        return (row, map_rank) not in done and (arguments.rows is None or row in arguments.rows)

    if wanted("dense", 0):
        keep("dense", without(dense, []))
    if wanted("8 blocks dropped", 0):
        blocks = arguments.dropped
        if blocks is None:
            rises = sides.rises("dropped", lambda block: without(dense, [block]))
            blocks = sorted(sorted(range(len(rises)), key=lambda block: rises[block])[:8])
        keep("8 blocks dropped", without(dense, blocks), blocks=blocks)
    if wanted("8 blocks replaced by a map"):
        model, chosen = sides.start("linear", 0.8)
        keep("8 blocks replaced by a map", model, **chosen)
    for row, (count, capacity, kind) in UNIFORM.items():
        kind_options = RetrofitOptions(**{"bypass_rank": sides.rank, **kind})
        map_rank = cast(int, kind_options.bypass_rank)
        if wanted(row, map_rank):
            measured = sides.importance(kind_options)
            order = sorted(range(len(measured)), key=lambda block: measured[block].expected_loss(capacity))
            capacities = dict.fromkeys(order[:count], capacity)
            keep(row, fitted_start(dense, sides.fit(map_rank), kind_options, capacities), capacities=capacities)
    for row, share in SPREAD.items():
        again = f"{row}, {METHOD}"
        if wanted(row) or wanted(again):
            capacities = sides.capacities(RetrofitOptions(bypass_rank=rank, **share))
            model = fitted_start(dense, sides.fit(sides.rank), RetrofitOptions(bypass_rank=rank), capacities)
            if wanted(row):
                keep(row, model, capacities=capacities)
            if wanted(again):
                keep(again, sides.fitted_to_skipping(model), capacities=capacities)


if __name__ == "__main__":
    main()
