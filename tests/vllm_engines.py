"""Checkpoints of small models, engines of vLLM over them, and what the package itself says of their answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from mixture_of_depths import MoDConfig, MoDForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "routed_layers": [0, 2, 3],
    "capacity": 0.5,
    "router_norm": True,
    "causal_router": "threshold",
    "initializer_range": 0.15,
}


def small_model(**changes: Any) -> MoDForCausalLM:
    """A model in float32 whose routers, bypasses and norms do something; about half of the tokens enter a block."""
    torch.manual_seed(0)
    model = MoDForCausalLM(MoDConfig(**{**SMALL, **changes})).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for name, weight in layer.named_parameters():
                if "bypass.up" in name:
                    weight.normal_(std=0.1)
                if "norm" in name:
                    weight.add_(0.2 * torch.randn_like(weight))
                if name.endswith("bias"):
                    weight.normal_(std=0.1)
    return model


def save(model: MoDForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random tokens, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist() for length in lengths]


def engine(folder: Path, **settings: Any) -> LLM:
    """vLLM over a checkpoint without a tokenizer; not compiled, in float32, with little memory."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 1 << 28,
        "max_model_len": 2048,
        "block_size": 32,
        "disable_log_stats": False,
    }
    return LLM(model=str(folder), **{**defaults, **settings})


def greedy(new: int, **settings: Any) -> SamplingParams:
    """The most likely tokens, and log-probabilities of each."""
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=1, **settings)


def asked(llm: LLM, prompts: list[list[int]], sampling: SamplingParams | list[SamplingParams]) -> list[Any]:
    """vLLM's answers, in the order of the prompts."""
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)


@torch.no_grad()
def check(model: MoDForCausalLM, answers: list[Any], is_greedy: bool = True) -> None:
    """Holds answers against the package's causal pass over the prompt and what vLLM made of it.

    Every token must be the most likely one, unless two logits differ by less than 1e-4, and its log-probability the
    model's within 1e-3.
    """
    for answer in answers:
        for completion in answer.outputs:
            prompt, made = list(answer.prompt_token_ids), list(completion.token_ids)
            logits = model(torch.tensor([prompt + made]), routing="causal", use_cache=False).logits
            logits = logits[0, len(prompt) - 1 : -1]
            token = torch.tensor(made)[:, None]
            if is_greedy:
                assert (logits.amax(dim=1) - logits.gather(1, token)[:, 0] < 1e-4).all()
            expected = logits.log_softmax(dim=1).gather(1, token)[:, 0]
            told = torch.tensor([step[one].logprob for step, one in zip(completion.logprobs, made, strict=True)])
            torch.testing.assert_close(told, expected, atol=1e-3, rtol=0)


def preemptions(llm: LLM) -> int:
    """How many times requests gave way to others, and were computed again."""
    (metric,) = [metric for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    return metric.value
