"""A checkpoint is whole or not there, whatever stops its writing and whatever happens to it afterwards."""

import random
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import CPU, QUIET, config_for
from transformers import set_seed

from mixture_of_depths import files
from mixture_of_depths.files import is_whole, seal
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training import checkpoint as checkpoint_module
from mixture_of_depths.training import run as run_module
from mixture_of_depths.training import trainer as trainer_module
from mixture_of_depths.training.checkpoint import (
    ASIDE,
    drop_checkpoints,
    latest_checkpoint,
    load_generators,
    save_generators,
    set_own_seed,
)
from mixture_of_depths.training.run import train

OPTIONS = TrainOptions(max_steps=6, batch_size=4, save_every=2)


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(config_for(corpus), corpus, OPTIONS, folder, console=QUIET)
    return folder


def test_a_run_leaves_whole_checkpoints_and_nothing_aside(finished: Path) -> None:
    assert sorted(path.name for path in finished.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert all(is_whole(path) for path in finished.glob("checkpoint-*"))
    assert latest_checkpoint(finished) == (finished / "checkpoint-6", 6)
    assert not (finished / ASIDE).exists()
    assert not list(finished.rglob("*.part"))


FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "schedule.json", "trainer_state.json")


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([*FILES, "generators.safetensors", "generators.json", "config.json", "checksums.json"]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["flip", "cut", "remove", "append"]),
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    finished: Path, name: str, place: float, change: str
) -> None:
    path = finished / "checkpoint-6" / name
    whole = path.read_bytes()
    at = int(place * len(whole))
    try:
        if change == "remove":
            path.unlink()
        else:
            changed = {
                "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
                "cut": whole[:at],
                "append": whole + b" x",
            }
            path.write_bytes(changed[change])
        assert latest_checkpoint(finished) == (finished / "checkpoint-4", 4)
    finally:
        path.write_bytes(whole)
    assert latest_checkpoint(finished) == (finished / "checkpoint-6", 6)


def test_a_file_that_cannot_be_read_is_no_damaged_checkpoint(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(files, "checksum", fail)
    with pytest.raises(OSError, match="Input/output error"):
        latest_checkpoint(finished)


def test_a_finished_run_without_a_whole_checkpoint_is_not_trained_again(
    finished: Path, corpus: Corpus, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds a finished run and no whole checkpoint of it"):
        train(config_for(corpus), corpus, OPTIONS, folder, resume=True, console=QUIET)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_oldest_checkpoints_go_whatever_the_clock_said(tmp_path: Path) -> None:
    for steps in (2, 10, 4, 30, 20):
        (tmp_path / f"checkpoint-{steps}").mkdir()
    # 30 is damaged, and the run went on from 10 to 20.
    drop_checkpoints(tmp_path, 20, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-20", "checkpoint-30"]
    drop_checkpoints(tmp_path, 20, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30"]


def test_each_process_keeps_its_own_random_numbers_and_a_new_one_draws_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), torch.rand(()).item()]

    def be(rank: int) -> None:
        monkeypatch.setattr(checkpoint_module, "processes", lambda: SimpleNamespace(process_index=rank))

    expected, at_first = [], []
    for rank in range(3):
        be(rank)
        set_seed(7)
        set_own_seed(7)
        at_first.append(draw())
        if rank < 2:
            save_generators(tmp_path, CPU)
            expected.append(draw())
    set_seed(7)
    assert at_first[0] == draw()
    # The third joins when the run goes on.
    for rank in (2, 1, 0):
        be(rank)
        set_seed(7)
        load_generators(tmp_path, CPU, 7, 10)
        at_first.append(draw())
    assert at_first[:2:-1][:2] == expected
    assert len({tuple(numbers) for numbers in at_first}) == len(at_first)


def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(config_for(corpus), corpus, OPTIONS, tmp_path / "whole", console=QUIET)
    calls = []

    def cut_off(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(trainer_module, "seal", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(config_for(corpus), corpus, OPTIONS, tmp_path / "parts", console=QUIET)
    monkeypatch.undo()
    assert (tmp_path / "parts" / ASIDE / "checkpoint-4").exists()
    assert latest_checkpoint(tmp_path / "parts") == (tmp_path / "parts" / "checkpoint-2", 2)
    parts, _ = train(config_for(corpus), corpus, OPTIONS, tmp_path / "parts", resume=True, console=QUIET)
    assert all((a == b).all() for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(corpus: Corpus, tmp_path: Path) -> None:
    config = config_for(corpus)
    train(config, corpus, replace(OPTIONS, max_steps=2), tmp_path / "small", console=QUIET)
    largest = (tmp_path / "small" / "model.safetensors").stat().st_size
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    class Filling(run_module.Recorder):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))

    before = run_module.Recorder
    try:
        run_module.Recorder = Filling
        with pytest.raises(OSError, match=r"cannot be written|File too large|No space"):
            train(config, corpus, OPTIONS, tmp_path / "run", console=QUIET)
    finally:
        run_module.Recorder = before
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert latest_checkpoint(tmp_path / "run") == (tmp_path / "run" / "checkpoint-2", 2)
    assert train(config, corpus, OPTIONS, tmp_path / "run", resume=True, console=QUIET)[1].finished
