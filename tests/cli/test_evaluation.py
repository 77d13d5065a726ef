"""The commands that judge a model on text: evaluate and calibrate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import run
from safetensors.torch import load_file, save_file


def test_train_then_evaluate_gives_the_figures_of_the_run(
    text: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    result = json.loads((checkpoint / "result.json").read_text())
    status, output, errors = run(monkeypatch, capsys, "evaluate", str(checkpoint))
    assert status == 0
    assert "causal routing" in errors
    assert "top-k routing" in errors
    found = json.loads(output)
    for name in ("loss_causal", "loss_top_k", "bits_per_byte", "tokens"):
        assert found[name] == pytest.approx(result["evaluation"][name])
    assert found["parameters"] == result["parameters"]
    status, output, _ = run(monkeypatch, capsys, "evaluate", str(checkpoint), "--precision", "bf16")
    rounded = json.loads(output)
    assert rounded["loss_causal"] != found["loss_causal"]
    assert rounded["loss_causal"] == pytest.approx(found["loss_causal"], rel=0.02)
    status, output, _ = run(monkeypatch, capsys, "evaluate", str(checkpoint), "--data", str(text / "*.txt"))
    assert json.loads(output)["tokens"] > found["tokens"]


def test_calibrate_writes_a_model_whose_blocks_take_their_capacity(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "calibrated"
    status, output, _ = run(monkeypatch, capsys, "calibrate", str(checkpoint), "--out", str(out))
    assert status == 0
    found = json.loads(output)
    status, output, _ = run(monkeypatch, capsys, "evaluate", str(out))
    assert status == 0
    share = json.loads(output)["causal_routers"]["predictor"]["share_entering"]["1"]
    assert share == pytest.approx(0.125, abs=0.05)
    assert found["after"]["tokens"] == found["before"]["tokens"]
    (tmp_path / "other.txt").write_text("0 1 2 3 4 5 6 7 8 9 " * 400)
    to_other = ["--data", str(tmp_path / "other.txt"), "--out", str(tmp_path / "to-other")]
    status, output, _ = run(monkeypatch, capsys, "calibrate", str(checkpoint), *to_other)
    assert status == 0
    found = json.loads(output)
    before, after = (found[name]["causal_routers"]["predictor"]["share_entering"]["1"] for name in ("before", "after"))
    assert abs(after - 0.125) < abs(before - 0.125)
    status, _, errors = run(monkeypatch, capsys, "calibrate", str(checkpoint), "--out", str(out))
    assert status == 2
    assert "exists" in errors


@pytest.mark.parametrize("factor", [1e30, float("nan")])
def test_a_loss_that_is_no_sensible_number_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, factor: float
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= factor
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    status, output, errors = run(monkeypatch, capsys, "evaluate", str(copy))
    assert status == 2
    assert "nats per token; its weights are damaged" in " ".join(errors.split())
    assert "Traceback" not in output + errors
