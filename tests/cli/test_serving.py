"""The commands that answer others."""

from pathlib import Path
from typing import Any

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
