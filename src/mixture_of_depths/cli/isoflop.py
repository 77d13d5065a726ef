"""The commands of isoFLOP studies: plan, run, measure, fit and plot."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixture_of_depths.cli.common import Device, Study, quiet_libraries

if TYPE_CHECKING:
    from mixture_of_depths.isoflop import plan as plan_module
    from mixture_of_depths.isoflop.plan import PlannedRun
    from mixture_of_depths.text.corpus import Corpus

# The family of the stochastic control in our own studies.
STOCHASTIC = "stochastic-12"


def plan(study: Study, device: Device = "auto") -> None:
    """Print every run of a study: parameters, steps, tokens, FLOPs per token of a forward pass and estimated time.

    Args:
        study: Study file, YAML.
        device: What the time is estimated for: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.isoflop.plan import flops_per_second, resolved_difference, seeds_to_resolve

    place = chosen_device(device)
    loaded, planned, corpus = _planned(study)
    speed = flops_per_second(place)
    table = Table(title=f"{len(planned)} runs", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("parameters", "steps", "tokens", "FLOPs/token", "minutes"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in planned:
        length, minutes = item.length, item.length.flops / speed / 60
        parameters, tokens = f"{item.parameters / 1e6:.3f} M", f"{length.tokens / 1e6:.1f} M"
        sizes = (parameters, f"{length.steps:,}", tokens, f"{item.flops_per_token:.3g}")
        table.add_row(item.run.name, *sizes, f"{minutes:.1f}" if minutes >= 0.05 else "< 0.1")
    console = Console()
    console.print(str(corpus.facts))
    console.print(table)
    total = sum(item.length.flops for item in planned)
    console.print(f"{total:.3g} training FLOPs, about {total / speed / 3600:.1f} hours on this machine")
    if (deviation := loaded.seed_deviation) is not None:
        console.print(
            f"{seeds_to_resolve(deviation)} seeds of a size show a difference of 0.5 % in four of five studies, when "
            f"seeds deviate by {100 * deviation:g} %"
        )
        most = max(Counter((item.run.family, item.run.depth, item.run.budget) for item in planned).values())
        if most > 1:
            resolved = 100 * resolved_difference(deviation, most)
            console.print(f"the {most} seeds that a size has at most show one of {resolved:.2g} %")


def run(study: Study, out: Path, ray: str | None = None, cpus: int | None = None, device: Device = "auto") -> None:
    """Carry out the runs of a study that have no record yet, and resume what broke.

    Args:
        study: Study file, YAML.
        out: Folder of the study: records.jsonl, and a folder for each run.
        ray: Address of a Ray cluster, or "auto"; by default the runs go one after another here.
        cpus: Cores of each run on a Ray cluster; by default 2.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU. On a
            Ray cluster cuda asks for a GPU for each run, and auto is the CPU.
    """
    from rich.console import Console

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.isoflop.run import check_ray, run_here, run_on_ray

    if cpus is not None and (ray is None or cpus < 1):
        wanted = "needs ray; leave it out, or name a cluster" if ray is None else "must be at least 1"
        raise ValueError(f"cpus={cpus} {wanted}")
    place = None
    if ray is None:
        place = chosen_device(device)
    else:
        # Before the text is prepared, which may take minutes.
        check_ray(device)
    _, planned, corpus = _planned(study)
    console = Console()
    console.print(str(corpus.facts))
    if place is not None:
        finished = run_here(planned, corpus, out, console, place)
    else:
        assert ray is not None
        finished = run_on_ray(planned, corpus, out, ray, cpus or 2, console, device)
    if not finished:
        console.print("stopped; go on with the same command")
        raise SystemExit(130)


def measure(study: Study, out: Path, family: str = "mod", device: Device = "auto") -> None:
    """Measure on a study's trained models what their records do not tell; writes measurements.json and prints it.

    That is, per budget, the sampling speed of the smallest model that is as good as the best baseline against that
    baseline's, the training times of both best models, and what top-k routing gains by looking ahead. A budget whose
    models are in measurements.json already is not measured again.

    Args:
        study: Study file, YAML.
        out: Folder of the study, with its runs.
        family: The family that is compared with the baseline.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.files import read_json, write_aside
    from mixture_of_depths.isoflop.measure import measure
    from mixture_of_depths.isoflop.plan import load_study
    from mixture_of_depths.provenance import provenance
    from mixture_of_depths.text.corpus import prepare

    quiet_libraries()
    place = chosen_device(device)
    records, baseline = _records(study, out, family)
    require_compiler("measuring sampling", place)
    corpus = prepare(load_study(study).data)
    path = out / "measurements.json"
    measured = read_json(path) if path.exists() else {}
    for budget, row in measure(records, baseline, family, corpus, out, measured, place):
        measured[budget] = {**row, **provenance(place)}
        write_aside(path, json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


def fit(study: Study, out: Path, family: str = "mod", stochastic: str | None = None) -> None:
    """Find every curve's optimum and compare the families; writes summary.json and prints it.

    Args:
        study: Study file, YAML.
        out: Folder of the study.
        family: The family that is compared with the baseline.
        stochastic: The family of the stochastic control; by default stochastic-12, if there are records of it.
    """
    from mixture_of_depths.files import read_json
    from mixture_of_depths.isoflop.fit import summarise
    from mixture_of_depths.provenance import provenance

    records, baseline = _records(study, out, family, *([] if stochastic is None else [stochastic]))
    path = out / "measurements.json"
    measured = read_json(path) if path.exists() else {}
    figures = summarise(records, baseline, family, stochastic or STOCHASTIC, measured)
    summary = json.dumps({**figures, **provenance()}, indent=2, allow_nan=False)
    (out / "summary.json").write_text(summary + "\n")
    print(summary)


def plot(study: Study, out: Path, family: str = "mod") -> None:
    """Draw a study's figures from its records.

    Args:
        study: Study file, YAML.
        out: Folder of the study.
        family: The family that is compared with the baseline.
    """
    from mixture_of_depths.isoflop.plan import capacities, load_study
    from mixture_of_depths.isoflop.plot import draw

    records, baseline = _records(study, out, family)
    for path in draw(records, baseline, family, capacities(load_study(study), family), out):
        print(path)


def _planned(path: Path) -> "tuple[plan_module.Study, list[PlannedRun], Corpus]":
    from mixture_of_depths.isoflop.plan import load_study, plan
    from mixture_of_depths.text.corpus import prepare

    quiet_libraries()
    study = load_study(path)
    corpus = prepare(study.data)
    return study, plan(study, corpus), corpus


def _records(study: Path, out: Path, *wanted: str) -> tuple[list[dict[str, Any]], str]:
    """The records of a study's runs, and the name of its baseline.

    Raises:
        ValueError: when there are none, or none of a family that is wanted; or one differs from the study in size or
            rate.
    """
    from mixture_of_depths.files import read_records
    from mixture_of_depths.isoflop.plan import load_study, runs
    from mixture_of_depths.isoflop.run import RECORDS

    loaded = load_study(study)
    planned = {run.name: run for run in runs(loaded)}
    records = [record for record in read_records(out / RECORDS) if record["name"] in planned]
    if not records:
        raise ValueError(f"out={out} holds no record of this study; run it first")
    for record in records:
        run = planned[record["name"]]
        was = record["hidden_size"], record["learning_rate"]
        if was != (run.model.hidden_size, run.training.learning_rate):
            now = f"{run.model.hidden_size} and {run.training.learning_rate:g}"
            raise ValueError(
                f"out={out} holds a record of {run.name} of another study: its hidden_size and learning_rate were "
                f"{was[0]} and {was[1]:g}, and the study says {now}"
            )
    if missing := planned.keys() - {record["name"] for record in records}:
        print(f"{len(missing)} of {len(planned)} runs have no record yet, {min(missing)} first", file=sys.stderr)
    families = sorted({record["family"] for record in records if record["evaluation"] is not None})
    for name, family in zip(("family", "stochastic"), wanted, strict=False):
        if family not in families:
            raise ValueError(f"{name}={family} has no records; there are some of {', '.join(families)}")
    return records, loaded.baseline
