"""What of PyTorch's compiler has no public name, in one place: these may change with every release of torch."""

from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir


def can_compile(device: torch.device) -> bool:
    """Whether there is what compiling for a device needs: on the CPU a C++ compiler, which no other asks for."""
    if device.type != "cpu":
        return True
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def require_compiler(option: str, device: torch.device) -> None:
    """Raises ValueError, naming the option, where there is not what compiling for a device needs."""
    if not can_compile(device):
        raise ValueError(f"{option} needs a C++ compiler; install one, such as g++")


def any_length(tensor: Tensor, dim: int) -> None:
    """Has one graph serve every length of a dimension.

    Of one that was only dynamic the compiler would note on which side of a few thousand it is, and it would compile
    anew in the middle of a text.
    """
    torch._dynamo.decorators.mark_unbacked(tensor, dim)


def load_native(source: str) -> None:
    """Compiles C++ source for this processor, or takes it from the disk, and loads it; its operators are there then."""
    CppCodeCache.load(source)


def compiler_cache() -> Path:
    """The folder where compiled graphs are kept."""
    return Path(cache_dir())
