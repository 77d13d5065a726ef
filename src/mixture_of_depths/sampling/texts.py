"""Text from a model: sampled after prompts of any lengths, and streamed as it appears."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stops import StopStrings
from mixture_of_depths.sampling.stream import end_tokens, stream
from mixture_of_depths.text.pieces import NewText, tokenized


@dataclass
class Sample:
    """A prompt and what was sampled after it.

    Attributes:
        prompt: the text before.
        text: the text sampled, without the stop string that ended it. A character that the prompt's tokens break off
            and the next ones end belongs to it; one that the last token breaks off does not.
        tokens: the tokens of both, and that of the end of text if it came.
        ended: "end_of_text", "stop" or "length"; None while it goes on.
        new_tokens: how many tokens were sampled, those of the stop string and of the end of text among them.
    """

    prompt: str
    text: str
    tokens: list[int]
    ended: str | None = None
    new_tokens: int = 0


def begin(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[Sample]:
    """Samples with nothing sampled yet.

    Raises:
        ValueError: for a prompt that is empty or not UTF-8.
    """
    tokens_of_prompts = tokenized(tokenizer, prompts, "prompt", special=True)
    return [Sample(prompt, "", tokens) for prompt, tokens in zip(prompts, tokens_of_prompts, strict=True)]


def step_texts(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[Sample],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
    compiled: bool = False,
) -> Iterator[list[tuple[int, str]]]:
    """As `stream_texts`, with one list a token, empty when it brings no text, and one of what is held back at the end.

    So its reader can leave after any token, and ends the sampling.
    """
    longest = max(len(sample.tokens) for sample in samples)
    padding = [longest - len(sample.tokens) for sample in samples]
    rows = [[0] * pad + sample.tokens for pad, sample in zip(padding, samples, strict=True)]
    input_ids = torch.tensor(rows, dtype=torch.int64, device=model.device)
    attention_mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding], device=model.device)
    active_B = torch.tensor([sample.ended is None for sample in samples])
    new_texts = [NewText(tokenizer, sample.tokens) for sample in samples]
    # How long a row's new text is before its first new token, and after each.
    lengths = [[0] for _ in samples]
    stops = [StopStrings(options.stop) for _ in samples]
    ends = end_tokens(model)
    for token_B in stream(model, input_ids, attention_mask, options, seeds, active_B, compiled):
        texts = []
        for row, (sample, token) in enumerate(zip(samples, token_B.tolist(), strict=True)):
            if sample.ended is not None:
                continue
            sample.tokens.append(token)
            sample.new_tokens += 1
            if token in ends:
                sample.ended, ready = "end_of_text", stops[row].held
            else:
                piece = new_texts[row].step(token)
                lengths[row].append(lengths[row][-1] + len(piece))
                ready = stops[row].let_through(piece)
                if stops[row].has_stopped:
                    sample.ended, active_B[row] = "stop", False
                    kept = bisect_left(lengths[row], len(sample.text) + len(ready))
                    del sample.tokens[len(sample.tokens) - sample.new_tokens + kept :]
            sample.text += ready
            if ready:
                texts.append((row, ready))
        yield texts
    texts = []
    for row, (sample, stop) in enumerate(zip(samples, stops, strict=True)):
        if sample.ended is None:
            sample.ended, sample.text = "length", sample.text + stop.held
            if stop.held:
                texts.append((row, stop.held))
    yield texts


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
        compiled: see `stream`.

    Raises:
        ValueError: for prompts the model cannot go on from.
    """
    for texts in step_texts(model, tokenizer, samples, options, seeds, compiled):
        yield from texts


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
