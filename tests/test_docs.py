"""Every command of the README and the docs is one that `mod` takes, and runs, on small models and texts."""

import functools
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import TASK, make_checkpoint, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.cli import isoflop, main
from mixture_of_depths.text.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# In the order in which they build on one another.
RUN = (
    "docs/index.md",
    "docs/training.md",
    "docs/text.md",
    "docs/sampling.md",
    "docs/pictures.md",
    "docs/retrofit.md",
    "docs/isoflop.md",
    "docs/experts.md",
    "README.md",
)
# Commands of other pages: those of reproduction.md and results.md are isoflop.md's over the committed records and
# index.md's, that of tuning.md runs after the page's Python, and those of devices.md and scaling.md are for machines
# with GPUs; tests/test_distributed.py runs `mod train` in several processes. That of serving.md needs vLLM.
NOT_RUN = {"reproduction.md", "results.md", "devices.md", "scaling.md", "tuning.md", "serving.md"}
# The command of experts.md that reads committed records.
COMMITTED = "recipes/mode-cpu.yaml"
SERVERS = ("serve", "playground")


def commands(text: str) -> list[str]:
    """The lines that call `mod`, also under a launcher, in shell blocks, indented or in tables, without comments."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    cells = [cell for line in lines if line.startswith("|") for cell in re.findall(r"`(mod [^`]+ [^`]+)`", line)]
    lines = [
        re.sub(r"^.*(torchrun|accelerate launch) .*-m mixture_of_depths ", "mod ", line) for line in [*lines, *cells]
    ]
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?mod [a-z-]+ ", f"{line} ")]


ALL = [(path.name, line) for path in [ROOT / "README.md", *PAGES] for line in commands(path.read_text())]


def test_there_are_commands_on_every_page() -> None:
    assert {name for name, _ in ALL} == {Path(page).name for page in RUN} | NOT_RUN


def test_the_tables_of_several_gpus_are_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"), run_name="__main__")
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(printed in page for printed in capsys.readouterr().out.strip().split("\n\n"))


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_in_the_docs_is_one_that_is_taken(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module in (main, isoflop):
        for name, function in list(vars(module).items()):
            home = getattr(function, "__module__", "")
            if not callable(function) or not home.startswith("mixture_of_depths.cli.") or name[0] == "_":
                continue
            if name in ("main", "commands") or home == "mixture_of_depths.cli.common":
                continue

            def stub(*args: Any, function: Any = function, **kwargs: Any) -> None:
                called.append(function)

            monkeypatch.setattr(module, name, functools.wraps(function)(stub))
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    main.main()
    assert len(called) == 1


def test_the_python_of_the_page_on_python_runs() -> None:
    names: dict[str, Any] = {
        "input_ids": torch.randint(0, 300, (1, 16)),
        "attention_mask": torch.ones(1, 16, dtype=torch.int64),
        "tokenizer": train_tokenizer(["Once upon a time"], 300),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("compiled=True", "compiled=False"), names)
    assert names["output"].routing[1].entered.shape == (1, 16)


def write_chats(folder: Path) -> None:
    """The conversations that the pages tune on."""
    turns = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox " * 20}]
    (folder / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 100)


@pytest.mark.slow
def test_the_python_that_tunes_on_conversations_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "runs" / "retrofit")
    write_chats(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "retrofit.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("max_steps=50", "max_steps=3"), names)
    assert names["sequences"]
    left, tuned = (MoDForCausalLM.from_pretrained(f"runs/{name}").state_dict() for name in ("retrofit", "chat"))
    changed = {name for name, weight in left.items() if not torch.equal(weight, tuned[name])}
    assert any("mlp" in name for name in changed)
    assert any("router" in name for name in changed)


@pytest.mark.slow
def test_the_python_that_tunes_with_other_trainers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "runs" / "mod")
    write_chats(tmp_path)
    pair = {"prompt": "the quick", "chosen": " brown fox jumps" * 8, "rejected": " over the lazy dog" * 8}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 100)
    page = (ROOT / "docs" / "tuning.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block.replace("max_steps=100", "max_steps=3").replace("range(100)", "range(4)"), {})
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    (command,) = commands(page)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    main.main()
    start = MoDForCausalLM.from_pretrained("runs/mod").state_dict()
    for name in ("sft", "merged", "dpo", "calibrated"):
        tuned = MoDForCausalLM.from_pretrained(f"runs/{name}").state_dict()
        changed = {key for key, weight in start.items() if not torch.equal(weight, tuned[key])}
        assert any("attn" in key for key in changed)
        assert any("router" in key for key in changed)


def readers_folder(folder: Path) -> None:
    """What the reader of the pages has: texts, a task, a study, a pretrained model; all of them small."""
    source = Path(json.__file__).parent
    shutil.copytree(source, folder / "my_texts", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(source / "tool.py", folder / "text.py")
    shutil.copy(source / "tool.py", folder / "other.txt")
    (folder / "prompts.jsonl").write_text('{"prompt": "import"}\n')
    asked = ({"messages": [{"role": "user", "content": f"{i} the quick brown fox " * 30}]} for i in range(40))
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    (folder / "my_tasks").mkdir()
    task = TASK.format(data=folder / "my_tasks" / "data.jsonl").replace("local_choice", "my_task")
    (folder / "my_tasks" / "my_task.yaml").write_text(task)
    example = {"question": "import", "choices": ["os", "json"], "answer": 0}
    (folder / "my_tasks" / "data.jsonl").write_text(f"{json.dumps(example)}\n" * 4)
    study = yaml.safe_load((ROOT / "recipes" / "isoflop-cpu.yaml").read_text())
    study["data"] |= {"data": ["my_texts"], "vocab_size": 300, "sequence_length": 64}
    study["training"]["compile"] = False
    study["sweeps"] = [{"budgets": [2.0e10], "families": ["baseline", "mod", "stochastic-12"], "depths": [2, 4]}]
    (folder / "recipes").mkdir()
    (folder / "recipes" / "isoflop-cpu.yaml").write_text(yaml.safe_dump(study))
    torch.manual_seed(0)
    fields: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    fields |= {"vocab_size": 300, "num_attention_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}
    write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", LlamaForCausalLM(LlamaConfig(**fields)), {}, {})


def shorter(line: str) -> list[str]:
    """The command with less to do: the same options, smaller lengths."""
    for pattern, small in (
        (r"--max-flops \S+", "--max-flops 2e11"),
        (r"--max-steps \S+", "--max-steps 8"),
        (r"--max-new-tokens \S+", "--max-new-tokens 8"),
        (r"~/texts", "my_texts"),
        (r"--port \S+", ""),
    ):
        line = re.sub(pattern, small, line)
    return [sys.executable, "-m", "mixture_of_depths", *shlex.split(line)[1:]]


def answers(program: list[str], folder: Path) -> None:
    """Starts a server, waits for an answer, and stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = f"http://127.0.0.1:{port}/" + ("health" if "serve" in program else "")
    with subprocess.Popen([*program, "--port", str(port)], cwd=folder) as process:
        try:
            for _ in range(900):
                assert process.poll() is None, "the server ended"
                try:
                    with urllib.request.urlopen(page, timeout=60) as answer:
                        assert answer.status == 200
                        return
                except urllib.error.URLError:
                    time.sleep(0.2)
            raise AssertionError("no answer")
        finally:
            process.terminate()


@pytest.mark.slow
def test_the_commands_of_the_pages_run_one_after_another(tmp_path: Path) -> None:
    readers_folder(tmp_path)
    ran = set()
    for page in RUN:
        text = (ROOT / page).read_text()
        for line in commands(text):
            # The README trains the model of the other pages once more, larger.
            trains_again = page == "README.md" and "--out runs/mod " in line
            if line in ran or trains_again or COMMITTED in line:
                continue
            ran.add(line)
            program = shorter(line)
            if shlex.split(line)[1] in SERVERS:
                answers(program, tmp_path)
                continue
            run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"{page}: {line}\n{run.stderr}"
        for block in re.findall(r"```python\n(import pyarrow.*?)```", text, re.DOTALL):
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    for left in (
        "demo/report.html",
        "demo/curves.png",
        "report.html",
        "figures/shares.svg",
        "runs/retrofitted/retrofit.json",
        "runs/retrofit/retrofit.json",
        "runs/isoflop/summary.json",
        "runs/isoflop/isoflop.png",
        "samples.jsonl",
    ):
        assert (tmp_path / left).stat().st_size > 0
