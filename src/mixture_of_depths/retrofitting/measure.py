"""What skipping costs a dense model: the model with fitted routed blocks, and the rise of its loss with each of them.

Shapes: L blocks, D hidden size, R rank of the maps.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from mixture_of_depths.evaluation.calibration import through_blocks
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Router
from mixture_of_depths.retrofitting.fit import CAPACITIES, Fit, missed_shares
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.packing import Sequences

# The capacity at which the rise of the loss is measured.
MEASURED_CAPACITY = 0.5


@dataclass(frozen=True)
class BlockImportance:
    """What it costs to route one block alone.

    Attributes:
        loss: by how much the loss rises at a capacity of `MEASURED_CAPACITY`, in nats per token.
        missed: at evenly spaced capacities from 0 to 1, the share that is missed of what all tokens would miss by
            skipping it.
    """

    loss: float
    missed: tuple[float, ...]

    def expected_loss(self, capacity: float) -> float:
        """By how much the loss should rise at a capacity: as the measured rise, in proportion to what is missed."""

        def missed(at: float) -> float:
            return float(np.interp(at, np.linspace(0, 1, len(self.missed)), self.missed))

        measured = missed(MEASURED_CAPACITY)
        return max(self.loss, 0.0) * missed(capacity) / measured if measured > 0 else 0.0


def routed_config(dense: MoDConfig, **changes: Any) -> MoDConfig:
    """The configuration of `routed_from`'s model."""
    return dense.changed(router_activation="straight_through", router_norm=True, first_token_enters=True, **changes)


def routed_from(dense: MoDForCausalLM, **changes: Any) -> MoDForCausalLM:
    """A copy of a model without routed blocks that has some; `changes` are fields of its configuration.

    Chosen tokens meet a block unchanged, so that at a capacity of 1 the model computes what the dense one does.
    """
    model = MoDForCausalLM(routed_config(dense.config, **changes))
    nn.Module.to(model, dense.device, dense.dtype)
    incompatible = model.load_state_dict(dense.state_dict(), strict=False)
    added = (".router.", ".bypass.")
    assert not incompatible.unexpected_keys
    assert all(any(part in name for part in added) for name in incompatible.missing_keys)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model


def routers_of(model: MoDForCausalLM) -> dict[int, Router]:
    """The routers of a model by the index of their block."""
    layers = cast(list[DecoderLayer], list(model.model.layers))
    return {layer_idx: layer.router for layer_idx, layer in enumerate(layers) if layer.router is not None}


@torch.no_grad()
def set_fit(model: MoDForCausalLM, fit: Fit) -> None:
    """Gives every routed block the router, where it is learned, and the map that were fitted to it."""
    for layer_idx, router in routers_of(model).items():
        if not router.is_random:
            router.proj.weight.copy_(fit.router_LD[layer_idx : layer_idx + 1])
        bypass = cast(DecoderLayer, model.model.layers[layer_idx]).bypass
        if bypass is not None:
            assert fit.down_LRD is not None and fit.up_LDR is not None
            bypass.down.weight.copy_(fit.down_LRD[layer_idx])
            bypass.up.weight.copy_(fit.up_LDR[layer_idx])


@contextmanager
def at_capacity(router: Router, fraction: float) -> Iterator[None]:
    """Within it, a router has another capacity."""
    before, router.capacity = router.capacity, fraction
    try:
        yield
    finally:
        router.capacity = before


@contextmanager
def beginning_at(model: MoDForCausalLM, layer_idx: int) -> Iterator[None]:
    """Within it, a model has no blocks before one of them, whose input it takes as `inputs_embeds`."""
    layers = model.model.layers
    model.model.layers = layers[layer_idx:]
    try:
        yield
    finally:
        model.model.layers = layers


@torch.no_grad()
def top_k_loss(model: MoDForCausalLM, text: Iterable[dict[str, Tensor]], bf16: bool) -> float:
    """The mean of the losses of batches under top-k routing, in nats per token; `bf16` under autocast."""
    losses = []
    for batch in text:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            losses.append(model(**batch, use_cache=False, routing="top_k", skip_logits=True).lm_loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def measure_importance(
    dense: MoDForCausalLM,
    fit: Fit | None,
    kind: dict[str, Any],
    sequences: Sequences,
    end_of_text: int,
    bf16: bool = False,
    measured: Sequence[BlockImportance] = (),
    console: Console | None = None,
) -> Iterator[BlockImportance]:
    """What it costs to route each block of a model alone, one after the other.

    Args:
        dense: a model without routed blocks.
        fit: what was fitted to its blocks; None for random routers without maps.
        kind: fields of the configuration that say how blocks are routed, but not which, and at what capacity.
        sequences: data set with the column `input_ids`; the states of all its tokens are held at once.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.
        measured: what was measured before of the first blocks, which are left out.
        console: where progress is shown.
    """
    count = dense.config.num_hidden_layers
    model = routed_from(dense, **kind, routed_layers=list(range(count)), capacity=1.0).eval()
    if fit is not None:
        set_fit(model, fit)
    routers = routers_of(model)
    if fit is None or model.config.router_type == "random":
        missed_LC = (1 - torch.linspace(0, 1, CAPACITIES)).expand(count, -1)
    else:
        missed_LC = missed_shares(dense, fit, sequences, end_of_text, bf16)
    text = list(batches(sequences, range(len(sequences)), end_of_text, 1, dense.device))
    before = top_k_loss(model, text, bf16)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
    # What the blocks before the one that is measured compute is the same each time: every block has its own input.
    blocks = track(through_blocks(model, text, "top_k", autocast), "measuring blocks", count, console=console)
    for layer_idx, (_, passing) in enumerate(blocks):
        if layer_idx >= len(measured):
            inputs = (
                {"inputs_embeds": hidden_1TD, "position_ids": batch["position_ids"], "labels": batch["labels"]}
                for batch, (hidden_1TD, _) in zip(text, passing, strict=True)
            )
            with at_capacity(routers[layer_idx], MEASURED_CAPACITY), beginning_at(model, layer_idx):
                rise = top_k_loss(model, inputs, bf16) - before
            yield BlockImportance(rise, tuple(missed_LC[layer_idx].tolist()))
