"""A GGUF file gives the logits of the model it was written from, and what it states beyond that is refused by name."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_gguf
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mixture_of_depths.model.convert import load_dense

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FREQS = "rope_freqs.weight"


def llama(rope: dict[str, Any] | None = None, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    parameters = {"rope_type": "default", "rope_theta": 500.0, **(rope or {})}
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}, rope_parameters=parameters)).eval()


def llama3(factor: float, original: int, low: float = 1.0) -> dict[str, Any]:
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": 4.0}
    return {**rope, "original_max_position_embeddings": original}


def divisors(rope: dict[str, Any]) -> torch.Tensor:
    """What llama.cpp's converter writes for Llama 3's scaling: by how much each frequency is divided."""
    plain = 1 / llama().model.rotary_emb.inv_freq
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](llama(rope).config, torch.device("cpu"))
    return 1 / (scaled * plain)


def check_same_logits(source: PreTrainedModel, path: Path) -> None:
    ours, _ = load_dense(str(path))
    input_ids = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours(input_ids).logits - source(input_ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("factor", "original"), [(8.0, 64), (32.0, 128), (4.0, 32)])
def test_llama_3s_divisors_of_the_frequencies_are_honoured(tmp_path: Path, factor: float, original: int) -> None:
    rope = llama3(factor, original)
    source = llama(rope)
    write_gguf(tmp_path / "a.gguf", source, {}, {FREQS: divisors(rope)})
    model, _ = load_dense(str(tmp_path / "a.gguf"))
    parameters = model.config.rope_parameters
    assert parameters is not None
    assert (parameters["rope_type"], parameters["factor"]) == ("llama3", factor)
    check_same_logits(source, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("rope", "facts"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        # The older name of the factor; llama.cpp takes scaling without a type as linear.
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        ({}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 0.5 * 1.1386294361119891,
            },
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.attn_factor": 0.5,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
        ),
    ],
)
def test_scaling_of_rope_in_the_metadata_is_honoured(
    tmp_path: Path, rope: dict[str, Any], facts: dict[str, Any]
) -> None:
    source = llama(rope)
    write_gguf(tmp_path / "a.gguf", source, facts, {})
    check_same_logits(source, tmp_path / "a.gguf")


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("architecture", ["llama", "llama with biases", "qwen2", "qwen3"])
def test_heads_of_any_width_biases_and_norms_are_honoured(tmp_path: Path, architecture: str, head_dim: int) -> None:
    torch.manual_seed(0)
    if architecture == "qwen2":
        source = Qwen2ForCausalLM(Qwen2Config(**{**SMALL, "head_dim": head_dim})).eval()
    elif architecture == "qwen3":
        source = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=head_dim, tie_word_embeddings=True)).eval()
    else:
        source = llama(head_dim=head_dim, attention_bias="biases" in architecture)
    for name, weight in source.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            weight.data.add_(torch.randn_like(weight) * 0.3)
    facts = {"attention.key_length": head_dim, "attention.value_length": head_dim, "attention.causal": True}
    write_gguf(tmp_path / "a.gguf", source, facts, {})
    check_same_logits(source, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type='longrope' of this file"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 0.5}, r"llama\.rope\.scaling\.factor=0\.5"),
        ({"rope.scaling.factor": -2.0}, r"llama\.rope\.scaling\.factor=-2\.0 of this file must be one positive"),
        ({"rope.scaling.factor": math.inf}, r"llama\.rope\.scaling\.factor=inf of this file must be one positive"),
        ({"rope.scaling.factor": math.nan}, r"llama\.rope\.scaling\.factor=nan of this file must be one positive"),
        ({"rope.scale_linear": math.inf}, r"llama\.rope\.scale_linear=inf of this file must be one positive"),
        ({"rope.freq_base": 0.0}, r"llama\.rope\.freq_base=0\.0 of this file must be one positive number"),
        ({"rope.freq_base": -1.0}, r"llama\.rope\.freq_base=-1\.0 of this file must be one positive number"),
        ({"rope.freq_base": math.nan}, r"llama\.rope\.freq_base=nan of this file must be one positive number"),
        ({"rope.freq_base": "x"}, r"llama\.rope\.freq_base='x' of this file must be one positive number"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": "x"},
            r"llama\.rope\.scaling\.yarn_beta_fast='x' of this file must be one positive number",
        ),
        ({"rope.scaling.attn_factor": 1.5}, r"llama\.rope\.scaling\.attn_factor=1\.5"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}, r"yarn_log_multiplier=0\.1"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor=0\.5"),
        ({"rope.dimension_count": 8}, r"llama\.rope\.dimension_count=8 of this file"),
        ({"attention.key_length": 32, "rope.dimension_count": 16}, r"llama\.rope\.dimension_count=16"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length=8"),
        ({"attention.sliding_window": 128}, r"llama\.attention\.sliding_window=128"),
        ({"attention.causal": False}, r"llama\.attention\.causal=False"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale=0\.5"),
        ({"attn_logit_softcapping": 50.0}, r"llama\.attn_logit_softcapping=50\.0"),
        ({"logit_scale": 0.25}, r"llama\.logit_scale=0\.25"),
        ({"expert_count": 4}, r"llama\.expert_count=4"),
        ({"something_new": "on"}, r"llama\.something_new='on'"),
        (
            {"attention.layer_norm_rms_epsilon": None},
            r"llama\.attention\.layer_norm_rms_epsilon=None of this file must",
        ),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count=0 of this file must be one positive whole number"),
        ({"attention.head_count": 4.5}, r"llama\.attention\.head_count=4\.5 of this file must be one positive whole"),
        ({"attention.head_count": 65}, r"llama\.attention\.head_count=65 of this file"),
        ({"attention.key_length": 0}, r"llama\.attention\.key_length=0 of this file must be one positive whole number"),
        ({"embedding_length": 0}, r"llama\.embedding_length=0 of this file must be one positive whole number"),
        ({"vocab_size": "x"}, r"llama\.vocab_size='x' of this file must be one positive whole number"),
        ({"feed_forward_length": 47}, r"layers\.0\.mlp\.down_proj\.weight has shape \[64, 48\], not \[64, 47\]"),
        ({"vocab_size": 310}, r"do not fit .*: lm_head\.weight has shape \[300, 64\], not \[310, 64\]"),
        ({"attention.head_count_kv": None}, r"llama\.attention\.head_count_kv=None of this file must"),
    ],
)
def test_what_would_change_the_logits_is_refused_by_name(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "a.gguf", llama(), facts, {})
    with pytest.raises(ValueError, match=message):
        load_dense(str(tmp_path / "a.gguf"))


def test_facts_that_change_nothing_are_taken(tmp_path: Path) -> None:
    source = llama()
    facts = {
        "attention.sliding_window": 256,
        "attention.scale": 0.25,
        "expert_count": 0,
        "expert_used_count": 0,
        "attn_logit_softcapping": 0.0,
        "rope.scaling.yarn_ext_factor": 0.0,
        "tensor_data_layout": "Meta AI original pth",
    }
    write_gguf(tmp_path / "a.gguf", source, facts, {FREQS: torch.ones(8)})
    check_same_logits(source, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("facts", "tensors", "message"),
    [
        ({}, {FREQS: divisors(llama3(8.0, 64, low=2.0))}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: torch.linspace(1, 8, 8)}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: torch.zeros(8)}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: -torch.ones(8)}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: torch.full((8,), torch.inf)}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: torch.ones(2, 4)}, r"rope_freqs\.weight of this file is no scaling"),
        ({}, {FREQS: torch.linspace(1, 8, 4)}, r"rope_freqs\.weight of this file is no scaling"),
        ({"rope.scaling.factor": 2.0}, {FREQS: divisors(llama3(8.0, 64))}, r"rope_freqs\.weight of this file is no"),
        (
            {},
            {"rope_factors_long.weight": torch.ones(8)},
            r"rope_factors_long\.weight of this file has no place",
        ),
        ({}, {"blk.2.attn_q.weight": torch.ones(64, 64)}, r"tensor blk\.2\.attn_q\.weight of this file has no place"),
        ({}, {"blk.0.attn_q_norm.weight": torch.ones(16)}, r"blk\.0\.attn_q_norm\.weight .* in a llama model"),
        ({}, {"blk.0.attn_q.bias": torch.ones(64)}, r"missing model\.layers\.\d\.self_attn\.\w_proj\.bias"),
    ],
)
def test_tensors_without_a_place_are_refused_by_name(
    tmp_path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor], message: str
) -> None:
    write_gguf(tmp_path / "a.gguf", llama(), facts, tensors)
    with pytest.raises(ValueError, match=message):
        load_dense(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize("size", [0, 3, 4, 24, 200, 2000, -2000, -1])
def test_a_file_that_is_cut_off_is_refused_as_such(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, llama(), {}, {})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.gguf cannot be read; copy it anew.*: the file is cut off or damaged"):
        load_dense(str(path))
