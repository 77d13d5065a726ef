"""Mixture-of-Depths transformers (arXiv:2404.02258) for PyTorch and the Hugging Face ecosystem.

The names below are imported when first used, so that the command line answers at once. Using any of the model classes
also registers them with transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixture_of_depths.cache import MoDCache
    from mixture_of_depths.configuration import MoDConfig
    from mixture_of_depths.modeling import MoDForCausalLM, MoDModel

__version__ = "0.1.0"
__all__ = ["MoDCache", "MoDConfig", "MoDForCausalLM", "MoDModel", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("MoDCache", "MoDConfig", "MoDForCausalLM", "MoDModel"):
        return getattr(import_module("mixture_of_depths.modeling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
