"""Which runs went wrong on their way: those whose training loss rose far after it had fallen.

How well such a run ends is chance more than it is its family's. It is named and still counts, so that nobody chooses.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

LOST_RISE = 0.3
"""Rise of the training loss, in nats, from which a run counts as lost."""


def loss_rise(losses: Sequence[float]) -> float:
    """How far the training loss rose above the lowest that it had been before, in nats; 0 when it never did.

    Single batches scatter, so means of a fiftieth of the steps are compared, of five steps at least. The first three
    means are passed over, since a loss may rise while the learning rate does; so are the last steps that fill no mean.

    Args:
        losses: training loss of every step, in nats per token, with what routers and experts add to it.
    """
    size = max(5, len(losses) // 50)
    means = [fmean(losses[start : start + size]) for start in range(0, len(losses) - size + 1, size)]
    lowest, rise = math.inf, 0.0
    for mean in means[3:]:
        rise = max(rise, mean - lowest)
        lowest = min(lowest, mean)
    return rise


def lost(records: Iterable[dict[str, Any]]) -> list[str]:
    """The names of the runs that count as lost, of those whose records tell how their loss rose."""
    return sorted(record["name"] for record in records if record.get("loss_rise", 0.0) >= LOST_RISE)
