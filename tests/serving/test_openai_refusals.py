"""What clients ask wrongly is refused in OpenAI's form by their own field, and the server goes on."""

import json
import math
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai_requests import ENDPOINTS, ask, chat, refusal, request_of

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.serving.openai import application
from mixture_of_depths.text.tokenizer import load_tokenizer

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_would_change_the_answer_and_cannot_is_refused_by_its_own_name(
    client: openai.OpenAI, checkpoint: Path, endpoint: str, streamed: bool
) -> None:
    tool = {"type": "function", "name": "look", "function": {"name": "look", "parameters": {}}}
    limit = {"completions": "max_tokens", "chat/completions": "max_completion_tokens", "responses": "max_output_tokens"}
    faults: dict[str, Any] = {
        "completions": {
            "best_of": 2,
            "echo": True,
            "logprobs": 0,
            "suffix": "end",
            "n": 0,
            "prompt": "",
        },
        "chat/completions": {
            "max_tokens": 0,
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {"type": "json_object"},
            "functions": [{"name": "look"}],
            "reasoning_effort": "high",
            "messages": [],
            "chat_template_kwargs": {"chat_template": "{% for i in range(9) %}{{ i }}{% endfor %}"},
        },
        "responses": {
            "previous_response_id": "resp_1",
            "background": True,
            "text": {"format": {"type": "json_object"}},
            "truncation": "auto",
            "n": 2,
        },
    }[endpoint]
    common = {
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "logit_bias": {"5": 10},
        "tools": [tool],
        "tool_choice": "required",
        "min_tokens": 2,
        "generation_config": "{}",
        "temperature": -1,
        "top_p": 7,
        "top_k": -2,
        "min_p": 2,
        "repetition_penalty": 0,
        "seed": "one",
        "stop": [1] * 65,
        limit[endpoint]: 0,
    }
    for name, value in {**faults, **common}.items():
        body = request_of(endpoint, checkpoint, stream=streamed)
        if name == "max_tokens":
            body.pop("max_completion_tokens", None)
        status, error = refusal(client, endpoint, {**body, name: value})
        assert (status, error["param"], error["type"]) == (400, name, "invalid_request_error")
        assert name in error["message"]
        assert "max_new_tokens" not in error["message"]


@pytest.mark.parametrize(("endpoint", "field"), zip(ENDPOINTS, ("prompt", "messages", "input"), strict=True))
def test_a_prompt_that_leaves_no_room_is_refused(
    client: openai.OpenAI, checkpoint: Path, endpoint: str, field: str
) -> None:
    text = "the " * 400
    body = request_of(endpoint, checkpoint, **{field: chat(text) if field == "messages" else text})
    status, error = refusal(client, endpoint, body)
    assert (status, error["param"], error["code"]) == (400, field, "context_length_exceeded")
    assert re.search("the prompt has .* tokens; the model takes at most 127", error["message"])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_padding_against_those_who_watch_is_refused_by_name(
    client: openai.OpenAI, checkpoint: Path, endpoint: str
) -> None:
    body = request_of(endpoint, checkpoint, stream=True, stream_options={"include_obfuscation": True})
    status, error = refusal(client, endpoint, body)
    assert (status, error["param"]) == (400, "stream_options.include_obfuscation")
    assert error["message"] == "stream_options.include_obfuscation=True is not supported; leave it out"
    neutral = {"include_obfuscation": False, **({} if endpoint == "responses" else {"include_usage": True})}
    assert ask(client, endpoint, {**body, "stream_options": neutral})[0]


def test_a_chat_with_a_picture_is_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    picture: Any = {"type": "image_url", "image_url": {"url": "data:,"}}
    status, error = refusal(
        client, "chat/completions", {"model": str(checkpoint), "messages": [{"role": "user", "content": [picture]}]}
    )
    assert (status, error["message"]) == (400, "the model reads text alone, not image_url")
    assert error["param"] == "messages[0].content[0].type"


def test_no_route_loads_another_model(client: openai.OpenAI) -> None:
    for path in ("load_model", "reset", "v1/audio/transcriptions", "v1/systemone", "v1/completions/"):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.post(f"/../{path}", body={"model": "gpt2"}, cast_to=object)
        assert unknown.value.response.json()["error"]["type"] == "invalid_request_error"


def test_a_broken_request_leaves_it_serving(client: openai.OpenAI, checkpoint: Path) -> None:
    for body in ({"messages": "hello"}, {"messages": [7]}, {"messages": None}, {}, {"nonsense": 1}):
        status, error = refusal(client, "chat/completions", {"model": str(checkpoint), "max_tokens": 2, **body})
        assert (status, error["param"]) == (400, "messages[0]" if body == {"messages": [7]} else "messages")
    digits = '{"model": "name", "max_tokens": 1' + "0" * 5000 + "}"
    for text in (b"{", b"[]", b"[" * 100_000, b"\xff\xfe", digits.encode(), b'{"model": "\\ud800", "prompt": "the"}'):
        broken = urllib.request.Request(f"{client.base_url}completions", text, JSON)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(broken)
        error = json.load(refused.value)["error"]
        assert (refused.value.code, error["param"]) == (400, "model" if b"ud800" in text else None)
        message = "the body (must be a JSON object|cannot be read)|model holds half|a number .* more than 4300 digits"
        assert re.match(message, error["message"])
    assert client.completions.create(model=str(checkpoint), prompt="the", max_tokens=3).choices


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template; use /v1/completions"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the model's chat template refuses .*: .roles must alternate",
        ),
        ("{{ 1 / 0 }}", "the model's chat template refuses .*: .division by zero"),
        ("{{ '{}'.format() }}", "the model's chat template refuses .*: .*index .*out of range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the model's chat template refuses .*: .maximum recursion"),
        (r"{{ '\ud800' }}", "the model's chat template refuses .*: .*surrogates not allowed"),
        ("{{ 10.0 ** 400 }}", "the model's chat template refuses .*: .*out of range"),
    ],
)
def test_a_conversation_that_the_model_has_no_template_for_is_refused(
    checkpoint: Path, template: str | None, message: str
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    tokenizer.chat_template = template
    client = TestClient(application(model, tokenizer, str(checkpoint)))
    for endpoint, field in (("chat/completions", "messages"), ("responses", "input")):
        answer = client.post(f"/v1/{endpoint}", json=request_of(endpoint, checkpoint))
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert re.search(message, answer.json()["error"]["message"])
    assert client.post("/v1/completions", json=request_of("completions", checkpoint)).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_body_that_no_model_has_room_for_is_refused_unread(
    client: openai.OpenAI, checkpoint: Path, endpoint: str
) -> None:
    status, error = refusal(client, endpoint, request_of(endpoint, checkpoint, user="the " * 2**20))
    assert (status, error["type"]) == (413, "invalid_request_error")
    assert error["message"] == "the body has more than 4194304 bytes; send less"


def test_more_samples_than_memory_holds_are_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    body = request_of("completions", checkpoint, prompt=["fox"] * 2049)
    assert refusal(client, "completions", body)[1]["param"] == "prompt"
    status, error = refusal(client, "completions", {**body, "prompt": ["fox"] * 17, "n": 128})
    assert (status, error["message"]) == (400, "prompt and n ask for 2176 samples; ask for at most 2048 at once")


@pytest.mark.parametrize(
    "name", ["self", "messages", "conversation", "conversations", "tokenize", "tools", "raise_exception"]
)
def test_what_templating_needs_for_itself_is_not_a_client_s(client: openai.OpenAI, checkpoint: Path, name: str) -> None:
    body = request_of("chat/completions", checkpoint, chat_template_kwargs={name: []})
    status, error = refusal(client, "chat/completions", body)
    assert (status, error["param"]) == (400, "chat_template_kwargs")
    assert error["message"] == f"chat_template_kwargs: {name} is not for clients to set; leave it out"


def test_two_limits_and_options_of_a_stream_that_is_none_are_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    body = request_of("chat/completions", checkpoint)
    for name, value in (("max_tokens", 5), ("stream_options", {"include_usage": True})):
        status, error = refusal(client, "chat/completions", {**body, name: value})
        assert (status, error["param"]) == (400, name)


def test_a_model_that_fails_says_so_in_openai_s_form(checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    client = TestClient(application(model, tokenizer, str(checkpoint)), raise_server_exceptions=False)
    for endpoint in ENDPOINTS:
        answer = client.post(f"/v1/{endpoint}", json=request_of(endpoint, checkpoint))
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        streamed = client.post(f"/v1/{endpoint}", json=request_of(endpoint, checkpoint, stream=True)).text.strip()
        last = json.loads(streamed.split("data: ")[-1])
        assert "not finite" in (last["response"] if endpoint == "responses" else last)["error"]["message"]


def test_what_a_chat_template_says_is_told_in_one_short_line(checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    tokenizer.chat_template = "{{ raise_exception('no: ' + messages[0]['content']) }}"
    client = TestClient(application(model, tokenizer, str(checkpoint)))
    for content, reason in (("a\nb\x1b", r"'no: a\nb\x1b'"), ("x" * 100_000, "xxx...xxx")):
        body = request_of("chat/completions", checkpoint, messages=chat(content))
        message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
        assert message.isprintable()
        assert len(message) < 600
        assert reason in message
