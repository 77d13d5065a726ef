"""Sets the causal routers so that, on given text, the share of tokens that enters a block equals its capacity.

So too the thresholds of experts with a capacity.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import datasets
import torch
from torch import Tensor

from mixture_of_depths.model.experts import ExpertMLP, ExpertRouter, ExpertRouting
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import LayerRouting
from mixture_of_depths.options import CausalRouter
from mixture_of_depths.text.batches import batches, spread

MAX_SEQUENCES = 128


@contextmanager
def using_causal_router(model: MoDForCausalLM, causal_router: CausalRouter) -> Iterator[None]:
    """Lets the model decide by another of its causal routers for a while.

    Raises:
        ValueError: when the model was not trained with it.
    """
    configured = model.config.causal_router
    if causal_router not in model.config.causal_routers:
        raise ValueError(
            f"causal_router={causal_router} is not among those of this model: {model.config.causal_routers}"
        )
    model.config.causal_router = causal_router
    try:
        yield
    finally:
        model.config.causal_router = configured


@torch.no_grad()
def calibrate(model: MoDForCausalLM, sequences: datasets.Dataset, end_of_text: int, batch_size: int = 16) -> None:
    """Shifts every causal router of a model, in place, so that its block's capacity is what enters on `sequences`.

    Blocks are taken in order of depth, each with those before it set already, under the causal routing that sampling
    uses. The threshold moves; of a predictor the last bias does. A router trained with the auxiliary loss has no
    constant of its own to move: set `config.causal_router = "threshold"` to sample with its calibrated threshold.
    Experts with a capacity are set to take its share of the tokens that the configured router lets in, or the threshold
    in the place of the auxiliary loss.

    Args:
        model: the model; it is left in the mode it came in.
        sequences: data set with the column `input_ids`; text that was not trained on. `MAX_SEQUENCES` of them serve at
            most, spread evenly.
        end_of_text: the token after which a new document begins.
        batch_size: sequences per forward pass.
    """
    was_training = model.training
    model.eval()
    # Their hidden states are all held in memory between two blocks.
    sequences = spread(sequences, MAX_SEQUENCES)
    batches_of_text = list(batches(sequences, range(len(sequences)), end_of_text, batch_size, model.device))
    names = model.config.causal_routers
    shifted: tuple[CausalRouter, ...] = tuple(name for name in names if name != "auxiliary_loss")
    deciding = shifted or (model.config.causal_router,)
    # A causal pass has shapes that depend on the data, which a compiled block would not accept.
    with torch.compiler.set_stance("force_eager"):
        for position, name in enumerate(deciding):
            with using_causal_router(model, name) if names else nullcontext():
                _shift_all(model, batches_of_text, name if names else None, with_experts=position == 0)
    model.train(was_training)


def _shift_all(
    model: MoDForCausalLM,
    batches_of_text: list[dict[str, Tensor]],
    causal_router: CausalRouter | None,
    with_experts: bool,
) -> None:
    """Takes all batches through the model together, block by block, each block set before they pass."""
    passing = [_entering(model, batch) for batch in batches_of_text]
    for layer_idx, layer in enumerate(cast(list[DecoderLayer], list(model.model.layers))):
        if causal_router is not None and layer.router is not None:
            placed = [(hidden, others["position_BT"].expand(hidden.shape[:2])) for hidden, others in passing]
            logits_N = torch.cat([layer.router.logits(*tokens)[1].flatten() for tokens in placed])
            is_first_N = torch.cat([position_BT.flatten() == 0 for _, position_BT in placed])
            _shift(model, layer_idx, causal_router, logits_N, is_first_N & model.config.first_token_enters)
        if with_experts and isinstance(layer.mlp, ExpertMLP) and layer.mlp.router.threshold is not None:
            decided = (layer(hidden_BTD, **others) for hidden_BTD, others in passing)
            _shift_experts(layer.mlp.router, ((routing, experts) for *_, routing, experts in decided))
        passing = [(layer(hidden_BTD, **others)[0], others) for hidden_BTD, others in passing]


def _entering(model: MoDForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states of a batch before the first block, and what else every block is given under causal routing."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    every = model.model.layers
    hook = every[0].register_forward_pre_hook(lambda _, args, others: seen.append((args[0], others)), with_kwargs=True)
    model.model.layers = every[:1]
    try:
        model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, routing="causal")
    finally:
        model.model.layers = every
        hook.remove()
    return seen[0]


def _shift(model: MoDForCausalLM, layer_idx: int, causal_router: str, logits_N: Tensor, forced_N: Tensor) -> None:
    """Moves the constant of one router so that, with the forced ones, the capacity's share of the tokens enters."""
    entering = round(model.config.capacity_fraction(layer_idx) * len(logits_N)) - int(forced_N.sum())
    # Where the forced ones fill the capacity, no other enters.
    entering = max(entering, 0)
    sorted_N = logits_N[~forced_N].float().sort(descending=True).values
    if len(sorted_N) == 0:
        return
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


def _shift_experts(router: ExpertRouter, decisions: Iterator[tuple[LayerRouting | None, ExpertRouting | None]]) -> None:
    """Sets each expert's threshold so that of the tokens it was asked by, at most its capacity's share passes."""
    tokens, scores = 0, []
    for routing, experts in decisions:
        if experts is not None:
            scores.append(experts.scores.flatten(0, 1))
            tokens += len(scores[-1]) if routing is None else int(routing.entered.sum())
    assert router.threshold is not None
    if tokens == 0:
        return
    places = router.config.expert_places(tokens)
    sorted_NE = torch.cat(scores).sort(dim=0, descending=True).values
    threshold_E = torch.zeros_like(router.threshold)
    if places < len(sorted_NE):
        middle_E = (sorted_NE[places - 1] + sorted_NE[places]) / 2
        threshold_E = torch.where(sorted_NE[places] > 0, middle_E, 0)
    router.threshold.copy_(threshold_E)
