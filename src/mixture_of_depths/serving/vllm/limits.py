"""What of vLLM does not go together with blocks that tokens skip: switched off, or refused by name, before loading."""

# pyright: reportMissingImports=false

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.config import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import is_quantized_kv_cache

from mixture_of_depths.model.configuration import MoDConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


def sources_digest(folder: Path) -> str:
    """A number for what the Python files of a folder say: a version's name is the same while it is worked on."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()


class Limits(VerifyAndUpdateConfig):
    """Called by vLLM with all of its settings, once the configuration of the model is read."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuses what cannot be right, and switches off what would be wrong.

        Raises:
            ValueError: naming the setting or the field, its value and the remedy.
        """
        config = vllm_config.model_config.hf_config
        assert isinstance(config, MoDConfig) and config.num_key_value_heads is not None
        if config.has_experts:
            raise ValueError(
                f"num_experts={config.num_experts}: this package has no experts in vLLM; leave out vLLM "
                "(mod serve --engine transformers)"
            )
        if not config.routed_layers:
            return
        if isinstance(vllm_config.additional_config, dict):
            # In the key under which vLLM keeps what it has compiled, which calls the operators of these files.
            vllm_config.additional_config["mixture_of_depths"] = sources_digest(Path(__file__).parent)
        refuse_what_moves_tokens(vllm_config)
        parts = set(map(config.routed_part, range(config.num_hidden_layers)))
        size, heads = vllm_config.parallel_config.tensor_parallel_size, config.num_key_value_heads
        if "block_keep_keys" in parts and heads % size:
            raise ValueError(
                f"tensor_parallel_size={size} does not divide num_key_value_heads={heads}, as blocks with "
                "routed_parts='block_keep_keys' need; give a divisor"
            )
        if parts & {"block", "block_keep_keys"}:
            refuse_what_turns_keys_into_fewer_bits(vllm_config)
            refuse_what_moves_keys(vllm_config)
        if "block" in parts:
            refuse_guesses(vllm_config)
            if vllm_config.cache_config.enable_prefix_caching:
                vllm_config.cache_config.enable_prefix_caching = False
                logger.warning(
                    "Prefix caching is off: a block with routed_parts='block' keeps the keys of the tokens that enter "
                    "side by side, so that the page of a prefix does not hold the prefix's keys."
                )
        if not current_platform.is_cpu() and vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
            logger.warning("CUDA graphs are off: how many tokens enter a block differs from step to step.")


def refuse_what_moves_tokens(vllm_config: "VllmConfig") -> None:
    """Refuses what takes the tokens of a block for all tokens of the step."""
    if vllm_config.lora_config is not None:
        raise ValueError(
            "enable_lora=True: an adapter finds its tokens by their place in the step, and a routed block gets only "
            "some of them; merge the adapter into the checkpoint"
        )
    if (size := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ValueError(f"pipeline_parallel_size={size}: give 1; tensor_parallel_size divides the blocks themselves")
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError("enable_dbo or ubatch_size is given: a routed block takes a step as one; leave it out")
    if (size := vllm_config.parallel_config.decode_context_parallel_size) > 1:
        raise ValueError(f"decode_context_parallel_size={size}: give 1; tensor_parallel_size divides the blocks")


def refuse_what_turns_keys_into_fewer_bits(vllm_config: "VllmConfig") -> None:
    """Refuses a cache for which queries would have to be quantised, too: those of chosen tokens are not."""
    if is_quantized_kv_cache(dtype := vllm_config.cache_config.cache_dtype):
        raise ValueError(
            f"kv_cache_dtype={dtype!r}: blocks in which attention is routed take keys as they are; give 'auto'"
        )


def refuse_what_moves_keys(vllm_config: "VllmConfig") -> None:
    """Refuses what takes keys out of the cache and puts them there, which it does where vLLM's attention begins."""
    moving = {
        "kv_offloading_size": vllm_config.cache_config.kv_offloading_size,
        "kv_transfer_config": vllm_config.kv_transfer_config and vllm_config.kv_transfer_config.kv_connector,
    }
    for name, value in moving.items():
        if value is not None:
            raise ValueError(
                f"{name}={value}: the keys of blocks in which attention is routed are stored by this package, which "
                "moves none between caches; leave it out"
            )


def refuse_guesses(vllm_config: "VllmConfig") -> None:
    """Refuses what takes a key's place in the cache for its token's place in the sequence."""
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "speculative_config is given, and a token that was guessed wrongly leaves its keys in blocks with "
            "routed_parts='block'; leave it out"
        )
