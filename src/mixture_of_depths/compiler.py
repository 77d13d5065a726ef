"""What of PyTorch's compiler has no public name, in one place: these may change with every release of torch."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch._inductor.codecache import CppCodeCache
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir


def missing_compiler(device: torch.device) -> str | None:
    """What compiling for a device needs and is not there, a C++ compiler on the CPU or Triton on CUDA, or None."""
    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            named = os.environ.get("CXX")
            if named is None:
                return "a C++ compiler; install one, such as g++"
            return f"a C++ compiler, and CXX={named!r} does not run as one; set CXX to one that does, such as g++"
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton; install the package triton, or on Windows triton-windows"
    return None


def require_compiler(what: str, device: torch.device) -> None:
    """Raises ValueError, naming what is to be compiled, where there is not what compiling for a device needs."""
    missing = missing_compiler(device)
    if missing is not None:
        raise ValueError(f"{what} needs {missing}")


def any_length(tensor: Tensor, dim: int) -> None:
    """Has one graph serve every length of a dimension.

    Of one that was only dynamic the compiler would note on which side of a few thousand it is, and it would compile
    anew in the middle of a text.
    """
    torch._dynamo.decorators.mark_unbacked(tensor, dim)


def load_native(source: str) -> Any:
    """Compiles C++ source for this processor, or takes it from the disk, and loads it.

    Returns:
        The library, for ctypes; its operators are PyTorch's then.

    Raises:
        ValueError: when the compiler fails.
    """
    try:
        # The compiler is told otherwise by default, which halves the speed of products.
        return CppCodeCache.load(source, extra_flags=("-ffp-contract=fast",))
    except CppCompileError as error:
        compiler = get_cpp_compiler()
        raise ValueError(
            f"the C++ compiler {compiler} failed; set CXX to another one, such as g++:\n{error}"
        ) from error


def compiler_cache() -> Path:
    """The folder where compiled graphs are kept."""
    return Path(cache_dir())


def trace_unknown_sizes() -> None:
    """Has the compiler, from now on, trace operators whose results have sizes that only the step knows."""
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
