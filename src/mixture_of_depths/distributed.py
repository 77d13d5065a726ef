"""What the processes of one run agree on: who writes, who failed, who was told to stop.

They are started by `torchrun` or `accelerate launch`; without one there is a single process, and nothing here waits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist

from mixture_of_depths.device import chosen_device

T = TypeVar("T")
# The others wait for process 0 while it prepares text.
LONGEST_WAIT = timedelta(hours=2)


def meet(device: torch.device) -> None:
    """Meets the other processes of a run that computes on a kind of device; only the first call does anything.

    Raises:
        ValueError: for one GPU by its number where a launcher gives each process its own.
    """
    state = PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
    if state.distributed_type != DistributedType.NO and device.index is not None:
        raise ValueError(
            f"device='{device}' is one GPU, and a launcher gives each process its own; give device='{device.type}'"
        )


def processes() -> PartialState:
    """This process among those of the run; the first call meets the others, unless `meet` has."""
    return PartialState(cpu=chosen_device().type == "cpu", timeout=LONGEST_WAIT)


def is_main() -> bool:
    """Whether this is process 0, the one that writes."""
    return processes().process_index == 0


@contextmanager
def failing_together() -> Iterator[None]:
    """Waits for all processes at its end, and raises in all of them what a user can mend and one of them met.

    Without it the others would wait for one that is gone.

    Raises:
        ValueError, OSError, SafetensorError: the process' own; in the others a ValueError with the same message.
    """
    if processes().num_processes == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        own = error
    messages: list[Any] = [None] * processes().num_processes
    dist.all_gather_object(messages, None if own is None else str(own))
    if own is not None:
        raise own
    for message in messages:
        if message is not None:
            raise ValueError(message)


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, in all processes; it runs there only, and its errors are raised everywhere."""
    returned: list[Any] = [None]
    with failing_together():
        if is_main():
            returned[0] = work()
    if processes().num_processes > 1:
        dist.broadcast_object_list(returned, src=0)
    return returned[0]


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if processes().num_processes == 1:
        return flag
    set_anywhere = torch.tensor(int(flag), device=processes().device)
    dist.all_reduce(set_anywhere, dist.ReduceOp.MAX)
    return bool(set_anywhere)


def average_(tensors: list[Tensor]) -> None:
    """Replaces tensors that differ between the processes by their mean over them."""
    if processes().num_processes > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= processes().num_processes


def leave() -> None:
    """Ends the connection to the others."""
    processes().destroy_process_group()
