"""The commands that judge a model on text: evaluate and calibrate."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, data, run
from models import write_numbers
from safetensors.torch import load_file, save_file
from torch import nn

from mixture_of_depths import MoDForCausalLM, load_tokenizer, to_llama


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


def test_the_held_out_text_is_taken_from_the_cache_or_prepared_again_or_missed_in_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, out = tmp_path / "text", tmp_path / "run"
    text.mkdir()
    write_numbers(text)
    assert run(monkeypatch, capsys, "train", "--out", str(out), *data(text), *TINY, "--max-steps", "1")[0] == 0

    def evaluated() -> Any:
        status, output, errors = run(monkeypatch, capsys, "evaluate", str(out))
        return json.loads(output)["loss_causal"] if status == 0 else (status, " ".join(errors.split()))

    loss = evaluated()
    # Prepared again where the entry is damaged.
    (entry,) = (path for path in (text / "cache").iterdir() if path.is_dir())
    (entry / "facts.json").write_text("{")
    assert evaluated() == loss
    assert json.loads((entry / "facts.json").read_text())
    # Neither edited nor gone does the text matter to what was held out.
    (text / "1.txt").write_text("another text " * 50)
    assert evaluated() == loss
    text.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved" / "cache", text / "cache")
    assert evaluated() == loss
    status, output, _ = run(monkeypatch, capsys, "calibrate", str(out), "--out", str(tmp_path / "calibrated"))
    assert (status, json.loads(output)["before"]["tokens"] > 0) == (0, True)
    # Without the cache both are named.
    shutil.rmtree(text / "cache")
    status, said = evaluated()
    assert (status, f"is not whole in the cache, as {entry}," in said) == (2, True)
    assert "cannot be prepared again" in said
    assert "holds no file" in said
    shutil.copy(tmp_path / "moved" / "1.txt", text)
    shutil.copy(tmp_path / "moved" / "2.txt", text)
    status, said = evaluated()
    assert (status, f"is not whole in the cache, as {entry}," in said) == (2, True)
    assert "has changed since the training" in said


def test_what_is_left_out_of_the_text_is_shown(
    text: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(text.glob("*.txt"))]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, '{"body": "x"}', "{"]))
    shown = "skipped: 0 not UTF-8, 0 empty, 1 not JSON, 1 without text or usable messages"
    status, _, errors = run(monkeypatch, capsys, "evaluate", str(checkpoint), "--data", str(tmp_path / "some.jsonl"))
    assert (status, shown in errors) == (0, True)
    small = ["--data", str(tmp_path / "some.jsonl"), *data(text)[2:], *TINY, "--max-steps", "1"]
    status, output, _ = run(monkeypatch, capsys, "train", "--out", str(tmp_path / "run"), *small)
    assert (status, shown in " ".join(output.split())) == (0, True)


def test_a_checkpoint_in_bf16_is_computed_in_float32_and_stays_in_bf16_when_it_is_calibrated(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    small, large, calibrated = tmp_path / "bf16", tmp_path / "fp32", tmp_path / "calibrated"
    for copy in (small, large):
        shutil.copytree(checkpoint, copy)
    model = nn.Module.to(MoDForCausalLM.from_pretrained(checkpoint), torch.bfloat16)
    model.save_pretrained(small)
    nn.Module.to(model, torch.float32).save_pretrained(large)
    losses = [json.loads(run(monkeypatch, capsys, "evaluate", str(copy))[1])["loss_causal"] for copy in (small, large)]
    assert losses[0] == losses[1]
    words = ("--prompt", "1 2", "--temperature", "0", "--max-new-tokens", "8")
    small_says, large_says = (run(monkeypatch, capsys, "generate", str(copy), *words)[1] for copy in (small, large))
    assert small_says == large_says
    assert run(monkeypatch, capsys, "calibrate", str(small), "--out", str(calibrated))[0] == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (small, calibrated))
    name = "model.embed_tokens.weight"
    assert after[name].dtype == torch.bfloat16
    assert torch.equal(after[name], before[name])


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


def test_a_dense_source_is_evaluated_as_what_is_made_of_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    baseline, llama = tmp_path / "baseline", tmp_path / "llama"
    words = ["train", "--out", str(baseline), *data(text), *TINY, "--no-routed", "--max-steps", "1"]
    assert run(monkeypatch, capsys, *words)[0] == 0
    to_llama(MoDForCausalLM.from_pretrained(baseline)).save_pretrained(llama)
    load_tokenizer(str(baseline)).save_pretrained(str(llama))
    given = ["--data", str(text / "*.txt"), "--sequence-length", "16", "--max-sequences", "20"]
    losses = []
    for folder in (baseline, llama):
        status, output, errors = run(monkeypatch, capsys, "evaluate", str(folder), *given)
        assert status == 0, errors
        losses.append(json.loads(output)["loss_causal"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
