"""Text from a model: sampled, streamed, and coloured by the number of blocks its tokens used."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from rich.text import Text
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from mixture_of_depths.configuration import MoDConfig
from mixture_of_depths.flops import block_flops, expert_rows_per_token
from mixture_of_depths.generation import end_tokens, stream
from mixture_of_depths.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.tokenizer import start_of_text

# From few blocks to many; told apart by the colour-blind, and readable on dark and light grounds.
COLOURS = ("#0072B2", "#009E73", "#B8860B", "#D55E00", "#CC3377")


@dataclass
class Sample:
    """A prompt and what was sampled after it.

    Attributes:
        prompt: the text before.
        text: the text sampled, without the stop string that ended it.
        tokens: the tokens of both, and that of the end of text if it came.
        ended: "end_of_text", "stop" or "length"; None while it goes on.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: str | None = None


def begin(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Sample]:
    """Samples with nothing sampled yet.

    Raises:
        ValueError: for a prompt that is empty or not UTF-8.
    """
    found = tokenized(tokenizer, prompts, "prompt", special=True)
    return [Sample(prompt, "", tokens) for prompt, tokens in zip(prompts, found, strict=True)]


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], name: str, special: bool) -> list[list[int]]:
    """The tokens of each text, as they are given to a model.

    Args:
        tokenizer: the model's tokenizer.
        texts: texts.
        name: what the user calls one of them.
        special: whether the name of a special token stands for it, as a chat's prompt needs, or for its characters, as
            in text that is trained on.

    Raises:
        ValueError: for a text that is empty or not UTF-8.
    """
    found, start = [], start_of_text(tokenizer)
    for text in texts:
        if not text:
            raise ValueError(f"{name}='' is empty; give at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}={text!r} is not UTF-8: {error}") from error
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=not special)
        ids = cast(list[int], encoded["input_ids"])
        # The prompt of a chat has it already.
        found.append(ids if ids[:1] == start else start + ids)
    return found


def stream_texts(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[Sample],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
    compiled: bool = False,
) -> Iterator[tuple[int, str]]:
    """Goes on from all samples at once; yields (index, text) as text appears, and keeps the samples up to date.

    Text that may become a stop string is held back until it is known not to.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        samples: from `begin`; of different lengths as it comes.
        options: how tokens are drawn, and when to stop.
        seeds: one seed a sample; by default the options' and those after it.
        compiled: see `generation.stream`.

    Raises:
        ValueError: for prompts the model cannot go on from.
    """
    longest = max(len(sample.tokens) for sample in samples)
    padding = [longest - len(sample.tokens) for sample in samples]
    rows = [[0] * pad + sample.tokens for pad, sample in zip(padding, samples, strict=True)]
    input_ids = torch.tensor(rows, dtype=torch.int64, device=model.device)
    attention_mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device)
    active_B = torch.tensor([sample.ended is None for sample in samples], device=model.device)
    decoders = [DecodeStream(ids=sample.tokens, skip_special_tokens=True) for sample in samples]
    begun = [len(sample.tokens) for sample in samples]
    held = [""] * len(samples)
    ends = end_tokens(model)
    backend = cast(TokenizersBackend, tokenizer).backend_tokenizer
    for token_B in stream(model, input_ids, attention_mask, options, seeds, active_B, compiled):
        for row, (sample, token) in enumerate(zip(samples, token_B.tolist(), strict=True)):
            if sample.ended is not None:
                continue
            sample.tokens.append(token)
            if token in ends:
                sample.ended, ready = "end_of_text", held[row]
            else:
                text = held[row] + (decoders[row].step(backend, token) or "")
                cut = min((at for stop in options.stop if (at := text.find(stop)) >= 0), default=None)
                if cut is not None:
                    sample.ended, ready = "stop", text[:cut]
                    active_B[row] = False
                    whole = len(sample.text) + cut
                    while len(sample.tokens) > begun[row] and whole <= len(
                        tokenizer.decode(sample.tokens[begun[row] : -1], skip_special_tokens=True)
                    ):
                        sample.tokens.pop()
                else:
                    kept = max((_overlap(text, stop) for stop in options.stop), default=0)
                    ready, held[row] = text[: len(text) - kept], text[len(text) - kept :]
            sample.text += ready
            if ready:
                yield row, ready
    for row, sample in enumerate(samples):
        if sample.ended is None:
            sample.ended, sample.text = "length", sample.text + held[row]
            if held[row]:
                yield row, held[row]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return max((size for size in range(1, min(len(text), len(stop)) + 1) if text.endswith(stop[:size])), default=0)


def sample_texts(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: SamplingOptions = SamplingOptions(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    compiled: bool = False,
) -> list[Sample]:
    """Samples after every prompt, all at once; see `stream_texts`."""
    samples = begin(tokenizer, prompts)
    for _ in stream_texts(model, tokenizer, samples, options, seeds, compiled):
        pass
    return samples


def tokens_per_second(model: MoDForCausalLM, input_ids: Tensor, max_new_tokens: int) -> float:
    """Speed of greedy sampling with `generate()`, end of text ignored; prefill included."""
    start = time.perf_counter()
    # The mixin annotates itself with a private protocol that no public class satisfies.
    tokens = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens,
    )
    assert isinstance(tokens, Tensor)
    return (tokens.shape[1] - input_ids.shape[1]) / (time.perf_counter() - start)


@torch.no_grad()
def blocks_used(model: MoDForCausalLM, input_ids: Tensor) -> Tensor:
    """How many blocks each token went through under causal routing, dense ones included; of shape [B, T]."""
    routing = model(input_ids=input_ids, use_cache=False, routing="causal", output_routing=True).routing
    dense = sum(layer is None for layer in routing)
    entered = [layer.entered.long() for layer in routing if layer is not None]
    return torch.stack([torch.full_like(input_ids, dense), *entered]).sum(dim=0)


def coloured(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Text:
    """The text of `tokens`, each coloured by how many blocks it went through, with a legend."""
    used = blocks_used(model, torch.tensor([tokens], device=model.device))[0].tolist()
    blocks = model.config.num_hidden_layers
    dense = blocks - len(model.config.routed_layers or [])

    def colour(count: int) -> str:
        place = 0 if blocks == dense else (count - dense) / (blocks - dense)
        return COLOURS[round(place * (len(COLOURS) - 1))]

    text = Text()
    for piece, count in zip(pieces(tokenizer, tokens), used, strict=True):
        text.append(piece, style=colour(count))
    text.append("\n\nblocks used: ", style="bold")
    for count in range(dense, blocks + 1):
        text.append(f" {count} ", style=f"bold {colour(count)}")
        text.append(f"({used.count(count) / len(used):.0%})")
    text.append(
        f"   mean {sum(used) / len(used):.2f} of {blocks}; {saved(model.config, used):.0%} of the compute saved"
    )
    return text


def saved(config: MoDConfig, used: Sequence[int]) -> float:
    """Share of the operations that tokens spare which went through `used` blocks, in the place of all of them."""
    block = block_flops(config, 1, len(used) / 2, expert_rows_per_token(config)).total
    whole = config.num_hidden_layers * block + 2 * config.hidden_size * config.vocab_size
    return (config.num_hidden_layers - sum(used) / len(used)) * block / whole


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    """The text each token adds; the bytes of one character may be spread over several, and come with the last."""
    decoder, backend = DecodeStream(skip_special_tokens=False), cast(TokenizersBackend, tokenizer).backend_tokenizer
    found = [decoder.step(backend, token) or "" for token in tokens]
    # A character that the tokens break off.
    waiting = next((i + 1 for i in reversed(range(len(found))) if found[i]), 0)
    if waiting < len(tokens):
        rest = tokenizer.decode(tokens[waiting:], skip_special_tokens=False)
        assert isinstance(rest, str)
        found[-1] = rest
    return found
