"""The figures show the records: their points, the bottoms of parabolas, the references and the names of families."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixture_of_depths.isoflop.plot import COLOURS, draw

DEPTHS = range(2, 7)
SWEPT = {"mod-12": 0.125, "mod": 0.25, "mod-50": 0.5}


def runs(family: str, bottom: float, budget: float = 1e13) -> list[dict[str, Any]]:
    """One run a depth, on a parabola with its bottom at 18 parameters; all but the baseline have a causal router."""
    return [
        {
            "name": f"{family}-{depth}-{budget:g}",
            "family": family,
            "depth": depth,
            "budget": budget,
            "seed": 0,
            "parameters": 2**depth,
            "flops_per_token": 10.0 * depth,
            "evaluation": {
                "loss_causal": (loss := bottom + (depth * math.log(2) - math.log(18)) ** 2),
                "loss_top_k": loss - 0.01,
                "causal_routers": {} if family == "baseline" else {"predictor": {}},
            },
        }
        for depth in DEPTHS
    ]


def losses(family: str, records: list[dict[str, Any]], name: str = "loss_causal") -> list[float]:
    return [record["evaluation"][name] for record in records if record["family"] == family]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by the names of the files that they are written to."""
    written: dict[str, Figure] = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: written.update({Path(path).stem: figure}))
    return written


def drawn(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    """Where the one line of that name runs."""
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def legend(axes: Axes) -> list[str]:
    shown = axes.get_legend()
    return [] if shown is None else [text.get_text() for text in shown.get_texts()]


def test_each_budget_has_a_panel_of_losses_by_size_with_the_bottoms_of_the_parabolas(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    records = [*runs("mod", 4.0, 2e13), *runs("baseline", 5.0), *runs("mod", 4.5)]
    assert draw(records, "baseline", "mod", {}, tmp_path) == [
        tmp_path / f"{name}.png" for name in ("isoflop", "relative", "routing")
    ]
    small, large = figures["isoflop"].axes
    assert (small.get_title(), large.get_title()) == ("1e+13 training FLOPs", "2e+13 training FLOPs")
    assert (legend(small), legend(large)) == (["baseline", "mod"], ["mod"])
    assert (small.get_xlabel(), small.get_xscale()) == ("parameters", "log")
    assert small.get_ylabel() == "held-out loss, causal routing (nats per token)"
    assert drawn(small, "baseline") == ([2**depth for depth in DEPTHS], losses("baseline", records))
    stars = [(line.get_color(), *line.get_xydata()[0]) for line in small.lines if line.get_marker() == "*"]
    assert stars == [
        pytest.approx((COLOURS[0], 18.0, 5.0)),
        pytest.approx((COLOURS[1], 18.0, 4.5)),
    ]
    # A family looks alike in all panels.
    colours = {line.get_color() for axes in (small, large) for line in axes.lines if line.get_label() == "mod"}
    assert colours == {COLOURS[1]}


def test_losses_and_flops_are_shown_over_those_of_the_best_baseline(figures: dict[str, Figure], tmp_path: Path) -> None:
    records = [*runs("baseline", 5.0), *runs("mod", 4.5), *runs("mod", 4.0, 2e13)]
    draw(records, "baseline", "mod", {}, tmp_path)
    axes, without_baseline = figures["relative"].axes
    best = min(losses("baseline", records))
    flops, ratios = drawn(axes, "mod")
    # The best baseline has 4 blocks.
    assert flops == [depth / 4 for depth in DEPTHS]
    assert ratios == pytest.approx([loss / best for loss in losses("mod", records)[:5]])
    references = [line.get_xydata().tolist() for line in axes.lines if line.get_color() == "grey"]
    assert references == [[[0, 1], [1, 1]], [[1, 0], [1, 1]]]
    assert (without_baseline.lines[:], legend(without_baseline)) == ([], [])


def test_causal_loss_is_shown_against_top_k_loss_of_what_has_a_router(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    records = [*runs("baseline", 5.0), *runs("mod", 4.5)]
    draw(records, "baseline", "mod", {}, tmp_path)
    (axes,) = figures["routing"].axes
    assert legend(axes) == ["mod"]
    assert drawn(axes, "mod") == (losses("mod", records, "loss_top_k"), losses("mod", records))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("held-out loss, top-k routing", "held-out loss, causal routing")
    (diagonal,) = (line for line in axes.lines if line.get_color() == "grey")
    assert diagonal.get_slope() == 1


def test_loss_is_shown_against_capacity_a_line_a_size_beside_the_baseline(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    records = [*runs("baseline", 5.0), *runs("mod", 4.5), *runs("mod-12", 4.0), *runs("mod-50", 4.75)]
    # Two capacities are no sweep.
    records = [record for record in records if (record["family"], record["depth"]) != ("mod-50", 2)]
    draw(records, "baseline", "mod", SWEPT, tmp_path)
    (axes,) = figures["capacity"].axes
    assert len(axes.lines) == 2 * 4
    above = losses("mod", records)[1] - 4.5
    assert drawn(axes, "1e+13 FLOPs, 3 blocks") == (
        [0.125, 0.25, 0.5],
        pytest.approx([4 + above, 4.5 + above, 4.75 + above]),
    )
    assert drawn(axes, "baseline, 3 blocks")[1] == pytest.approx([5 + above] * 2)
    assert axes.get_xlabel() == "capacity"


def test_training_curves_are_those_of_the_best_runs_whose_folders_are_there(
    figures: dict[str, Figure], tmp_path: Path
) -> None:
    records = [*runs("baseline", 5.0), *runs("mod", 4.5)]
    folder = tmp_path / "runs" / "mod-4-1e+13"
    folder.mkdir(parents=True)
    lines = [
        {"step": 1, "flops": 1e12},
        {"step": 1, "eval_loss_causal": 6.0},
        {"step": 2, "flops": 2e12},
        {"step": 2, "eval_loss_causal": 5.5},
        {"step": 3, "flops": 3e12},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    paths = draw(records, "baseline", "mod", {}, tmp_path)
    assert paths[-1] == tmp_path / "curves.png"
    (axes,) = figures["curves"].axes
    assert legend(axes) == ["mod, 4 blocks"]
    assert drawn(axes, "mod, 4 blocks") == ([1e12, 2e12], [6.0, 5.5])
    assert axes.get_xlabel() == "training FLOPs"


def test_runs_that_diverged_are_not_drawn(figures: dict[str, Figure], tmp_path: Path) -> None:
    records = [*runs("baseline", 5.0), {**runs("mod", 4.0)[0], "evaluation": None}]
    draw(records, "baseline", "mod", {}, tmp_path)
    assert figures.keys() == {"isoflop", "relative"}
    assert legend(figures["isoflop"].axes[0]) == ["baseline"]
