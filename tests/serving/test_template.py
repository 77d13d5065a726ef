"""A chat template that refuses is answered by the field that it refuses."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from models import make_checkpoint
from openai_requests import request_of

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.serving.openai import application
from mixture_of_depths.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("templated")
    make_checkpoint(made)
    return made


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
NO_USER = "{{ raise_exception('no users') }}"
BOTH = "{{ raise_exception(messages[0].role ~ ' goes not first') }}"
NO_DATE = "{{ 10 // (date | default(1)) }}"
OTHER_DATE = "{{ raise_exception('no ' ~ (date | default('date'))) }}"
INSTRUCTIONS: dict[str, Any] = {"instructions": "Be brief."}
SETTINGS: dict[str, Any] = {"chat_template_kwargs": {"date": 0}}


@pytest.mark.parametrize(
    ("endpoint", "more", "template", "param", "message"),
    [
        ("responses", INSTRUCTIONS, NO_SYSTEM, "instructions", "instructions: 'no system'"),
        ("responses", {"instructions": ""}, NO_SYSTEM, "instructions", "instructions: 'no system'"),
        ("responses", INSTRUCTIONS, NO_USER, "input", "input: 'no users'"),
        ("responses", INSTRUCTIONS, BOTH, None, "input and instructions: 'system goes not first'"),
        ("responses", {}, BOTH, "input", "input: 'user goes not first'"),
        ("chat/completions", SETTINGS, NO_DATE, "chat_template_kwargs", "chat_template_kwargs: 'integer division"),
        ("chat/completions", SETTINGS, NO_USER, "messages", "messages: 'no users'"),
        ("chat/completions", SETTINGS, OTHER_DATE, None, "messages and chat_template_kwargs: 'no 0'"),
        ("chat/completions", {"chat_template_kwargs": {}}, OTHER_DATE, "messages", "messages: 'no date'"),
    ],
)
def test_what_a_template_refuses_is_named_by_its_own_field(
    folder: Path, endpoint: str, more: dict[str, Any], template: str, param: str | None, message: str
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))
    tokenizer.chat_template = template
    client = TestClient(application(model, tokenizer, str(folder)))
    answer = client.post(f"/v1/{endpoint}", json=request_of(endpoint, folder, **more))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["message"].startswith(f"the model's chat template refuses {message}")


PARTS_ALONE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("endpoint", "more"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "the quick brown fox jumps"}]}),
        ("responses", {"input": "the quick brown fox jumps"}),
        ("responses", {"instructions": "the quick brown", "input": " fox jumps"}),
    ],
)
def test_a_template_that_reads_parts_alone_loses_nothing_of_what_is_said(
    folder: Path, endpoint: str, more: dict[str, Any]
) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))
    tokenizer.chat_template = PARTS_ALONE
    client = TestClient(application(model, tokenizer, str(folder)))
    usage = client.post(f"/v1/{endpoint}", json=request_of(endpoint, folder, **more)).json()["usage"]
    tokens = len(tokenizer("the quick brown fox jumps", add_special_tokens=False)["input_ids"])
    assert usage["input_tokens" if endpoint == "responses" else "prompt_tokens"] == tokens
