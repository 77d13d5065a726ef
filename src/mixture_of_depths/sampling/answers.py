"""A model's own answers to conversations, turn by turn, and the file they are kept in."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.files import locked, read_records, write_aside
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stream import check_prompts
from mixture_of_depths.sampling.texts import begin, sample_texts
from mixture_of_depths.text.conversations import Message, conversation_of, rendered, shortened


@dataclass(frozen=True)
class Answered:
    """A conversation with a model's answers.

    Attributes:
        messages: all of it, each with "role" and "content".
        cut: how many of the answers broke off at `max_new_tokens`.
    """

    messages: list[Message]
    cut: int = 0


def check_askable(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    options: SamplingOptions,
) -> None:
    """Looks at all conversations up to their first question without an answer, before the model answers any.

    Raises:
        ValueError: for one that the template refuses, or that leaves no room for an answer.
    """
    for messages in conversations:
        said: list[Message] = []
        if not _goes_on(said, list(messages)):
            continue
        (sample,) = begin(tokenizer, rendered([said], tokenizer, asks=True))
        tokens = torch.tensor([sample.tokens])
        try:
            check_prompts(model, tokens, torch.ones_like(tokens), options.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"data holds {shortened(messages)}, which cannot be answered: {error}") from error


def answered(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[Message]],
    options: SamplingOptions = SamplingOptions(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    compiled: bool = False,
) -> list[Answered]:
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
    cut = [0] * len(conversations)
    ahead = [list(messages) for messages in conversations]
    while asking := [row for row in range(len(said)) if _goes_on(said[row], ahead[row])]:
        prompts = rendered([said[row] for row in asking], tokenizer, asks=True)
        samples = sample_texts(model, tokenizer, prompts, options, [seeds[row] for row in asking], compiled)
        for row, sample in zip(asking, samples, strict=True):
            said[row].append({"role": "assistant", "content": sample.text.strip()})
            cut[row] += sample.ended == "length"
    return [Answered(messages, count) for messages, count in zip(said, cut, strict=True)]


def _goes_on(said: list[Message], ahead: list[Message]) -> bool:
    """Takes the messages up to the next one of the user's without an answer; whether there is such a one."""
    while ahead:
        said.append(ahead.pop(0))
        is_answered = bool(ahead) and ahead[0]["role"] == "assistant"
        if said[-1]["role"] == "user" and not is_answered:
            return True
    return False


@contextmanager
def only_answers(path: Path) -> Iterator[None]:
    """Holds a file of answers, so that no second process writes it.

    Raises:
        ValueError: when another process holds it.
    """
    with locked(path.with_name(f".{path.name}.lock"), wait=False) as ours:
        if not ours:
            raise ValueError(f"out={path} is being written by another call; wait for it, or name another file")
        yield


def keep_answers(path: Path, conversations: Sequence[Answered], facts: dict[str, Any]) -> None:
    """Writes answered conversations, a line each, with what they were answered by."""
    records = ({"messages": one.messages, "cut": one.cut, "answered_by": facts} for one in conversations)
    write_aside(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def kept_answers(path: Path, asked: Sequence[list[Message]], facts: dict[str, Any]) -> list[Answered]:
    """What an earlier call has answered of the conversations that are asked, the first of them; none without a file.

    Args:
        path: the file.
        asked: all conversations that are asked.
        facts: what they were answered by, or a part of it.

    Raises:
        ValueError: when the file holds anything else, or was answered by other facts, or for other conversations.
    """
    if path.is_dir():
        raise ValueError(f"out={path} is a folder; name a file")
    try:
        records = read_records(path)
    except ValueError as error:
        raise ValueError(f"out={path} is no file of answers; name another file: {error}") from error
    lines = path.read_text(encoding="utf-8").split("\n")[len(records) :] if path.exists() else []
    # Of what follows, the beginning of a record is what a kill may leave.
    if any(line and not line.startswith('{"messages": ') for line in lines):
        raise ValueError(f"out={path} is no file of answers, from line {len(records) + 1} on; name another file")
    for number, record in enumerate(records, start=1):
        is_answer = (
            isinstance(record, dict)
            and isinstance(record.get("answered_by"), dict)
            and conversation_of(record.get("messages"))
        )
        if not is_answer:
            raise ValueError(f"out={path} is no file of answers, in line {number}; name another file")
        if not json.loads(json.dumps(facts)).items() <= record["answered_by"].items():
            raise ValueError(
                f"out={path} was answered by another model or with other options, or does not say, in line {number}; "
                "name another file"
            )
    if len(records) > len(asked):
        raise ValueError(
            f"out={path} answers {len(records)} conversations of which data has {len(asked)}; name another file"
        )
    for number, (messages, record) in enumerate(zip(asked, records, strict=False), start=1):
        if any(message not in record["messages"] for message in messages):
            raise ValueError(f"out={path} answers other conversations, from line {number} on; name another file")
    return [Answered(record["messages"], record.get("cut", 0)) for record in records]
