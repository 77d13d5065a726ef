"""A device is chosen by its name in every command, and what is on the CPU leaves GPUs alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, data, run
from gpus import pretended_gpus
from models import write_numbers
from runs import QUIET, config_for, dense_for

from mixture_of_depths import Corpus, SamplingOptions, TrainOptions, retrofit, stream, train
from mixture_of_depths.cli.main import commands
from mixture_of_depths.compiler import require_compiler
from mixture_of_depths.device import accelerator_name, chosen_device
from mixture_of_depths.options import RetrofitOptions

# Every command that computes, with what it cannot do without.
COMPUTING = (
    ("train", "--out", "out", "--max-steps", "1"),
    ("retrofit", "source", "--out", "out", "--max-steps", "1"),
    ("demo", "--out", "out"),
    ("evaluate", "model"),
    ("calibrate", "model", "--out", "out"),
    ("answer", "source", "--data", "chats.jsonl", "--out", "out"),
    ("generate", "model", "--prompt", "x"),
    ("bench", "model"),
    ("inspect", "model", "--out", "out", "--text", "x"),
    ("playground", "model"),
    ("serve", "model"),
    ("isoflop", "plan", "study"),
    ("isoflop", "run", "study", "--out", "out"),
    ("isoflop", "measure", "study", "--out", "out"),
)


def test_auto_is_a_gpu_where_there_is_one() -> None:
    for count, device in ((0, "cpu"), (2, "cuda")):
        with pretended_gpus(count):
            assert chosen_device() == chosen_device("auto") == torch.device(device)


def test_a_device_is_what_its_name_says() -> None:
    with pretended_gpus(2):
        for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
            assert chosen_device(name) == chosen_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    ("gpus", "device", "message"),
    [
        (2, "gpu", r"device='gpu' is unknown; give 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
        (2, "cuda:x", r"device='cuda:x' is unknown"),
        (2, "cuda:-1", r"device='cuda:-1' is unknown"),
        (2, "cuda:01", r"device='cuda:01' is unknown"),
        (2, "cuda:\u0661", "device='cuda:\u0661' is unknown"),
        (2, "cuda:99999999999999999999", r"device='cuda:9+' is not available: .* from 0 to 1"),
        (0, "cuda:99999999999999999999", r"device='cuda:9+' is not available: .*; give device='cpu'"),
        (2, "cuda:2", r"device='cuda:2' is not available: .* from 0 to 1; give one of them, or device='cpu'"),
        (0, "cuda", r"device='cuda' is not available: .*; give device='cpu'"),
        (0, "cuda:0", r"device='cuda:0' is not available: .*; give device='cpu'"),
        (0, "mps", r"device='mps' is not available: .*; give device='cpu'"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    gpus: int, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pretended_gpus(gpus), pytest.raises(ValueError, match=message):
        chosen_device(device)


def test_the_list_names_every_command_that_computes() -> None:
    named = {(words[1] if words[0] == "isoflop" else words[0]) for words in COMPUTING}
    group = {"plan", "run", "measure", "fit", "plot"}
    every = {*commands()._subcommands, *group} - {"isoflop"}
    assert every - named == {"fit", "plot", "prepare"}


@pytest.mark.parametrize("words", COMPUTING, ids=lambda words: " ".join(words[:2]))
def test_every_command_refuses_a_device_that_is_not_there(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pretended_gpus(0):
        status, output, errors = run(monkeypatch, capsys, *words, "--device", "cuda")
    assert status == 2
    assert errors.startswith("error: device='cuda' is not available: ")
    assert "Traceback" not in output + errors
    assert list(tmp_path.iterdir()) == []


def test_compiling_asks_for_a_cpp_compiler_on_the_cpu_and_for_triton_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("mixture_of_depths.compiler.get_cpp_compiler", missing)
    monkeypatch.setattr("mixture_of_depths.compiler.find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "nowhere-g++")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler, and CXX='nowhere-g\+\+' does not run"):
        require_compiler("compile", torch.device("cpu"))
    monkeypatch.delenv("CXX")
    with pytest.raises(ValueError, match=r"compile needs a C\+\+ compiler; install one"):
        require_compiler("compile", torch.device("cpu"))
    with pytest.raises(ValueError, match="compile needs Triton; install the package triton"):
        require_compiler("compile", torch.device("cuda"))
    require_compiler("compile", torch.device("mps"))
    monkeypatch.setattr("mixture_of_depths.compiler.find_spec", lambda name: name)
    require_compiler("compile", torch.device("cuda"))


def test_without_a_compiler_nothing_is_begun_that_is_to_be_compiled(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    options, dense = TrainOptions(max_steps=2, batch_size=4, compile=True), dense_for(corpus)
    missing = torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)})
    refused = pytest.raises(ValueError, match="compile needs a C\\+\\+ compiler; install one, such as g\\+\\+")
    with missing, refused:
        train(config_for(corpus), corpus, options, tmp_path / "run", device="cpu")
    with missing, refused:
        retrofit(dense, "dense", corpus, RetrofitOptions(), options, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    with missing, pytest.raises(ValueError, match="compiled needs a C"):
        next(stream(dense, prompt, options=SamplingOptions(max_new_tokens=2), compiled=True))


def test_records_name_the_gpu_that_computed_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_gpus(2):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        assert accelerator_name(torch.device("cuda:1")) == "GPU 1"
        assert accelerator_name(torch.device("mps")) == "mps"
        assert accelerator_name(torch.device("cpu")) is None


def test_what_runs_on_the_cpu_wakes_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    write_numbers(tmp_path)
    out, model, page = (str(tmp_path / name) for name in ("run", "run", "page.html"))
    text = ["--data", str(tmp_path / "*.txt")]
    lines = (
        ("train", "--out", out, *data(tmp_path), *TINY, "--max-steps", "2"),
        ("train", "--out", out, *data(tmp_path), *TINY, "--max-steps", "2", "--resume"),
        ("evaluate", model),
        ("calibrate", model, "--out", str(tmp_path / "calibrated")),
        ("generate", model, "--prompt", "The router", "--max-new-tokens", "3"),
        ("inspect", model, "--text", "The router lets few in", "--out", page),
        ("evaluate", model, *text, "--max-sequences", "2"),
    )
    with pretended_gpus(1):
        for words in lines:
            status, _, errors = run(monkeypatch, capsys, *words, "--device", "cpu")
            assert status == 0, errors
    assert not torch.cuda.is_initialized()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["machine"]["accelerator"] is None
