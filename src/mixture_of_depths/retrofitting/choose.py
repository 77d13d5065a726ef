"""Who skips where: the blocks to route, and their capacity, for a share of the FLOPs."""

from bisect import bisect_left
from dataclasses import replace
from typing import Any

from mixture_of_depths.model.configuration import MoDConfig, capacity_tokens
from mixture_of_depths.model.flops import forward_flops_per_token
from mixture_of_depths.options import RetrofitOptions
from mixture_of_depths.retrofitting.measure import BlockImportance, routed_config


def choose_blocks(
    importance: list[BlockImportance], dense: MoDConfig, options: RetrofitOptions, sequence_length: int
) -> list[int]:
    """The blocks to route: those that cost least, as many as it takes to come down to the share of the FLOPs.

    Raises:
        ValueError: when routing all blocks would not be enough.
    """
    check_share(dense, options, sequence_length)
    order = sorted(range(len(importance)), key=lambda layer_idx: importance[layer_idx].lower_ranked)
    chosen: list[int] = []
    while not chosen or flops_share(dense, sorted(chosen), options, sequence_length) > options.flops_share:
        chosen.append(order[len(chosen)])
    return sorted(chosen)


def full_capacity(dense: MoDConfig, routed_layers: list[int], options: RetrofitOptions, sequence_length: int) -> float:
    """The largest capacity of these blocks, the options' at least, that keeps to the share of the FLOPs at a length."""

    def is_too_much(entering: int) -> bool:
        filled = replace(options, capacity=entering / sequence_length)
        return flops_share(dense, routed_layers, filled, sequence_length) > options.flops_share

    counts = range(capacity_tokens(options.capacity, sequence_length) + 1, sequence_length)
    more = bisect_left(counts, True, key=is_too_much)
    return counts[more - 1] / sequence_length if more else options.capacity


def check_share(dense: MoDConfig, options: RetrofitOptions, sequence_length: int) -> None:
    """Raises ValueError when routing all blocks would not come down to the share of the FLOPs."""
    least = flops_share(dense, list(range(dense.num_hidden_layers)), options, sequence_length)
    if least > options.flops_share:
        raise ValueError(
            f"flops_share={options.flops_share} cannot be reached with capacity={options.capacity}: with all blocks "
            f"routed the share is {least:.3f}; raise it, or lower the capacity"
        )


def flops_share(dense: MoDConfig, routed_layers: list[int], options: RetrofitOptions, sequence_length: int) -> float:
    """FLOPs per token of a forward pass with some blocks routed, over those of the dense model."""
    config = routed_config(dense, **routed_fields(options, routed_layers))
    return forward_flops_per_token(config, sequence_length) / forward_flops_per_token(dense, sequence_length)


def routed_fields(options: RetrofitOptions, routed_layers: list[int]) -> dict[str, Any]:
    return {
        "routed_layers": routed_layers,
        "capacity": options.capacity,
        "router_type": options.router_type,
        "causal_router": options.causal_router,
    }
