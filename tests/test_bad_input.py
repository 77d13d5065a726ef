"""Whatever a user gives, it is taken or refused with the reason: never a traceback, and no pickle is loaded.

`benchmarks/bad_inputs.py` runs these tests with many more cases each, and reads `TRIED`.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import make_checkpoint
from safetensors.torch import load_file, save_file

from mixture_of_depths import MoDConfig
from mixture_of_depths.cli.main import main

TRIED: Counter[str] = Counter()
CASES = int(os.environ.get("BAD_INPUT_CASES", "12"))
FEW = settings(
    max_examples=CASES,
    deadline=None,
    # A command line is short as it is, and to shorten it takes minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

HOSTILE = ["", " ", "nan", "inf", "-inf", "-1", "0", "1", "1.5", "1e400", "9" * 25, "9" * 400]
HOSTILE += ["abc", "None", "[]", "{}", "--", "-x", "💥", "true", "1,2", "'", "x" * 300]
HOSTILE += ["\udcff", "/dev/null", "/nonexistent/x", "a/../.."]
HOSTILE += ['"', "*", "~", ".", "<script>"]
JSON_VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 7.5, -0.5, float("nan"), float("inf"), "", "abc", [], [1], ["a"], [[]], {}]
)
FIELDS = sorted(MoDConfig.__annotations__)


def status_of(*arguments: str) -> tuple[int, str]:
    """Status and output of the command line. What is raised beyond its end would be a traceback."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mod", *arguments])
        try:
            main()
        except SystemExit as end:
            status = end.code
        else:
            status = 0
    assert status in (0, 2), said.getvalue()
    return int(status), said.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder)
    return folder


TEXT = ["--data", "FILE", "--cache-dir", "CACHE"]
TRAIN = ["--vocab-size", "300", "--sequence-length", "16", "--hidden-size", "16", "--num-attention-heads", "2"]
TRAIN += ["--num-hidden-layers", "2", "--batch-size", "2", "--max-steps", "1"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A text, a trained model, a dense one and a study that was carried out, by the words that stand for them."""
    root = tmp_path_factory.mktemp("places")
    (root / "text.txt").write_text("".join(f"{number} is the number after {number - 1}.\n" for number in range(400)))
    found = {"FILE": str(root / "text.txt"), "CACHE": str(root / "cache"), "STUDY": str(root / "study.yaml")}
    found |= {name: str(root / name) for name in ("TRAINED", "DENSE", "STUDIED")}
    study = {
        "data": {"data": [found["FILE"]], "cache_dir": found["CACHE"], "vocab_size": 300, "sequence_length": 16},
        "training": {"batch_size": 2},
        "ladder": {"width_per_block": 8, "width_offset": 0, "head_dim": 8},
        "families": {"baseline": {"routed": False}, "mod": {}},
        "learning_rates": {"baseline": 1e-2, "mod": 1e-2},
        "sweeps": [{"budgets": [1e7], "families": ["baseline", "mod"], "depths": [2]}],
    }
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    for words in (
        ["train", "--out", "TRAINED", *TEXT, *TRAIN],
        ["train", "--out", "DENSE", *TEXT, *TRAIN, "--no-routed"],
        ["isoflop", "run", "STUDY", "--out", "STUDIED"],
    ):
        status, said = status_of(*(found.get(word, word) for word in words))
        assert status == 0, said
    return found


@FEW
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, min_size=1, max_size=4))
def test_a_configuration_is_taken_or_refused_by_the_name_of_a_field(fields: dict[str, Any]) -> None:
    TRIED["configurations"] += 1
    try:
        MoDConfig(**fields)
    except ValueError as error:
        reason = str(error)
    else:
        return
    assert any(name in reason for name in FIELDS), reason


def options_of(command: list[str]) -> list[str]:
    """The options that the help of a command names."""
    return sorted(set(re.findall(r"--[a-z][a-z-]+", status_of(*command, "--help")[1])) - {"--help"})


COMMANDS = {
    "train": ["train", "--out", "OUT", *TEXT, *TRAIN],
    "evaluate": ["evaluate", "TRAINED", "--data", "FILE", "--max-sequences", "2"],
    "generate": ["generate", "TRAINED", "--prompt", "the", "--max-new-tokens", "2"],
    "calibrate": ["calibrate", "TRAINED", "--out", "OUT"],
    "inspect": ["inspect", "TRAINED", "--text", "the", "--out", "OUT.html"],
    "retrofit": ["retrofit", "DENSE", "--out", "OUT", *TEXT, "--sequence-length", "16", "--batch-size", "2"],
    "isoflop plan": ["isoflop", "plan", "STUDY"],
    "isoflop fit": ["isoflop", "fit", "STUDY", "--out", "STUDIED"],
}
COMMANDS["prepare"] = ["prepare", "FILE", "--out", "OUT", "--vocab-size", "300", "--processes", "1"]
COMMANDS["retrofit"] += ["--max-steps", "1", "--measure-sequences", "1", "--fit-sequences", "1"]


@FEW
@given(st.data())
def test_a_command_line_ends_with_status_0_or_2(places: dict[str, str], data: st.DataObject) -> None:
    TRIED["command lines"] += 1
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    options = OPTIONS.setdefault(name, options_of(name.split()))
    with tempfile.TemporaryDirectory() as place:
        there = places | {"OUT": f"{place}/out", "OUT.html": f"{place}/out.html"}
        words = [there.get(word, word) for word in COMMANDS[name]]
        for _ in range(data.draw(st.integers(1, 3))):
            if data.draw(st.booleans()) and options:
                words += [data.draw(st.sampled_from(options)), data.draw(st.sampled_from(HOSTILE))]
            else:
                words[data.draw(st.integers(1, len(words) - 1))] = data.draw(st.sampled_from(HOSTILE))
        with contextlib.chdir(place):
            status_of(*words)


OPTIONS: dict[str, list[str]] = {}


def parquet(column: str, values: list[Any]) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({column: values}), written)
    return written.getvalue()


WHOLE = [
    b"",
    b"\0" * 100,
    b"\xff\xfe\xfa text",
    b"ordinary text " * 50,
    b'{"text": "one"}\n{"text": 2}\n',
    b'{"other": "one"}\n',
    b"[1, 2]\nnull\n",
    gzip.compress(b"ordinary text " * 50, mtime=0),
    gzip.compress(b"ordinary text " * 50, mtime=0)[:-9],
    parquet("text", ["ordinary text " * 20]),
    parquet("text", [1, 2]),
    parquet("text", [None, "a"]),
    parquet("body", ["a"]),
    b"x" * 100_000,
]
SUFFIXES = [".txt", ".md", ".py", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".parquet.gz", ".bin", ""]
SUFFIXES += [".json", ".json.gz", ".jsonl.zst"]


@FEW
@given(
    content=st.one_of(st.sampled_from(WHOLE), st.binary(max_size=300)),
    cut=st.one_of(st.none(), st.integers(0, 60)),
    flipped=st.one_of(st.none(), st.integers(0, 10_000)),
    suffix=st.sampled_from(SUFFIXES),
)
def test_a_file_of_text_is_read_or_refused(
    checkpoint: Path, content: bytes, cut: int | None, flipped: int | None, suffix: str
) -> None:
    TRIED["data files"] += 1
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"file{suffix}"
        written = bytearray(content if cut is None else content[:-cut])
        if written and flipped is not None:
            written[flipped % len(written)] ^= 1 << flipped % 8
        file.write_bytes(written)
        length = ["--sequence-length", "16"]
        status, said = status_of("evaluate", str(checkpoint), "--data", str(file), "--max-sequences", "1", *length)
        assert status == 0 or "error: " in said, said


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.marker, "loaded"))


def damaged_json(raw: bytes, data: st.DataObject) -> bytes:
    """One value, at any depth, is another or gone."""
    whole = json.loads(raw)
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(min(len(place), 20)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(JSON_VALUES)
        return json.dumps(whole).encode()


def damaged_bytes(raw: bytes, data: st.DataObject) -> bytes:
    position = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        return raw[:position]
    return raw[:position] + bytes([raw[position] ^ data.draw(st.integers(1, 255))]) + raw[position + 1 :]


def damaged_tensors(path: Path, data: st.DataObject) -> None:
    tensors = load_file(path)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    kind = data.draw(st.sampled_from(["missing", "shape", "extra", "type", "scalar"]))
    if kind == "shape":
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == "extra":
        tensors |= {name: tensor, "model.extra.weight": tensor.clone()}
    elif kind == "type":
        tensors[name] = tensor.to(torch.int32)
    elif kind == "scalar":
        tensors[name] = torch.tensor(1.0)
    save_file(tensors, path, {"format": "pt"})


@FEW
@given(st.data())
def test_a_damaged_checkpoint_is_taken_or_refused_and_no_pickle_loaded(checkpoint: Path, data: st.DataObject) -> None:
    TRIED["checkpoints"] += 1
    with tempfile.TemporaryDirectory() as place:
        folder, marker = Path(place) / "model", Path(place) / "loaded"
        shutil.copytree(checkpoint, folder)
        kind = data.draw(st.sampled_from(["json", "bytes", "tensors", "pickle", "missing"]))
        name = data.draw(st.sampled_from(["config.json", "model.safetensors", "generation_config.json"]))
        if kind == "tensors":
            damaged_tensors(folder / "model.safetensors", data)
        elif kind == "pickle":
            for disguise in ("model.safetensors", "pytorch_model.bin", "training_args.bin"):
                (folder / disguise).write_bytes(pickle.dumps(Payload(marker)))
            if data.draw(st.booleans()):
                (folder / "model.safetensors").unlink()
        elif kind == "missing":
            (folder / name).unlink()
        elif kind == "json" and name != "model.safetensors":
            (folder / name).write_bytes(damaged_json((folder / name).read_bytes(), data))
        else:
            (folder / name).write_bytes(damaged_bytes((folder / name).read_bytes(), data))
        status, said = status_of("generate", str(folder), "--prompt", "the", "--max-new-tokens", "2")
        assert status == 0 or "error: " in said, said
        assert not marker.exists()


@FEW
@given(st.data())
def test_a_run_with_a_damaged_description_is_taken_or_refused(places: dict[str, str], data: st.DataObject) -> None:
    TRIED["runs"] += 1
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(places["TRAINED"], f"{place}/run")
        path = Path(place) / "run" / "run.json"
        damage = data.draw(st.sampled_from([damaged_json, damaged_bytes]))
        path.write_bytes(damage(path.read_bytes(), data))
        commands = [
            ["evaluate", "RUN", "--max-sequences", "1"],
            ["calibrate", "RUN", "--out", f"{place}/calibrated"],
            ["train", "--out", "RUN", *TEXT, *TRAIN, "--resume"],
            ["retrofit", "DENSE", "--out", "RUN", *TEXT, "--sequence-length", "16", "--max-steps", "1", "--resume"],
        ]
        there = places | {"RUN": f"{place}/run"}
        status, said = status_of(*(there.get(word, word) for word in data.draw(st.sampled_from(commands))))
        assert status == 0 or "error: " in said, said


@FEW
@given(st.data())
def test_a_damaged_source_is_taken_or_refused_and_no_pickle_loaded(places: dict[str, str], data: st.DataObject) -> None:
    TRIED["sources"] += 1
    with tempfile.TemporaryDirectory() as place:
        folder, marker = Path(place) / "model", Path(place) / "loaded"
        shutil.copytree(places["DENSE"], folder)
        kind = data.draw(st.sampled_from(["tensors", "pickle", "bytes"]))
        if kind == "tensors":
            damaged_tensors(folder / "model.safetensors", data)
        elif kind == "bytes":
            name = data.draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json"]))
            (folder / name).write_bytes(damaged_bytes((folder / name).read_bytes(), data))
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
            (folder / "model.safetensors").unlink()
        words = [word if word != "DENSE" else str(folder) for word in COMMANDS["retrofit"]]
        there = places | {"OUT": f"{place}/out"}
        status, said = status_of(*(there.get(word, word) for word in words))
        assert status == 0 or "error: " in said, said
        assert status == 2 or kind != "pickle"
        assert not marker.exists()


@FEW
@given(st.data())
def test_a_damaged_tokenizer_is_taken_or_refused(checkpoint: Path, data: st.DataObject) -> None:
    TRIED["tokenizers"] += 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(checkpoint, folder)
        path = folder / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
        damage = data.draw(st.sampled_from([damaged_json, damaged_bytes]))
        path.write_bytes(damage(path.read_bytes(), data))
        status, said = status_of("generate", str(folder), "--prompt", "the fox", "--max-new-tokens", "2")
        assert status == 0 or "error: " in said, said
