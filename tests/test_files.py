"""Files and folders are whole or not there."""

import os
from pathlib import Path

import pytest

from mixture_of_depths.files import is_whole, seal, write_aside


def test_a_folder_without_checksums_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert not is_whole(tmp_path)
    seal(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "checksums.json").write_text("[]")
    assert not is_whole(tmp_path)


def test_a_file_is_written_whole_or_keeps_what_it_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_aside(path, "first")

    def fail(number: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_aside(path, "second")
    assert path.read_text() == "first"
