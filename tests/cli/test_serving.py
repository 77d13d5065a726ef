"""The commands that answer others."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import gradio
import pytest
from command import run


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
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr("mixture_of_depths.serving.playground.check_address", lambda *_: None)
    status, output, errors = run(monkeypatch, capsys, "playground", str(checkpoint))
    assert (status, output.strip(), errors.strip()) == (130, "http://127.0.0.1:7860/", "stopped")


def test_serve_hands_its_keys_on_and_refuses_those_that_no_client_can_send(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handed = []
    monkeypatch.setattr("mixture_of_depths.serving.openai.serve", lambda *arguments: handed.append(arguments[-1]))
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
