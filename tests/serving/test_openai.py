"""A real server process answers OpenAI's own client, and goes on after everything that clients do wrong."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from models import make_checkpoint

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.serving.openai import application, serve
from mixture_of_depths.text.tokenizer import load_tokenizer

JSON = {"Content-Type": "application/json"}
ENDPOINTS = ("completions", "chat/completions", "responses")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mixture_of_depths", "serve", str(checkpoint), "--port", str(port)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        connected = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(600):
            try:
                connected.models.list()
                break
            except openai.APIConnectionError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
        yield connected
        assert process.poll() is None, "the server ended"
        process.terminate()


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


def test_a_completion_is_what_sampling_gives(client: openai.OpenAI, checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    expected = sample_texts(model, tokenizer, ["the quick"], SamplingOptions(max_new_tokens=12, temperature=0))[0]
    answer = client.completions.create(model=str(checkpoint), prompt="the quick", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    tokens: Any = tokenizer("the quick")["input_ids"]
    again = client.completions.create(model=str(checkpoint), prompt=tokens, max_tokens=12, temperature=0)
    assert again.choices[0].text == expected.text
    # OpenAI's own number.
    assert client.completions.create(model=str(checkpoint), prompt="the").usage.completion_tokens == 16  # type: ignore


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_is_streamed_is_what_is_answered_whole(client: openai.OpenAI, checkpoint: Path, endpoint: str) -> None:
    body = request_of(endpoint, checkpoint, 16, temperature=0.7, seed=7)
    (whole,), reason, tokens = ask(client, endpoint, body)
    pieces, *rest = ask(client, endpoint, {**body, "stream": True})
    assert len(pieces) > 2
    assert ("".join(pieces), *rest) == (whole, reason, tokens)
    assert (reason, tokens) == ("incomplete" if endpoint == "responses" else "length", 16)
    assert ask(client, endpoint, {**body, "seed": -6})[0] != [whole]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_an_answer_ends_before_a_stop_string_that_two_tokens_make(
    client: openai.OpenAI, checkpoint: Path, endpoint: str, streamed: bool
) -> None:
    pieces, _, _ = ask(client, endpoint, request_of(endpoint, checkpoint, 60, stream=True))
    pieces = [piece for piece in pieces if piece]
    whole, stop = "".join(pieces), pieces[4][-1] + pieces[5][0]
    body = request_of(endpoint, checkpoint, 60, stream=streamed, stop=["nowhere", stop])
    texts, reason, tokens = ask(client, endpoint, body)
    assert "".join(texts) == whole[: whole.index(stop)]
    assert reason == ("completed" if endpoint == "responses" else "stop")
    # As many tokens as it takes for the text to hold the stop string, which is more than are shown.
    upto = [ask(client, endpoint, request_of(endpoint, checkpoint, tokens - less))[0][0] for less in (0, 1)]
    assert [stop in text for text in upto] == [True, False]


def test_a_response_is_not_streamed_unless_asked(client: openai.OpenAI, checkpoint: Path) -> None:
    body = request_of("responses", checkpoint, instructions="Be brief.", metadata={"a": "b"})
    answer: Any = client.post("/responses", body=body, cast_to=object)
    assert (answer["object"], answer["metadata"]) == ("response", {"a": "b"})
    # What was answered can be handed back.
    history = [*chat("fox"), *answer["output"], *chat("the")]
    assert client.responses.create(**{**body, "input": history}).usage.input_tokens > answer["usage"]["input_tokens"]  # type: ignore


def test_every_prompt_has_as_many_choices_as_asked_each_with_a_seed_of_its_own(
    client: openai.OpenAI, checkpoint: Path
) -> None:
    asked: Any = {"model": str(checkpoint), "max_tokens": 8, "temperature": 1}
    alone = [
        client.completions.create(**asked, prompt=prompt, seed=seed).choices[0].text
        for prompt, seed in (("the", 5), ("the", 6), ("fox", 7), ("fox", 8))
    ]
    assert len(set(alone)) == 4
    together = client.completions.create(**asked, prompt=["the", "fox"], n=2, seed=5)
    assert [(choice.index, choice.text) for choice in together.choices] == list(enumerate(alone))
    assert together.usage is not None
    assert (together.usage.prompt_tokens, together.usage.completion_tokens) == (3, 32)
    texts = [""] * 4
    for chunk in client.completions.create(**asked, prompt=["the", "fox"], n=2, seed=5, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == alone


def test_settings_of_vllm_are_the_sampler_s(client: openai.OpenAI, checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    for settings in (
        {"top_k": 3},
        {"min_p": 0.3},
        {"repetition_penalty": 1.7},
        {"top_k": -1, "min_p": 0},
        {"top_k": 0},
    ):
        options: Any = {"top_k": 0, **settings}
        options["top_k"] = max(0, options["top_k"])
        expected = sample_texts(model, tokenizer, ["fox"], SamplingOptions(16, temperature=1, seed=3, **options))
        body = request_of("completions", checkpoint, 16, temperature=1, seed=3, **settings)
        assert ask(client, "completions", body)[0] == [expected[0].text], settings


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_asks_for_nothing_changes_nothing(client: openai.OpenAI, checkpoint: Path, endpoint: str) -> None:
    nothing = {
        "completions": {"best_of": 1, "echo": False, "logprobs": None, "suffix": None, "n": 1},
        "chat/completions": {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "function_call": "none"},
        "responses": {"text": {"format": {"type": "text"}}, "include": [], "reasoning": {"effort": None}},
    }[endpoint]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    common = {"tools": [tool], "tool_choice": "none", "parallel_tool_calls": False, "user": "me", "logit_bias": {}}
    zero = {"frequency_penalty": 0.0, "presence_penalty": 0, "min_tokens": 0, "top_k": -1, "store": True}
    plain = ask(client, endpoint, request_of(endpoint, checkpoint))
    assert ask(client, endpoint, request_of(endpoint, checkpoint, **nothing, **common, **zero)) == plain
    assert ask(client, endpoint, request_of(endpoint, checkpoint, tools=[], stop=None)) == plain


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
        "stop": [""],
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


def test_a_chat_with_a_picture_is_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    picture: Any = {"type": "image_url", "image_url": {"url": "data:,"}}
    status, error = refusal(
        client, "chat/completions", {"model": str(checkpoint), "messages": [{"role": "user", "content": [picture]}]}
    )
    assert (status, error["message"]) == (400, "the model reads text alone, not image_url")
    assert error["param"] == "messages[0].content[0].type"


def test_the_one_model_is_listed_and_another_is_not_found(client: openai.OpenAI, checkpoint: Path) -> None:
    (listed,) = client.models.list()
    assert (listed.id, listed.object, type(listed.created)) == (str(checkpoint), "model", int)
    assert abs(listed.created - time.time()) < 3600
    assert listed.owned_by
    assert listed.model_extra == {}
    assert client.models.retrieve(str(checkpoint)) == listed
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("other")
    assert unknown.value.code == "model_not_found"
    for endpoint in ENDPOINTS:
        status, error = refusal(client, endpoint, {**request_of(endpoint, checkpoint), "model": "other"})
        assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert str(checkpoint) in error["message"]


def test_no_route_loads_another_model(client: openai.OpenAI) -> None:
    for path in ("load_model", "reset", "v1/audio/transcriptions", "v1/systemone", "v1/completions/"):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.post(f"/../{path}", body={"model": "gpt2"}, cast_to=object)
        assert unknown.value.response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("fault", ["port", "host", "setting"])
def test_what_cannot_be_served_is_refused_at_the_start(checkpoint: Path, fault: str) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if fault == "port" else 0
        if fault == "setting":
            assert model.generation_config is not None
            model.generation_config.no_repeat_ngram_size = 3
        message = {
            "port": f"port={port} of host=127.0.0.1 cannot be listened on",
            "host": "host=999.1.1.1 cannot be listened on",
            "setting": "checkpoint=name: its generation_config.json .* no_repeat_ngram_size=3 is not supported",
        }[fault]
        with pytest.raises(ValueError, match=message):
            serve(model, tokenizer, "name", "999.1.1.1" if fault == "host" else "127.0.0.1", port)


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
        assert re.match("the body (must be a JSON object|cannot be read)|model holds half", error["message"])
    assert client.completions.create(model=str(checkpoint), prompt="the", max_tokens=3).choices


def test_what_is_asked_for_ends_where_the_model_does(client: openai.OpenAI, checkpoint: Path) -> None:
    answer = client.completions.create(model=str(checkpoint), prompt="the", max_tokens=10_000, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 128
    assert answer.choices[0].finish_reason == "length"


def test_many_clients_at_once_each_get_their_own_answer(client: openai.OpenAI, checkpoint: Path) -> None:
    prompts = [f"the {number}" for number in range(32)]

    def answer(prompt: str) -> str:
        return (
            client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        )

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(answer, prompts)) == alone


def test_the_seed_of_a_request_is_its_own_among_many_at_once(client: openai.OpenAI, checkpoint: Path) -> None:
    def answer(seed: int) -> str:
        asked: Any = {"model": str(checkpoint), "prompt": "the", "max_tokens": 6, "temperature": 1, "seed": seed}
        return client.completions.create(**asked).choices[0].text

    alone = [answer(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(answer, range(32))) == alone


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_clients_that_hang_up_free_the_server(
    client: openai.OpenAI, checkpoint: Path, endpoint: str, streamed: bool
) -> None:
    start = time.perf_counter()
    ask(client, endpoint, request_of(endpoint, checkpoint, 110))
    whole = time.perf_counter() - start
    body = json.dumps(request_of(endpoint, checkpoint, 110, stream=streamed))
    head = (
        f"POST /v1/{endpoint} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    address = (client.base_url.host, client.base_url.port)
    connections = [socket.create_connection(address) for _ in range(20)]
    for connection in connections:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
    # The server has read them all when it answers this, which waits for nothing.
    client.models.list()
    start = time.perf_counter()
    for connection in connections:
        connection.close()
    ask(client, endpoint, request_of(endpoint, checkpoint))
    # Answered to their ends they would have taken 20 times as long as one.
    assert time.perf_counter() - start < 10 * whole


def test_a_key_is_asked_for_under_v1_and_nowhere_else(checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    client = TestClient(application(model, tokenizer, "name", api_keys=["sesame", "two words"]))
    assert client.get("/health").status_code == 200
    wrong = (
        "",
        "sesame",
        "Bearer",
        "Bearer ",
        "Bearer sesam",
        "Bearer sesamee",
        "Basic sesame",
        "Bearer sesame two words",
    )
    for method, path in (("GET", "models"), ("GET", "models/name"), ("POST", "completions"), ("POST", "nowhere")):
        for header in wrong:
            answer = client.request(method, f"/v1/{path}", headers={"Authorization": header.encode()}, content="{")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/v1/models").status_code == 401
    for header in ("Bearer sesame", "bearer sesame", "Bearer two words"):
        assert client.get("/v1/models", headers={"Authorization": header.encode()}).status_code == 200


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template; use /v1/completions"),
        ("{{ raise_exception('roles must alternate') }}", "the model's chat template refuses .*: roles must alternate"),
        ("{{ 1 / 0 }}", "the model's chat template refuses .*: division by zero"),
        ("{{ '{}'.format() }}", "the model's chat template refuses .*: .*index .*out of range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the model's chat template refuses .*: maximum recursion"),
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
def test_health_answers_while_a_prompt_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    reads, healthy, tokenise = threading.Event(), threading.Event(), type(tokenizer).__call__

    def held_up(*arguments: Any, **settings: Any) -> Any:
        reads.set()
        assert healthy.wait(60), "health waits for the prompt"
        return tokenise(*arguments, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", held_up)
    with TestClient(application(model, tokenizer, str(checkpoint))) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.post, f"/v1/{endpoint}", json=request_of(endpoint, checkpoint))
        assert reads.wait(60)
        assert client.get("/health").status_code == 200
        healthy.set()
        assert answer.result().status_code == 200


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


@pytest.mark.parametrize("name", ["self", "messages", "conversation", "conversations", "tokenize", "tools"])
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


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("0.0.0.0", (), True),
        ("", (), True),
        ("0.0.0.0", ("sesame",), False),
    ],
)
def test_a_server_that_others_reach_without_a_key_warns_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, host: str, keys: tuple[str, ...], warns: bool
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)
    capsys.readouterr()
    serve(model, tokenizer, "name", host, 0, api_keys=keys)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (captured.err.count("\n"), "--api-key" in captured.err) == (int(warns), warns)
    assert "sesame" not in captured.err
