"""The command line as a user meets it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from models import SENTENCE
from safetensors.torch import load_file, save_file
from studies import study_file

from mixture_of_depths.cli.main import main
from mixture_of_depths.training.checkpoint import latest_checkpoint

SIZE = ["--hidden-size", "16", "--num-hidden-layers", "3", "--num-attention-heads", "2"]
TINY = [*SIZE, "--batch-size", "4", "--learning-rate", "1e-2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1, 60)) + SENTENCE)
    return folder


def data(text: Path, *more: str) -> list[str]:
    small = ["--vocab-size", "300", "--sequence-length", "16", "--cache-dir", str(text / "cache")]
    return ["--data", str(text / "*.txt"), *small, *more]


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mod", *arguments])
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def checkpoint(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mod", "train", "--out", str(out), *data(text), *TINY, "--max-steps", "20"])
        main()
    return out


def test_help_answers_in_under_half_a_second() -> None:
    command = [sys.executable, "-m", "mixture_of_depths", "--help"]
    seconds, output = [], ""
    for _ in range(4):
        start = time.perf_counter()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds.append(time.perf_counter() - start)
    # The quickest: what else the machine does is not the command's.
    assert min(seconds) < 0.5
    for name in ("train", "evaluate", "calibrate", "generate", "bench", "demo"):
        assert name in output


def test_a_reader_that_leaves_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "mixture_of_depths", "train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        left = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (left.returncode, left.stderr) == (1, "")


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


def test_generate_repeats_with_its_seed_and_shows_depth(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router [red]", "--max-new-tokens", "12"]
    first = run(monkeypatch, capsys, *arguments)
    assert first[0] == 0
    assert first[1].startswith("The router [red]")
    assert run(monkeypatch, capsys, *arguments) == first
    assert run(monkeypatch, capsys, *arguments, "--seed", "1") != first
    greedy = [run(monkeypatch, capsys, *arguments, "--temperature", "0", "--seed", seed)[1] for seed in "12"]
    assert greedy[0] == greedy[1]
    status, output, _ = run(monkeypatch, capsys, *arguments, "--show-depth")
    assert status == 0
    assert output.startswith(first[1].rstrip("\n"))
    assert re.search(r"blocks used:  2 \(\d+%\) 3 \(\d+%\)   mean \d\.\d\d of 3", output)


def test_a_streamed_sample_is_the_same_text(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router", "--max-new-tokens", "12"]
    assert run(monkeypatch, capsys, *arguments, "--stream") == run(monkeypatch, capsys, *arguments)


def test_prompts_of_a_file_give_json_lines_whatever_the_batch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["The router", 'A "quoted"\nline', "x"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ["generate", str(checkpoint), "--prompts", str(prompts), "--max-new-tokens", "9"]
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, capsys, *arguments, "--out", str(out), "--batch-size", "2") == (0, "", "")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == texts
    assert {record["ended"] for record in records} <= {"length", "end_of_text"}
    status, output, _ = run(monkeypatch, capsys, *arguments, "--batch-size", "1")
    assert status == 0
    assert [json.loads(line) for line in output.splitlines()] == records
    status, _, errors = run(monkeypatch, capsys, *arguments, "--out", str(out))
    assert status == 2
    assert "exists; name another file" in errors
    prompts.write_text('{"text": "x"}\n')
    status, _, errors = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert 'line 1: needs an object with the field "prompt"' in errors


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


def test_without_a_compiler_it_says_so_and_samples(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router", "--max-new-tokens", "5"]
    plain = run(monkeypatch, capsys, *arguments)
    with torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)}):
        status, output, errors = run(monkeypatch, capsys, *arguments, "--compile")
    assert (status, output) == (0, plain[1])
    assert "no C++ compiler found" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "checkpoint=nowhere holds no config.json"),
        (["generate", "nowhere", "--prompt", "x"], "checkpoint=nowhere"),
        (["generate", "CHECKPOINT", "--prompt", ""], "prompt='' is empty"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--top-p", "0"], "top_p=0.0"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--max-new-tokens", "99999"], "max_position_embeddings=2048"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--min-p", "2"], "min_p=2.0 is out of range"),
        (["generate", "CHECKPOINT"], "exactly one of prompt and prompts"),
        (["generate", "CHECKPOINT", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--out", "y"], "out=y needs prompts"),
        (["bench", "CHECKPOINT", "--new-tokens", "1"], "new_tokens=1"),
        (["bench", "CHECKPOINT", "--new-tokens", "9999"], "max_position_embeddings=2048"),
        (["generate", "CHECKPOINT", "--prompt", "x", "--temperature", "1e-40"], "temperature=1e-40 is out of range"),
        (["generate", "CHECKPOINT", "--prompts", "nowhere.txt", "--stream"], "stream and show_depth need prompt"),
        (["train", "--out", "OUT", "DATA", "--max-flops", "1e9", "--batch-size", "0"], "batch_size=0"),
        (["isoflop", "plan", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "CHECKPOINT", "--data", "nowhere"], "data=nowhere does not exist"),
        (["train", "--out", "OUT", "--data", "nowhere", "--max-steps", "3"], "data=nowhere does not exist"),
        (["train", "--out", "OUT", "DATA"], "exactly one of max_steps, max_tokens and max_flops"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--capacity", "2"],
            "capacity=2.0 is out of range: it must be less than or equal to 1",
        ),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--hidden-size", "15"], "hidden_size=15"),
        (["train", "--out", "CHECKPOINT", "DATA", "--max-steps", "3"], "is not empty"),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--resume"], "holds no run to resume"),
        (["demo", "--out", "OUT", "DATA", "--max-flops", "1"], "max_flops=1 is less than one step"),
        (["evaluate", "CHECKPOINT", "--max-sequences", "0"], "max_sequences=0"),
        (["generate", "CHECKPOINT", "--prompt", "a\udcffb"], "is not UTF-8"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--no-routed", "--route-every", "2"],
            "route_every and no-routed contradict",
        ),
        (["train", "--out", "OUT", "DATA", *TINY, "--max-steps", "3", "--learning-rate", "1e30"], "is no number"),
        (["train", "--out", "/proc/run", "DATA", *TINY, "--max-steps", "3"], "/proc/run"),
        (
            ["evaluate", "CHECKPOINT", "--data", "TEXT", "--sequence-length", "1"],
            "sequence_length=1 must be at least 2",
        ),
        (["evaluate", "CHECKPOINT", "--data", "TEXT", "--sequence-length", "4096"], "max_position_embeddings=2048"),
        (["evaluate", "CHECKPOINT", "--data", "TEXT", "--sequence-length", "1500000"], "give more text or a shorter"),
        (["evaluate", "CHECKPOINT", "--limit", "3"], "limit=3 needs tasks"),
        (
            ["evaluate", "CHECKPOINT", "--tasks", "x", "--max-sequences", "3"],
            "max_sequences=3 needs data or held-out text",
        ),
        (["evaluate", "CHECKPOINT", "--tasks", "x", "--task-files", "nowhere"], "task_files=nowhere is no folder"),
        (["train", "--out", "OUT", "DATA", "--max-steps", "9" * 400], "is out of range: it must be less than 1"),
        (["train", "--out", "OUT", "DATA", "--max-steps", "9" * 20], "steps; lower it to at most 2,147,483,647"),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--hidden-size", "1000000"], "the weights alone take"),
        (["frobnicate"], "frobnicate"),
        (["train", "--out", "OUT", "--max-steps", "many"], "many"),
    ],
)
def test_what_a_user_can_mend_ends_with_status_2_and_no_traceback(
    text: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    message: str,
) -> None:
    places = {"CHECKPOINT": [str(checkpoint)], "OUT": [str(tmp_path / "out")], "DATA": data(text), "TEXT": [str(text)]}
    words = [word for argument in arguments for word in places.get(argument, [argument])]
    before = sorted(path.name for path in checkpoint.iterdir())
    status, output, errors = run(monkeypatch, capsys, *words)
    assert status == 2
    assert message in " ".join((output + errors).split())
    assert "Traceback" not in output + errors
    assert sorted(path.name for path in checkpoint.iterdir()) == before


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


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", lambda raw: raw[: len(raw) // 2], "cannot be read"),
        ("model.safetensors", lambda raw: b"", "cannot be read"),
        ("model.safetensors", lambda raw: raw.replace(b"mlp.up_proj", b"mlp.xx_proj"), "does not fit its config.json"),
        ("config.json", lambda raw: raw.replace(b'"hidden_size": 16', b'"hidden_size": 32'), "checkpoint="),
        ("config.json", lambda raw: raw.replace(b'"capacity": 0.125', b'"capacity": 7.0'), "capacity=7.0"),
        ("config.json", lambda raw: raw.replace(b"mixture_of_depths", b"llama"), "it is a llama model"),
        ("config.json", lambda raw: raw[:-20], "cannot be read"),
        ("tokenizer.json", lambda raw: raw[:-20], "tokenizer="),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, damage: Any, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / name).write_bytes(damage((copy / name).read_bytes()))
    status, output, errors = run(monkeypatch, capsys, "generate", str(copy), "--prompt", "x")
    assert status == 2
    assert message in errors
    assert "Traceback" not in output + errors


def test_the_demo_trains_compares_and_samples(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "demo"
    status, output, _ = run(monkeypatch, capsys, "demo", "--out", str(out), *data(text, "--max-flops", "2e10"))
    assert status == 0
    for words in ("held-out loss, causal routing", "bits per byte", "FLOPs per token", "tokens/s", "blocks used"):
        assert words in output
    assert (out / "curves.png").stat().st_size > 10_000
    models = json.loads((out / "demo.json").read_text())["models"]
    assert models["MoD"]["flops"] == pytest.approx(models["baseline"]["flops"], rel=0.1)
    assert models["MoD"]["blocks"] > models["baseline"]["blocks"]


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
        (["--file", "absent.txt"], "absent.txt"),
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


def test_the_playground_refuses_what_it_cannot_show(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for arguments, message in (
        ([str(tmp_path / "absent")], "absent"),
        ([str(checkpoint), "--port", "70000"], "port=70000"),
        ([str(checkpoint), "--baseline", str(tmp_path / "absent")], "absent"),
    ):
        status, _, errors = run(monkeypatch, capsys, "playground", *arguments)
        assert (status, message in errors) == (2, True)


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
    status, _, errors = run(monkeypatch, capsys, "isoflop", "fit", study, "--out", out, "--family", "typo")
    assert (status, "family=typo has no records" in errors) == (2, True)
