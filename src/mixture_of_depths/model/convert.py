"""Llama-family checkpoints as models of this package without routed blocks, and back."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixture_of_depths.model.configuration import ROPE_TYPES, MoDConfig
from mixture_of_depths.model.gguf import gguf_fields
from mixture_of_depths.model.modeling import MoDForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def config_from(source: PreTrainedConfig) -> MoDConfig:
    """The configuration of a Llama, Mistral, Qwen2 or Qwen3 model, without routed blocks.

    Raises:
        ValueError: naming the architecture or the option that has no counterpart here.
    """
    fields: dict[str, Any] = source.to_dict()
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r} is none of {', '.join(FAMILIES)}; it cannot be represented")
    rope = fields.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor")) or 1.0
    longest, window = fields["max_position_embeddings"], fields.get("sliding_window")
    if family in ("qwen2", "qwen3") and not fields.get("use_sliding_window"):
        window = None
    refused = {
        "hidden_act": fields["hidden_act"] != "silu",
        "mlp_bias": bool(fields.get("mlp_bias")),
        "attention_dropout": bool(fields.get("attention_dropout")),
        "sliding_window": window is not None and window < longest,
        "rope_parameters": rope.get("rope_type", "default") not in ROPE_TYPES or partial != 1.0,
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{name}={fields[name]!r} of this {family} model cannot be represented")
    return MoDConfig(
        **{name: fields[name] for name in SHARED},
        head_dim=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        # Qwen2 always has one.
        attention_bias=family == "qwen2" or bool(fields.get("attention_bias")),
        query_key_norm=family == "qwen3",
        routed_layers=[],
    )


def from_dense(source: PreTrainedModel) -> MoDForCausalLM:
    """The same model as one of this package without routed blocks, of the same precision and on the same device.

    Its logits are equal.

    Raises:
        ValueError: naming the architecture or the option that has no counterpart here.
    """
    config = config_from(source.config)
    weights = dict(source.state_dict())
    if config.attention_bias:
        for layer in range(config.num_hidden_layers):
            # Qwen2 has none on the output projection.
            zero = torch.zeros(config.hidden_size, dtype=source.dtype, device=source.device)
            weights.setdefault(f"model.layers.{layer}.self_attn.o_proj.bias", zero)
    model = MoDForCausalLM(config)
    nn.Module.to(model, source.device, source.dtype)
    model.load_state_dict(weights)
    model.generation_config = source.generation_config
    return model.eval()


def load_dense(source: str) -> tuple[MoDForCausalLM, PreTrainedTokenizerBase]:
    """A pretrained model in float32 and its tokenizer; one of this package is returned as it is.

    Args:
        source: a folder, the name of a model on the Hugging Face hub, or a GGUF file, whose weights are dequantised.

    Raises:
        ValueError: when it cannot be read, or is of a kind that cannot be represented.
    """
    place = source
    gguf: dict[str, Any] = {}
    stated: dict[str, Any] = {}
    if source.endswith(".gguf"):
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"source={source} is no file; name a GGUF file, a folder or a model of the hub")
        place, gguf = str(path.parent), {"gguf_file": path.name}
    elif not Path(source).is_dir() and not is_hub_name(source):
        raise ValueError(
            f"source={source} is no folder, and no name of the hub either, OWNER/NAME; name a folder, a GGUF file or a "
            "model of the hub"
        )
    try:
        if gguf:
            stated = gguf_fields(Path(source))
        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **gguf)
        for name, value in stated.items():
            setattr(config, name, value)
        if not isinstance(config, MoDConfig):
            # Before the weights are read.
            config_from(config)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **gguf)
        if gguf:
            gguf["quantization_config"] = GgufConfig(dequantize=True)
        # The library annotates the model alone; asked for it, it returns what it found beside the model.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=None if gguf else True,
            output_loading_info=True,
            # They are refused by name below; the library's own error names none.
            ignore_mismatched_sizes=True,
            **gguf,
        )
        model, loading_info = loaded
    except Exception as error:
        # What libraries raise about a damaged file has no common kind; the tokenizers' reader raises Exception itself.
        if Path(source).exists():
            problem = "cannot be read; copy it anew"
        else:
            problem = "is no folder here, and cannot be read from the hub; check the name and the connection"
        raise ValueError(f"source={source} {problem}, or give another: {error}") from error
    misfits = [f"missing {name}" for name in sorted(loading_info["missing_keys"])]
    mismatched = [*loading_info["mismatched_keys"]]
    if gguf:
        # Of these files transformers before 5.23 takes whatever shapes they hold, and does not tell.
        with torch.device("meta"):
            planned = dict(AutoModelForCausalLM.from_config(config).named_parameters())
        for name, weight in model.named_parameters():
            if weight.shape != planned[name].shape:
                mismatched.append((name, weight.shape, planned[name].shape))
    for name, stored, meant in sorted(mismatched):
        misfits.append(f"{name} has shape {list(stored)}, not {list(meant)}")
    if misfits:
        raise ValueError(f"source={source}: its weights do not fit its configuration: {', '.join(misfits[:3])}")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"source={source}: its weights are damaged: {name} holds infinity or no numbers")
    return model.eval() if isinstance(model, MoDForCausalLM) else from_dense(model), tokenizer


def is_hub_name(source: str) -> bool:
    """Whether a name can be that of a model on the hub, and is not a folder's, mistyped, in a folder that is there."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) is not None and not Path(source).parent.is_dir()


def to_llama(model: MoDForCausalLM) -> LlamaForCausalLM:
    """A model without routed blocks as transformers' Llama, of the same precision and on the same device.

    Its logits are equal.

    Raises:
        ValueError: naming what Llama does not have.
    """
    config = model.config
    for name, is_there in (
        ("routed_layers", bool(config.routed_layers)),
        ("num_experts", config.has_experts),
        ("query_key_norm", config.query_key_norm),
    ):
        if is_there:
            raise ValueError(f"{name}={getattr(config, name)} has no counterpart in Llama")
    fields = {name: getattr(config, name) for name in (*SHARED, "head_dim", "attention_bias")}
    llama = LlamaForCausalLM(LlamaConfig(**fields))
    nn.Module.to(llama, model.device, model.dtype)
    llama.load_state_dict(model.state_dict())
    llama.generation_config = model.generation_config
    return llama.eval()
