"""The commands that train: train, retrofit and demo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import TINY, data, run
from models import write_numbers

from mixture_of_depths.training.checkpoint import latest_checkpoint
from mixture_of_depths.training.folder import only_run


def test_ctrl_c_saves_and_ends_with_status_130(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", "--out", str(out), *data(text), *TINY, "--max-steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mixture_of_depths", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert latest_checkpoint(out)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_all_that_is_written_has_the_mode_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        write_numbers(tmp_path)
        out, calibrated = tmp_path / "run", tmp_path / "calibrated"
        train = ["train", "--out", str(out), *data(tmp_path), *TINY, "--max-steps", "2", "--save-every", "1"]
        assert run(monkeypatch, capsys, *train)[0] == 0
        (out / "run.json").chmod(0o640)
        assert run(monkeypatch, capsys, "calibrate", str(out), "--out", str(calibrated))[0] == 0
        (out / "run.json").chmod(mode)
    finally:
        os.umask(before)
    weights = [path.parent.name for path in tmp_path.rglob("model.safetensors")]
    assert sorted(weights) == ["calibrated", "checkpoint-1", "checkpoint-2", "run"]
    assert (tmp_path / "cache").is_dir()
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: oct(found) for path, found in modes.items() if found != mode} == {}


def test_a_model_with_experts_goes_the_same_ways(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out, calibrated = tmp_path / "run", tmp_path / "calibrated"
    experts = ["--num-experts", "3", "--expert-capacity", "0.7", "--num-noop-experts", "1", "--noop-share", "0.3"]
    status, output, _ = run(
        monkeypatch, capsys, "train", "--out", str(out), *data(text), *TINY, *experts, "--max-steps", "6"
    )
    assert status == 0
    assert '"experts"' in output
    found = json.loads(run(monkeypatch, capsys, "evaluate", str(out))[1])
    for routing in ("top_k", "causal"):
        for figures in found["experts"][routing].values():
            assert sum(figures["share"]) + figures["dropped"] == pytest.approx(1)
            assert len(figures["share"]) == 4
    assert run(monkeypatch, capsys, "calibrate", str(out), "--out", str(calibrated))[0] == 0
    sample = ["--prompt", "The router", "--max-new-tokens", "12", "--show-depth"]
    assert "blocks used" in run(monkeypatch, capsys, "generate", str(calibrated), *sample)[1]
    refused = run(
        monkeypatch, capsys, "train", "--out", str(tmp_path / "x"), *data(text), *TINY, "--expert-capacity", "2"
    )
    assert refused[0] == 2
    assert refused[2].startswith("error: expert_capacity=2.0 needs experts")


@pytest.mark.slow
def test_the_demo_shows_the_three_claims_and_ends_with_the_page(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "demo"
    status, output, _ = run(monkeypatch, capsys, "demo", "--out", str(out), *data(text, "--max-flops", "2e10"))
    assert status == 0
    for words in ("held-out loss at equal training FLOPs", "FLOPs per token", "sampling, tokens/s", "blocks used"):
        assert words in output
    assert "steps are too few to compare: give more FLOPs." in " ".join(output.split())
    assert f"open {(out / 'report.html').as_uri()}" in output.splitlines()[-1]
    assert (out / "curves.png").stat().st_size > 10_000
    models = json.loads((out / "demo.json").read_text())["models"]
    assert models["MoD"]["flops"] == pytest.approx(models["baseline"]["flops"], rel=0.1)
    assert models["MoD"]["blocks"] == models["baseline"]["blocks"]
    assert models["MoD"]["forward_flops_per_token"] < 0.7 * models["baseline"]["forward_flops_per_token"]
    assert models["MoD"]["tokens"] > 1.3 * models["baseline"]["tokens"]


def test_a_trained_model_is_retrofitted_and_evaluated(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "retrofitted"
    train = ["train", "--out", str(dense), *data(text), *TINY, "--no-routed", "--max-steps", "2"]
    assert run(monkeypatch, capsys, *train)[0] == 0
    sources = ["--data", str(text / "*.txt"), "--sequence-length", "16", "--cache-dir", str(text / "cache")]
    arguments = ["retrofit", str(dense), *sources, "--out", str(out), "--batch-size", "4", "--flops-share", "0.9"]
    status, _, errors = run(monkeypatch, capsys, *arguments, "--max-steps", "4")
    assert status == 0, errors
    assert 0 < json.loads((out / "retrofit.json").read_text())["flops_share"] <= 0.9
    status, output, _ = run(monkeypatch, capsys, "evaluate", str(out))
    assert status == 0
    assert json.loads(output)["loss_causal"] > 0
    status, _, errors = run(monkeypatch, capsys, *arguments, "--max-steps", "4")
    assert (status, "is not empty" in errors) == (2, True)


def test_a_folder_with_a_demo_is_refused_with_the_option_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "MoD").mkdir()
    status, _, errors = run(monkeypatch, capsys, "demo", "--out", str(tmp_path))
    assert (status, "holds a demo; name another folder, or go on with it by --resume" in errors) == (2, True)


def test_text_is_prepared_trained_on_and_evaluated(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, out = tmp_path / "prepared", tmp_path / "run"
    write = ["prepare", str(text / "*.txt"), "--out", str(folder), "--vocab-size", "300", "--processes", "1"]
    status, output, _ = run(monkeypatch, capsys, *write)
    assert (status, "tokens to train on; held out" in output) == (0, True)
    sources = ["--data", str(folder), "--sequence-length", "16", "--cache-dir", str(tmp_path / "cache")]
    status, output, _ = run(monkeypatch, capsys, "train", "--out", str(out), *sources, *TINY, "--max-steps", "2")
    assert (status, "documents cut" in output) == (0, True)
    status, output, errors = run(monkeypatch, capsys, "evaluate", str(out), "--max-sequences", "4")
    assert status == 0, errors
    assert json.loads(output)["text"] == "held out in training"
    again = run(monkeypatch, capsys, *write[:-2], "--validation-fraction", "0.5")
    assert again[0] == 2
    assert again[2].startswith("error: validation_fraction=0.5 differs from 0.04, with which out=")


def test_a_folder_that_is_in_use_or_full_is_refused_before_text_and_model_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # Neither is there.
    commands = (["train", "--data", str(tmp_path / "absent.txt")], ["retrofit", "absent.gguf"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    for words in commands:
        status, _, errors = run(monkeypatch, capsys, *words, "--out", str(out))
        assert (status, f"out={out} is not empty" in errors) == (2, True), errors
    with only_run(out):
        for words in (*commands, [*commands[0], "--resume"]):
            status, _, errors = run(monkeypatch, capsys, *words, "--out", str(out))
            assert (status, f"out={out} is in use by another run" in errors) == (2, True), errors
