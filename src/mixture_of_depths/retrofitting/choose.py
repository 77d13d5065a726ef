"""Who skips where: one budget for the whole model, spread over its blocks where skipping costs least.

With c_l the capacity of block l, minimised is the rise of the loss that is expected of all blocks together,

    sum over l of loss_l m_l(c_l) / m_l(1/2)    with    sum over l of price_l(c_l) <= share - 1,

where loss_l is the measured rise with half of the tokens entering block l alone, m_l(c) what is missed of it at the
capacity c (see `measure.py`), and price_l(c) what routing the block adds to the FLOPs per token, or to the bytes that
are read for a decoded token, over those of the whole dense model: as a rule it is below 0. A block may stay dense, at
no rise. Rises are taken to add up, and none is taken for less than half the median: one alone may be measured as
nothing, and even below, where several are not.

By Lagrange's method: for a rise per unit of the budget, every block takes the capacity at which its own rise and price
weigh least, and that rate is lowered until the budget is just kept to. What is left then goes, step by step, to where
it saves most.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mixture_of_depths.model.configuration import MoDConfig, capacity_tokens
from mixture_of_depths.model.flops import decode_bytes, forward_flops_per_token
from mixture_of_depths.options import RetrofitOptions
from mixture_of_depths.retrofitting.measure import BlockImportance, routed_config

# Capacities between 0 and 1 that a block can get.
STEPS = 64
# Each halves the range of the rate.
BISECTIONS = 100


def spread_budget(
    importance: list[BlockImportance], dense: MoDConfig, options: RetrofitOptions, sequence_length: int
) -> dict[int, float]:
    """The blocks to route, by their index, and their capacities; see the file's description.

    Raises:
        ValueError: when routing all blocks at the least capacity would not be enough.
    """
    check_share(dense, options, sequence_length)
    (least,) = options.capacity
    capacities = [least, *(step / STEPS for step in range(1, STEPS) if step / STEPS > least)]
    prices = {capacity: _price(dense, options, capacity, sequence_length) for capacity in capacities}
    # At the highest ones router and map may take more than is skipped. The last stands for a dense block.
    prices = {capacity: price for capacity, price in prices.items() if price < 0} | {1.0: 0.0}
    capacities, price_C = list(prices), np.array(list(prices.values()))
    least_loss = float(np.median([max(block.loss, 0.0) for block in importance])) / 2
    floored = [replace(block, loss=max(block.loss, least_loss)) for block in importance]
    rise_LC = np.array([[block.expected_loss(c) for c in capacities[:-1]] + [0.0] for block in floored])
    # What all blocks may save together, as a negative number.
    budget = (wanted_share(options) - 1) * (1 + 1e-12)

    def taken(rate: float) -> np.ndarray:
        return (rise_LC + rate * price_C).argmin(axis=1)

    low, high = 0.0, 1e-9
    while price_C[taken(high)].sum() > budget and high < 1e30:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if price_C[taken(middle)].sum() <= budget else (middle, high)
    chosen_L = _filled(taken(high), rise_LC, price_C, budget)
    return {block: capacities[c] for block, c in enumerate(chosen_L.tolist()) if c < len(capacities) - 1}


def _filled(chosen_L: np.ndarray, rise_LC: np.ndarray, price_C: np.ndarray, budget: float) -> np.ndarray:
    """What each block takes once what is left of the budget is spent, each time where it saves most for its price."""
    chosen_L, blocks_L = chosen_L.copy(), np.arange(len(chosen_L))
    while True:
        added_LC = price_C[None] - price_C[chosen_L][:, None]
        saved_LC = rise_LC[blocks_L, chosen_L][:, None] - rise_LC
        fits_LC = (added_LC > 0) & (saved_LC >= 0) & (price_C[chosen_L].sum() + added_LC <= budget)
        if not fits_LC.any():
            return chosen_L
        gain_LC = np.where(fits_LC, saved_LC / np.where(fits_LC, added_LC, 1), -np.inf)
        block, capacity = np.unravel_index(gain_LC.argmax(), gain_LC.shape)
        chosen_L[block] = capacity


def _price(dense: MoDConfig, options: RetrofitOptions, capacity: float, sequence_length: int) -> float:
    """What one block at a capacity adds to the share of the model, where a dense one adds 0."""
    return share_of(dense, {0: capacity}, options, sequence_length) - 1


def wanted_share(options: RetrofitOptions) -> float:
    return options.flops_share if options.decode_share is None else options.decode_share


def share_of(dense: MoDConfig, capacities: dict[int, float], options: RetrofitOptions, sequence_length: int) -> float:
    """What `flops_share`, or `decode_share` where it is given, bounds, with the blocks routed at these capacities."""
    config = routed_config(dense, **routed_fields(dense, options, capacities))
    measure = flops_share if options.decode_share is None else decode_share
    return measure(config, dense, sequence_length)


def flops_share(config: MoDConfig, dense: MoDConfig, sequence_length: int) -> float:
    """FLOPs per token of a forward pass over those of the dense model."""
    return forward_flops_per_token(config, sequence_length) / forward_flops_per_token(dense, sequence_length)


def decode_share(config: MoDConfig, dense: MoDConfig, context_length: int) -> float:
    """Bytes read for a decoded token of one sequence, after `context_length` tokens, over those of the dense model."""
    return decode_bytes(config, context_length).total / decode_bytes(dense, context_length).total


def check_share(dense: MoDConfig, options: RetrofitOptions, sequence_length: int) -> None:
    """Raises ValueError when routing all blocks would not come down to the share."""
    (capacity,) = options.capacity
    least = share_of(dense, dict.fromkeys(range(dense.num_hidden_layers), capacity), options, sequence_length)
    if least > wanted_share(options):
        name = "flops_share" if options.decode_share is None else "decode_share"
        raise ValueError(
            f"{name}={wanted_share(options)} cannot be reached with capacity={capacity}: with all blocks routed the "
            f"share is {least:.3f}; raise it, or lower the capacity"
        )


def given_capacities(options: RetrofitOptions) -> dict[int, float]:
    """The capacities of the blocks that the options name."""
    blocks, capacity = options.routed_layers or (), options.capacity
    return dict(zip(blocks, capacity * len(blocks) if len(capacity) == 1 else capacity, strict=True))


def check_capacities(options: RetrofitOptions, sequence_length: int) -> None:
    """Raises ValueError for a capacity of one token, which the first one is."""
    for capacity in options.capacity:
        if capacity_tokens(capacity, sequence_length) < 2:
            raise ValueError(
                f"capacity={capacity} of sequence_length={sequence_length} is one token, which the first one is; raise "
                "one of them until their product is at least 2"
            )


def routed_kind(dense: MoDConfig, options: RetrofitOptions) -> dict[str, Any]:
    """Fields of the configuration that say how blocks are routed, but not which."""
    rank = options.bypass_rank
    return {
        "routed_parts": options.routed_parts,
        "bypass_rank": min(128, dense.hidden_size // 4) if rank is None else rank,
        "router_type": options.router_type,
        "causal_router": options.causal_router,
    }


def routed_fields(dense: MoDConfig, options: RetrofitOptions, capacities: dict[int, float]) -> dict[str, Any]:
    """All fields of the configuration that say what is routed."""
    blocks = sorted(capacities)
    return {
        **routed_kind(dense, options),
        "routed_layers": blocks,
        "capacity": [capacities[block] for block in blocks],
    }
