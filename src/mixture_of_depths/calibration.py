"""Sets the causal routers so that, on given text, the share of tokens that enters a block equals its capacity."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import datasets
import torch

from mixture_of_depths.configuration import MoDConfig
from mixture_of_depths.data import batches
from mixture_of_depths.modeling import DecoderLayer, MoDForCausalLM


def causal_routers(config: MoDConfig) -> tuple[str, ...]:
    """The causal decisions a trained model can make: the one it was trained for, first, and the threshold."""
    if not config.routed_layers or config.router_type == "random":
        return ()
    return tuple(dict.fromkeys((config.causal_router, "threshold")))


@contextmanager
def using_causal_router(model: MoDForCausalLM, causal_router: str) -> Iterator[None]:
    """Lets the model decide by another of its causal routers for a while.

    Raises:
        ValueError: when the model was not trained with it.
    """
    configured = model.config.causal_router
    if causal_router not in causal_routers(model.config):
        raise ValueError(
            f"causal_router={causal_router} is not among those of this model: {causal_routers(model.config)}"
        )
    model.config.causal_router = causal_router
    try:
        yield
    finally:
        model.config.causal_router = configured


@torch.no_grad()
def calibrate(model: MoDForCausalLM, blocks: datasets.Dataset, end_of_text: int, batch_size: int = 16) -> None:
    """Shifts every causal router of a model, in place, so that its block's capacity is what enters on `blocks`.

    Blocks are taken in order of depth, each with those before it set already, under the causal routing that sampling
    uses. The threshold moves; of a predictor the last bias does. A router trained with the auxiliary loss has no
    constant of its own to move: set `config.causal_router = "threshold"` to sample with its calibrated threshold.

    Args:
        model: the model; it is left in the mode it came in.
        blocks: data set with the column `input_ids`; text that was not trained on.
        end_of_text: the token after which a new document begins.
        batch_size: blocks per forward pass.
    """
    was_training = model.training
    model.eval()
    for causal_router in causal_routers(model.config):
        if causal_router == "auxiliary_loss":
            continue
        with using_causal_router(model, causal_router), torch.compiler.set_stance("force_eager"):
            for layer_idx in model.config.routed_layers or []:
                logits = []
                for batch in batches(blocks, range(len(blocks)), end_of_text, batch_size, model.device):
                    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
                    output = model.model(**inputs, use_cache=False, routing="causal")
                    logits.append(output.routing[layer_idx].causal_logits.flatten())
                _shift(model, layer_idx, causal_router, torch.cat(logits))
    model.train(was_training)


def _shift(model: MoDForCausalLM, layer_idx: int, causal_router: str, logits_N: torch.Tensor) -> None:
    """Moves the constant of one router so that the capacity's share of `logits_N` would have been positive."""
    entering = round(model.config.capacity_fraction(layer_idx) * len(logits_N))
    sorted_N = logits_N.float().sort(descending=True).values
    last_in = sorted_N[max(entering, 1) - 1]
    first_out = sorted_N[entering] if entering < len(sorted_N) else torch.tensor(-math.inf)
    cut = (last_in + first_out) / 2 if first_out.isfinite() else last_in - 1
    router = cast(DecoderLayer, model.model.layers[layer_idx]).router
    assert router is not None
    if causal_router == "threshold":
        router.threshold.add_(cut)
    else:
        assert router.predictor is not None
        router.predictor.down_proj.bias.sub_(cut)
