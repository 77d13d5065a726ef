"""Records of a study: none lost, none twice, none of another definition."""

import fcntl
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console
from runs import CPU
from studies import study_file

from mixture_of_depths.files import read_records
from mixture_of_depths.isoflop import run as module
from mixture_of_depths.isoflop.fit import summarise
from mixture_of_depths.isoflop.lost import loss_rise
from mixture_of_depths.isoflop.plan import load_study, plan
from mixture_of_depths.isoflop.plot import draw
from mixture_of_depths.isoflop.run import add_record, open_records, run_here, run_on_ray
from mixture_of_depths.text.corpus import prepare


def test_a_study_runs_to_its_end_is_taken_up_again_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(study_file(tmp_path))
    corpus = prepare(study.data)
    planned, out, quiet = plan(study, corpus), tmp_path / "out", Console(quiet=True)
    carry_out, done = module.carry_out, []

    def once(item: object, *arguments: object) -> object:
        if done:
            return None
        done.append(item)
        return carry_out(item, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "carry_out", once)
    assert not run_here(planned, corpus, out, quiet, CPU)
    first = (out / "records.jsonl").read_text()
    assert [record["name"] for record in read_records(out / "records.jsonl")] == [planned[0].run.name]
    monkeypatch.setattr(module, "carry_out", carry_out)
    assert run_here(planned, corpus, out, quiet, CPU)
    assert (out / "records.jsonl").read_text().startswith(first)
    records = list(open_records(out, planned).values())
    assert [record["name"] for record in records] == [item.run.name for item in planned]
    for record, item in zip(records, planned, strict=True):
        assert record["flops"] == item.length.flops
        # As they were trained, on all of the held-out text.
        assert not record["calibrated"]
        assert record["evaluation"]["tokens"] == len(corpus.validation) * 15
        assert record["parameters"] == item.parameters
        metrics = read_records(out / "runs" / record["name"] / "metrics.jsonl")
        losses = [line["loss"] for line in metrics if "loss" in line]
        assert len(losses) == record["steps"]
        assert record["loss_rise"] == loss_rise(losses)
    assert run_here(planned, corpus, out, quiet, CPU)
    assert len(read_records(out / "records.jsonl")) == len(planned)
    assert summarise(records, "baseline", "mod", "absent", {}).keys() == {"3e07"}
    drawn = draw(records, "baseline", "mod", {"mod": 0.25}, out)
    assert [path.name for path in drawn] == ["isoflop.png", "relative.png", "routing.png", "curves.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)

    study = load_study(study_file(tmp_path, learning_rates={"baseline": 2e-2, "mod": 1e-2}))
    with pytest.raises(ValueError, match="holds a record of baseline-3e07-depth2-seed0 with another definition"):
        run_here(plan(study, corpus), corpus, out, quiet, CPU)


def test_a_run_that_diverges_is_recorded_and_the_study_goes_on(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, learning_rates={"baseline": 1e30, "mod": 1e-2}))
    corpus = prepare(study.data)
    planned, out = plan(study, corpus), tmp_path / "out"
    assert run_here(planned, corpus, out, Console(quiet=True), CPU)
    diverged, finished = read_records(out / "records.jsonl")
    assert diverged["name"] == "baseline-3e07-depth2-seed0"
    assert diverged["evaluation"] is None
    assert "is no number" in diverged["diverged"]
    assert finished["evaluation"]["loss_causal"] > 0
    assert draw([diverged, finished], "baseline", "mod", {}, out)


def test_a_run_that_another_process_is_at_is_left_to_it_and_taken_over_if_that_ends_without_a_record(
    tmp_path: Path,
) -> None:
    study = load_study(study_file(tmp_path))
    corpus = prepare(study.data)
    planned, out = plan(study, corpus), tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with (out / "runs" / f"{planned[0].run.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            running = pool.submit(run_here, planned, corpus, out, Console(quiet=True), CPU)
            while not (records := read_records(out / "records.jsonl")):
                time.sleep(0.1)
            assert [record["name"] for record in records] == [planned[1].run.name]
            with pytest.raises(TimeoutError):
                running.result(timeout=0.5)
        assert running.result(timeout=60)
    assert {record["name"] for record in read_records(out / "records.jsonl")} == {item.run.name for item in planned}


def test_records_of_many_writers_are_all_kept_once(tmp_path: Path) -> None:
    names = [f"run-{number % 20}" for number in range(60)]
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda name: add_record(tmp_path, {"name": name}), names))
    assert sum(wrote) == 20
    assert sorted(record["name"] for record in read_records(tmp_path / "records.jsonl")) == sorted(set(names))


def test_a_line_cut_off_by_a_kill_makes_way_for_the_next(tmp_path: Path) -> None:
    add_record(tmp_path, {"name": "a"})
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + '{"name": "b", "los')
    add_record(tmp_path, {"name": "b"})
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_on_a_cluster_the_number_of_a_gpu_is_refused_before_a_cluster_is_looked_for(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path))
    corpus = prepare(study.data)
    with pytest.raises(ValueError, match="device='cuda:1' numbers a GPU"):
        run_on_ray(plan(study, corpus), corpus, tmp_path / "out", "auto", 1, Console(quiet=True), "cuda:1")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_a_cluster_a_node_that_dies_costs_only_its_run_since_the_last_checkpoint(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    sweep = {"budgets": [2e9], "families": ["baseline", "mod"], "depths": [2]}
    sweeps = [sweep, {**sweep, "families": ["mod"], "depths": [3]}]
    study = load_study(study_file(tmp_path, sweeps=sweeps, training={"batch_size": 4, "save_every": 100}))
    corpus = prepare(study.data)
    planned, out = plan(study, corpus), tmp_path / "out"
    assert len(planned) == 3
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    killed: list[str] = []

    def kill() -> None:
        """Kills the second node once both nodes' runs have a checkpoint and none has ended."""
        for _ in range(600):
            running = {path.parent.name for path in out.glob("runs/*/checkpoint-*/trainer_state.json")}
            if len(running) >= 2:
                cluster.remove_node(second, allow_graceful=False)
                killed.extend(running)
                return
            time.sleep(0.2)

    try:
        with ThreadPoolExecutor(1) as pool:
            killing = pool.submit(kill)
            assert run_on_ray(planned, corpus, out, cluster.address, 1, Console(quiet=True))
            killing.result()
    finally:
        cluster.shutdown()
    assert len(killed) >= 2
    records = read_records(out / "records.jsonl")
    assert sorted(record["name"] for record in records) == sorted(item.run.name for item in planned)
    # Each step was recorded, and those before the last checkpoint of the dead run were not done again.
    for item in planned:
        steps = [
            line["step"] for line in read_records(out / "runs" / item.run.name / "metrics.jsonl") if "loss" in line
        ]
        assert steps == list(range(1, item.length.steps + 1))
