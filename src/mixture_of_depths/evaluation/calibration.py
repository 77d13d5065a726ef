"""Sets the causal routers so that, on given text, the share of tokens that enters a block equals its capacity.

So too the thresholds of experts with a capacity.

Shapes: B batch, T tokens, N tokens of all batches, E experts, D hidden size.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import datasets
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from mixture_of_depths.evaluation.adapters import Adapted, without_adapters
from mixture_of_depths.model.experts import ExpertMLP, ExpertRouter, ExpertRouting
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import LayerRouting, Router, Routing
from mixture_of_depths.options import CausalRouter
from mixture_of_depths.text.batches import batches, spread
from mixture_of_depths.text.packing import Lazy, Sequences

MAX_SEQUENCES = 128


@contextmanager
def using_causal_router(model: MoDForCausalLM, causal_router: CausalRouter) -> Iterator[None]:
    """Lets the model decide by another of its causal routers for a while.

    Raises:
        ValueError: when the model was not trained with it.
    """
    if causal_router not in model.config.causal_routers:
        raise ValueError(
            f"causal_router={causal_router} is not among those of this model: {model.config.causal_routers}"
        )
    # A router that peft trains is a copy, with its own copy of the configuration.
    configs = [model.config, *(module.config for module in model.modules() if isinstance(module, Router))]
    configured = model.config.causal_router
    for config in configs:
        config.causal_router = causal_router
    try:
        yield
    finally:
        for config in configs:
            config.causal_router = configured


@torch.no_grad()
def calibrate(
    model: Adapted,
    sequences: Sequences | Iterable[Mapping[str, Tensor]],
    end_of_text: int | None = None,
    batch_size: int = 16,
) -> None:
    """Shifts every causal router of a model, in place, so that its block's capacity is what enters on `sequences`.

    Blocks are taken in order of depth, each with those before it set already, under the causal routing that sampling
    uses. The threshold moves; of a predictor the last bias does. A router trained with the auxiliary loss has no
    constant of its own to move: set `config.causal_router = "threshold"` to sample with its threshold. Experts with a
    capacity are set to take its share of the tokens that the configured router lets in.

    Args:
        model: the model, under peft's adapters or not; it is left in the mode it came in. Of what peft trains in the
            place of the model's own, the copy that is active moves.
        sequences: text that was not trained on. Packed sequences, a data set with the column `input_ids`; or batches
            as the model is called with, of `input_ids` and, if they have them, `attention_mask` and `position_ids`, all
            of shape [B, T]: padding then does not count. `MAX_SEQUENCES` rows serve at most, of a data set spread
            evenly, of batches the first.
        end_of_text: the token after which a new document begins in a data set's sequences; None for batches.
        batch_size: sequences of a data set per forward pass.

    Raises:
        ValueError: for batches without `input_ids`, an `end_of_text` that is missing or has no use, or no text; and for
            a model of which blocks are offloaded.

    Warns:
        UserWarning: when the active adapter does not keep all that moves, so that it is saved without it, and the model
            and its other adapters change, too.
    """
    base = without_adapters(model)
    _check_constants(base)
    batches_of_text = list(_batches(base.device, sequences, end_of_text, batch_size))
    if not batches_of_text:
        raise ValueError("sequences holds no text; give at least one")
    was_training = base.training
    base.eval()
    names: tuple[CausalRouter | None, ...] = base.config.causal_routers or (None,)
    try:
        # A causal pass has shapes that depend on the data, which a compiled block would not accept.
        with torch.compiler.set_stance("force_eager"):
            for name in names:
                with nullcontext() if name is None else using_causal_router(base, name):
                    shifted = None if name == "auxiliary_loss" else name
                    with_experts = name == names[0] and base.config.expert_capacity is not None
                    if shifted or with_experts:
                        _shift_all(base, batches_of_text, shifted, with_experts)
    finally:
        base.train(was_training)


def _check_constants(base: MoDForCausalLM) -> None:
    """Refuses constants that are not in memory, and warns of those that the active adapter does not keep."""
    routers = {name: module for name, module in base.named_modules() if isinstance(module, Router | ExpertRouter)}
    for name, router in routers.items():
        if any(weight.is_meta for weight in router.parameters()):
            raise ValueError(f"{name} is offloaded, where it cannot be set; load the model without offloading")
    # Adapters may lie in the layers without a model of peft's around them.
    if not any(type(module).__module__.partition(".")[0] == "peft" for module in base.modules()):
        return
    moved = {id(constant) for constant in _constants(base)}
    named = [*base.named_parameters(), *base.named_buffers()]
    # A bias that is trained is one that the adapter keeps.
    shared = [
        name
        for name, tensor in named
        if id(tensor) in moved and ".modules_to_save." not in name and not tensor.requires_grad
    ]
    if shared:
        others = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        warnings.warn(
            f"the adapter does not keep {shared[0]}{others}: what is set here moves in the model that all adapters "
            'share, and the adapter will be saved without it; make it with modules_to_save=["router"], or merge it '
            "before",
            # Three frames: this one, calibrate's, and that of its decorator.
            stacklevel=4,
        )


def _constants(base: MoDForCausalLM) -> Iterator[Tensor]:
    """What calibration moves: of routers under adapters, the copies that are active."""
    for layer in cast(list[DecoderLayer], list(base.model.layers)):
        if layer.router is not None and "threshold" in base.config.causal_routers:
            yield layer.router.threshold
        if layer.router is not None and "predictor" in base.config.causal_routers:
            assert layer.router.predictor is not None
            yield layer.router.predictor.down_proj.bias
        if base.config.expert_capacity is not None:
            threshold = cast(ExpertMLP, layer.mlp).router.threshold
            assert threshold is not None
            yield threshold


def _batches(
    device: torch.device,
    sequences: Sequences | Iterable[Mapping[str, Tensor]],
    end_of_text: int | None,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """Batches of at most `MAX_SEQUENCES` rows together, whose hidden states are all held between two blocks."""
    names = ("input_ids", "attention_mask", "position_ids")
    if isinstance(sequences, datasets.Dataset | Lazy):
        if end_of_text is None:
            raise ValueError("end_of_text=None: give the token that ends a document of a data set, or -1 for none")
        sequences = spread(sequences, MAX_SEQUENCES)
        sequences = batches(sequences, range(len(sequences)), end_of_text, batch_size, device)
    elif end_of_text is not None:
        raise ValueError(f"end_of_text={end_of_text} has no use with batches, whose positions tell; leave it out")
    rows = 0
    for batch in sequences:
        if "input_ids" not in batch:
            raise ValueError(f"sequences holds a batch of {sorted(batch)}; give input_ids")
        left = MAX_SEQUENCES - rows
        yield {name: batch[name][:left].to(device) for name in names if name in batch}
        rows += len(batch["input_ids"])
        if rows >= MAX_SEQUENCES:
            return


def _shift_all(
    model: MoDForCausalLM,
    batches_of_text: list[dict[str, Tensor]],
    causal_router: CausalRouter | None,
    with_experts: bool,
) -> None:
    """Takes all batches through the model together, block by block, each block set before they pass.

    A block is only ever called as a whole: its weights may be spread over processes, and come together for that.
    """
    for layer_idx, (layer, passing) in enumerate(through_blocks(model, batches_of_text, "causal")):
        if causal_router is not None and layer.router is not None:
            logits, is_first = [], []
            for hidden_BTD, others in passing:
                _, _, routing, _ = layer(hidden_BTD, **others)
                assert routing is not None
                real_BT = _real(hidden_BTD, others)
                logits.append(routing.causal_logits[real_BT])
                is_first.append((others["position_BT"] == 0).expand_as(real_BT)[real_BT])
            forced_N = torch.cat(is_first) & model.config.first_token_enters
            _shift(layer.router, causal_router, model.config.capacity_fraction(layer_idx), torch.cat(logits), forced_N)
            _gather_anew(model)
        if with_experts:
            _shift_experts(
                cast(ExpertMLP, layer.mlp).router,
                ((_real(hidden_BTD, others), *layer(hidden_BTD, **others)[2:]) for hidden_BTD, others in passing),
            )


def through_blocks(
    model: MoDForCausalLM,
    batches_of_text: Iterable[dict[str, Tensor]],
    routing: Routing,
    autocast: AbstractContextManager[object] | None = None,
) -> Iterator[tuple[DecoderLayer, list[tuple[Tensor, dict[str, Any]]]]]:
    """Every block, with the hidden states that each batch brings to it and what else it is given.

    All batches pass a block when the next one is asked for, as it is then; under `autocast`, if there is one.
    """
    autocast = autocast or nullcontext()
    with autocast:
        passing = [_entering_blocks(model, batch, routing) for batch in batches_of_text]
    for layer in cast(list[DecoderLayer], list(model.model.layers)):
        yield layer, passing
        with autocast:
            passing = [(layer(hidden_BTD, **others)[0], others) for hidden_BTD, others in passing]


def _entering_blocks(
    model: MoDForCausalLM, batch: dict[str, Tensor], routing: Routing
) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states of a batch before the first block, and what else every block is given."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []
    every = model.model.layers
    hook = every[0].register_forward_pre_hook(lambda _, args, others: seen.append((args[0], others)), with_kwargs=True)
    model.model.layers = every[:1]
    try:
        tokens = {name: value for name, value in batch.items() if name != "labels"}
        model(**tokens, use_cache=False, routing=routing, logits_to_keep=1)
    finally:
        model.model.layers = every
        hook.remove()
    return seen[0]


def _real(hidden_BTD: Tensor, others: dict[str, Any]) -> Tensor:
    """False for padding; of shape [B, T]."""
    real_BT = others["placement"].real
    return torch.ones_like(hidden_BTD[..., 0], dtype=torch.bool) if real_BT is None else real_BT


def _gather_anew(model: MoDForCausalLM) -> None:
    """Drops what a sharded model may still hold of weights gathered before they were moved."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _shift(router: Router, causal_router: CausalRouter, fraction: float, logits_N: Tensor, forced_N: Tensor) -> None:
    """Moves the constant of one router so that, with the forced ones, a fraction of the tokens enters."""
    # Where the forced ones fill the capacity, no other enters.
    entering = max(round(fraction * len(logits_N)) - int(forced_N.sum()), 0)
    sorted_N = logits_N[~forced_N].float().sort(descending=True).values
    if len(sorted_N) == 0:
        return
    last_in = sorted_N[max(entering, 1) - 1].item()
    first_out = sorted_N[entering].item() if entering < len(sorted_N) else -math.inf
    cut = (last_in + first_out) / 2 if math.isfinite(first_out) else last_in - 1
    if causal_router == "threshold":
        router.threshold.add_(cut)
    else:
        assert router.predictor is not None
        router.predictor.down_proj.bias.sub_(cut)


def _shift_experts(
    router: ExpertRouter, decisions: Iterable[tuple[Tensor, LayerRouting | None, ExpertRouting | None]]
) -> None:
    """Sets each expert's threshold so that of the tokens it was asked by, at most its capacity's share passes.

    Args:
        router: the experts' router.
        decisions: of every batch, which tokens are no padding, and what the routers of the block decided.
    """
    tokens, scores = 0, []
    for real_BT, routing, experts in decisions:
        if experts is not None:
            scores.append(experts.scores.flatten(0, 1))
            tokens += int((real_BT if routing is None else routing.entered).sum())
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
