"""The command that takes all measurements on a GPU; `.ci/run` runs the whole of it in toy sizes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
import torch._inductor.config

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


def test_a_part_that_compiles_is_refused_without_a_compiler_before_its_first_case(tmp_path: Path) -> None:
    for part in gpu.COMPILING:
        with (
            torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)}),
            pytest.raises(SystemExit, match=f"--smoke of the part {part} needs a C"),
        ):
            gpu.run_one(part, tmp_path, None, True, None)
    assert list(tmp_path.iterdir()) == []
