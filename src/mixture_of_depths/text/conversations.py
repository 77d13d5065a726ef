"""Conversations: what a chat template makes of them, cut into sequences whose positions go on from turn to turn."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    # Whoever reads text loads this module, and loading transformers takes longer than all else.
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """The messages of a chat, as JSON, which says where one differs from another."""

    json: str

    @property
    def messages(self) -> list[Message]:
        """Mappings with "role" and "content" at least."""
        return json.loads(self.json)


def conversation_of(value: object) -> Conversation | None:
    """The conversation that a value of JSON is: messages with a role and a content, both text; None if it is none."""
    if not isinstance(value, list) or not value:
        return None
    for message in value:
        if not isinstance(message, dict):
            return None
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            return None
    # JSON can spell half a surrogate pair, which is no text.
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return Conversation(text.encode("utf-8", "replace").decode("utf-8"))


# Characters of a message that an error shows.
MOST_SHOWN = 60
# A word that no template says by itself.
PROBE = "zyxwvu"


@lru_cache(maxsize=64)
def _in_parts(tokenizer: "PreTrainedTokenizerBase", template: str, roles: tuple[str, ...]) -> tuple[bool, ...]:
    """Of each message of a conversation, whether a chat template loses what it says in a text, and not in parts."""
    probes = [f"{PROBE}{number}q" for number in range(len(roles))]

    def told(contents: Sequence[str | list[dict[str, str]]]) -> list[bool]:
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = cast(str, tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception:
            # A template is a program of the model's, and fails as programs do: with any kind of error.
            text = ""
        return [probe in text for probe in probes]

    in_texts, in_parts = told(probes), told([[{"type": "text", "text": probe}] for probe in probes])
    return tuple(part and not text for text, part in zip(in_texts, in_parts, strict=True))


def _with_content(message: Mapping[str, Any], in_parts: bool) -> Mapping[str, Any]:
    """A message whose content is a list of parts, or else a text; the texts of parts become lines of it."""
    content = message["content"]
    if isinstance(content, str) and in_parts:
        return {**message, "content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and not in_parts:
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    asks: bool,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The text of a conversation, by the tokenizer's chat template.

    Args:
        messages: mappings with "role" and "content" at least, which is a text or a list of parts that are texts; the
            template is given what it reads.
        tokenizer: the model's tokenizer.
        asks: whether the text ends where the model's answer is to begin.
        settings: further variables of the template.

    Raises:
        ValueError: when the template refuses it; in the template's own words.
    """
    try:
        roles = tuple(message["role"] for message in messages)
        in_parts = _in_parts(tokenizer, tokenizer.get_chat_template(), roles)
        told = [_with_content(message, part) for message, part in zip(messages, in_parts, strict=True)]
        text = tokenizer.apply_chat_template(cast(Any, told), tokenize=False, add_generation_prompt=asks, **settings)
        # A template can spell half a surrogate pair, which is no text.
        cast(str, text).encode()
    except Exception as error:
        # A template is a program of the model's, and fails as programs do: with any kind of error.
        raise ValueError(str(error)) from error
    return cast(str, text)


def rendered(
    conversations: Sequence[list[Message]], tokenizer: "PreTrainedTokenizerBase", asks: bool = False
) -> list[str]:
    """The text of each conversation, by the tokenizer's chat template.

    Args:
        conversations: messages.
        tokenizer: the model's tokenizer.
        asks: whether the text ends where the model's answer is to begin.

    Raises:
        ValueError: when there is no template, or it refuses a conversation.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "data holds conversations, and the tokenizer has no chat template to make text of them; give a model that "
            "answers conversations, or texts"
        )
    texts = []
    for messages in conversations:
        try:
            texts.append(render(messages, tokenizer, asks))
        except ValueError as error:
            raise ValueError(f"data holds {shortened(messages)}, which the chat template refuses: {error}") from error
    return texts


def shortened(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation in a few words, by which it is found in its file."""
    first = messages[0]
    words = " ".join(str(first["content"]).split())
    return f'a conversation that begins with {first["role"]}: "{words[:MOST_SHOWN]}{"..." * (len(words) > MOST_SHOWN)}"'


def tokens_of(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """The tokens of what `rendered` made of conversations, in which names of special tokens stand for them."""
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def positions_in_sequences(lengths: Sequence[int], sequence_length: int) -> np.ndarray:
    """Where the tokens of conversations stand that follow one another, cut to sequences; of shape [sequences, T].

    Positions begin at 0 with every conversation, and with every sequence. The rest that fills none is dropped.

    Args:
        lengths: tokens of each conversation.
        sequence_length: tokens of a sequence, T.
    """
    total = sum(lengths) // sequence_length * sequence_length
    is_start = np.zeros(sum(lengths) + 1, dtype=bool)
    is_start[np.cumsum([0, *lengths])] = True
    is_start_ST = is_start[:total].reshape(-1, sequence_length)
    is_start_ST[:, 0] = True
    slots_T = np.arange(sequence_length)
    return slots_T - np.maximum.accumulate(np.where(is_start_ST, slots_T, 0), axis=1)
