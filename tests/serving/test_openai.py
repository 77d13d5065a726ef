"""A real server process answers OpenAI's own client, and goes on after everything that clients do wrong."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from models import make_checkpoint
from transformers import GenerationConfig

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.serving.openai import sampling_options, serve
from mixture_of_depths.text.tokenizer import load_tokenizer


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


def test_a_completion_is_what_sampling_gives(client: openai.OpenAI, checkpoint: Path) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    expected = sample_texts(model, tokenizer, ["the quick"], SamplingOptions(max_new_tokens=12, temperature=0))[0]
    answer = client.completions.create(model=str(checkpoint), prompt="the quick", max_tokens=12, temperature=0)
    # The server shows the bytes of a character that is not complete.
    assert answer.choices[0].text.rstrip("\ufffd") == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI, checkpoint: Path) -> None:
    asked: Any = {"model": str(checkpoint), "messages": chat("fox"), "max_tokens": 16, "temperature": 0.7, "seed": 7}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == whole
    assert parts[-1].finish_reason == "length"
    other = client.chat.completions.create(**{**asked, "seed": 6}).choices[0].message.content
    assert other != whole


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, checkpoint: Path) -> None:
    asked: Any = {"model": str(checkpoint), "prompt": "the", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    answer = client.completions.create(**asked, stop=whole[6:8]).choices[0]
    assert whole.startswith(answer.text)
    assert len(answer.text) < len(whole)
    assert answer.finish_reason == "stop"


def test_only_the_one_model_is_served_and_no_route_loads_another(client: openai.OpenAI, checkpoint: Path) -> None:
    assert [model.id for model in client.models.list()] == [str(checkpoint)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="other", prompt="the")
    assert "Server is pinned to" in str(refused.value)
    for path in ("load_model", "reset", "v1/audio/transcriptions", "v1/systemone"):
        with pytest.raises(openai.NotFoundError):
            client.post(f"/../{path}", body={"model": "gpt2"}, cast_to=object)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "the " * 400}, "the prompt has .* tokens; the model takes at most 127"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": "the", "temperature": -1}, "temperature=-1.0 is out of range"),
        ({"prompt": "the", "top_p": 7}, "top_p=7.0 is out of range"),
        ({"prompt": "the", "max_tokens": 0}, "max_new_tokens=0 is out of range"),
        ({"prompt": "the", "extra_body": {"generation_config": '{"num_beams": 3}'}}, "num_beams=3 is not supported"),
        ({"prompt": ["the", "fox"]}, "prompt must be a string"),
        ({"prompt": "the", "n": 3}, "n=3 is not supported"),
        ({"prompt": "the", "logprobs": 2}, "logprobs=2 is not supported"),
        ({"prompt": "the", "presence_penalty": 0.5}, "presence_penalty=0.5 is not supported"),
        ({"prompt": "the", "stop": [""]}, "stop=.* is out of range"),
    ],
)
def test_a_completion_that_cannot_be_made_is_refused_with_the_reason(
    client: openai.OpenAI, checkpoint: Path, request_: dict[str, Any], message: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{"model": str(checkpoint), "stream": stream, **request_})
        assert re.search(message, str(refused.value))
        assert re.search(message, refused.value.response.json()["detail"])


def test_a_chat_with_a_picture_is_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    picture: Any = {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=str(checkpoint), messages=[{"role": "user", "content": [picture]}])
    assert "the model reads text alone, not image_url" in refused.value.response.json()["detail"]


@pytest.mark.parametrize("fault", ["port", "host", "setting"])
def test_what_cannot_be_served_is_refused_at_the_start(checkpoint: Path, fault: str) -> None:
    model, tokenizer = MoDForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(str(checkpoint))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if fault == "port" else 0
        if fault == "setting":
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
        with pytest.raises(openai.APIStatusError) as refused:
            client.post("/chat/completions", body={"model": str(checkpoint), "max_tokens": 2, **body}, cast_to=object)
        assert 400 <= refused.value.status_code < 500
    assert client.completions.create(model=str(checkpoint), prompt="the", max_tokens=3).choices


def test_what_is_asked_for_ends_where_the_model_does(client: openai.OpenAI, checkpoint: Path) -> None:
    answer = client.completions.create(model=str(checkpoint), prompt="the", max_tokens=10_000, temperature=0)
    assert answer.usage is not None
    assert answer.usage.total_tokens == 128
    assert answer.choices[0].finish_reason == "length"


def test_many_clients_at_once_each_get_their_own_answer(client: openai.OpenAI, checkpoint: Path) -> None:
    prompts = [f"the {number}" for number in range(32)]

    def ask(prompt: str) -> str:
        return (
            client.completions.create(model=str(checkpoint), prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        )

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, prompts)) == alone


def test_the_seed_of_a_request_is_its_own_among_many_at_once(client: openai.OpenAI, checkpoint: Path) -> None:
    def ask(seed: int) -> str:
        asked: Any = {"model": str(checkpoint), "prompt": "the", "max_tokens": 6, "temperature": 1, "seed": seed}
        return client.completions.create(**asked).choices[0].text

    alone = [ask(seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == alone


@pytest.mark.slow
def test_a_client_that_hangs_up_frees_the_server(client: openai.OpenAI, checkpoint: Path) -> None:
    asked: Any = {"model": str(checkpoint), "prompt": "the", "temperature": 0}
    start = time.perf_counter()
    client.completions.create(max_tokens=120, **asked)
    whole = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(30):
        streamed = client.completions.create(max_tokens=120, stream=True, **asked)
        next(iter(streamed))
        streamed.close()
    assert client.completions.create(max_tokens=3, **asked).choices
    # Answered to their ends they would have taken 30 times as long as one.
    assert time.perf_counter() - start < 15 * whole


def test_a_chat_template_of_a_clients_own_is_refused(client: openai.OpenAI, checkpoint: Path) -> None:
    message: Any = {"role": "user", "content": "the"}
    extra = {"chat_template_kwargs": {"chat_template": "{% for i in range(9) %}{{ i }}{% endfor %}"}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=str(checkpoint), messages=[message], max_tokens=2, extra_body=extra)
    assert "chat_template is the model's own" in refused.value.response.json()["detail"]


def test_settings_of_generate_become_those_of_the_sampler() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.5, top_p=0.9, max_new_tokens=7, repetition_penalty=1.2)
    assert sampling_options(config, 5) == SamplingOptions(
        max_new_tokens=7, temperature=0.5, top_p=0.9, top_k=0, repetition_penalty=1.2, seed=5
    )
    assert sampling_options(GenerationConfig(max_new_tokens=7)).temperature == 0
    with pytest.raises(ValueError, match="num_beams=2 is not supported"):
        sampling_options(GenerationConfig(num_beams=2, max_new_tokens=1))
