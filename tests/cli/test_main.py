"""The command line as a user meets it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from command import TINY, data, run

import mixture_of_depths


def seconds_of(*arguments: str, turns: int = 4) -> float:
    """The quickest of several turns of Python: what else the machine does is not the program's."""
    seconds = []
    for _ in range(turns):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_help_loads_nothing_that_computes() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mixture_of_depths", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in shown.splitlines()}
    assert {"mixture_of_depths.cli.main", "tyro"} <= loaded
    assert not loaded & {"torch", "transformers", "datasets", "numpy", "gradio", "uvicorn", "matplotlib", "pandas"}


@pytest.mark.slow
def test_help_takes_little_longer_than_loading_the_library_that_prints_it() -> None:
    # PyTorch alone would take ten times as long.
    assert seconds_of("-m", "mixture_of_depths", "--help") < 4 * seconds_of("-c", "import tyro")


@pytest.mark.slow
def test_help_answers_in_under_half_a_second() -> None:
    assert seconds_of("-m", "mixture_of_depths", "--help", turns=8) < 0.5


def test_help_names_every_command_and_the_version_is_the_package_s() -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "mixture_of_depths", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    shown = said("--help")
    for name in (
        "train",
        "evaluate",
        "calibrate",
        "retrofit",
        "answer",
        "generate",
        "bench",
        "inspect",
        "serve",
        "isoflop",
        "demo",
    ):
        assert name in shown
    assert all(name in said("isoflop", "--help") for name in ("plan", "run", "measure", "fit", "plot"))
    assert said("--version").strip() == mixture_of_depths.__version__


def test_a_reader_that_leaves_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "mixture_of_depths", "train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        left = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (left.returncode, left.stderr) == (1, "")


@pytest.mark.parametrize("command", ["bench", "serve"])
def test_ctrl_c_ends_a_command_that_loads_libraries_which_catch_all_that_is_raised(
    tmp_path: Path, command: str
) -> None:
    interrupted = "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "torch.py").write_text(interrupted)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    ended = subprocess.run(
        [sys.executable, "-m", "mixture_of_depths", command, "nowhere"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        # What is started in the background does not heed Ctrl-C by default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "checkpoint=nowhere is no folder or file, and no name of the hub either"),
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
        # Before any text is read.
        (["train", "--out", "OUT", "--data", "nowhere"], "given: none (--max-steps, --max-tokens, --max-flops)"),
        (
            ["train", "--out", "OUT", "--data", "nowhere", "--max-steps", "3", "--capacity", "12.5"],
            "capacity=12.5 must be a share of the tokens, above 0 and at most 1; 0.125 is 12.5 %",
        ),
        (["generate", "nowhere", "--prompt", "x"], "checkpoint=nowhere does not exist; name the folder"),
        (["inspect", "CHECKPOINT", "--file", "..", "--out", "OUT"], "file=.. is a folder; name a file of text in it"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--capacity", "2"],
            "capacity=2.0 must be a share of the tokens, above 0 and at most 1",
        ),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--hidden-size", "15"], "or give MoDConfig a head_dim"),
        (
            ["train", "--out", "CHECKPOINT", "DATA", "--max-steps", "3"],
            "is not empty; name another folder, or go on with its run by resume=True (--resume)",
        ),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--resume"], "leave out resume=True (--resume)"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--route-from", "9"],
            "or route none by routed_layers=[] (--no-routed)",
        ),
        (["demo", "--out", "OUT", "DATA", "--max-flops", "1"], "max_flops=1 is less than one step"),
        (["evaluate", "CHECKPOINT", "--max-sequences", "0"], "max_sequences=0"),
        (["generate", "CHECKPOINT", "--prompt", "a\udcffb"], "is not UTF-8"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--no-routed", "--route-every", "2"],
            "route_every and routed=False (--no-routed) contradict one another; give",
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
        (["train", "--out", "OUT", "DATA", "--max-steps", "9" * 400], "is out of range: it must be less than 1e+30"),
        (
            ["train", "--out", "OUT", "DATA", "--max-steps", "3", "--hidden-size", "9" * 400],
            "is out of range: it must be less than 1e+30",
        ),
        (["train", "--out", "OUT", "DATA", "--max-steps", "9" * 20], "steps; lower it to at most 2,147,483,647"),
        (["train", "--out", "OUT", "DATA", "--max-steps", "3", "--hidden-size", "1000000"], "the weights alone take"),
        (["retrofit", "x", "--out", "OUT", "--lora-rank", "4"], "lora_rank=4 has no use with tune=all; leave out one"),
        (["retrofit", "nowhere", "--out", "OUT"], "given: none (--max-steps, --max-tokens)"),
        (["retrofit", "x", "--out", "OUT", "--max-steps", "1"], "source=x is no folder, and no name of the hub either"),
        (
            ["retrofit", "./x", "--out", "OUT", "--max-steps", "1"],
            "source=./x is no folder, and no name of the hub either",
        ),
        (["answer", "x", "--data", "nowhere", "--out", "OUT"], "data=nowhere does not exist"),
        (["answer", "x", "--data", "TEXT", "--out", "OUT"], "holds no conversation; give .jsonl with"),
        (
            ["answer", "x", "--data", "TEXT", "--out", "nowhere/y"],
            "out=nowhere/y cannot be written: there is no folder nowhere",
        ),
        (["evaluate", "CHECKPOINT", "--text-column", "text"], "text_column=text needs data; the held-out text"),
        (["calibrate", "CHECKPOINT", "--out", "OUT", "--text-column", "text"], "text_column=text needs data"),
        (["evaluate", "CHECKPOINT", "--tasks", "x", "--text-column", "text"], "text_column=text needs data or"),
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


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        (
            "generate",
            "--max-new-tokens",
            "0",
            "max_new_tokens=0 is out of range: it must be greater than or equal to 1",
        ),
        ("generate", "--repetition-penalty", "0", "repetition_penalty=0.0 is out of range: it must be greater than or"),
        ("generate", "--temperature", "nan", "temperature=nan is out of range: it must be a finite number"),
        ("generate", "--temperature", "0.001", "temperature=0.001 is out of range: it must be 0, or at least 0.01"),
        ("generate", "--top-k", "-1", "top_k=-1 is out of range: it must be greater than or equal to 0"),
        ("generate", "--top-p", "7", "top_p=7.0 is out of range: it must be less than or equal to 1"),
        ("generate", "--min-p", "2", "min_p=2.0 is out of range: it must be less than or equal to 1"),
        ("generate", "--stop", "", "stop=('',) is out of range: it must have at least 1 character"),
        ("generate", "--seed", "-1", "seed=-1 is out of range: it must be greater than or equal to 0"),
        ("retrofit", "--flops-share", "1", "flops_share=1.0 is out of range: it must be less than 1"),
        ("retrofit", "--capacity", "0", "capacity=(0.0,) is out of range: it must be greater than 0"),
        ("retrofit", "--distillation", "2", "distillation=2.0 is out of range: it must be less than or equal to 1"),
        ("retrofit", "--lora-rank", "4", "lora_rank=4 has no use with tune=all; leave out one of them"),
        ("retrofit", "--lowering-fraction", "1", "lowering_fraction=1.0 is out of range: it must be less than 1"),
        ("train", "--batch-size", "0", "batch_size=0 is out of range: it must be greater than or equal to 1"),
    ],
)
def test_an_option_out_of_its_range_is_refused_in_one_plain_line(
    text: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    command: str,
    option: str,
    value: str,
    message: str,
) -> None:
    words = {
        "generate": [str(checkpoint), "--prompt", "x"],
        "retrofit": ["nowhere", "--out", str(tmp_path / "out")],
        "train": ["--out", str(tmp_path / "out"), *data(text), "--max-steps", "3"],
    }[command]
    status, output, errors = run(monkeypatch, capsys, command, *words, option, value)
    assert (status, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {message}")
    assert command == "train" or output == ""


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("generate", "How tokens are drawn."),
        ("generate", "--top-p FLOAT Sample from the likeliest tokens that hold this much probability. (default: 1.0)"),
        ("retrofit", "What is routed, and which parts are tuned."),
        ("retrofit", "--lora-rank INT Rank of the adapters. (default: 16)"),
    ],
)
def test_options_that_a_command_checks_itself_are_described_as_all_others(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str, shown: str
) -> None:
    status, output, _ = run(monkeypatch, capsys, command, "--help")
    assert status == 0
    assert shown in " ".join(re.sub("[│╭╮╰╯─]", " ", output).split())


@pytest.mark.parametrize(("option", "value"), [("--tokenizer", "y"), ("--vocab-size", "4096"), ("--max-flops", "1e9")])
def test_retrofit_has_no_option_that_it_cannot_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, option: str, value: str
) -> None:
    assert option in run(monkeypatch, capsys, "train", "--help")[1]
    shown = run(monkeypatch, capsys, "retrofit", "--help")[1]
    assert "--max-steps" in shown
    assert f"{option} " not in shown
    status, output, errors = run(monkeypatch, capsys, "retrofit", "x", "--out", str(tmp_path / "out"), option, value)
    assert (status, option in output + errors) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--out", "OUT", "--data", "nowhere", "--max-steps", "1", "--compile"],
        ["retrofit", "nowhere", "--out", "OUT", "--max-steps", "1", "--compile"],
        ["bench", "nowhere"],
        ["serve", "nowhere", "--compile"],
        ["playground", "nowhere", "--compile"],
    ],
)
def test_without_a_compiler_a_command_that_compiles_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    words = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    with torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)}):
        status, output, errors = run(monkeypatch, capsys, *words)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert re.match(r"error: .*C\+\+ compiler.*; install one, such as g\+\+$", errors)
    assert list(tmp_path.iterdir()) == []
