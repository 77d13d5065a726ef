"""Samples with `generate()`, their speed, and text coloured by the number of blocks its tokens used."""

import time

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.utils import GenerateDecoderOnlyOutput

from mixture_of_depths.evaluation import blocks_used
from mixture_of_depths.modeling import MoDForCausalLM

# From few blocks to many; told apart by the colour-blind, and readable on dark and light grounds.
COLOURS = ("#0072B2", "#009E73", "#B8860B", "#D55E00", "#CC3377")


def encode(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> Tensor:
    """The prompt as tokens, of shape [1, T].

    Raises:
        ValueError: when it is empty or leaves no room for `max_new_tokens`.
    """
    if not prompt:
        raise ValueError("prompt='' is empty; give at least one character")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt={prompt!r} is not UTF-8: {error}") from error
    input_ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = model.config.max_position_embeddings
    if input_ids.shape[1] + max_new_tokens > longest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {input_ids.shape[1]} tokens is more than the model's "
            f"max_position_embeddings={longest}; shorten one of them"
        )
    return input_ids


def sample(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """Samples after a prompt; returns the tokens of both.

    Raises:
        ValueError: when the prompt is empty or too long, or a setting is out of its range.
    """
    for name, value, valid in (
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not valid:
            raise ValueError(f"{name}={value} is out of range: temperature >= 0, top_k >= 0, 0 < top_p <= 1")
    input_ids = encode(model, tokenizer, prompt, max_new_tokens)
    chosen = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    torch.manual_seed(seed)
    return _generate(model, input_ids, max_new_tokens, chosen if temperature > 0 else {"do_sample": False})[0].tolist()


def tokens_per_second(model: MoDForCausalLM, input_ids: Tensor, max_new_tokens: int) -> float:
    """Speed of greedy sampling after the prompt, end of text ignored; prefill included."""
    start = time.perf_counter()
    settings = {"do_sample": False, "min_new_tokens": max_new_tokens}
    tokens = _generate(model, input_ids, max_new_tokens, settings)
    return (tokens.shape[1] - input_ids.shape[1]) / (time.perf_counter() - start)


def _generate(model: MoDForCausalLM, input_ids: Tensor, max_new_tokens: int, settings: dict[str, object]) -> Tensor:
    # The mixin annotates itself with a private protocol that no public class satisfies.
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        **settings,
    )
    assert isinstance(output, GenerateDecoderOnlyOutput)
    return output.sequences


def coloured(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Text:
    """The text of `tokens`, each coloured by how many blocks it went through, with a legend."""
    used = blocks_used(model, torch.tensor([tokens], device=model.device))[0].tolist()
    blocks = model.config.num_hidden_layers
    dense = blocks - len(model.config.routed_layers or [])

    def colour(count: int) -> str:
        place = 0 if blocks == dense else (count - dense) / (blocks - dense)
        return COLOURS[round(place * (len(COLOURS) - 1))]

    text = Text()
    for piece, count in zip(_pieces(tokenizer, tokens), used, strict=True):
        text.append(piece, style=colour(count))
    text.append("\n\nblocks used: ", style="bold")
    for count in range(dense, blocks + 1):
        text.append(f" {count} ", style=f"bold {colour(count)}")
        text.append(f"({used.count(count) / len(used):.0%})")
    text.append(f"   mean {sum(used) / len(used):.2f} of {blocks}")
    return text


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text each token adds; the bytes of one character may be spread over several."""
    pieces, before = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=False)
        assert isinstance(text, str)
        whole = text.removesuffix("�") if end < len(tokens) else text
        pieces.append(whole[len(before) :])
        before = whole if len(whole) >= len(before) else before
    return pieces
