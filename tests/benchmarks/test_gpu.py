"""The command that takes all measurements on a GPU; `.ci/run` runs the whole of it in toy sizes."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import torch._inductor.config
from parts import only_owner

ROOT = Path(__file__).parents[2]


def measured(out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Runs the command; its status, and the last line that it printed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), "--parts", "environment", *more]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_last_line_holds_the_parts_and_a_later_start_runs_none_that_is_done(tmp_path: Path) -> None:
    status, first = measured(tmp_path, "--smoke", "--commit", "abc")
    machine = first["parts"]["environment"]["cases"]["machine"]
    assert (status, first["parts"]["environment"]["status"]) == (0, "done")
    assert machine["read_gb_per_s"] > 0
    part = json.loads((tmp_path / "environment.json").read_text())
    assert part["cases"]["machine"] == machine
    assert part["provenance"]["git_commit"]
    assert measured(tmp_path, "--smoke") == (0, first)


def test_a_part_that_cannot_begin_fails_with_its_log_s_last_lines_and_status_1(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "torch.py").write_text("raise ImportError('no driver')\n")
    status, record = measured(tmp_path / "out", "--smoke", "--site", str(tmp_path / "packages"))
    part = record["parts"]["environment"]
    assert (status, part["status"], part["cases"]) == (1, "failed", {})
    assert part["error"]["last_lines"][-1] == "ImportError: no driver"


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs the command in this process; what it says when it refuses."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_it_is_refused_before_anything_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "there is no CUDA GPU here; --smoke runs" in refused(monkeypatch, capsys, "--out", tmp_path)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "torch.py").write_text("raise ImportError('no driver')\n")
    site = ("--site", tmp_path / "packages")
    assert "(ImportError: no driver); install it" in refused(monkeypatch, capsys, "--out", tmp_path, *site)
    assert not list(tmp_path.glob("*.json"))


def test_toy_figures_are_not_taken_for_those_of_a_gpu_nor_the_reverse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, part = tmp_path / "environment.json", {"cases": {"machine": {}}, "running": None, "complete": True}
    for is_smoke, words, kind in ((True, (), "with"), (False, ("--smoke",), "without")):
        path.write_text(json.dumps({**part, "smoke": is_smoke}))
        message = f"holds the part environment of a start {kind} --smoke; name another folder"
        assert message in refused(monkeypatch, capsys, "--out", tmp_path, *words)


def test_a_second_start_in_a_folder_is_refused_while_a_process_of_the_first_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--out", tmp_path, "--smoke", "--parts", "parity")
    with only_owner([tmp_path / "parity.json"]) as descriptors:
        process = subprocess.Popen(["sleep", "60"], pass_fds=descriptors)
    try:
        message = "is in use: another process is at the part parity; wait for it, or end it"
        assert message in refused(monkeypatch, capsys, *words)
    finally:
        process.kill()
        process.wait()
    with only_owner([tmp_path / "parity.json"]):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "file"), "cannot be written (File exists); name another folder"),
        (("--out", "file/in"), "cannot be written (Not a directory); name another folder"),
        (("--out", "out", "--site", "nowhere"), "argument --site: nowhere is no folder"),
        (("--out", "out", "--minutes", "nan"), "argument --minutes: nan is not a number above 0"),
        (("--out", "out", "--minutes", "-3"), "argument --minutes: -3 is not a number above 0"),
        (("--out", "out", "--tokens", "nowhere"), "cannot be read ([Errno 2]"),
        (("--out", "out", "--tokens", "file"), "cannot be read (Input format not supported by decoder); write it by"),
        (("--out", "out", "--tokens", "cut"), "cannot be read (Compressed file ended before the end-of-stream"),
        (("--out", "out", "--tokens", "other"), "holds no text; write it by carried_tokens.py"),
        (("--out", "damaged"), "environment.json is damaged ("),
        (("--out", "list"), "environment.json is not the file of a part"),
    ],
    ids=lambda words: " ".join(words[1:]) if isinstance(words, tuple) else "",
)
def test_what_cannot_be_read_or_written_is_named_in_one_line(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    with tarfile.open(tmp_path / "other", "w:xz") as archive:
        archive.add(tmp_path / "file")
    with tarfile.open(tmp_path / "tokens", "w:xz") as archive:
        archive.add(tmp_path / "file", "corpus.json")
    (tmp_path / "cut").write_bytes((tmp_path / "tokens").read_bytes()[:-20])
    for name, text in (("damaged", '{"cases": {'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "environment.json").write_text(text)
    assert message in refused(monkeypatch, capsys, *words, "--smoke")


def test_a_part_that_compiles_is_refused_without_a_compiler_before_its_first_case(tmp_path: Path) -> None:
    for part in gpu.COMPILING:
        with (
            torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)}),
            pytest.raises(SystemExit, match=f"--smoke of the part {part} needs a C"),
        ):
            gpu.run_one(part, tmp_path, None, True, None)
    assert list(tmp_path.iterdir()) == []
