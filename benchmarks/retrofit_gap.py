"""Where the loss of a tuned retrofit sits: in its weights, in who is chosen to skip, or in the skipping itself.

    python benchmarks/retrofit_gap.py SmolLM2-135M-Instruct.Q4_1.gguf ours-0.8-0 --tune wikitext2_valid.txt \\
        --conversations results/retrofit/chats.jsonl --test wikitext=wikitext2_test.txt --windows 16 \\
        --runs runs/compared --out results/retrofit

The side, and the equally tuned dense model `tuned-SEED`, are folders in `--runs` that benchmarks/retrofit.py left
there. A line is added to `--out`/gap.jsonl, with the loss by kind of text, in nats per token and under top-k routing:

    tuned        of the dense model;
    all_enter    of the side, every token of which enters every block: what lies above `tuned` is lost in its weights;
    chosen       at its capacities: what lies above `all_enter` is lost by skipping;
    by_missed    with those tokens chosen in the routers' place that would miss most: how much better routers would do.

`by_step` is the side's tuning loss less the dense model's, of the same sequences, in each eighth of the steps.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from retrofit import WINDOW, test_file
from retrofit_sides import Texts, texts_of
from torch import Tensor, nn

from mixture_of_depths import MoDForCausalLM, load_dense
from mixture_of_depths.files import read_json, read_records
from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.measure import routers_of, top_k_loss
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.tokenizer import checked

PARTS_OF_THE_RUN = 8


class MissedNorm(nn.Module):
    """In the place of a router's weights: the logarithm of the norm of what a token that skips the block misses."""

    @torch.no_grad()
    def look(self, layer: DecoderLayer, args: tuple[Tensor], others: dict[str, Any]) -> None:
        """Before the block runs, with what it is given."""
        (hidden_BTD,) = args
        delta_BTD, _ = layer.delta(hidden_BTD, others["placement"], None, "top_k")
        skipped_BTD = layer.bypassed(hidden_BTD, torch.zeros_like(hidden_BTD[..., 0], dtype=torch.bool))
        self.missed_BT1 = (hidden_BTD + delta_BTD - skipped_BTD).norm(dim=-1, keepdim=True).clamp(min=1e-6).log()

    def forward(self, router_input_BTD: Tensor) -> Tensor:
        return self.missed_BT1


@contextmanager
def choosing_by_missed(model: MoDForCausalLM) -> Iterator[None]:
    """Within it, top-k routing chooses the tokens that would miss most."""
    learned, hooks = {}, []
    for layer_idx, router in routers_of(model).items():
        missed = MissedNorm()
        learned[layer_idx], router.proj = router.proj, cast(Any, missed)
        hooks.append(model.model.layers[layer_idx].register_forward_pre_hook(cast(Any, missed.look), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer_idx, router in routers_of(model).items():
            router.proj = learned[layer_idx]


@contextmanager
def all_entering(model: MoDForCausalLM) -> Iterator[None]:
    """Within it, every token enters every block under top-k routing."""
    capacities = {layer_idx: router.capacity for layer_idx, router in routers_of(model).items()}
    for router in routers_of(model).values():
        router.capacity = 1.0
    try:
        yield
    finally:
        for layer_idx, router in routers_of(model).items():
            router.capacity = capacities[layer_idx]


def losses(model: MoDForCausalLM, texts: Texts) -> dict[str, float]:
    """Under top-k routing, by kind of text."""
    end = texts.corpus.end_of_text
    return {
        name: top_k_loss(model, batches(windows, range(len(windows)), end, 1, model.device), bf16=False)
        for name, windows in texts.windows.items()
    }


def gap_by_step(side: Path, tuned: Path) -> list[float]:
    """The mean difference of the tuning losses in each part of the run; both have seen the same sequences."""
    ours, theirs = (
        [line["loss"] for line in read_records(folder / "metrics.jsonl") if "loss" in line] for folder in (side, tuned)
    )
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    cuts = [round(part * len(differences) / PARTS_OF_THE_RUN) for part in range(PARTS_OF_THE_RUN + 1)]
    return [fmean(differences[start:end]) for start, end in pairwise(cuts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("side", help="name of the side's folder in --runs, such as ours-0.8-0")
    parser.add_argument("--tune", nargs="+", required=True)
    parser.add_argument("--conversations")
    parser.add_argument("--test", type=test_file, nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.runs / arguments.side
    tuned_folder = arguments.runs / f"tuned-{folder.name.split('-')[-1]}"
    for needed in (folder, tuned_folder):
        if not (needed / "result.json").exists():
            parser.error(f"side={arguments.side} needs {needed}, which holds no finished model; tune it first")
    side, tuned = (MoDForCausalLM.from_pretrained(path).eval() for path in (folder, tuned_folder))
    if not side.config.routed_layers or side.config.router_type == "random":
        parser.error(f"side={arguments.side} has no learned routers; name one that has")
    _, loaded = load_dense(arguments.source)
    texts = texts_of(
        arguments.tune,
        arguments.conversations,
        {name: str(file) for name, file in arguments.test},
        checked(loaded, arguments.source),
        arguments.sequence_length,
        WINDOW,
        arguments.windows,
        arguments.runs,
    )
    loss = {"tuned": losses(tuned, texts), "chosen": losses(side, texts)}
    with all_entering(side):
        loss["all_enter"] = losses(side, texts)
    with choosing_by_missed(side):
        loss["by_missed"] = losses(side, texts)
    result = read_json(folder / "result.json")
    record = {
        "side": arguments.side,
        "map_rank": side.config.bypass_rank or None,
        "steps": cast(int, result["steps"]),
        "loss": loss,
        "by_step": gap_by_step(folder, tuned_folder),
        **provenance(side.device),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gap.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
