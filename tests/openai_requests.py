"""What tests of the server share: a request in the words of every endpoint, and what the client makes of answers."""

from pathlib import Path
from typing import Any

import openai
import pytest

ENDPOINTS = ("completions", "chat/completions", "responses")


def chat(text: str) -> Any:
    return [{"role": "user", "content": text}]


def request_of(endpoint: str, checkpoint: Path, new_tokens: int = 3, **more: Any) -> dict[str, Any]:
    """A request that every endpoint answers alike, in its own words."""
    prompt: dict[str, Any] = {
        "completions": {"prompt": "fox", "max_tokens": new_tokens},
        "chat/completions": {"messages": chat("fox"), "max_completion_tokens": new_tokens},
        "responses": {"input": "fox", "max_output_tokens": new_tokens},
    }[endpoint]
    return {"model": str(checkpoint), "temperature": 0, **prompt, **more}


def ask(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> tuple[list[str], str, int]:
    """The pieces of the text (one if it is not streamed), why it ended, and how many tokens it counts."""
    required = {"model", "prompt", "messages", "input", "stream"} & set(body)
    extra = {name: value for name, value in body.items() if name not in required}
    body = {name: body[name] for name in required}
    if endpoint == "responses":
        answer: Any = client.responses.create(**body, extra_body=extra)
        if not body.get("stream"):
            return [answer.output_text], answer.status, answer.usage.output_tokens
        events = list(answer)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        last = events[-1].response
        assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == last.output_text
        pieces = [event.delta for event in events if event.type.endswith("text.delta")]
        return pieces, last.status, last.usage.output_tokens
    create: Any = client.completions.create if endpoint == "completions" else client.chat.completions.create
    if not body.get("stream"):
        answer = create(**body, extra_body=extra)
        (choice,) = answer.choices
        text = choice.text if endpoint == "completions" else choice.message.content
        return [text], choice.finish_reason, answer.usage.completion_tokens
    *chunks, last = create(**body, stream_options={"include_usage": True}, extra_body=extra)
    assert last.choices == []
    choices = [chunk.choices[0] for chunk in chunks]
    texts = [(choice.text if endpoint == "completions" else choice.delta.content) or "" for choice in choices]
    return texts, choices[-1].finish_reason, last.usage.completion_tokens


def refusal(client: openai.OpenAI, endpoint: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The status, and what OpenAI's error form says."""
    with pytest.raises(openai.APIStatusError) as refused:
        client.post(f"/{endpoint}", body=body, cast_to=object)
    return refused.value.status_code, refused.value.response.json()["error"]
