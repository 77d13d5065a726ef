"""Parts of a long measurement: what a case that fails, crashes or hangs costs, and what a later start goes on with."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import parts
import pytest
from parts import forget_failures, read_part, run_part, status

ROOT = Path(__file__).parents[2]
PATHS = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'benchmarks'}"}
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from parts import run_cases

def figures():
    return {{"process": os.getpid()}}

def raises():
    raise RuntimeError("out of memory")

def crashes():
    print("the driver says why", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs():
    time.sleep(60)

def is_wrong():
    return {{"holds": False}}

def in_two_starts():
    begun = Path("begun")
    finished = begun.exists()
    begun.touch()
    return {{"finished": finished}}

cases = {{name: globals()[name.split("-")[0]] for name in {names}}}
sys.exit(run_cases(Path("part.json"), cases, {{"commit": "abc"}}))
"""


def start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str, limit: float = 60, left: float = 60
) -> dict[str, Any]:
    """Runs a part of these cases, and returns its file."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(parts, "GRACE", 1)
    command = [sys.executable, "-c", PROGRAM.format(names=list(names))]
    run_part(folder / "part.json", command, PATHS, limit, left)
    return json.loads((folder / "part.json").read_text())


def test_the_figures_of_every_case_are_in_the_part_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = start(tmp_path, monkeypatch, "figures-1", "figures-2")
    assert status(part) == "done"
    assert part["commit"] == "abc"
    first, second = part["cases"].values()
    assert first["process"] == second["process"]


def test_a_case_that_raises_is_written_down_and_the_next_has_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = start(tmp_path, monkeypatch, "figures-1", "raises", "figures-2")
    error = part["cases"]["raises"]["error"]
    assert (error["type"], error["message"]) == ("RuntimeError", "out of memory")
    assert "in raises" in "\n".join(error["last_lines"])
    assert part["cases"]["figures-1"]["process"] != part["cases"]["figures-2"]["process"]
    assert part["complete"]
    assert status(part) == "failed"


def test_a_case_that_crashes_its_process_is_written_down_with_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = start(tmp_path, monkeypatch, "crashes", "figures")
    error = part["cases"]["crashes"]["error"]
    assert error["type"] == "exit status -9"
    assert error["last_lines"] == ["the driver says why"]
    assert "process" in part["cases"]["figures"]


def test_a_process_that_ends_before_its_first_case_fails_the_part_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = start(tmp_path, monkeypatch, "unknown")
    assert "KeyError" in part["error"]["last_lines"][-1]
    assert (part["cases"], status(part)) == ({}, "failed")
    assert status(start(tmp_path, monkeypatch, "figures")) == "done"


def test_a_case_that_hangs_is_cut_off_by_the_part_s_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    part = start(tmp_path, monkeypatch, "hangs", "figures", limit=2)
    assert time.monotonic() - begin < 20
    assert part["cases"]["hangs"]["error"]["type"] == "TimeoutError"
    assert status(part) == "failed"


def test_a_case_to_which_others_left_too_little_of_the_limit_has_all_of_it_in_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = start(tmp_path, monkeypatch, "figures", "hangs", limit=2)
    assert list(part["cases"]) == ["figures"]
    assert status(part) == "stopped"
    part = start(tmp_path, monkeypatch, "figures", "hangs", limit=2)
    assert part["cases"]["hangs"]["error"]["type"] == "TimeoutError"


def test_a_case_that_the_end_of_all_time_cut_off_is_run_again_and_those_before_it_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = start(tmp_path, monkeypatch, "figures-1", "hangs", left=2)
    assert status(part) == "stopped"
    process = part["cases"]["figures-1"]["process"]
    # Under the name of the one that hung.
    part = start(tmp_path, monkeypatch, "figures-1", "figures-2")
    assert (part["cases"]["figures-1"]["process"], status(part)) == (process, "done")
    assert part["cases"]["figures-2"]["process"] != process


def test_a_case_that_has_more_to_do_goes_on_in_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(start(tmp_path, monkeypatch, "in_two_starts")) == "stopped"
    part = start(tmp_path, monkeypatch, "in_two_starts")
    assert (part["cases"]["in_two_starts"]["finished"], status(part)) == (True, "done")


def test_a_case_at_which_an_earlier_start_was_ended_has_not_failed_when_the_next_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "part.json").write_text(json.dumps({"cases": {}, "running": "figures", "complete": False}))
    part = start(tmp_path, monkeypatch, "unknown")
    assert (part["cases"], "error" in part) == ({}, True)


def test_what_does_not_hold_has_failed_and_is_tried_again_when_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(start(tmp_path, monkeypatch, "figures", "is_wrong")) == "failed"
    kept = start(tmp_path, monkeypatch, "figures", "is_wrong")["cases"]
    forget_failures(tmp_path / "part.json")
    assert list(read_part(tmp_path / "part.json")["cases"]) == ["figures"]
    assert start(tmp_path, monkeypatch, "figures", "is_wrong")["cases"]["figures"] == kept["figures"]
