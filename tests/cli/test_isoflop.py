"""The commands of a study."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import run
from studies import study_file


def test_an_isoflop_study_from_plan_to_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    study, out = str(study_file(tmp_path)), str(tmp_path / "out")
    status, output, _ = run(monkeypatch, capsys, "isoflop", "plan", study)
    assert status == 0
    assert "2 runs" in output
    assert "hours on this machine" in output
    status, _, errors = run(monkeypatch, capsys, "isoflop", "fit", study, "--out", out)
    assert (status, "holds no record of this study" in errors) == (2, True)
    assert run(monkeypatch, capsys, "isoflop", "run", study, "--out", out)[0] == 0
    status, output, _ = run(monkeypatch, capsys, "isoflop", "fit", study, "--out", out)
    assert status == 0
    summary = json.loads(output)
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["3e07"]["loss_ratio"] > 0
    assert {"git_commit", "command", "versions"} <= summary.keys()
    status, output, _ = run(monkeypatch, capsys, "isoflop", "plot", study, "--out", out)
    assert status == 0
    assert all(Path(line).is_file() for line in output.split())
    for name in ("family", "stochastic"):
        status, _, errors = run(monkeypatch, capsys, "isoflop", "fit", study, "--out", out, f"--{name}", "typo")
        assert (status, f"{name}=typo has no records" in errors) == (2, True)
    for words, message in (([], "cpus=0 needs ray; leave it out"), (["--ray", "auto"], "cpus=0 must be at least 1")):
        status, _, errors = run(monkeypatch, capsys, "isoflop", "run", study, "--out", out, "--cpus", "0", *words)
        assert (status, message in errors) == (2, True)


def test_a_plan_says_how_many_seeds_a_deviation_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    study = str(study_file(tmp_path, seed_deviation=0.004))
    status, output, _ = run(monkeypatch, capsys, "isoflop", "plan", study)
    assert status == 0
    assert "12 seeds of a size show a difference of 0.5 % in four of five studies, when" in " ".join(output.split())


def test_the_number_of_a_clusters_gpu_is_refused_before_the_text_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["isoflop", "run", str(study_file(tmp_path)), "--out", str(tmp_path / "out"), "--ray", "auto"]
    status, _, errors = run(monkeypatch, capsys, *words, "--device", "cuda:1")
    assert (status, "device='cuda:1' numbers a GPU" in errors) == (2, True)
    assert not (tmp_path / "cache").exists()
