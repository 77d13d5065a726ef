"""A run begins in a folder of its own, and goes on there only as the same run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import QUIET, config_for, records
from safetensors.torch import load_file

from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.folder import only_run
from mixture_of_depths.training.run import train

OPTIONS = TrainOptions(max_steps=6, batch_size=4, save_every=2)


def test_a_folder_is_never_overwritten_and_resuming_needs_the_same_run(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=2, batch_size=4)
    config = config_for(corpus)
    train(config, corpus, opts, tmp_path / "run", console=QUIET)
    with pytest.raises(ValueError, match="is not empty"):
        train(config, corpus, opts, tmp_path / "run")
    with pytest.raises(ValueError, match=r"learning_rate=0\.5 differs from 0\.002"):
        train(config, corpus, replace(opts, learning_rate=0.5), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"capacity=0\.5 differs from 0\.25"):
        train(config_for(corpus, capacity=(0.5,)), corpus, opts, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(config, corpus, opts, tmp_path / "other", resume=True)


def test_resuming_with_other_text_is_refused_and_changes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    opts = TrainOptions(max_steps=4, batch_size=4)
    train(config_for(corpus), corpus, opts, tmp_path / "run", console=QUIET)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="the text, its tokenizer or sequence_length differs"):
        train(config_for(corpus), replace(corpus, key="other"), opts, tmp_path / "run", resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_a_run_without_a_later_field_is_resumed_at_its_default(corpus: Corpus, tmp_path: Path) -> None:
    opts, path = TrainOptions(max_steps=2, batch_size=4), tmp_path / "run.json"
    train(config_for(corpus), corpus, opts, tmp_path, console=QUIET)
    before = json.loads(path.read_text())
    del before["model"]["expert_routing"], before["train"]["precision"]
    path.write_text(json.dumps(before))
    assert train(config_for(corpus), corpus, opts, tmp_path, resume=True, console=QUIET)[1].finished
    for change in ({"num_experts": 2}, {"capacity": (0.5,)}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}=.* differs from"):
            train(config_for(corpus, **change), corpus, opts, tmp_path, resume=True, console=QUIET)


def test_a_run_may_go_on_with_other_evaluations_and_checkpoints_and_becomes_the_same(
    corpus: Corpus, tmp_path: Path
) -> None:
    def train_losses(folder: Path) -> list[float]:
        return [line["loss"] for line in records(folder) if "loss" in line]

    train(config_for(corpus), corpus, OPTIONS, tmp_path / "whole", console=QUIET)
    folder = tmp_path / "parts"
    train(config_for(corpus), corpus, OPTIONS, folder, console=QUIET)
    # As a kill after the second step would leave it.
    for path in (*folder.glob("checkpoint-[46]"), folder / "result.json", folder / "model.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    changed = replace(OPTIONS, save_every=3, eval_every=1, eval_sequences=3)
    _, resumed = train(config_for(corpus), corpus, changed, folder, resume=True, console=QUIET)
    assert resumed.finished
    looked_at = [line["step"] for line in records(folder) if "eval_loss" in line and line["step"] > 2]
    assert looked_at == [3, 4, 5, 6]
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert train_losses(folder) == train_losses(tmp_path / "whole")
    ours, whole = (load_file(run / "model.safetensors") for run in (folder, tmp_path / "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert json.loads((folder / "run.json").read_text())["train"]["save_every"] == 3


def test_a_second_run_in_the_folder_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with only_run(tmp_path), pytest.raises(ValueError, match="is in use by another run"):
        train(config_for(corpus), corpus, OPTIONS, tmp_path, console=QUIET)
    assert train(config_for(corpus), corpus, replace(OPTIONS, max_steps=2), tmp_path, console=QUIET)[1].finished


def test_a_run_with_options_that_are_not_known_is_refused_as_another_version_s(corpus: Corpus, tmp_path: Path) -> None:
    train(config_for(corpus), corpus, replace(OPTIONS, max_steps=2), tmp_path, console=QUIET)
    description = json.loads((tmp_path / "run.json").read_text())
    description["train"]["eval_blocks"] = description["train"].pop("eval_sequences")
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="run of another version of this package, with eval_blocks=64"):
        train(config_for(corpus), corpus, replace(OPTIONS, max_steps=2), tmp_path, resume=True, console=QUIET)
