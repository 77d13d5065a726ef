"""Conversations as the model's chat template renders them, and which field is to blame where it refuses."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixture_of_depths.serving.answers import RequestError
from mixture_of_depths.serving.requests import MOST_REASON, Message, shown
from mixture_of_depths.text.conversations import render, tokens_of

# What transformers and Jinja call the conversation and themselves, of which a second value is an error, and the
# functions that they give to a template.
NAMES_WITHIN_TEMPLATING = ("self", "messages", "conversations", "raise_exception", "strftime_now")
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    field: str,
    beside: str,
    instructions: str | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> list[int]:
    """A conversation as the tokens of a prompt.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation.
        field: what the request calls it.
        beside: what the request calls the instructions or the settings.
        instructions: what the system says before the conversation.
        settings: variables of the template.

    Raises:
        RequestError: when the model has no chat template, or its template refuses what it is given. It names `beside`
            where the template takes the conversation alone, and both where it refuses that in other words.
    """
    if tokenizer.chat_template is None:
        raise RequestError(400, "the model's tokenizer has no chat template; use /v1/completions", field)
    ours = {*inspect.signature(tokenizer.apply_chat_template).parameters, *NAMES_WITHIN_TEMPLATING}
    for name in ours & set(settings):
        # A template with loops would hold up all others.
        raise RequestError(400, f"{beside}: {name} is not for clients to set; leave it out", beside)
    conversation = [message.for_template() for message in messages]
    system = [] if instructions is None else [{"role": "system", "content": instructions}]
    text, error = _rendered(tokenizer, system + conversation, settings)
    if error is None:
        return tokens_of([text], tokenizer)[0]
    blamed, param = field, field
    if system or settings:
        _, alone = _rendered(tokenizer, conversation, NO_SETTINGS)
        if alone is None:
            blamed, param = beside, beside
        elif str(alone) != str(error):
            blamed, param = f"{field} and {beside}", None
    reason = shown(str(error), MOST_REASON)
    raise RequestError(400, f"the model's chat template refuses {blamed}: {reason}", param) from error


def _rendered(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]], settings: Mapping[str, Any]
) -> tuple[str, ValueError | None]:
    """The text of a prompt, or why the template refuses it."""
    try:
        return render(conversation, tokenizer, True, settings), None
    except ValueError as error:
        return "", error
