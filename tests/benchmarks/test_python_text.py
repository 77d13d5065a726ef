"""The text of the GPU's isoFLOP study."""

import hashlib
import io
import runpy
import tarfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "python_text.py"))


def archive(**files: bytes) -> bytes:
    """A source distribution with files by their paths, which have __ for a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo("p-1/" + name.replace("__", "/") + ".py")
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_modules_come_in_the_order_of_their_paths_without_tests_and_what_is_no_text() -> None:
    source = archive(b=b"b = 1\n", a__tests__t=b"t = 1\n", a__x="é = 1\n".encode(), c=b"\xff", d=b" \n")
    assert list(SCRIPT["modules"](source)) == ["é = 1\n", "b = 1\n"]


def test_a_kept_source_distribution_is_held_against_its_sum(tmp_path: Path) -> None:
    source = archive(b=b"b = 1\n")
    (tmp_path / "p-1.tar.gz").write_bytes(source)
    assert SCRIPT["fetch"]("p", "1", hashlib.sha256(source).hexdigest(), tmp_path) == source
    with pytest.raises(ValueError, match=r"p-1\.tar\.gz is not p 1: its SHA-256 is another"):
        SCRIPT["fetch"]("p", "1", "0" * 64, tmp_path)


def test_a_source_distribution_is_fetched_by_a_link_of_its_index_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive(b=b"b = 1\n")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "P_q-1.tar.gz").write_bytes(source)
    links = '<a href="files/p-q-1.1.tar.gz">other</a> <a href="files/P_q-1.tar.gz#sha256=0&amp;x">P_q-1.tar.gz</a>'
    (tmp_path / "p-q.html").write_text(links)
    monkeypatch.setitem(SCRIPT["fetch"].__globals__, "INDEX", tmp_path.as_uri() + "/{name}.html")
    assert SCRIPT["fetch"]("p-q", "1", hashlib.sha256(source).hexdigest(), None) == source
    with pytest.raises(ValueError, match=r"p-q\.html has no p-q-2\.tar\.gz; the version was taken back"):
        SCRIPT["fetch"]("p-q", "2", "0" * 64, None)


def test_every_package_has_one_version_and_one_sum() -> None:
    packages = SCRIPT["packages"]()
    assert len({name for name, _, _ in packages}) == len(packages) > 10
    assert all(len(sha256) == 64 for _, _, sha256 in packages)
