"""The study's figures, drawn from its records."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from mixture_of_depths.files import read_records
from mixture_of_depths.isoflop.fit import Records, curve, group, run_of

# Each family keeps its colour and mark in all figures.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = ("o", "s", "^", "v", "D", "P", "X", "*")


def style(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and mark of every family."""
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKS[(i + i // len(COLOURS)) % len(MARKS)]}
        for i, name in enumerate(dict.fromkeys(names))
    }


def draw(records: Records, baseline: str, mod: str, capacities: dict[str, float], out: Path) -> list[Path]:
    """Writes every figure that the records allow; returns their paths.

    - `isoflop.png`: loss under causal routing against parameters, a panel a budget (figure 3 of the paper, left).
    - `relative.png`: loss over the best baseline's against forward FLOPs over the best baseline's (figure 4).
    - `routing.png`: loss under causal routing against loss under top-k (figure 6).
    - `capacity.png`: loss of the families in `capacities`, which differ in nothing else, against their capacity, a line
      a size (section 4.1).
    - `curves.png`: training curves of the best runs at the largest budget, where their folders are still there.
    """
    records = [record for record in records if record["evaluation"] is not None]
    styles = style([baseline, mod, *(record["family"] for record in records)])
    figures = {
        "isoflop": _panels(records, baseline, styles, _isoflop),
        "relative": _panels(records, baseline, styles, _relative),
        "routing": _routing(records, styles),
        "capacity": _capacity(records, baseline, capacities),
        "curves": _curves(records, (baseline, mod), styles, out),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            figure.tight_layout()
            paths.append(out / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


Styles = dict[str, dict[str, Any]]


def _panels(
    records: Records, baseline: str, styles: Styles, fill: Callable[[Axes, dict[str, Records], str, Styles], None]
) -> Figure:
    budgets = sorted(group(records).items())
    figure = Figure(figsize=(5 * len(budgets), 4.2))
    axes = figure.subplots(1, len(budgets), squeeze=False)
    for panel, (budget, families) in zip(axes[0], budgets, strict=True):
        panel.set_title(f"{budget:g} training FLOPs")
        panel.grid(alpha=0.3)
        fill(panel, families, baseline, styles)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    return figure


def _isoflop(panel: Axes, families: dict[str, Records], baseline: str, styles: Styles) -> None:
    for name, runs in families.items():
        fitted = curve(runs, "loss_causal")
        panel.plot([p.parameters for p in fitted.points], [p.loss for p in fitted.points], label=name, **styles[name])
        if fitted.optimum:
            panel.plot(*fitted.optimum, "*", color=styles[name]["color"], markersize=12)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("parameters")
    panel.set_ylabel("held-out loss, causal routing (nats per token)")


def _relative(panel: Axes, families: dict[str, Records], baseline: str, styles: Styles) -> None:
    if baseline not in families:
        return
    best = curve(families[baseline], "loss_causal").best
    for name, runs in families.items():
        points = curve(runs, "loss_causal").points
        flops = [point.flops_per_token / best.flops_per_token for point in points]
        panel.plot(flops, [point.loss / best.loss for point in points], label=name, **styles[name])
    panel.axhline(1, color="grey", lw=0.8)
    panel.axvline(1, color="grey", lw=0.8)
    panel.set_xlabel("forward FLOPs per token over the best baseline's")
    panel.set_ylabel("held-out loss over the best baseline's")


def _routing(records: Records, styles: Styles) -> Figure | None:
    routed = [record for record in records if record["evaluation"]["causal_routers"]]
    if not routed:
        return None
    figure = Figure(figsize=(5, 4.2))
    axes = figure.subplots()
    for name in sorted({record["family"] for record in routed}):
        evaluations = [record["evaluation"] for record in routed if record["family"] == name]
        top_k, causal = [e["loss_top_k"] for e in evaluations], [e["loss_causal"] for e in evaluations]
        axes.plot(top_k, causal, linestyle="none", label=name, **styles[name])
    low = axes.get_xlim()[0]
    axes.axline((low, low), slope=1, color="grey", lw=0.8)
    axes.set_xlabel("held-out loss, top-k routing")
    axes.set_ylabel("held-out loss, causal routing")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _capacity(records: Records, baseline: str, capacities: dict[str, float]) -> Figure | None:
    sizes: dict[tuple[float, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["family"] in capacities or record["family"] == baseline:
            losses = sizes[record["budget"], record["depth"]][record["family"]]
            losses.append(record["evaluation"]["loss_causal"])
    swept = {
        size: by_family for size, by_family in sorted(sizes.items()) if len(by_family.keys() & capacities.keys()) > 2
    }
    if not swept:
        return None
    figure = Figure(figsize=(5, 4.2))
    axes = figure.subplots()
    for (budget, depth), by_family in swept.items():
        points = sorted((capacities[name], fmean(losses)) for name, losses in by_family.items() if name in capacities)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=f"{budget:g} FLOPs, {depth} blocks")
        if baseline in by_family:
            axes.axhline(
                fmean(by_family[baseline]), color=line.get_color(), linestyle="--", label=f"{baseline}, {depth} blocks"
            )
    axes.set_xlabel("capacity")
    axes.set_ylabel("held-out loss, causal routing (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _curves(records: Records, names: tuple[str, str], styles: Styles, out: Path) -> Figure | None:
    families = group(records)[max(record["budget"] for record in records)]
    figure = Figure(figsize=(6, 4.2))
    axes = figure.subplots()
    for name in names:
        runs = families.get(name, [])
        if not runs:
            continue
        size = curve(runs, "loss_causal").best.parameters
        run = run_of(runs, size)
        lines = read_records(out / "runs" / run["name"] / "metrics.jsonl")
        flops = {line["step"]: line["flops"] for line in lines if "flops" in line}
        held_out = [line for line in lines if "eval_loss_causal" in line and line["step"] in flops]
        if held_out:
            axes.plot(
                [flops[line["step"]] for line in held_out],
                [line["eval_loss_causal"] for line in held_out],
                label=f"{name}, {run['depth']} blocks",
                **styles[name],
            )
    if not axes.lines:
        return None
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss of part of the held-out text, causal routing")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
