"""What tests share: small models and their layouts, tokenizers, texts, corpora and checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.options import DataOptions, ModelOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.text.tokenizer import train_tokenizer
from mixture_of_depths.training.settings import model_config

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "predictor_hidden_size": 8,
    "initializer_range": 0.5,
}


def tiny(**changes: Any) -> MoDForCausalLM:
    """A small float64 model with large weights, so that routers decide and errors show."""
    return MoDForCausalLM(MoDConfig(**{**TINY, **changes})).double()


def distinct_tokens(batch: int, length: int) -> torch.Tensor:
    """Rows without repeats: equal tokens that follow one another differ by rounding alone, which then decides ties."""
    return torch.stack([torch.randperm(31)[:length] for _ in range(batch)])


def check_gradients(model: MoDForCausalLM, loss: torch.Tensor, reference_loss: torch.Tensor) -> None:
    """Both losses have the same gradients by every weight."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(reference_loss, parameters, allow_unused=True)
    for name, a, b in zip(names, got, wanted, strict=True):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros(()) if b is None else b
        scale = max(1.0, b.abs().max().item())
        assert (a - b).abs().max().item() / scale < 1e-9, name


def layout(kind: str, batch: int, length: int, generator: torch.Generator) -> tuple[Any, Any, Any, Any, Any]:
    """Inputs of the model and the lists of the oracle: real tokens, positions, documents."""
    real = [[True] * length for _ in range(batch)]
    positions = [list(range(length)) for _ in range(batch)]
    documents = [[0] * length for _ in range(batch)]
    mask = position_ids = None
    if kind in ("left", "right") and length > 1:
        for b in range(batch):
            pad = int(torch.randint(0, length, (), generator=generator))
            real[b] = [i >= pad if kind == "left" else i < length - pad for i in range(length)]
            positions[b] = [max(0, sum(real[b][: i + 1]) - 1) for i in range(length)]
        mask = torch.tensor(real).long()
    elif kind == "packed" and length > 1:
        for b in range(batch):
            start = int(torch.randint(1, length, (), generator=generator))
            positions[b] = list(range(start)) + list(range(length - start))
            documents[b] = [0] * start + [1] * (length - start)
        position_ids = torch.tensor(positions)
    return mask, position_ids, real, positions, documents


LLAMA: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def left_padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(0, 31, (batch, length))
    mask = torch.ones_like(input_ids)
    for row in range(1, batch):
        mask[row, : min(row * 2, length - 1)] = 0
    return input_ids, mask


def greedy(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids, attention_mask=mask, **settings)[:, input_ids.shape[1] :]


SENTENCE = "The router lets few tokens in, and the others pass. "


def options(tmp_path: Path, *data: str, **changes: Any) -> DataOptions:
    small: dict[str, Any] = {"vocab_size": 300, "sequence_length": 16, "validation_fraction": 0.2}
    return DataOptions(data=data, cache_dir=tmp_path / "cache", **{**small, **changes})


QUIET = Console(quiet=True)


SMALL = ModelOptions(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, capacity=(0.25,))


def config_for(corpus: Corpus, **changes: Any) -> MoDConfig:
    return model_config(replace(SMALL, **changes), corpus.tokenizer, 16)


TEXT = "the quick brown fox jumps over the lazy dog\n    <script>é😀</script> שלום" * 3


TOKENIZER = train_tokenizer([TEXT * 10], 300)


def model_with(**changes: Any) -> MoDForCausalLM:
    fields: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "capacity": 0.25,
        "initializer_range": 0.3,
    }
    return MoDForCausalLM(MoDConfig(**{**fields, **changes})).eval()


TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def make_checkpoint(folder: Path, max_position_embeddings: int = 128) -> None:
    """A small model with a tokenizer and a chat template."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = MoDConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.3,
    )
    MoDForCausalLM(config).save_pretrained(folder)


TASK = """task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
