"""The command that looks inside: inspect."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import run


def test_inspect_writes_the_page_the_figures_and_the_numbers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    page, figures, numbers = tmp_path / "new" / "page.html", tmp_path / "figures", tmp_path / "other" / "trace.json"
    arguments = ["inspect", str(checkpoint), "--text", "The router <b>", "--out", str(page)]
    status, output, _ = run(
        monkeypatch, capsys, *arguments, "--figures", str(figures), "--trace", str(numbers), "--routing", "top_k"
    )
    assert status == 0
    assert {Path(line) for line in output.split("\n") if line} == {page, numbers, *figures.iterdir()}
    assert len(list(figures.glob("*.svg"))) == len(list(figures.glob("*.png"))) == 6
    trace = json.loads(numbers.read_text())
    assert "".join(trace["pieces"]) == "The router <b>"
    assert trace["routing"] == "top_k"
    assert page.read_text().count('<span class="s') >= len(trace["pieces"])


def test_inspect_reads_a_file_as_training_does(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "text.txt").write_bytes("first\r\nsecond\r".encode("utf-8-sig"))
    arguments = ["--file", str(tmp_path / "text.txt"), "--trace", str(tmp_path / "trace.json")]
    page = ["--out", str(tmp_path / "page.html")]
    assert run(monkeypatch, capsys, "inspect", str(checkpoint), *arguments, *page)[0] == 0
    assert "".join(json.loads((tmp_path / "trace.json").read_text())["pieces"]) == "first\r\nsecond\r"
    over = ["--file", str(tmp_path / "text.txt"), "--out", str(tmp_path / "new" / ".." / "text.txt")]
    status, _, errors = run(monkeypatch, capsys, "inspect", str(checkpoint), *over)
    assert (status, "would be written over" in errors) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of text and file"),
        (["--text", ""], "text='' is empty"),
        (["--text", "a", "--trace", "trace.csv"], "must end in .json or .parquet"),
        (["--text", "a\udcff"], "is not UTF-8"),
        (["--text", "a " * 4000], "max_position_embeddings="),
        (["--file", "absent.txt"], "file=absent.txt does not exist; name a file of text"),
    ],
)
def test_inspect_refuses_what_it_cannot_look_at(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    message: str,
) -> None:
    page = tmp_path / "page.html"
    status, _, errors = run(monkeypatch, capsys, "inspect", str(checkpoint), "--out", str(page), *arguments)
    assert (status, message in errors, page.exists()) == (2, True, False)


def test_inspect_refuses_folders_as_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    words = ["inspect", str(checkpoint), "--text", "a", "--out", str(tmp_path / "page.html")]
    for field, others in (("trace", ["--trace", str(folder)]), ("out", ["--out", str(folder)])):
        status, _, errors = run(monkeypatch, capsys, *words, *others)
        assert (status, f"{field}={folder} is a folder; name a file in it" in errors) == (2, True), errors
    (tmp_path / "file").touch()
    status, _, errors = run(monkeypatch, capsys, *words, "--out", str(tmp_path / "file" / "page.html"))
    assert (status, f"out={tmp_path / 'file'}" in errors) == (2, True), errors
