"""Every script of `examples/` is short, and does what it says: here on less text and with fewer operations."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from models import make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from mixture_of_depths import MoDForCausalLM, load_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
# What makes a script take a minute, and what stands there in these tests.
SIZES = {
    "4_000_000": "120_000",
    "1e12": "7e10",
    "sequence_length=512": "sequence_length=32",
    "max_steps=240": "max_steps=4",
}


def run_example(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> str:
    """What a script prints when it is called with these arguments."""
    source = (EXAMPLES / name).read_text()
    for size, smaller in SIZES.items():
        source = source.replace(size, smaller)
    script = tmp_path / name
    script.write_text(source)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_short_and_says_how_it_is_called(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < 40
    assert re.search(rf"^python examples/{path.name} ", source, re.MULTILINE)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("cached")
def test_the_model_that_is_trained_can_be_sampled_and_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    folder, text = str(tmp_path / "small"), tmp_path / "text.py"
    assert re.search(
        r"held-out loss: \d+\.\d{3} nats", run_example("train.py", [folder], monkeypatch, tmp_path, capsys)
    )
    printed = run_example("stream_text.py", [folder, "def add("], monkeypatch, tmp_path, capsys)
    assert printed.startswith("def add(")
    assert len(printed) > 20
    text.write_text("import os\n")
    printed = run_example("see_routing.py", [folder, str(text)], monkeypatch, tmp_path, capsys)
    pieces = len(load_tokenizer(folder)("import os\n")["input_ids"])
    assert len(re.findall(r"#+ +[3-6] blocks, loss ", printed)) == pieces
    assert re.search(r"^\d+% of the compute", printed, re.MULTILINE)


@pytest.mark.usefixtures("cached")
def test_a_router_of_ones_own_is_trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    printed = run_example("own_router.py", [str(tmp_path / "own")], monkeypatch, tmp_path, capsys)
    assert re.findall(r"block (\d): \d+\.\d% of the tokens enter", printed) == ["1", "3", "5"]


@pytest.mark.usefixtures("cached")
def test_a_pretrained_model_is_made_to_skip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    source, text, out = tmp_path / "dense", tmp_path / "text.txt", tmp_path / "out"
    make_checkpoint(source)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **fields)).save_pretrained(source)
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 400)
    printed = run_example("retrofit.py", [str(source), str(text), str(out)], monkeypatch, tmp_path, capsys)
    assert re.search(r"dense \d+\.\d{3}, made to skip \d+\.\d{3}", printed)
    assert MoDForCausalLM.from_pretrained(out).config.routed_layers
