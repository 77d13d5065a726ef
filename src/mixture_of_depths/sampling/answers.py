"""A model's own answers to conversations, turn by turn."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.text.conversations import Message, rendered


def answered(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    options: SamplingOptions = SamplingOptions(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    compiled: bool = False,
) -> list[list[Message]]:
    """The conversations, with the model's answer after every message of the user's that has none; all at once.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer, with a chat template.
        conversations: messages, each with "role" and "content".
        options: how tokens are drawn.
        seeds: one seed a conversation; by default the options' and those after it.
        compiled: see `stream`.

    Raises:
        ValueError: for a conversation that the template refuses, or that the model cannot go on from.
    """
    seeds = range(options.seed, options.seed + len(conversations)) if seeds is None else seeds
    said: list[list[Message]] = [[] for _ in conversations]
    ahead = [list(messages) for messages in conversations]
    while asking := [row for row in range(len(said)) if _goes_on(said[row], ahead[row])]:
        prompts = rendered([said[row] for row in asking], tokenizer, asks=True)
        samples = sample_texts(model, tokenizer, prompts, options, [seeds[row] for row in asking], compiled)
        for row, sample in zip(asking, samples, strict=True):
            said[row].append({"role": "assistant", "content": sample.text.strip()})
    return said


def _goes_on(said: list[Message], ahead: list[Message]) -> bool:
    """Takes the messages up to the next one of the user's without an answer; whether there is such a one."""
    while ahead:
        said.append(ahead.pop(0))
        is_answered = bool(ahead) and ahead[0]["role"] == "assistant"
        if said[-1]["role"] == "user" and not is_answered:
            return True
    return False
