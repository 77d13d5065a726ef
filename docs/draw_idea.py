"""Draws the picture at the top of the README: code coloured by the blocks its tokens used, and a token's way.

mod demo
python docs/draw_idea.py demo/MoD src/mixture_of_depths/provenance.py 1 12 docs/images/idea.png
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from mixture_of_depths import MoDForCausalLM, Trace, load_tokenizer, trace

INK, ACCENT, PALE = "#1F2933", "#0072B2", "#EEF2F6"
SHADES = matplotlib.colormaps["Blues"]


def shade(share: float) -> tuple[float, float, float, float]:
    """From nearly white, for none of the routed blocks, to a blue on which white is readable."""
    return SHADES(0.06 + 0.84 * share)


def draw_code(axes: Axes, traced: Trace, first: int, last: int) -> None:
    """The lines from `first` to `last`, each token on the shade of the routed blocks it entered."""
    routed = len(traced.routed_layers)
    line, column, width = 1, 0, 0
    for piece, entered in zip(traced.pieces, traced.entered.sum(axis=0).tolist(), strict=True):
        for character in piece:
            if first <= line <= last and character != "\n":
                axes.add_patch(Rectangle((column, line - first), 1, 1, color=shade(entered / routed), linewidth=0))
                ink = "white" if entered / routed > 0.6 else INK
                place = (column + 0.5, line - first + 0.55)
                axes.text(*place, character, ha="center", va="center", family="monospace", fontsize=11, color=ink)
            column += 1
            width = max(width, column if first <= line <= last else 0)
            if character == "\n":
                line, column = line + 1, 0
    axes.set_xlim(0, width)
    axes.set_ylim(last - first + 1, 0)
    axes.axis("off")


def draw_legend(axes: Axes, traced: Trace) -> None:
    dense, routed = traced.num_hidden_layers - len(traced.routed_layers), len(traced.routed_layers)
    axes.text(0, 0.5, "blocks that a token used:", va="center", fontsize=11, color=INK)
    for count in range(routed + 1):
        left = 22 + 5 * count
        axes.add_patch(Rectangle((left, 0.1), 4, 0.8, facecolor=shade(count / routed), edgecolor=INK, linewidth=0.5))
        ink = "white" if count / routed > 0.6 else INK
        axes.text(left + 2, 0.48, str(dense + count), ha="center", va="center", fontsize=11, color=ink)
    saved = f"of {traced.num_hidden_layers}; in this text {traced.saved:.0%} of the compute is saved"
    axes.text(22 + 5 * (routed + 1), 0.5, saved, va="center", fontsize=11, color=INK)
    axes.set_xlim(0, 110)
    axes.set_ylim(0, 1)
    axes.axis("off")


def box(axes: Axes, centre: tuple[float, float], size: tuple[float, float], title: str, below: str, fill: str) -> None:
    (x, y), (width, height) = centre, size
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=INK, linewidth=1.2))
    ink = "white" if fill == ACCENT else INK
    axes.text(x, y + (1.1 if below else 0), title, ha="center", va="center", fontsize=13, weight="bold", color=ink)
    axes.text(x, y - 1.7, below, ha="center", va="center", fontsize=10, color=ink)


def draw_way(axes: Axes, capacity: float) -> None:
    """The four boxes: router, block or bypass, add."""
    box(axes, (22, 10), (18, 7), "router", "weighs each token", "white")
    box(axes, (57, 15.5), (26, 7), "block", "attention and MLP", ACCENT)
    box(axes, (57, 4.5), (26, 7), "bypass", "nothing is computed", PALE)
    box(axes, (88, 10), (9, 7), "add", "", "white")
    arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    for start, end in (
        ((5, 10), (13, 10)),
        ((31, 11), (44, 15.5)),
        ((31, 9), (44, 4.5)),
        ((70, 15.5), (83.5, 11)),
        ((70, 4.5), (83.5, 9)),
        ((92.5, 10), (100, 10)),
    ):
        axes.annotate("", end, start, arrowprops=arrow)
    axes.text(4, 10, "token", ha="right", va="center", fontsize=12, color=INK)
    axes.text(101, 10, "next block", ha="left", va="center", fontsize=12, color=INK)
    axes.text(35, 15.8, f"{capacity:.1%} of the\ntokens", ha="center", va="center", fontsize=10, color=ACCENT)
    axes.text(35, 4.2, f"{1 - capacity:.1%}", ha="center", va="center", fontsize=10, color=INK)
    axes.set_xlim(-2, 112)
    axes.set_ylim(0, 20)
    axes.axis("off")


def main() -> None:
    folder, path, first, last, out = sys.argv[1:]
    model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    lines = Path(path).read_text().splitlines(keepends=True)
    traced = trace(model, tokenizer, "".join(lines[: int(last)]))
    figure = Figure(figsize=(11.4, 6.4), facecolor="white")
    areas = figure.subplots(3, 1, height_ratios=(3.0, 0.3, 2.2))
    draw_code(areas[0], traced, int(first), int(last))
    draw_legend(areas[1], traced)
    draw_way(areas[2], traced.capacity[0])
    figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.02, hspace=0.08)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
