"""What the retrofit is compared with, and what all sides are tuned and tested on."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch
from retrofit_questions import QUESTIONS, is_right
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mixture_of_depths import (
    DataOptions,
    MoDConfig,
    MoDForCausalLM,
    SamplingOptions,
    calibrate,
    evaluate,
    forward_flops_per_token,
    pack,
    prepare,
    read_documents,
    tokenize,
)
from mixture_of_depths.files import locked, read_json, write_aside
from mixture_of_depths.model.modeling import MoDModelOutput
from mixture_of_depths.options import RetrofitOptions
from mixture_of_depths.provenance import model_digest
from mixture_of_depths.retrofitting.choose import routed_fields, routed_kind, spread_budget
from mixture_of_depths.retrofitting.fit import (
    Fit,
    fit_blocks,
    passes,
    router_weights,
    scaled,
    with_constant,
)
from mixture_of_depths.retrofitting.measure import (
    BlockImportance,
    measure_importance,
    routed_config,
    routed_from,
    routers_of,
    set_fit,
    top_k_loss,
)
from mixture_of_depths.retrofitting.record import Measured
from mixture_of_depths.retrofitting.skipping import fit_to_skipping
from mixture_of_depths.retrofitting.tune import fitted_start
from mixture_of_depths.sampling.answers import answered
from mixture_of_depths.text.batches import batches, kinds, spread
from mixture_of_depths.text.conversations import Conversation
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.text.documents import Skipped, read_all, split_documents
from mixture_of_depths.text.packing import Sequences

# What the starts of sides are made by; another name for every change, since records of before are of other starts.
METHOD = "maps fitted block after block to the tokens that skip"
# What is tuned on, of what the command names; another name for every change, too.
MIXED = "pieces of files and of code, with as many characters each as the conversations"
# Characters of such a piece, about a thousand tokens.
PIECE = 4000
# The capacity of the former retrofit, at which its blocks were chosen.
FORMER_CAPACITY = 0.125
# At an answer's end, or where none comes.
ANSWER = SamplingOptions(max_new_tokens=40, temperature=0.0, top_k=0)


@dataclass(frozen=True)
class Texts:
    """What all sides are tuned, calibrated and tested on.

    Attributes:
        corpus: to tune on: files, Python code and conversations, as many characters of each.
        windows: to test on, by kind of text.
        kinds: of the tuning text, to calibrate on, by the same kinds.
    """

    corpus: Corpus
    windows: dict[str, Sequences]
    kinds: dict[str, datasets.Dataset]


def first_of(texts: list[str], characters: int) -> list[str]:
    """The first texts with a number of characters in all, and what of the last one is more."""
    taken = []
    for text in texts:
        if characters <= 0:
            break
        taken.append(text)
        characters -= len(text)
    return taken


def pieces_of(texts: list[str], characters: int) -> list[str]:
    """Pieces of equal length from all over the texts, with about a number of characters in all."""
    pieces = [text[start : start + PIECE] for text in texts for start in range(0, len(text) - PIECE + 1, PIECE)]
    count = min(characters // PIECE, len(pieces))
    return [pieces[i * len(pieces) // count] for i in range(count)]


def characters_said(conversations: str) -> int:
    """Characters of all messages of a file of conversations.

    Raises:
        ValueError: when it holds none.
    """
    every = read_all(DataOptions(data=(conversations,)), Skipped())
    characters = sum(
        len(str(message["content"])) for one in every if isinstance(one, Conversation) for message in one.messages
    )
    if not characters:
        raise ValueError(f"conversations={conversations} holds no conversation; give .jsonl with records of messages")
    return characters


def write_once(path: Path, text: str) -> None:
    """Writes a file, unless it is there and the same: another side's call may be reading it, or writing it."""
    with locked(path.with_name(f".{path.name}.lock")):
        if not path.exists() or path.read_text() != text:
            write_aside(path, text)


def texts_of(
    tune: list[str],
    conversations: str | None,
    test: dict[str, str],
    tokenizer: Any,
    length: int,
    window: int,
    count: int,
    folder: Path,
) -> Texts:
    """Reads the files, and writes what is tuned on into a folder, for `prepare`.

    With conversations, pieces of the files and of code have as many characters each as these. Without them all of the
    files counts, and as many characters of code.
    """
    from_files = list(read_documents(DataOptions(data=tuple(tune)), Skipped()))
    fraction = DataOptions().validation_fraction
    every, held_out, _ = split_documents(list(read_documents(DataOptions(), Skipped())), fraction)
    characters = sum(map(len, from_files))
    if conversations is None:
        code = first_of(every, characters)
    else:
        characters = min(characters, characters_said(conversations))
        from_files, code = pieces_of(from_files, characters), pieces_of(every, characters)
        if not from_files:
            raise ValueError(f"tune={tune} holds fewer than {PIECE:,} characters; give more text")
    path = folder / "tuning.jsonl"
    write_once(path, "".join(json.dumps({"text": text}) + "\n" for text in [*from_files, *code]))
    sources = (str(path),) if conversations is None else (str(path), conversations)
    # A conversation is short: of few of them, more are to be held out.
    options = DataOptions(data=sources, sequence_length=length, tokenizer="of the source", validation_fraction=0.06)
    corpus = prepare(options, tokenizer)
    windows: dict[str, Sequences] = {
        name: spread(
            pack(tokenize(list(read_documents(DataOptions(data=(file,)), Skipped())), tokenizer), window, name), count
        )
        for name, file in test.items()
    }
    windows["code"] = spread(pack(tokenize(held_out, tokenizer), window, "code"), count)
    by_kind = dict.fromkeys(test, pack(tokenize(from_files, tokenizer), length, "tuning"))
    by_kind["code"] = pack(tokenize(code, tokenizer), length, "tuning")
    if conversations is not None:
        windows["conversations"] = kinds(corpus.validation)["conversations"]
        assert isinstance(corpus.train, datasets.Dataset)
        by_kind["conversations"] = kinds(corpus.train)["conversations"]
    return Texts(corpus, windows, by_kind)


def tested(
    model: MoDForCausalLM, texts: Texts, tokenizer: PreTrainedTokenizerBase, bf16: bool, calibrates: bool
) -> dict[str, Any]:
    """By kind of text the loss under causal routing, and the share of tokens that enters a routed block; and answers.

    Args:
        model: the model.
        texts: what is tested on.
        tokenizer: the model's.
        bf16: whether products are in bf16.
        calibrates: whether the thresholds are set before each text on the tuning text of its kind, so that the answers
            are given with those of the last; else they stay as they are.
    """
    told: dict[str, Any] = {"loss": {}, "entering": {}}
    for name, window in texts.windows.items():
        if calibrates and model.config.causal_routers:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                calibrate(model, spread(texts.kinds[name], 32), texts.corpus.end_of_text)
        evaluation = evaluate(
            model, window, texts.corpus.end_of_text, 1.0, batch_size=2, bf16=bf16, all_causal_routers=False
        )
        told["loss"][name] = evaluation.loss_causal
        for causal in evaluation.causal_routers.values():
            told["entering"][name] = mean(causal.share_entering.values())
    losses = told["loss"]
    told["perplexity"] = {name: exp(loss) for name, loss in losses.items() if name != "conversations"}
    told["conversation_loss"] = losses.get("conversations")
    return told | answers_right(model, tokenizer)


def answers_right(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How many of the questions are answered right, and what is said, with the thresholds as they are."""
    asked = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    said = [
        one.messages[-1]["content"]
        for start in range(0, len(asked), 16)
        for one in answered(model.eval(), tokenizer, asked[start : start + 16], ANSWER)
    ]
    return {"answers_right": count_right(said), "questions": len(said), "answers": said}


def count_right(said: Sequence[str]) -> int:
    """How many of the answers, one for each question, are right."""
    return sum(is_right(text, words) for text, (_, words) in zip(said, QUESTIONS, strict=True))


def without(dense: MoDForCausalLM, dropped: list[int]) -> MoDForCausalLM:
    """The model with some of its blocks taken out."""
    kept = [i for i in range(dense.config.num_hidden_layers) if i not in dropped]
    model = MoDForCausalLM(dense.config.changed(num_hidden_layers=len(kept)))
    nn.Module.to(model, dense.device)
    weights = {name: weight for name, weight in dense.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        for name, weight in dense.state_dict().items():
            if name.startswith(prefix):
                weights[f"model.layers.{new}.{name.removeprefix(prefix)}"] = weight
    model.load_state_dict(weights)
    model.generation_config = dense.generation_config
    return model


def map_fields(fit: Fit, blocks: list[int], length: int) -> dict[str, Any]:
    """Fields of a model of which blocks are replaced by their maps: of a sequence the first token alone enters."""
    assert fit.down_LRD is not None
    rank = fit.down_LRD.shape[1]
    return {
        "routed_layers": blocks,
        "capacity": 1 / length,
        "bypass_rank": rank,
        "causal_router": "threshold",
        # First tokens of later documents in a row enter, too; under top-k there would be a place for one alone.
        "training_routing": "causal",
    }


def replaced(dense: MoDForCausalLM, fit: Fit, blocks: list[int], length: int) -> MoDForCausalLM:
    """The model with blocks replaced by their maps."""
    model = routed_from(dense, **map_fields(fit, blocks, length))
    set_fit(model, fit)
    for router in routers_of(model).values():
        router.requires_grad_(False)
        # Never above its threshold of 0.
        router.proj.weight.data.zero_()
    return model


@torch.no_grad()
def fit_norms(dense: MoDForCausalLM, text: Sequences, end_of_text: int, bf16: bool) -> Fit:
    """The former retrofit's routers: fitted to the norm of what a block adds, and not to its logarithm; no maps."""
    count, size = dense.config.num_hidden_layers, dense.config.hidden_size
    moments_LDD = torch.zeros(count, size + 1, size + 1, dtype=torch.float64)
    targets_LD = torch.zeros(count, size + 1, dtype=torch.float64)
    for blocks in passes(dense, text, end_of_text, bf16):
        for layer_idx, (hidden_ND, delta_ND) in enumerate(blocks):
            inputs_ND = with_constant(scaled(dense, hidden_ND)).double().cpu()
            moments_LDD[layer_idx] += inputs_ND.T @ inputs_ND
            targets_LD[layer_idx] += inputs_ND.T @ delta_ND.norm(dim=-1).double().cpu()
    sums = zip(moments_LDD, targets_LD, strict=True)
    return Fit(torch.stack([router_weights(moments_DD, targets_D) for moments_DD, targets_D in sums]).float())


class KeptTeacher(nn.Module):
    """The dense model as a teacher: what it computes of a sequence is kept in a folder, for every other side and seed.

    Attributes:
        saved_seconds: what computing it took, of all that was read from the folder instead.
    """

    def __init__(self, dense: MoDForCausalLM, folder: Path) -> None:
        super().__init__()
        self.dense, self.folder, self.saved_seconds = dense, folder, 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def lm_head(self) -> nn.Module:
        return self.dense.lm_head

    def model(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> MoDModelOutput:
        """As the dense model's own, for a batch [B, T]."""
        batch = torch.stack([input_ids, position_ids.expand_as(input_ids)]).cpu()
        path = self.folder / f"{hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16]}.safetensors"
        if path.exists():
            kept = load_file(path, device=str(input_ids.device))
            self.saved_seconds += kept["seconds"].item()
            return MoDModelOutput(last_hidden_state=kept["hidden_BTD"])
        start = time.perf_counter()
        hidden_BTD = self.dense.model(input_ids, position_ids=position_ids, use_cache=use_cache).last_hidden_state
        seconds = torch.tensor(time.perf_counter() - start)
        # Another side's call may be at the same sequence.
        aside = path.with_suffix(f".{os.getpid()}")
        save_file({"hidden_BTD": hidden_BTD.contiguous(), "seconds": seconds}, aside)
        aside.replace(path)
        return MoDModelOutput(last_hidden_state=hidden_BTD)


class Sides:
    """The starts of all sides; what they are chosen by is measured once and kept in a folder.

    Args:
        dense: the model.
        source: where it comes from.
        texts: what is tuned on.
        folder: where it is kept.
        options: of the retrofit; its share is given with each side.
        bf16: whether to measure under bf16 autocast, which is slow on processors without it.
    """

    def __init__(
        self, dense: MoDForCausalLM, source: str, texts: Texts, folder: Path, options: RetrofitOptions, bf16: bool
    ) -> None:
        self.dense, self.texts, self.folder, self.options = dense, texts, folder, options
        self.source, self.digest, self.bf16 = source, model_digest(dense), bf16
        self.length = len(texts.corpus.train[0]["input_ids"])
        self.measuring = spread(texts.corpus.train, options.measure_sequences)

    def _measured(self, name: str) -> Measured:
        facts = {
            "source": self.source,
            "source_digest": self.digest,
            "text": self.texts.corpus.key,
            "fit": self.options.fit_sequences,
            "bf16": self.bf16,
        }
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return Measured(folder, {**facts, "measure": self.options.measure_sequences})

    def fit(self, rank: int) -> Fit:
        """What is fitted to the blocks, with maps of a rank."""
        text, end = spread(self.texts.corpus.train, self.options.fit_sequences), self.texts.corpus.end_of_text
        return self._measured(f"rank-{rank}").fit_once(lambda: fit_blocks(self.dense, text, end, rank, self.bf16))

    def fitted_to_skipping(self, model: MoDForCausalLM) -> MoDForCausalLM:
        """The model, its maps fitted to the tokens that skip; in place."""
        text, end = spread(self.texts.corpus.train, self.options.fit_sequences), self.texts.corpus.end_of_text
        if model.config.bypass_rank:
            fit_to_skipping(model, text, end, self.bf16)
        return model

    @property
    def rank(self) -> int:
        return routed_kind(self.dense.config, self.options)["bypass_rank"]

    def importance(self, options: RetrofitOptions) -> list[BlockImportance]:
        """What routing each block costs."""
        kind, end = routed_kind(self.dense.config, options), self.texts.corpus.end_of_text
        fit, parts = self.fit(kind["bypass_rank"]), kind["routed_parts"]
        place = f"rank-{kind['bypass_rank']}" + ("" if parts == RetrofitOptions.routed_parts else f"-{parts}")
        return self._measured(place).measure_rest(
            self.dense.config.num_hidden_layers,
            lambda before: measure_importance(self.dense, fit, kind, self.measuring, end, self.bf16, before),
        )

    def capacities(self, options: RetrofitOptions) -> dict[int, float]:
        """Of the blocks that the retrofit routes."""
        return spread_budget(self.importance(options), self.dense.config, options, self.length)

    def rises(self, name: str, variant: Callable[[int], MoDForCausalLM]) -> list[float]:
        """By how much the loss rises in a variant of the model for each block, under top-k routing."""
        path = self._measured(name).place / "rises.json"
        known: list[float] = read_json(path) if path.exists() else []
        end, before = self.texts.corpus.end_of_text, None
        text = list(batches(self.measuring, range(len(self.measuring)), end, 1, self.dense.device))
        for block in track(range(len(known), self.dense.config.num_hidden_layers), name):
            before = top_k_loss(self.dense, text, self.bf16) if before is None else before
            known.append(top_k_loss(variant(block).eval(), text, self.bf16) - before)
            write_aside(path, json.dumps(known))
        return known

    def cheapest(self, rises: list[float], config_of: Callable[[list[int]], MoDConfig], share: float) -> list[int]:
        """The blocks with the least rises, as many as it takes to come down to a share of the FLOPs."""
        order = sorted(range(len(rises)), key=lambda block: rises[block])
        dense = forward_flops_per_token(self.dense.config, self.length)
        for count in range(1, len(order)):
            blocks = sorted(order[:count])
            if forward_flops_per_token(config_of(blocks), self.length) / dense <= share:
                return blocks
        raise ValueError(f"share={share} is less than the embedding and the head alone")

    def start(self, side: str, share: float) -> tuple[MoDForCausalLM, dict[str, Any]]:
        """The model that is tuned, and what was chosen for it."""
        dense, length = self.dense, self.length
        if side in ("dense", "tuned"):
            return without(dense, []), {}
        if side in ("ours", "random"):
            options = RetrofitOptions(flops_share=share, bypass_rank=self.options.bypass_rank)
            capacities = self.capacities(options)
            if side == "random":
                options = RetrofitOptions(router_type="random", bypass_rank=self.options.bypass_rank)
            model = fitted_start(dense, self.fit(self.rank), options, capacities)
            return self.fitted_to_skipping(model), {"capacities": capacities}
        if side == "former":
            text, end = spread(self.texts.corpus.train, self.options.fit_sequences), self.texts.corpus.end_of_text
            fit = self._measured("former").fit_once(lambda: fit_norms(dense, text, end, self.bf16))
            options = RetrofitOptions(routed_parts="block", bypass_rank=0)

            def config_at(blocks: list[int], capacity: float) -> MoDConfig:
                return routed_config(
                    dense.config, **routed_fields(dense.config, options, dict.fromkeys(blocks, capacity))
                )

            rises = self.rises("former", lambda block: fitted_start(dense, fit, options, {block: FORMER_CAPACITY}))
            blocks = self.cheapest(rises, lambda some: config_at(some, FORMER_CAPACITY), share)
            wanted = share * forward_flops_per_token(dense.config, length)
            counts = range(int(FORMER_CAPACITY * length), length)
            fitting = [n for n in counts if forward_flops_per_token(config_at(blocks, n / length), length) <= wanted]
            capacities = dict.fromkeys(blocks, max(fitting) / length)
            return fitted_start(dense, fit, options, capacities), {"capacities": capacities}
        if side == "dropped":
            rises = self.rises("dropped", lambda block: without(dense, [block]))
            blocks = self.cheapest(
                rises, lambda some: dense.config.changed(num_hidden_layers=len(rises) - len(some)), share
            )
            return without(dense, blocks), {"blocks": blocks}
        if side == "linear":
            fit = self.fit(self.rank)

            rises = self.rises(f"linear-{self.rank}", lambda block: replaced(dense, fit, [block], length))
            blocks = self.cheapest(
                rises, lambda some: routed_config(dense.config, **map_fields(fit, some, length)), share
            )
            return self.fitted_to_skipping(replaced(dense, fit, blocks, length)), {"blocks": blocks}
        raise ValueError(f"side={side} is none of {', '.join(SIDES)}")


SIDES = ("dense", "tuned", "ours", "former", "dropped", "linear", "random")


def map_rank(side: str, dense: MoDConfig, options: RetrofitOptions) -> int | None:
    """The rank of a side's maps; None for a side without."""
    return routed_kind(dense, options)["bypass_rank"] if side in ("ours", "linear", "random") else None
