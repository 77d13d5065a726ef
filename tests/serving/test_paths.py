"""What is no path is told so, and a response tells how it was made."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from models import make_checkpoint

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.serving.openai import application
from mixture_of_depths.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder: Path = tmp_path_factory.mktemp("asked")
    make_checkpoint(folder)
    model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))
    assert model.generation_config is not None
    model.generation_config.do_sample = True
    model.generation_config.top_p = 0.9
    return TestClient(application(model, tokenizer, "name"))


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/nowhere", 404, "POST /v1/nowhere does not exist"),
        ("GET", "/v1/models/", 404, "GET /v1/models/ does not exist"),
        ("GET", "/v1/completions", 405, "GET /v1/completions does not exist; the path takes POST"),
        ("DELETE", "/v1/models", 405, "DELETE /v1/models does not exist; the path takes GET"),
    ],
)
def test_a_path_or_method_that_does_not_exist_is_named(
    client: TestClient, method: str, path: str, status: int, message: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"] == {"message": message, "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, {"temperature": 1.0, "top_p": 0.9, "tool_choice": "auto", "parallel_tool_calls": True}),
        (
            {"temperature": 0, "top_p": 0.5, "tool_choice": "none", "parallel_tool_calls": False},
            {"temperature": 0, "top_p": 0.5, "tool_choice": "none", "parallel_tool_calls": False},
        ),
        ({"temperature": None, "tool_choice": None}, {"temperature": 1.0, "top_p": 0.9, "tool_choice": "auto"}),
    ],
)
def test_a_response_tells_what_was_asked_and_how_it_was_sampled(
    client: TestClient, asked: dict[str, Any], told: dict[str, Any]
) -> None:
    body = {"model": "name", "input": "fox", "max_output_tokens": 2, **asked}
    answer = client.post("/v1/responses", json=body).json()
    assert {name: answer[name] for name in told} == told


@pytest.mark.parametrize("name", ["runs/mod", "./runs/mod", "runs/mod/"])
def test_a_model_answers_to_every_spelling_of_its_folder(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path)
    model, tokenizer = MoDForCausalLM.from_pretrained(tmp_path).eval(), load_tokenizer(str(tmp_path))
    client = TestClient(application(model, tokenizer, name))
    assert client.get("/v1/models").json()["data"][0]["id"] == name
    for spelling in ("runs/mod", "./runs/mod", "runs/mod/"):
        assert client.get(f"/v1/models/{spelling}").json()["id"] == name
        body = {"model": spelling, "prompt": "fox", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 200
    for other in ("mod", "runs", "runs/mod/mod", "/runs/mod"):
        assert client.post("/v1/completions", json={**body, "model": other}).status_code == 404
