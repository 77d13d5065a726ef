"""What skipping costs a dense model: routers fitted to it, and the rise of its loss without each block.

Shapes: B batch, T tokens, N tokens of a batch, L blocks, D hidden size.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import datasets
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Router
from mixture_of_depths.text.batches import batches

# A router's weights decay towards zero by this share of its inputs' mean square.
RIDGE = 0.01


@dataclass(frozen=True)
class BlockImportance:
    """By how much the loss rises when one block alone is skipped, in nats per token.

    Attributes:
        bypassed: when all tokens skip it.
        lower_ranked: when the capacity's share of the tokens, chosen by the fitted router, enters it.
    """

    bypassed: float
    lower_ranked: float


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
    assert not incompatible.unexpected_keys and all(".router." in name for name in incompatible.missing_keys)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model


@contextmanager
def _capacity(router: Router, fraction: float) -> Iterator[None]:
    before, router.capacity = router.capacity, fraction
    try:
        yield
    finally:
        router.capacity = before


@torch.no_grad()
def fit_routers(dense: MoDForCausalLM, sequences: datasets.Dataset, end_of_text: int, bf16: bool = False) -> Tensor:
    """Routers for every block, fitted by least squares to the norm of the block's delta; of shape [L, D].

    Scaled so that a router's output has a deviation of 1 on the tokens given. First tokens, which enter anyway, do not
    count.

    Args:
        dense: a model without routed blocks.
        sequences: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.

    Raises:
        ValueError: for sequences of first tokens alone.
    """
    config, device = dense.config, dense.device
    layers, size = list(dense.model.layers), config.hidden_size
    moments_LDD = torch.zeros(len(layers), size + 1, size + 1, device=device)
    products_LD = torch.zeros(len(layers), size + 1, device=device)
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0] - args[0])))
        for layer in layers
    ]
    try:
        for batch in batches(sequences, range(len(sequences)), end_of_text, 1, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                dense(**batch, use_cache=False)
            chooses_BT = batch["position_ids"] != 0
            for layer_idx, (hidden_BTD, delta_BTD) in enumerate(seen):
                hidden_ND = F.rms_norm(hidden_BTD[chooses_BT].float(), (size,), eps=config.rms_norm_eps)
                hidden_ND = F.pad(hidden_ND, (0, 1), value=1.0)
                moments_LDD[layer_idx] += hidden_ND.T @ hidden_ND
                products_LD[layer_idx] += hidden_ND.T @ delta_BTD[chooses_BT].float().norm(dim=-1)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    if moments_LDD[0, -1, -1] == 0:
        raise ValueError(
            "sequences have no token to fit the routers to: first tokens of documents do not count, and no other is "
            "there; give longer sequences"
        )
    weights_LD = _ridge(moments_LDD, products_LD)[:, :-1].to(moments_LDD.dtype)
    count = moments_LDD[:, -1:, -1]
    means_LD = moments_LDD[:, -1, :-1] / count
    outer_LDD = moments_LDD[:, :-1, :-1] / count[..., None] - means_LD[:, :, None] * means_LD[:, None, :]
    variance_L = (weights_LD[:, None] @ outer_LDD @ weights_LD[..., None]).flatten()
    return weights_LD / variance_L.clamp(min=1e-12).sqrt()[:, None]


def _ridge(moments_LDD: Tensor, products_LD: Tensor) -> Tensor:
    """Weights of least squares with decay, in float64, from sums over inputs whose last entry is a constant 1."""
    weights = []
    # One by one, and not by LU: that of a batch fails in some builds of MKL once the number of threads is set.
    for moments_DD, products_D in zip(moments_LDD, products_LD, strict=True):
        moments_DD, products_D = moments_DD.double(), products_D.double()
        decay_D = RIDGE * moments_DD.diagonal().mean().repeat(len(products_D))
        # The intercept is not held back.
        decay_D[-1] = 0
        lower_DD = torch.linalg.cholesky(moments_DD + decay_D.diag())
        weights.append(torch.cholesky_solve(products_D[:, None], lower_DD)[:, 0])
    return torch.stack(weights)


def routers_of(model: MoDForCausalLM) -> dict[int, Router]:
    """The routers of a model by the index of their block."""
    layers = cast(list[DecoderLayer], list(model.model.layers))
    return {layer_idx: layer.router for layer_idx, layer in enumerate(layers) if layer.router is not None}


@torch.no_grad()
def measure_importance(
    dense: MoDForCausalLM,
    weights_LD: Tensor | None,
    capacity: float,
    sequences: datasets.Dataset,
    end_of_text: int,
    bf16: bool = False,
    console: Console | None = None,
) -> list[BlockImportance]:
    """By how much the loss rises when a block is skipped, for every block of a model.

    Args:
        dense: a model without routed blocks.
        weights_LD (torch.Tensor | None): the fitted routers, of shape [blocks, D]; None for random ones.
        capacity: fraction of the tokens that enters.
        sequences: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.
        console: where progress is shown.
    """
    count = dense.config.num_hidden_layers
    kind = "random" if weights_LD is None else "learned"
    model = routed_from(dense, routed_layers=list(range(count)), capacity=1.0, router_type=kind).eval()
    routers = routers_of(model)
    set_routers(model, weights_LD)
    batches_of_text = list(batches(sequences, range(len(sequences)), end_of_text, 1, dense.device))

    def loss() -> float:
        total = 0.0
        for batch in batches_of_text:
            with torch.autocast(dense.device.type, torch.bfloat16, enabled=bf16):
                total += model(**batch, use_cache=False, routing="top_k", skip_logits=True).lm_loss.item()
        return total / len(batches_of_text)

    before, every, importance = loss(), model.model.layers, []
    for layer_idx in track(range(count), "measuring blocks", console=console):
        model.model.layers = nn.ModuleList([layer for i, layer in enumerate(every) if i != layer_idx])
        bypassed = loss() - before
        model.model.layers = every
        with _capacity(routers[layer_idx], capacity):
            importance.append(BlockImportance(bypassed, loss() - before))
    return importance


def set_routers(model: MoDForCausalLM, weights_LD: Tensor | None) -> None:
    """Gives every learned router of a model its block's row of `weights_LD`, of shape [blocks, D]."""
    for layer_idx, router in routers_of(model).items():
        if not router.is_random:
            assert weights_LD is not None
            router.proj.weight.data.copy_(weights_LD[layer_idx : layer_idx + 1])
