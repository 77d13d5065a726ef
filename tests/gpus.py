"""What tests of devices share: GPUs that PyTorch says are there, and that must not be woken; kernels without one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

# See `conftest.py`.
interpreted = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or there is a GPU, on which tests/test_gpu.py runs its kernels",
)


@contextmanager
def pretended_gpus(count: int) -> Iterator[list[torch.device]]:
    """PyTorch says that there are so many CUDA GPUs; yields those that were made the current one.

    Anything that would wake one fails.
    """
    taken: list[torch.device] = []

    def woken() -> None:
        raise AssertionError("CUDA was woken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "set_device", taken.append)
        patch.setattr(torch.cuda, "_lazy_init", woken)
        yield taken
