"""Mixture-of-Depths transformers (arXiv:2404.02258) for PyTorch and the Hugging Face ecosystem.

The public names, listed in `__init__.pyi`, are imported when first used, so that the command line answers at once. The
model is registered with transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` as soon as these are there.
"""

import lazy_loader

from mixture_of_depths.registration import register_with_transformers

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_with_transformers()
