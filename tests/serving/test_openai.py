"""A real server process answers OpenAI's own client, many at once."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from openai_requests import ENDPOINTS, ask, chat, refusal, request_of

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.serving.openai import application, serve
from mixture_of_depths.text.tokenizer import load_tokenizer


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


def test_a_response_tells_again_which_tools_must_not_be_called(client: openai.OpenAI, checkpoint: Path) -> None:
    tool: Any = {"type": "function", "name": "look", "parameters": {}, "strict": True}
    given = client.responses.create(model=str(checkpoint), input="the quick", tools=[tool], tool_choice="none")
    assert [one.model_dump(include=set(tool)) for one in given.tools] == [tool]


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


def test_the_port_is_held_from_before_the_step_is_compiled_until_the_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tries = []

    def take(*_: Any) -> None:
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        tries.append(port)

    monkeypatch.setattr("mixture_of_depths.serving.openai.compile_step", take)
    monkeypatch.setattr("uvicorn.Server.run", take)
    serve(model, tokenizer, "name", "127.0.0.1", port, compiled=True)
    assert tries == [port, port]
    socket.create_server(("127.0.0.1", port)).close()


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


def test_clients_that_hang_up_before_they_are_read_are_not_read(client: openai.OpenAI, checkpoint: Path) -> None:
    body = json.dumps({"model": str(checkpoint), "prompt": "the quick " * 40_000})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    address = (client.base_url.host, client.base_url.port)

    def connected() -> socket.socket:
        connection = socket.create_connection(address)
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        return connection

    start = time.perf_counter()
    with connected() as connection:
        assert b" 400 " in connection.recv(100)
    alone = time.perf_counter() - start
    connections = [connected() for _ in range(20)]
    # The server has their bodies when it answers this, which waits for nothing.
    client.models.list()
    start = time.perf_counter()
    for connection in connections:
        connection.close()
    ask(client, "completions", request_of("completions", checkpoint))
    # Read to their ends they would have taken 20 times as long as one.
    assert time.perf_counter() - start < 10 * alone


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


@pytest.mark.parametrize(
    ("host", "keys", "warns"),
    [
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("0.0.0.0", (), True),
        ("0.0.0.0", ("sesame",), False),
    ],
)
def test_a_server_that_others_reach_without_a_key_warns_in_one_line(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, host: str, keys: tuple[str, ...], warns: bool
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_: None)
    capsys.readouterr()
    serve(model, tokenizer, "name", host, 0, api_keys=keys)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (captured.err.count("\n"), "--api-key" in captured.err) == (int(warns), warns)
    assert "sesame" not in captured.err
