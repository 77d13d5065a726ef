"""Held-out loss under top-k and under causal routing, and what the routers do there."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mixture_of_depths.evaluation.adapters import Adapted, without_adapters
from mixture_of_depths.evaluation.calibration import using_causal_router
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.model.routing import Routing
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Source
from mixture_of_depths.text.packing import Sequences

# Tokens of a forward pass: with a vocabulary of 49,152, their logits are 0.8 GB.
TOKENS = 4096


@dataclass(frozen=True)
class CausalEvaluation:
    """What one causal router did.

    Attributes:
        loss: in nats per token, when it decides.
        accuracy: share of the decisions in which it agrees with top-k, under top-k routing.
        share_entering: share of the tokens that enter each routed block when it decides, by block index.
    """

    loss: float
    accuracy: float
    share_entering: dict[int, float]


@dataclass(frozen=True)
class ExpertEvaluation:
    """What became of the tokens that entered one block with experts; means over the batches.

    Attributes:
        share: tokens that each expert took and, at the end, each no-op got, over the choices.
        dropped: share of the choices, or under expert choice of the tokens, that found no place.
    """

    share: list[float]
    dropped: float


@dataclass(frozen=True)
class Evaluation:
    """What a pass over held-out sequences found; losses in nats per token.

    Attributes:
        loss_top_k: loss when the k largest router weights of the sequence decide, which looks ahead.
        loss_causal: loss when every token decides by itself, as in sampling; equal to the above where nothing looks
            ahead.
        bits_per_byte: of the causal loss.
        causal_routers: figures of each causal router that was asked for, the configured one first; empty without
            routed blocks.
        experts: figures of each block with experts that any token entered, by its index, under "top_k" and under
            "causal" routing; empty without experts.
        tokens: number of tokens that were predicted.
    """

    loss_top_k: float
    loss_causal: float
    bits_per_byte: float
    causal_routers: dict[str, CausalEvaluation]
    experts: dict[Routing, dict[int, ExpertEvaluation]]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Adapted,
    sequences: Sequences,
    end_of_text: int,
    bytes_per_token: float,
    max_sequences: int | None = None,
    batch_size: int | None = None,
    bf16: bool = False,
    all_causal_routers: bool = True,
    console: Console | None = None,
) -> Evaluation:
    """Evaluates a model on packed sequences.

    Args:
        model: the model, under peft's adapters or not; it is left in the mode it came in.
        sequences: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bytes_per_token: bytes of UTF-8 per token of this text.
        max_sequences: how many sequences to use, evenly spaced; None for all.
        batch_size: sequences per forward pass; None for 16, or fewer where those are more than 4,096 tokens.
        bf16: whether to compute under bf16 autocast.
        all_causal_routers: whether to try every causal router the model has, or only the configured one.
        console: where progress is shown; None for nowhere.
    """
    base = without_adapters(model)
    batch_size = batch_size or max(1, min(16, TOKENS // len(sequences[0]["input_ids"])))
    count = len(sequences) if max_sequences is None else min(max_sequences, len(sequences))
    chosen = np.linspace(0, len(sequences) - 1, count).round().astype(int).tolist()

    def run(routing: Routing) -> _Pass:
        name, number = f"{routing.replace('_', '-')} routing", math.ceil(count / batch_size)
        text = batches(sequences, chosen, end_of_text, batch_size, base.device)
        return _run(base, track(text, name, total=number, console=console, disable=console is None), routing)

    was_training = base.training
    base.eval()
    precision = torch.autocast(base.device.type, torch.bfloat16) if bf16 else nullcontext()
    names = base.config.causal_routers
    by_router: dict[str, CausalEvaluation] = {}
    try:
        # The causal pass has shapes that depend on the data, which a compiled block would not accept.
        with precision, torch.compiler.set_stance("force_eager"):
            causal = run("causal")
            top_k = run("top_k") if base.config.looks_ahead else causal
            for name in names if all_causal_routers else names[:1]:
                with using_causal_router(base, name):
                    # The configured one decided above.
                    decided = causal if name == names[0] else run("causal")
                    compared = top_k if name == names[0] else run("top_k")
                    by_router[name] = CausalEvaluation(
                        decided.loss, sum(compared.agreeing.values()) / len(compared.agreeing), decided.entering
                    )
    finally:
        base.train(was_training)
    passes: dict[Routing, _Pass] = {"top_k": top_k, "causal": causal}
    return Evaluation(
        loss_top_k=top_k.loss,
        loss_causal=causal.loss,
        bits_per_byte=causal.loss / math.log(2) / bytes_per_token,
        causal_routers=by_router,
        experts={name: seen.experts for name, seen in passes.items()} if base.config.has_experts else {},
        tokens=causal.tokens,
    )


def mean_of(evaluations: Sequence[Evaluation], sources: Sequence[Source]) -> Evaluation:
    """The mean of the evaluations of several sources by their shares; that of one is as it is.

    Bits per byte are the mean loss over the mean bytes per token. A block with experts that no token of a source
    entered has the mean of the others.
    """
    first = evaluations[0]
    if len(evaluations) == 1:
        return first

    def mean(figures: Iterable[Any]) -> Any:
        pairs = zip(sources, figures, strict=True)
        known = [(source.share, np.asarray(figure)) for source, figure in pairs if figure is not None]
        total = np.asarray(sum(share * figure for share, figure in known))
        return (total / sum(share for share, _ in known)).tolist()

    def mean_of_router(name: str) -> CausalEvaluation:
        each = [evaluation.causal_routers[name] for evaluation in evaluations]
        entering = {block: mean(one.share_entering[block] for one in each) for block in each[0].share_entering}
        return CausalEvaluation(mean(one.loss for one in each), mean(one.accuracy for one in each), entering)

    def mean_of_experts(routing: Routing, block: int) -> ExpertEvaluation:
        each = [evaluation.experts[routing].get(block) for evaluation in evaluations]
        return ExpertEvaluation(mean(one and one.share for one in each), mean(one and one.dropped for one in each))

    loss = mean(evaluation.loss_causal for evaluation in evaluations)
    return Evaluation(
        loss_top_k=mean(evaluation.loss_top_k for evaluation in evaluations),
        loss_causal=loss,
        bits_per_byte=loss / math.log(2) / mean(source.bytes_per_token for source in sources),
        causal_routers={name: mean_of_router(name) for name in first.causal_routers},
        experts={
            routing: {
                block: mean_of_experts(routing, block)
                for block in sorted({block for evaluation in evaluations for block in evaluation.experts[routing]})
            }
            for routing in first.experts
        },
        tokens=sum(evaluation.tokens for evaluation in evaluations),
    )


@dataclass(frozen=True)
class _Pass:
    """What one pass over the text gave.

    Attributes:
        loss: mean over the predicted tokens.
        tokens: number of predicted tokens.
        entering: share of the tokens that entered each routed block.
        agreeing: share of the tokens of each routed block that the causal router would have treated alike.
        experts: figures of each block with experts.
    """

    loss: float
    tokens: int
    entering: dict[int, float]
    agreeing: dict[int, float]
    experts: dict[int, ExpertEvaluation]


def _run(model: MoDForCausalLM, batches_of_text: Iterable[dict[str, Tensor]], routing: Routing) -> _Pass:
    """Takes the batches through the model one by one; of each only sums are kept."""
    loss, predicted, seen = 0.0, 0, 0
    entering: Counter[int] = Counter()
    agreeing: Counter[int] = Counter()
    passes: Counter[int] = Counter()
    experts: dict[int, np.ndarray] = {}
    for batch in batches_of_text:
        output = model(**batch, use_cache=False, routing=routing, output_routing=True, skip_logits=True)
        labels = batch["labels"][:, 1:].numel()
        loss, predicted = loss + output.lm_loss.item() * labels, predicted + labels
        seen += batch["labels"].numel()
        for layer_idx, layer in enumerate(output.routing):
            if layer is not None:
                entering[layer_idx] += int(layer.entered.sum())
                agreeing[layer_idx] += int((layer.enters_by_itself == layer.entered).sum())
        for layer_idx, layer in enumerate(output.expert_routing):
            if layer is not None:
                figures = np.array([*layer.share.tolist(), layer.dropped.item()])
                experts[layer_idx] = experts.get(layer_idx, 0) + figures
                passes[layer_idx] += 1
    means = {layer: (total / passes[layer]).tolist() for layer, total in experts.items()}
    return _Pass(
        loss=loss / predicted,
        tokens=predicted,
        entering={layer: count / seen for layer, count in entering.items()},
        agreeing={layer: count / seen for layer, count in agreeing.items()},
        experts={layer: ExpertEvaluation(share, dropped) for layer, (*share, dropped) in means.items()},
    )
