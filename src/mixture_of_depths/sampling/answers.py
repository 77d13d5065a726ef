"""A model's own answers to conversations, turn by turn, and the file they are kept in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixture_of_depths.files import read_records, write_aside
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.text.conversations import Message, conversation_of, rendered


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


def keep_answers(path: Path, conversations: Sequence[list[Message]], facts: dict[str, Any]) -> None:
    """Writes answered conversations, a line each, with what they were answered by."""
    records = ({"messages": messages, "answered_by": facts} for messages in conversations)
    write_aside(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def kept_answers(path: Path, asked: Sequence[list[Message]], facts: dict[str, Any]) -> list[list[Message]]:
    """What an earlier call has answered of the conversations that are asked, the first of them; none without a file.

    Raises:
        ValueError: when the file holds anything else, or was answered by other facts, or for other conversations.
    """
    if path.is_dir():
        raise ValueError(f"out={path} is a folder; name a file")
    records = read_records(path)
    lines = path.read_text(encoding="utf-8").split("\n")[len(records) :] if path.exists() else []
    # Of what follows, the beginning of a record is what a kill may leave.
    if any(line and not line.startswith('{"messages": ') for line in lines):
        raise ValueError(f"out={path} is no file of answers, from line {len(records) + 1} on; name another file")
    for number, record in enumerate(records, start=1):
        is_answer = isinstance(record, dict) and "answered_by" in record and conversation_of(record.get("messages"))
        if not is_answer:
            raise ValueError(f"out={path} is no file of answers, in line {number}; name another file")
        if record["answered_by"] != json.loads(json.dumps(facts)):
            raise ValueError(
                f"out={path} was answered by another model or with other options, in line {number}; name another file"
            )
    if len(records) > len(asked):
        raise ValueError(
            f"out={path} answers {len(records)} conversations of which data has {len(asked)}; name another file"
        )
    for number, (messages, record) in enumerate(zip(asked, records, strict=False), start=1):
        if any(message not in record["messages"] for message in messages):
            raise ValueError(f"out={path} answers other conversations, from line {number} on; name another file")
    return [record["messages"] for record in records]
