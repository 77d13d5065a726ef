"""Files and folders are whole or not there."""

import os
from pathlib import Path

import pytest

from mixture_of_depths.files import check_place, is_whole, seal, write_aside


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


def test_a_place_where_no_folder_can_be_made_is_refused_with_its_field_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "new" / "newer"):
        check_place(place, "out")
    (tmp_path / "nowhere").symlink_to("absent")
    (tmp_path / "loop").symlink_to("loop")
    long = "x" * 256
    for place, reason in (
        ("file", "file is a file"),
        ("file/in/it", "file is a file"),
        (long, "file name too long"),
        (f"new/{long}/it", "file name too long"),
        ("nowhere", "a link that leads nowhere"),
        ("loop/in/it", "a link that leads nowhere"),
    ):
        with pytest.raises(ValueError, match=rf"out=\S+{place} cannot be a folder \(.*{reason}\); name another"):
            check_place(tmp_path / place, "out")
