"""Several processes do what one does, go on from what any number of them left, and end together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
import yaml
from models import write_numbers
from safetensors.torch import load_file

from mixture_of_depths.files import is_whole
from mixture_of_depths.training.checkpoint import latest_checkpoint

WORKER = Path(__file__).with_name("distributed_worker.py")
RECIPE = yaml.safe_load((Path(__file__).parent.parent / "recipes" / "fsdp.yaml").read_text())
# As `accelerate launch` hands on its file; by itself it starts CPU processes only through MPI.
FSDP = {"ACCELERATE_USE_FSDP": "true", **{key.upper(): str(value) for key, value in RECIPE["fsdp_config"].items()}}
SIZE = ["--hidden-size", "16", "--num-hidden-layers", "3", "--num-attention-heads", "2", "--capacity", "0.25"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    # Not from 0, whose text is one number over and over: such tokens are equal in a routed block up to rounding, and
    # rounding would choose among them.
    write_numbers(folder, range(1, 21))
    return folder


def job(text: Path, out: Path, *arguments: str, env: dict[str, str] | None = None, **injected: Any) -> dict[str, Any]:
    data = ["--data", str(text / "*.txt"), "--vocab-size", "300", "--sequence-length", "16"]
    cache = ["--cache-dir", str(out.parent / "cache"), "--eval-sequences", "8"]
    argv = ["train", "--out", str(out), *data, *cache, *SIZE, "--batch-size", "8", *arguments]
    return {"argv": argv, "env": env or {}, **injected}


def launch(folder: Path, processes: int, *jobs: dict[str, Any]) -> str:
    """Runs the jobs one after another in that many processes; one is this one. Returns what several said of errors."""
    if processes == 1:
        distributed_worker.run(list(jobs))
        return ""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*program, str(WORKER), str(path)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


def statuses(out: Path, processes: int) -> list[str]:
    return [Path(f"{out}.status-{rank}").read_text() for rank in range(processes)]


def records(out: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if key in record]


def largest_difference(one: Path, other: Path) -> float:
    """Of the losses and gradient norms of all steps, and of the losses of all evaluations."""
    differences = []
    for keys in (("loss", "grad_norm", "learning_rate", "flops"), ("eval_loss_top_k", "eval_loss_causal")):
        pairs = list(zip(records(one, keys[0]), records(other, keys[0]), strict=True))
        assert pairs
        assert all(a["step"] == b["step"] for a, b in pairs)
        differences += [abs(a[key] - b[key]) for a, b in pairs for key in keys]
    return max(differences)


def sequences(out: Path, processes: int) -> dict[int, list[list[list[int]]]]:
    """The sequences that each process trained on, by step."""
    found: dict[int, list[list[list[int]]]] = {}
    for rank in range(processes):
        for line in Path(f"{out}.sequences-{rank}").read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, []).append(rows)
    return found


def test_two_processes_give_the_losses_of_one_and_split_its_batches(text: Path, tmp_path: Path) -> None:
    # Predictors are sharded, thresholds are not, and calibration moves both.
    steps = ("--max-steps", "4", "--eval-every", "2")
    one, ddp, fsdp, shards, alone = (tmp_path / name for name in ("one", "ddp", "fsdp", "shards", "alone"))
    packing = ("--packing", "best_fit")
    jobs = [job(text, ddp, *steps), job(text, fsdp, *steps, env=FSDP), job(text, shards, *steps, *packing)]
    launch(tmp_path, 2, *jobs)
    launch(tmp_path, 1, job(text, one, *steps), job(text, alone, *steps, *packing))
    # Shards give each process a part of the batch, too.
    assert largest_difference(alone, shards) < 1e-5
    expected_rows = sequences(alone, 1)
    for step, parts in sequences(shards, 2).items():
        assert [len(rows) for rows in parts] == [4, 4]
        assert sorted(row for rows in parts for row in rows) == sorted(expected_rows[step][0])
    whole = sequences(one, 1)
    for several in (ddp, fsdp):
        assert statuses(several, 2) == ["0", "0"]
        assert largest_difference(one, several) < 1e-5
        for step, parts in sequences(several, 2).items():
            assert [len(rows) for rows in parts] == [4, 4]
            assert sorted(row for rows in parts for row in rows) == sorted(whole[step][0])
        # Only the first reads the text, however often it is streamed.
        assert Path(f"{several}.read-0").exists()
        assert not Path(f"{several}.read-1").exists()
        expected, found = load_file(one / "model.safetensors"), load_file(several / "model.safetensors")
        assert expected.keys() == found.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
        folder, step = latest_checkpoint(several) or (several, 0)
        assert (is_whole(folder), step) == (True, 4)
        assert not [path for path in several.rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".distcp"}]
        assert json.loads((folder / "trainer_state.json").read_text())["total_flos"] == pytest.approx(
            json.loads((several / "result.json").read_text())["flops"]
        )
    assert not list((ddp / "checkpoint-4").glob("shard-*"))
    assert len(list((fsdp / "checkpoint-4").glob("shard-*.safetensors"))) == 2


@pytest.mark.slow
def test_two_processes_by_the_threshold_give_the_losses_of_one(text: Path, tmp_path: Path) -> None:
    routing = ("--causal-router", "threshold", "--training-routing", "threshold")
    steps = (*routing, "--max-steps", "6", "--eval-every", "6")
    one, ddp, fsdp = (tmp_path / name for name in ("one", "ddp", "fsdp"))
    launch(tmp_path, 2, job(text, ddp, *steps), job(text, fsdp, *steps, env=FSDP))
    launch(tmp_path, 1, job(text, one, *steps))
    for several in (ddp, fsdp):
        assert statuses(several, 2) == ["0", "0"]
        assert largest_difference(one, several) < 1e-5


@pytest.mark.slow
def test_processes_route_at_random_each_by_numbers_of_its_own_and_go_on_with_them(text: Path, tmp_path: Path) -> None:
    steps = ("--max-steps", "6", "--router-type", "random", "--eval-every", "6")
    whole, parts, grown = (tmp_path / name for name in ("whole", "parts", "grown"))
    launch(tmp_path, 1, job(text, grown, *steps, stop=[0, 3]))
    jobs = [job(text, whole, *steps), job(text, parts, *steps, stop=[1, 3]), job(text, parts, *steps, "--resume")]
    launch(tmp_path, 2, *jobs, job(text, grown, *steps, "--resume"))
    numbers = [load_file(parts / "checkpoint-6" / f"generators{name}.safetensors")["torch"] for name in ("", "-1")]
    assert not torch.equal(*numbers)
    expected, found = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert is_whole(parts / "checkpoint-6")
    # A process that the run did not have before draws numbers that none drew.
    assert statuses(grown, 2) == ["0", "0"]
    drawn = [load_file(grown / "checkpoint-6" / f"generators{name}.safetensors")["torch"] for name in ("", "-1")]
    assert not any(torch.equal(state, other) for state in drawn for other in numbers)
    assert not torch.equal(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--gradient-accumulation-steps", "2", "--tie-word-embeddings"),
        ("--causal-router", "auxiliary_loss", "--gradient-checkpointing"),
        ("--causal-router", "threshold"),
    ],
)
def test_fifty_steps_of_two_processes_are_those_of_one(text: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    steps = ("--max-steps", "50", *arguments)
    one, ddp, fsdp = (tmp_path / name for name in ("one", "ddp", "fsdp"))
    launch(tmp_path, 1, job(text, one, *steps))
    launch(tmp_path, 2, job(text, ddp, *steps), job(text, fsdp, *steps, env=FSDP))
    assert largest_difference(one, ddp) < 1e-5
    assert largest_difference(one, fsdp) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["--tie-word-embeddings", "--no-tie-word-embeddings"])
def test_a_run_goes_on_in_any_number_of_processes_sharded_or_not(text: Path, tmp_path: Path, tied: str) -> None:
    steps = ("--max-steps", "20", tied)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(tmp_path, 1, job(text, whole, *steps), job(text, parts, *steps, stop=[0, 3]))
    resumed = (*steps, "--resume")
    # An epoch ends in between.
    launch(tmp_path, 2, job(text, parts, *resumed, env=FSDP, stop=[1, 6]), job(text, parts, *resumed, stop=[0, 9]))
    assert statuses(parts, 2) == ["130", "130"]
    launch(tmp_path, 4, job(text, parts, *resumed, env=FSDP, stop=[3, 12]), job(text, parts, *resumed, stop=[2, 14]))
    launch(tmp_path, 2, job(text, parts, *resumed, env=FSDP, stop=[0, 17]))
    assert latest_checkpoint(parts) == (parts / "checkpoint-17", 17)
    launch(tmp_path, 1, job(text, parts, *resumed))
    assert statuses(parts, 1) == ["0"]
    assert largest_difference(whole, parts) < 1e-5
    assert len(sequences(whole, 1)) == 20


@pytest.mark.slow
def test_resuming_in_the_same_number_of_processes_is_exact(text: Path, tmp_path: Path) -> None:
    jobs = []
    for name, env in (("ddp", {}), ("fsdp", FSDP)):
        steps = ("--max-steps", "12", "--router-type", "random", "--eval-every", "5")
        jobs.append(job(text, tmp_path / f"{name}-whole", *steps, env=env))
        jobs.append(job(text, tmp_path / f"{name}-parts", *steps, env=env, stop=[1, 7]))
        jobs.append(job(text, tmp_path / f"{name}-parts", *steps, "--resume", env=env))
    launch(tmp_path, 2, *jobs)
    for name in ("ddp", "fsdp"):
        a, b = (load_file(tmp_path / f"{name}-{half}" / "model.safetensors") for half in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_what_stops_one_process_stops_all_of_them_with_status_2(text: Path, tmp_path: Path) -> None:
    steps = ("--max-steps", "6", "--save-every", "2")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    refused = [
        job(text, taken, *steps),
        job(text, tmp_path / "none", *steps, "--resume"),
        job(text, tmp_path / "uneven", *steps, "--batch-size", "7"),
        job(text, tmp_path / "parts", *steps, "--gradient-accumulation-steps", "8"),
        job(tmp_path / "no-text", tmp_path / "empty", *steps),
        job(text, tmp_path / "first", *steps, env={**FSDP, "FSDP_VERSION": "1"}),
        job(text, tmp_path / "loading", *steps, env={**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}),
        job(text, tmp_path / "full", *steps, full=[0, 3, 0]),
        # Room for records, and not for a checkpoint.
        job(text, tmp_path / "full-ddp", *steps, full=[0, 3, 50_000]),
        job(text, tmp_path / "full-fsdp", *steps, env=FSDP, full=[0, 3, 50_000]),
        # The second process writes nothing but its shards.
        job(text, tmp_path / "full-other", *steps, env=FSDP, full=[1, 3, 50_000]),
    ]
    launch(tmp_path, 2, *refused)
    for item in refused:
        out = Path(item["argv"][2])
        assert statuses(out, 2) == ["2", "2"], out.name
    for name in ("full", "full-ddp", "full-fsdp", "full-other"):
        assert latest_checkpoint(tmp_path / name) == (tmp_path / name / "checkpoint-2", 2)
    launch(tmp_path, 2, job(text, tmp_path / "full-other", *steps, "--resume"))
    assert statuses(tmp_path / "full-other", 2) == ["0", "0"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_in_one_process_names_the_batch_of_all(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def named(said: str) -> list[set[str]]:
        message = r"loss=nan at step 4 is no number; its batch was sequences ([\d, ]+) of"
        return [set(sequences.split(", ")) for sequences in re.findall(message, " ".join(said.split()))]

    steps = ("--max-steps", "6", "--save-every", "2")
    one, ddp, fsdp = (tmp_path / name for name in ("one", "ddp", "fsdp"))
    launch(tmp_path, 1, job(text, one, *steps, poison=[0, 3]))
    (batch,) = named(capsys.readouterr().err)
    assert len(batch) == 8
    jobs = [job(text, out, *steps, env=env, poison=[1, 3]) for out, env in ((ddp, {}), (fsdp, FSDP))]
    said = named(launch(tmp_path, 2, *jobs))
    assert len(said) >= len(jobs)
    assert all(sequences == batch for sequences in said)
    for out, processes in ((one, 1), (ddp, 2), (fsdp, 2)):
        assert statuses(out, processes) == ["2"] * processes
        assert latest_checkpoint(out) == (out / "checkpoint-2", 2)


@pytest.mark.slow
def test_experts_and_bf16_train_sharded(text: Path, tmp_path: Path) -> None:
    experts = ("--num-experts", "3", "--num-noop-experts", "1", "--expert-capacity", "0.7")
    jobs = []
    for name, env in (("ddp", {}), ("fsdp", FSDP)):
        jobs.append(job(text, tmp_path / f"{name}-experts", "--max-steps", "10", *experts, env=env))
        jobs.append(job(text, tmp_path / f"{name}-bf16", "--max-steps", "10", "--precision", "bf16", env=env))
    launch(tmp_path, 2, *jobs)
    assert largest_difference(tmp_path / "ddp-experts", tmp_path / "fsdp-experts") < 1e-5
    # Autocast and sharded bf16 weights round at different places.
    assert largest_difference(tmp_path / "ddp-bf16", tmp_path / "fsdp-bf16") < 0.05
