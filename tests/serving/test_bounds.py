"""What one body may cost is bounded."""

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from models import make_checkpoint

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.serving.openai import application
from mixture_of_depths.serving.requests import ChatBody
from mixture_of_depths.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = tmp_path_factory.mktemp("bounded")
    make_checkpoint(folder)
    model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))
    # As the server does when it starts.
    gc.collect()
    gc.freeze()
    yield TestClient(application(model, tokenizer, "name"), raise_server_exceptions=False)
    gc.unfreeze()


def fields(count: int, value: Any = 1) -> dict[str, Any]:
    return {f"f{number}": value for number in range(count)}


def turn(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": "fox", **more}


COMPLETION, CHAT, RESPONSE = {"prompt": "fox"}, {"messages": [turn()]}, {"input": "fox"}
ENDPOINTS = {"completions": COMPLETION, "chat/completions": CHAT, "responses": RESPONSE}


@pytest.mark.parametrize(
    ("endpoint", "body", "param", "message"),
    [
        ("completions", {"stop": [1] * 1_900_000}, "stop", "stop has 1900000 strings of 0 characters"),
        ("completions", {"prompt": [[1]] * 900_000}, "prompt", "prompt holds 900000 prompts; send at most 2048"),
        ("completions", {"prompt": [[1.5]] * 600_000}, "prompt", "prompt holds 600000 prompts; send at most 2048"),
        ("completions", fields(300_000), None, "the body has 300002 fields; send at most 100"),
        ("completions", {"stream_options": fields(300_000)}, "stream_options", "stream_options has 300000 fields"),
        ("responses", {"metadata": fields(300_000)}, "metadata", "metadata has 300000 fields; send at most 100"),
        (
            "chat/completions",
            {"chat_template_kwargs": fields(300_000)},
            "chat_template_kwargs",
            "chat_template_kwargs has 300000 fields",
        ),
        (
            "chat/completions",
            {"messages": [turn(**fields(300_000))]},
            "messages[0].f0",
            "messages[0].f0=1 is not supported; leave it out",
        ),
        (
            "chat/completions",
            {"messages": [turn(content=[{"type": "text", "text": "", **fields(300_000)}])]},
            "messages[0].content[0].f0",
            "messages[0].content[0].f0=1 is not supported; leave it out",
        ),
        ("chat/completions", {"tools": [1] * 1_900_000}, "tools[0]", "tools[0]=1 must be an object"),
        (
            "chat/completions",
            {"messages": [turn(content="")] * 130_000},
            "messages",
            "there are 130000 messages and parts of them; send at most 4096",
        ),
        (
            "responses",
            {"input": [turn(content=[{"type": "text", "text": ""}] * 150_000)]},
            "input",
            "there are 150001 messages and parts of them; send at most 4096",
        ),
    ],
)
def test_a_body_of_very_many_parts_is_refused_soon_and_by_its_field(
    client: TestClient, endpoint: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    text = json.dumps({"model": "name", **ENDPOINTS[endpoint], **body}, separators=(",", ":"))
    assert 2**20 < len(text) < 5 * 2**20
    start = time.process_time()
    answer = client.post(f"/v1/{endpoint}", content=text[: 4 * 2**20], headers={"Content-Type": "application/json"})
    seconds = time.process_time() - start
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["message"].startswith(message)
    # Collecting every fault took up to half a minute.
    assert seconds < 5


@pytest.mark.parametrize("levels", [101, 900, 950])
@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        ("completions", "user"),
        ("completions", "prompt"),
        ("chat/completions", "messages"),
        ("chat/completions", "chat_template_kwargs"),
        ("responses", "metadata"),
        ("responses", "unknown"),
        ("completions", "\ud800"),
    ],
)
def test_a_field_that_is_nested_deeply_is_refused_by_its_name(
    client: TestClient, endpoint: str, field: str, levels: int
) -> None:
    value = '{"a":' * levels + "1" + "}" * levels
    body = json.dumps({"model": "name", **ENDPOINTS[endpoint], field: "VALUE"}).replace('"VALUE"', value)
    answer = client.post(f"/v1/{endpoint}", content=body, headers={"Content-Type": "application/json"})
    message = f"{field} is nested in more than 100 levels; send fewer"
    if field == "\ud800":
        # A name that no answer can tell again as it is.
        field, message = r"'\ud800'", r"'\ud800' holds half a character (half of a surrogate pair); send whole ones"
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert answer.json()["error"]["message"] == message


def test_a_body_that_is_nested_as_deeply_as_it_may_be_is_answered(client: TestClient) -> None:
    value = json.loads('{"a":' * 100 + "1" + "}" * 100)
    body = {"model": "name", **CHAT, "max_tokens": 2, "chat_template_kwargs": value, "prediction": value}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("stop", [["a"] * 65, ["a" * 600, "b" * 401], "a" * 1001])
@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_more_stop_strings_than_are_looked_for_at_every_token_are_refused(
    client: TestClient, endpoint: str, stop: Any
) -> None:
    answer = client.post(f"/v1/{endpoint}", json={"model": "name", **ENDPOINTS[endpoint], "stop": stop})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stop")
    assert answer.json()["error"]["message"].endswith("give at most 64 of at most 1000 in all")


def test_a_conversation_and_stop_strings_of_the_largest_size_are_taken() -> None:
    parts = [{"type": "text", "text": "fox"}] * 2048
    ChatBody.model_validate({"model": "name", "messages": [turn()] * 2047 + [turn(content=parts)], "stop": ["a"] * 64})
    ChatBody.model_validate({"model": "name", "messages": [turn()] * 4096, "stop": ["a" * 500, "b" * 500]})
    for messages in ([turn()] * 4097, [turn()] * 2048 + [turn(content=parts)]):
        with pytest.raises(ValueError, match="send at most 4096"):
            ChatBody.model_validate({"model": "name", "messages": messages})


LONG, ODD = "x" * 100_000, "two\nlines\x1b[31m"


@pytest.mark.parametrize("name", [LONG, ODD, "", " ", "a b"])
@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("completions", lambda name: {name: 1}),
        ("completions", lambda name: {name: [[[["x" * 200] * 9] * 9] * 9] * 9}),
        ("completions", lambda name: {name: {name: {name: name}}}),
        ("completions", lambda name: {name: float("inf")}),
        ("completions", lambda name: {name: "\ud800"}),
        ("completions", lambda name: {"model": name}),
        ("completions", lambda name: {"n": name}),
        ("completions", lambda name: {"stream_options": {name: 1}, "stream": True}),
        ("chat/completions", lambda name: {"messages": [turn(role=name)]}),
        ("chat/completions", lambda name: {"messages": [turn(**{name: name})]}),
        ("chat/completions", lambda name: {"messages": [turn(content=[{"type": name, "text": ""}])]}),
        ("chat/completions", lambda name: {"messages": [turn(content=[{"type": "text", "text": "", name: 1}])]}),
        ("responses", lambda name: {"metadata": {name: 1}}),
    ],
)
def test_what_a_request_brings_stands_in_a_message_in_one_short_line(
    client: TestClient, endpoint: str, body: Callable[[str], dict[str, Any]], name: str
) -> None:
    text = json.dumps({"model": "name", **ENDPOINTS[endpoint], **body(name)})
    answer = client.post(f"/v1/{endpoint}", content=text, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code in (400, 404)
    assert error["message"].isprintable()
    assert len(error["message"]) < 700
    assert error["param"].isprintable()
    assert len(error["param"]) < 200
    if name in (LONG, ODD):
        assert ("xxx...xxx" if name is LONG else r"two\nlines\x1b[31m") in error["message"]


@pytest.mark.parametrize("name", ["best_of", "max_tokens", "top_k", "seed", "n"])
def test_a_number_of_thousands_of_digits_is_cut(client: TestClient, name: str) -> None:
    body = {"model": "name", **COMPLETION, name: -int("9" * 4000)}
    message = client.post("/v1/completions", json=body).json()["error"]["message"]
    assert message.startswith(f"{name}=-9999")
    assert len(message) < 200


def test_a_path_that_does_not_exist_is_told_in_one_short_line(client: TestClient) -> None:
    for path in (f"/v1/{LONG[:9999]}", "/v1/%0a%1b%5B31m"):
        message = client.get(path).json()["error"]["message"]
        assert message.isprintable()
        assert len(message) < 150
