"""Every command of the README and the docs is one that `mod` takes, and those in shell blocks of the docs run."""

import functools
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixture_of_depths import cli
from mixture_of_depths.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# In the order in which they build on one another.
RUN = ("index.md", "training.md", "sampling.md", "pictures.md", "retrofit.md")


def commands(text: str) -> list[str]:
    """The lines that call `mod`, also under a launcher, in shell blocks or indented, without comments."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [re.sub(r"^.*(torchrun|accelerate launch) .*-m mixture_of_depths.cli ", "mod ", line) for line in lines]
    return [line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?mod [a-z-]+ ", f"{line} ")]


def in_shell_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))


ALL = [(path.name, line) for path in [ROOT / "README.md", *PAGES] for line in commands(path.read_text())]


def test_there_are_commands_on_every_page() -> None:
    assert {name for name, _ in ALL} >= {"README.md", *RUN, "isoflop.md", "scaling.md"}


def test_the_tables_of_several_gpus_are_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"), run_name="__main__")
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(printed in page for printed in capsys.readouterr().out.strip().split("\n\n"))


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_in_the_docs_is_one_that_is_taken(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, function in list(vars(cli).items()):
        if (
            callable(function)
            and getattr(function, "__module__", "") == cli.__name__
            and name[0] != "_"
            and name != "main"
        ):

            def stub(*args: Any, function: Any = function, **kwargs: Any) -> None:
                called.append(function)

            monkeypatch.setattr(cli, name, functools.wraps(function)(stub))
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    cli.main()
    assert len(called) == 1


def test_the_python_of_the_readme_runs() -> None:
    names: dict[str, Any] = {
        "input_ids": torch.randint(0, 300, (1, 16)),
        "attention_mask": torch.ones(1, 16, dtype=torch.int64),
        "tokenizer": train_tokenizer(["Once upon a time"], 300),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("compiled=True", "compiled=False"), names)
    assert names["output"].routing[1].entered.shape == (1, 16)


@pytest.mark.slow
def test_the_commands_of_the_docs_run_one_after_another(tmp_path: Path) -> None:
    for page in RUN:
        for line in commands(in_shell_blocks((ROOT / "docs" / page).read_text())):
            shorter = re.sub(r"--max-flops \S+", "--max-flops 2e11", line)
            shorter = re.sub(r"--max-steps \S+", "--max-steps 8", shorter)
            program = [sys.executable, "-m", "mixture_of_depths.cli", *shlex.split(shorter)[1:]]
            run = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert run.returncode == 0, f"{page}: {line}\n{run.stderr}"
        for block in re.findall(r"```python\n(import pyarrow.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    for left in (
        "demo/report.html",
        "demo/curves.png",
        "report.html",
        "figures/shares.svg",
        "runs/retrofitted/retrofit.json",
    ):
        assert (tmp_path / left).stat().st_size > 0
