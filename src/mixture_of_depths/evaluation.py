"""Held-out loss under top-k and under causal routing, and what the routers do there."""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from mixture_of_depths.data import Collator
from mixture_of_depths.modeling import MoDForCausalLM
from mixture_of_depths.routing import Routing


@dataclass(frozen=True)
class Evaluation:
    """What one pass over held-out blocks found; losses in nats per token.

    Attributes:
        loss_top_k: loss when the k largest router weights of the sequence decide, which looks ahead.
        loss_causal: loss when every token decides by itself, as in sampling; equal to the above without routed blocks.
        bits_per_byte: of the causal loss.
        causal_accuracy: share of the tokens for which the causal decision and top-k agree, under top-k routing; None
            without routed blocks.
        share_entering: share of the tokens that enter each routed block under causal routing, by block index.
        tokens: number of tokens that were predicted.
    """

    loss_top_k: float
    loss_causal: float
    bits_per_byte: float
    causal_accuracy: float | None
    share_entering: dict[int, float]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: MoDForCausalLM,
    blocks: datasets.Dataset,
    end_of_text: int,
    bytes_per_token: float,
    max_blocks: int | None = None,
    batch_size: int = 16,
    bf16: bool = False,
) -> Evaluation:
    """Evaluates a model on packed blocks.

    Args:
        model: the model; it is left in the mode it came in.
        blocks: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bytes_per_token: bytes of UTF-8 per token of this text.
        max_blocks: how many blocks to use, evenly spaced; None for all.
        batch_size: blocks per forward pass.
        bf16: whether to compute under bf16 autocast.
    """
    count = len(blocks) if max_blocks is None else min(max_blocks, len(blocks))
    chosen = np.linspace(0, len(blocks) - 1, count).round().astype(int).tolist()
    collate = Collator(end_of_text)
    was_training = model.training
    model.eval()
    tally = _Tally(model.config.routed_layers or [])
    precision = torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()
    try:
        # The causal pass has shapes that depend on the data, which a compiled block would not accept.
        with precision, torch.compiler.set_stance("force_eager"):
            for start in range(0, count, batch_size):
                rows = blocks.select(chosen[start : start + batch_size])
                batch = {name: value.to(model.device) for name, value in collate(list(rows)).items()}  # pyright: ignore
                tally.add(model, batch)
    finally:
        model.train(was_training)
    return tally.result(bytes_per_token)


class _Tally:
    def __init__(self, routed_layers: list[int]) -> None:
        self.routed_layers = routed_layers
        self.loss: dict[Routing, float] = {"top_k": 0.0, "causal": 0.0}
        self.predicted = self.seen = self.agreed = 0
        self.entered = dict.fromkeys(routed_layers, 0)

    def add(self, model: MoDForCausalLM, batch: dict[str, Tensor]) -> None:
        predicted = batch["labels"][:, 1:].numel()
        self.predicted += predicted
        self.seen += batch["labels"].numel()
        for routing in self.loss if self.routed_layers else ("causal",):
            output = model(**batch, use_cache=False, routing=routing, output_routing=True)
            self.loss[routing] += output.lm_loss.item() * predicted
            for layer_idx in self.routed_layers:
                layer = output.routing[layer_idx]
                if routing == "top_k":
                    self.agreed += int(((layer.causal_logits > 0) == layer.entered).sum())
                else:
                    self.entered[layer_idx] += int(layer.entered.sum())

    def result(self, bytes_per_token: float) -> Evaluation:
        causal = self.loss["causal"] / self.predicted
        return Evaluation(
            loss_top_k=self.loss["top_k"] / self.predicted if self.routed_layers else causal,
            loss_causal=causal,
            bits_per_byte=causal / math.log(2) / bytes_per_token,
            causal_accuracy=self.agreed / self.seen / len(self.routed_layers) if self.routed_layers else None,
            share_entering={layer_idx: count / self.seen for layer_idx, count in self.entered.items()},
            tokens=self.predicted,
        )


@torch.no_grad()
def blocks_used(model: MoDForCausalLM, input_ids: Tensor) -> Tensor:
    """How many blocks each token went through under causal routing, dense ones included; of shape [B, T]."""
    routing = model(input_ids=input_ids, use_cache=False, routing="causal", output_routing=True).routing
    dense = sum(layer is None for layer in routing)
    entered = [layer.entered.long() for layer in routing if layer is not None]
    return torch.stack([torch.full_like(input_ids, dense), *entered]).sum(dim=0)
