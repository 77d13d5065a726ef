"""Where the loss of a tuned retrofit sits: in its weights, in who is chosen to skip, or in the skipping itself.

    python benchmarks/retrofit_gap.py ours-0.8-0 --tune wikitext2_valid.txt --test wikitext=wikitext2_test.txt \\
        --conversations results/retrofit/chats.jsonl --windows 16 --runs runs/compared --out results/retrofit

The side, and the equally tuned dense model `tuned-SEED`, are folders in `--runs` that benchmarks/retrofit.py left
there; what they were tuned on is given as it was then. A line is added to `--out`/gap.jsonl, with the loss by kind of
text, in nats per token and under top-k routing:

    tuned        of the dense model;
    chosen       of the side;
    by_norm      of the side, with those tokens chosen in each block that would miss most of it, by its norm, which is
                 what routers are fitted to at the start. Other choices may be better still;
    all_enter    of the side, with every token in every block. Its weights were not tuned to that, so what is left above
                 `tuned` is more than they lost.

`by_step` is the side's tuning loss less the dense model's in each eighth of the steps, for the same sequences: of the
mixture of cross-entropy and divergence that tuning lowers.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from retrofit import WINDOW, contents, existing, test_file
from retrofit_sides import Texts, texts_of
from torch import Tensor, nn

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.files import read_json, read_records
from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.measure import at_capacity, routers_of, top_k_loss
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.tokenizer import load_tokenizer
from mixture_of_depths.training.folder import MAY_CHANGE

PARTS_OF_THE_RUN = 8


class NormOfMissed(nn.Module):
    """In the place of a router's weights: gives the norm of what a token that skips the block misses."""

    @torch.no_grad()
    def before_block(self, layer: DecoderLayer, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        """A hook, called with what the block is called with."""
        (hidden_BTD,) = args
        delta_BTD, _ = layer.delta(hidden_BTD, kwargs["placement"], None, "top_k")
        skipped_BTD = layer.bypassed(hidden_BTD, torch.zeros_like(hidden_BTD[..., 0], dtype=torch.bool))
        self.norm_BT1 = (hidden_BTD + delta_BTD - skipped_BTD).norm(dim=-1, keepdim=True)

    def forward(self, router_input_BTD: Tensor) -> Tensor:
        return self.norm_BT1


@contextmanager
def choosing_by_norm(model: MoDForCausalLM) -> Iterator[None]:
    """Within it, top-k routing chooses the tokens that would miss most."""
    learned, hooks = {}, []
    for layer_idx, router in routers_of(model).items():
        norm = NormOfMissed()
        learned[layer_idx], router.proj = router.proj, cast(Any, norm)
        layer = model.model.layers[layer_idx]
        hooks.append(layer.register_forward_pre_hook(cast(Any, norm.before_block), with_kwargs=True))
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
    with ExitStack() as changed:
        for router in routers_of(model).values():
            changed.enter_context(at_capacity(router, 1.0))
        yield


def losses(model: MoDForCausalLM, texts: Texts) -> dict[str, float]:
    """Under top-k routing, by kind of text."""
    end = texts.corpus.end_of_text
    return {
        name: top_k_loss(model, batches(windows, range(len(windows)), end, 1, model.device), bf16=False)
        for name, windows in texts.windows.items()
    }


def gap_by_step(side: Path, tuned: Path) -> list[float]:
    """The mean difference of the tuning losses in each part of the run."""
    ours, theirs = (
        [line["loss"] for line in read_records(folder / "metrics.jsonl") if "loss" in line] for folder in (side, tuned)
    )
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    cuts = [round(part * len(differences) / PARTS_OF_THE_RUN) for part in range(PARTS_OF_THE_RUN + 1)]
    return [fmean(differences[start:end]) for start, end in pairwise(cuts)]


def check_side(side: Path, tuned: Path) -> dict[str, Any]:
    """How both were tuned.

    Raises:
        ValueError: for a folder without a finished model, for a side whose tokens have no such choice as is compared
            here, or for models that were not tuned alike.
    """
    for folder in (side, tuned):
        for name in ("result.json", "run.json", "metrics.jsonl", "config.json"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"side={side.name} needs {folder / name}, which is not there; tune {folder.name} first"
                )
    config = MoDConfig.from_pretrained(side)
    routed = (config.routed_parts, config.router_type, config.training_routing)
    if not config.routed_layers or routed != ("block_keep_keys", "learned", "top_k"):
        raise ValueError(
            f"side={side.name} has no learned routers of blocks whose keys are kept, tuned under top-k routing; name a "
            "side of ours"
        )
    ours, theirs = read_json(side / "run.json"), read_json(tuned / "run.json")
    ways = [{name: value for name, value in of["train"].items() if name not in MAY_CHANGE} for of in (ours, theirs)]
    if ways[0] != ways[1] or ours["text"]["key"] != theirs["text"]["key"]:
        raise ValueError(
            f"side={side.name} was not tuned as {tuned.name} was: options or text differ in their run.json; tune one "
            "of them again"
        )
    if ours["train"]["max_steps"] < PARTS_OF_THE_RUN:
        raise ValueError(f"side={side.name} was tuned for fewer than {PARTS_OF_THE_RUN} steps; tune it for longer")
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", help="name of the side's folder in --runs, such as ours-0.8-0")
    parser.add_argument("--tune", type=existing, nargs="+", required=True)
    parser.add_argument("--conversations", type=existing)
    parser.add_argument("--test", type=test_file, nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    folder = arguments.runs / arguments.side
    tuned_folder = arguments.runs / f"tuned-{folder.name.split('-')[-1]}"
    tuned_as = check_side(folder, tuned_folder)
    by_step = gap_by_step(folder, tuned_folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tests = dict(arguments.test)
    texts = texts_of(
        [str(file) for file in arguments.tune],
        None if arguments.conversations is None else str(arguments.conversations),
        {name: str(file) for name, file in tests.items()},
        load_tokenizer(str(folder)),
        tuned_as["text"]["options"]["sequence_length"],
        WINDOW,
        arguments.windows,
        arguments.runs,
    )
    if texts.corpus.key != tuned_as["text"]["key"]:
        raise ValueError(
            "tune and conversations are not what the models were tuned on, so that held-out text may have been seen; "
            "give the files of then"
        )
    side, tuned = (MoDForCausalLM.from_pretrained(path).eval() for path in (folder, tuned_folder))
    loss = {"tuned": losses(tuned, texts), "chosen": losses(side, texts)}
    with choosing_by_norm(side):
        loss["by_norm"] = losses(side, texts)
    with all_entering(side):
        loss["all_enter"] = losses(side, texts)
    record = {
        "side": arguments.side,
        "map_rank": side.config.bypass_rank or None,
        "loss": loss,
        "by_step": by_step,
        "train": tuned_as["train"],
        "tuning": tuned_as["tuning"],
        "windows": arguments.windows,
        "text": tuned_as["text"]["key"],
        "test": {name: contents(file) for name, file in tests.items()},
        **provenance(side.device),
    }
    with (arguments.out / "gap.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
