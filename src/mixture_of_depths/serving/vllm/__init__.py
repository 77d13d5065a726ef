"""The model in vLLM: continuous batching, paged caches and all of OpenAI's protocol, with blocks that tokens skip.

vLLM finds `register` by an entry point of this package, in each of its processes, and then loads checkpoints of ours
like any other (`vllm serve runs/mod`). `model.py` has the blocks, `places.py` where the keys of their tokens lie, and
`limits.py` what does not go together with them.
"""

# pyright: reportMissingImports=false

ARCHITECTURE = "MoDForCausalLM"


def register() -> None:
    """Tells vLLM of the model, and of what to look at before it loads one; may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    # It loads the configuration, too, which makes itself known to transformers.
    from mixture_of_depths.serving.vllm.limits import Limits

    ModelRegistry.register_model(ARCHITECTURE, "mixture_of_depths.serving.vllm.model:MoDForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Limits
