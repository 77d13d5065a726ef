"""The part "isoflop" of `gpu.py`: the missing runs of recipes/isoflop-gpu.yaml, as far as the time goes.

Their records stand in DIR/isoflop/records.jsonl, from which `mod isoflop fit` and `plot` read elsewhere, too.
"""

import lzma
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from carried_tokens import archive_of, read_tokens
from parts import Case
from rich.console import Console

from mixture_of_depths.device import chosen_device
from mixture_of_depths.isoflop.plan import Study, Sweep, load_study, plan
from mixture_of_depths.isoflop.run import open_records, run_here
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.corpus import prepare

RECIPE = Path(__file__).parents[1] / "recipes" / "isoflop-gpu.yaml"


def go_on(study: Study, tokens: Path, out: Path) -> dict[str, Any]:
    """Carries out what has no record; a signal to end stops it in order, and it is not finished then."""
    corpus = read_tokens(tokens, study.data)
    planned = plan(study, corpus)
    finished = run_here(planned, corpus, out, Console(width=120), chosen_device("auto"))
    records = list(open_records(out, planned).values())
    trained = [record for record in records if record["evaluation"] is not None]
    train_seconds = sum(record["train_seconds"] for record in trained)
    return {
        "text": corpus.key,
        "runs": len(planned),
        "records": len(records),
        "train_s": round(train_seconds, 1),
        "tflops": round(sum(record["flops"] for record in trained) / max(train_seconds, 1e-9) / 1e12, 2),
        "finished": finished and len(records) == len(planned),
    }


def small(out: Path) -> tuple[Study, Path]:
    """A study of the same families in sizes that two cores train in seconds, and a file of tokens for it."""
    data = DataOptions(
        data=(str(Path(__file__).parent),), vocab_size=300, sequence_length=64, cache_dir=out.parent / "cache"
    )
    study = load_study(RECIPE)
    training = replace(study.training, batch_size=2, precision="fp32", compile=False)
    sweep = Sweep(budgets=(2e9,), families=(study.baseline, "mod"), depths=(2,))
    study = replace(study, data=data, training=training, sweeps=(sweep,))
    tokens = out.parent / "tokens.tar.xz"
    tokens.write_bytes(lzma.compress(archive_of(prepare(data))))
    return study, tokens


def cases(out: Path, tokens: Path | None, smoke: bool) -> dict[str, Case]:
    if smoke:
        study, tokens = small(out)
    else:
        study = load_study(RECIPE)
    return {} if tokens is None else {"study": partial(go_on, study, tokens, out)}
