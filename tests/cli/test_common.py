"""What all commands do alike."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import run


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda raw: raw[: len(raw) // 2], "cannot be read"),
        ("model.safetensors", lambda raw: b"", "cannot be read"),
        ("model.safetensors", lambda raw: raw.replace(b"mlp.up_proj", b"mlp.xx_proj"), "does not fit its config.json"),
        ("config.json", lambda raw: raw.replace(b'"hidden_size": 16', b'"hidden_size": 32'), "checkpoint="),
        ("config.json", lambda raw: raw.replace(b'"capacity": 0.125', b'"capacity": 7.0'), "capacity=7.0"),
        (
            "config.json",
            lambda raw: raw.replace(b"mixture_of_depths", b"llama"),
            "is a llama model, not mixture_of_depths; make one of it with mod retrofit",
        ),
        ("config.json", lambda raw: raw[:-20], "cannot be read"),
        ("tokenizer.json", lambda raw: raw[:-20], "tokenizer="),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, damage: Any, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    status, output, errors = run(monkeypatch, capsys, "generate", str(copy), "--prompt", "x")
    assert status == 2
    assert message in errors
    assert "Traceback" not in output + errors
