"""A text, and a small model trained on it, for every command; no test changes them."""

import sys
from pathlib import Path

import pytest
from command import TINY, data
from models import write_numbers

from mixture_of_depths.cli.main import main


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_numbers(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    with pytest.MonkeyPatch.context() as patch:
        # Left to `mod calibrate`, and evaluated on all of the text, as by `mod evaluate`.
        words = ["train", "--out", str(out), *data(text), *TINY, "--max-steps", "20", "--no-calibrate"]
        patch.setattr(sys, "argv", ["mod", *words])
        main()
    return out
