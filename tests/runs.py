"""What tests of training share: small configurations, a pretrained stand-in, and a run's records."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.options import ModelOptions, RetrofitOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.settings import model_config

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
SMALL = ModelOptions(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, capacity=(0.25,))
ROUTING = RetrofitOptions(capacity=(0.25,), routed_layers=(1, 2), fit_sequences=4)


def config_for(corpus: Corpus, **changes: Any) -> MoDConfig:
    return model_config(replace(SMALL, **changes), corpus.tokenizer, 16)


def dense_for(corpus: Corpus, **changes: Any) -> MoDForCausalLM:
    """A model without routed blocks, as pretrained ones are."""
    torch.manual_seed(1)
    end = corpus.end_of_text
    fields: dict[str, Any] = {
        "vocab_size": len(corpus.tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "routed_layers": [],
        "eos_token_id": end,
        "pad_token_id": end,
    }
    return MoDForCausalLM(MoDConfig(**{**fields, **changes})).eval()


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
