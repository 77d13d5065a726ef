"""What tests of the command line share: the arguments of small runs, and the call of a command."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mixture_of_depths.cli.main import main

SIZE = ["--hidden-size", "16", "--num-hidden-layers", "3", "--num-attention-heads", "2"]
TINY = [*SIZE, "--batch-size", "4", "--learning-rate", "1e-2"]


def data(text: Path, *more: str) -> list[str]:
    """The arguments for the text, with its cache beside it."""
    small = ["--vocab-size", "300", "--sequence-length", "16", "--cache-dir", str(text / "cache")]
    return ["--data", str(text / "*.txt"), *small, *more]


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    """The status of a command, and what it wrote to its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["mod", *arguments])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err
