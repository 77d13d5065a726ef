"""What a GGUF file says that transformers' reader passes over: brought into the configuration, or refused by name."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Without these the reader would take another model's defaults, or leave the weights in another order.
NEEDED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
)
# Read by transformers, read below, or without an effect on the logits.
KNOWN = (
    "vocab_size",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "attention.key_length",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "pooling_type",
)
# Namespaces that tell of the file, the tokenizer, and how the weights were quantised.
DESCRIPTIONS = ("GGUF", "general", "tokenizer", "quantize", "split", "imatrix")
# By how much Llama 3's scaling differs between these models, and the two bounds that all of them share.
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_BOUNDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def gguf_fields(path: Path) -> dict[str, Any]:
    """The fields in which the configuration that transformers makes of a GGUF file is to be changed.

    Raises:
        ValueError: naming the fact or the tensor of the file that cannot be represented.
    """
    try:
        reader = GGUFReader(path)
        stated = {name: field.contents() for name, field in reader.fields.items()}
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"the file is cut off or damaged, or of another format ({error})") from error
    architecture = stated.get("general.architecture")
    for name, accepted in (
        ("general.architecture", ARCHITECTURES),
        ("general.type", ("model", None)),
        ("split.count", (0, 1, None)),
    ):
        if (value := stated.get(name)) not in accepted:
            choices = ", ".join(str(choice) for choice in accepted if choice is not None)
            raise ValueError(f"{name}={value!r} of this file is none of {choices}; it cannot be represented")
    facts: dict[str, Any] = {}
    for name, value in stated.items():
        namespace, _, rest = name.partition(".")
        if namespace == architecture:
            facts[rest] = value
        elif namespace not in DESCRIPTIONS:
            raise _unknown(name, value)
    for name in (*NEEDED, "attention.key_length", "vocab_size"):
        if name in NEEDED or name in facts:
            is_whole = name != "attention.layer_norm_rms_epsilon"
            _check_positive(f"{architecture}.{name}", facts.get(name), is_whole)
    if facts["attention.head_count"] > facts["embedding_length"]:
        raise _unknown(f"{architecture}.attention.head_count", facts["attention.head_count"])
    facts.setdefault("attention.key_length", facts["embedding_length"] // facts["attention.head_count"])
    head_dim = facts["attention.key_length"]
    _check(f"{architecture}.", facts, head_dim)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_tensors(str(architecture), set(tensors), facts["block_count"])
    rope = _rope(f"{architecture}.", facts)
    if "rope_freqs.weight" in tensors:
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
        rope = _with_divisors(rope, divisors, head_dim, facts)
    fields = {"head_dim": head_dim, "rope_parameters": rope}
    # Qwen2 always has biases, and no field for them.
    return fields if architecture == "qwen2" else fields | {"attention_bias": "blk.0.attn_q.bias" in tensors}


def _unknown(name: str, value: object) -> ValueError:
    return ValueError(f"{name}={value!r} of this file cannot be represented")


def _check_positive(name: str, value: object, whole: bool = False) -> None:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not (isinstance(value, kinds) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} of this file must be one positive {'whole ' if whole else ''}number")


def _check(prefix: str, facts: dict[str, Any], head_dim: int) -> None:
    """Refuses each fact that is neither read nor at the value at which it changes nothing."""
    is_yarn = facts.get("rope.scaling.type") == "yarn"
    neutral: dict[str, tuple[float, ...]] = {
        "attention.value_length": (head_dim,),
        "attention.scale": (0, head_dim**-0.5),
        "attention.sliding_window": (0,),
        "attention.causal": (True,),
        "attention.clamp_kqv": (0,),
        "attention.max_alibi_bias": (0,),
        "attn_logit_softcapping": (0,),
        "final_logit_softcapping": (0,),
        "logit_scale": (0, 1),
        "residual_scale": (0, 1),
        "embedding_scale": (0, 1),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "nextn_predict_layers": (0,),
        "use_parallel_residual": (False,),
        "rope.dimension_count": (head_dim,),
        "rope.scaling.yarn_ext_factor": (1 if is_yarn else 0,),
        "rope.scaling.yarn_attn_factor": (1,),
        "rope.scaling.yarn_log_multiplier": (0,),
    }
    for name, value in facts.items():
        if name in NEEDED or name in KNOWN:
            continue
        accepted = neutral.get(name, ())
        # A window that no text fills is none.
        is_neutral = isinstance(value, int | float) and (
            any(math.isclose(value, number, rel_tol=1e-6) for number in accepted)
            or (name == "attention.sliding_window" and value >= facts["context_length"])
        )
        if not is_neutral:
            raise _unknown(prefix + name, value)


def _check_tensors(architecture: str, names: set[str], block_count: int) -> None:
    """Refuses tensors that the model has no place for."""
    inside = r"(attn|ffn)_norm\.weight|attn_(q|k|v|output)\.weight|ffn_(gate|up|down)\.weight"
    inside += r"|attn_(q|k|v)\.bias" if architecture == "qwen2" else r"|attn_(q|k|v|output)\.bias"
    inside += r"|attn_(q|k)_norm\.weight" if architecture == "qwen3" else ""
    outside = "token_embd|output_norm|output" + ("|rope_freqs" if architecture == "llama" else "")
    for name in sorted(names):
        block = re.fullmatch(rf"blk\.(\d+)\.({inside})", name)
        if not (int(block[1]) < block_count if block else re.fullmatch(rf"({outside})\.weight", name)):
            raise ValueError(f"the tensor {name} of this file has no place in a {architecture} model")


def _rope(prefix: str, facts: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters as the metadata states them; the defaults are llama.cpp's."""
    kind = facts.get("rope.scaling.type", "linear")
    for name in ("freq_base", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow"):
        _check_positive(f"{prefix}rope.{name}", facts.get(f"rope.{name}", 1))
    for name in ("scaling.factor", "scale_linear", "scaling.original_context_length"):
        # 0 is how a file says that it states none.
        if (value := facts.get(f"rope.{name}", 0)) != 0:
            _check_positive(f"{prefix}rope.{name}", value)
    factor = float(facts.get("rope.scaling.factor", facts.get("rope.scale_linear", 0))) or 1.0
    attention_factor = float(facts.get("rope.scaling.attn_factor", 1))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(facts.get("rope.freq_base", 10000))}
    if kind not in ("none", "linear", "yarn"):
        raise _unknown(f"{prefix}rope.scaling.type", kind)
    if kind == "yarn":
        if factor < 1:
            raise _unknown(f"{prefix}rope.scaling.factor", factor)
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(
                facts.get("rope.scaling.original_context_length") or facts["context_length"]
            ),
            "attention_factor": attention_factor * (0.1 * math.log(factor) + 1),
            "beta_fast": float(facts.get("rope.scaling.yarn_beta_fast", 32)),
            "beta_slow": float(facts.get("rope.scaling.yarn_beta_slow", 1)),
        }
    if attention_factor != 1:
        raise _unknown(f"{prefix}rope.scaling.attn_factor", attention_factor)
    return rope if kind == "none" or factor == 1 else rope | {"rope_type": "linear", "factor": factor}


def _with_divisors(rope: dict[str, Any], divisors: Tensor, head_dim: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The parameters of Llama 3's scaling whose frequencies are the plain ones over `divisors`.

    The file holds the result alone. The largest divisor is the factor where the lowest frequency is scaled in full, and
    the original context is that which the metadata states, or a power of two.
    """
    fits = divisors.shape == (head_dim // 2,) and bool((divisors.isfinite() & (divisors > 0)).all())
    if fits and bool((divisors == 1).all()):
        return rope
    context = int(facts["context_length"])
    originals = [2**exponent for exponent in range(context.bit_length()) if 2**exponent < context]
    if "rope.scaling.original_context_length" in facts:
        originals.insert(0, int(facts["rope.scaling.original_context_length"]))
    if fits and rope["rope_type"] == "default":
        plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).float() / head_dim)
        for factor in (float(divisors.max()), *LLAMA3_FACTORS):
            for original in originals:
                scaled = rope | {"rope_type": "llama3", "factor": factor, **LLAMA3_BOUNDS}
                scaled |= {"original_max_position_embeddings": original}
                config = LlamaConfig(head_dim=head_dim, max_position_embeddings=context, rope_parameters=scaled)
                frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
                if torch.allclose(plain / frequency, divisors, rtol=1e-5, atol=0):
                    return scaled
    raise ValueError("rope_freqs.weight of this file is no scaling of Llama 3's; its RoPE cannot be represented")
