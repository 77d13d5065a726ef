"""Figures of a trace, for pages and papers; the colours can be told apart by the colour-blind (Okabe and Ito)."""

import io
import keyword
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from scipy.stats import pearsonr, rankdata

from mixture_of_depths.inspect.trace import Trace

LIGHT, PALE = "#F0F0F0", "#C8D7E1"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999"
KINDS = ("keyword", "name", "space", "digit", "end of line", "other")
# More labels than that run into one another.
MOST_TICKS = 16


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, with its 95 % interval that takes the tokens as independent."""

    rho: float
    low: float
    high: float
    tokens: int


def engagement_against_entropy(trace: Trace) -> Correlation | None:
    """How a token's engagement goes with the entropy of its prediction; None where one is constant."""
    used, entropy = trace.engagement, trace.entropy
    if len(used) < 4 or len(np.unique(used)) < 2 or len(np.unique(entropy)) < 2:
        return None
    # Its result is a tuple with more to it, which type checkers do not see.
    correlation: Any = pearsonr(rankdata(used), rankdata(entropy))
    interval = correlation.confidence_interval(0.95)
    return Correlation(float(correlation.statistic), float(interval.low), float(interval.high), len(used))


def engagement_name(trace: Trace) -> str:
    """What the engagement of a token counts."""
    return "blocks used" if trace.experts_met is None else "blocks whose experts were used"


def kind_of(piece: str) -> str:
    """What kind of token a piece of text is; keywords are Python's."""
    bare = piece.strip()
    if not bare:
        return "end of line" if "\n" in piece or "\r" in piece else "space" if piece else "other"
    if keyword.iskeyword(bare):
        return "keyword"
    if bare.isdigit():
        return "digit"
    return "name" if bare.isidentifier() else "other"


def engagement_by_kind(trace: Trace) -> dict[str, tuple[int, float, float]]:
    """Per kind that occurs: number of tokens, mean engagement, and half the width of its 95 % interval."""
    kinds = np.array([kind_of(piece) for piece in trace.pieces])
    by_kind = {}
    for kind in KINDS:
        used = trace.engagement[kinds == kind]
        if len(used):
            half = 1.96 * used.std(ddof=1) / np.sqrt(len(used)) if len(used) > 1 else float("nan")
            by_kind[kind] = (len(used), float(used.mean()), float(half))
    return by_kind


def accuracy(top_k: Trace) -> list[tuple[float, float, float]]:
    """Per routed block: share of causal decisions that agree with top-k, that only let in, and that only keep out."""
    by_block = []
    for decided, chosen in zip(top_k.enters_by_itself, top_k.entered, strict=True):
        by_block.append(
            (float((decided == chosen).mean()), float((decided & ~chosen).mean()), float((~decided & chosen).mean()))
        )
    return by_block


def _axes(height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: list[Patch] | None = None) -> None:
    """Above the axes, where no bar can lie under it."""
    shown: dict[str, Any] = {} if handles is None else {"handles": handles}
    figure.legend(loc="outside upper right", ncols=3, frameon=False, **shown)


def _block_ticks(axes: Axes, trace: Trace) -> None:
    places = range(0, len(trace.routed_layers), -(-len(trace.routed_layers) // MOST_TICKS))
    axes.set_xticks(places, [str(trace.routed_layers[place]) for place in places])
    axes.set_xlabel("routed block")


def _cells(axes: Axes, tokens: np.ndarray, block: int, colour: str, name: str) -> None:
    """Draws one block's row of the map where `tokens` is true, side by side ones as one rectangle."""
    first, last = np.flatnonzero(np.diff(tokens.astype(int), prepend=0, append=0)).reshape(-1, 2).T - 0.5
    low, high = np.full(len(first), block - 0.5), np.full(len(first), block + 0.5)
    corners = np.array([[first, low], [last, low], [last, high], [first, high], [first, low]])
    codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY] * len(first)
    # Not pixels: a picture narrower than the text would leave tokens out. Nor one shape a token, which would be
    # moved to the next whole pixel.
    outline = Outline(corners.transpose(2, 0, 1).reshape(-1, 2), codes)
    shape = PathPatch(outline, color=colour, lw=0, snap=False)
    shape.set_gid(f"{name}-{block}")
    axes.add_patch(shape)


def routing_map(trace: Trace) -> Figure:
    """Depth against sequence: which tokens went through which block (figure 5 of the paper).

    The entries of block i are the shape `entered-i` of the SVG; those that no expert took there, `no-expert-i`.
    """
    depth, length, inside = trace.num_hidden_layers, len(trace.pieces), trace.inside
    figure, axes = _axes(min(6.0, 1.3 + 0.22 * depth))
    axes.set(xlim=(-0.5, length - 0.5), ylim=(-0.5, depth - 0.5), xlabel="token of the sequence", ylabel="block")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    patches = {}
    for block in range(depth):
        if block not in trace.routed_layers and trace.experts_met is None:
            axes.axhspan(block - 0.5, block + 0.5, color=PALE, lw=0)
            patches["not routed"] = PALE
            continue
        axes.axhspan(block - 0.5, block + 0.5, color=LIGHT, lw=0)
        _cells(axes, inside[block], block, BLUE, "entered")
        patches["entered"] = BLUE
        if trace.experts_met is not None:
            _cells(axes, inside[block] & (trace.experts_met[block] == 0), block, ORANGE, "no-expert")
            patches["entered, no expert"] = ORANGE
        if block in trace.routed_layers:
            patches["skipped"] = LIGHT
    step = -(-depth // MOST_TICKS)
    axes.set_yticks(range(0, depth, step))
    _legend(figure, [Patch(color=colour, label=label) for label, colour in patches.items()])
    return figure


def router_histogram(trace: Trace) -> Figure:
    """What routers give the tokens that entered and those that did not, all routed blocks together.

    Tokens are counted in logarithms: those that entered are few.
    """
    figure, axes = _axes()
    values = getattr(trace, trace.told_apart_by)
    bins = np.histogram_bin_edges(values, bins=60).tolist()
    axes.hist(values[~trace.entered], bins=bins, color=GREY, alpha=0.8, label="skipped")
    axes.hist(values[trace.entered], bins=bins, color=BLUE, alpha=0.8, label="entered")
    axes.set_xlabel(trace.told_apart_by.replace("_", " "))
    axes.set_ylabel("tokens")
    axes.set(yscale="log", ylim=(0.5, None))
    _legend(figure)
    return figure


def shares(trace: Trace) -> Figure:
    """Share of the tokens that entered each routed block, beside its capacity."""
    figure, axes = _axes()
    places = np.arange(len(trace.routed_layers))
    axes.bar(places, trace.entered.mean(axis=1), color=BLUE, label="entered")
    axes.plot(places, trace.capacity, "D", color=ORANGE, label="capacity")
    _block_ticks(axes, trace)
    axes.set_ylabel("share of the tokens")
    _legend(figure)
    return figure


def experts_figure(trace: Trace) -> Figure:
    """How many experts took a token inside each block on average, beside what training aims at."""
    assert trace.experts_met is not None and trace.experts_expected is not None
    figure, axes = _axes()
    means = trace.experts_met.sum(axis=1) / np.maximum(trace.inside.sum(axis=1), 1)
    axes.bar(range(len(means)), means, color=BLUE, label="experts met")
    axes.axhline(trace.experts_expected, color=ORANGE, ls="--", label="aimed at")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=MOST_TICKS))
    axes.set(xlabel="block", ylabel="experts per token inside")
    _legend(figure)
    return figure


def causal_decisions(top_k: Trace) -> Figure:
    """Where the causal decision differs from the top-k choice, per routed block; from a trace under top-k routing."""
    figure, axes = _axes()
    agreeing, let_in, kept_out = np.array(accuracy(top_k)).reshape(-1, 3).T
    places = np.arange(len(agreeing))
    axes.bar(places, let_in, color=ORANGE, label="let in, top-k keeps out")
    axes.bar(places, kept_out, bottom=let_in, color=PINK, label="kept out, top-k lets in")
    _block_ticks(axes, top_k)
    axes.set_ylabel("share of the decisions")
    axes.set_title(f"{agreeing.mean():.1%} of the decisions agree", fontsize="medium", loc="left")
    _legend(figure)
    return figure


def entropy_figure(trace: Trace) -> Figure:
    """Entropy of the next-token prediction by engagement (the paper's remark in section 4.1)."""
    figure, axes = _axes()
    counts = np.unique(trace.engagement)
    groups = [trace.entropy[trace.engagement == count] for count in counts]
    axes.boxplot(groups, positions=counts, widths=0.6, showfliers=False, medianprops={"color": ORANGE})
    axes.set_xticks(counts, [f"{count}\n({len(group)})" for count, group in zip(counts, groups, strict=True)])
    axes.set_xlabel(f"{engagement_name(trace)} (tokens)")
    axes.set_ylabel("entropy of the prediction (nats)")
    correlation = engagement_against_entropy(trace)
    if correlation is not None:
        interval = f"95 % interval {correlation.low:+.3f} to {correlation.high:+.3f}"
        axes.set_title(f"rank correlation {correlation.rho:+.3f}, {interval}", fontsize="medium", loc="left")
    return figure


def kinds_figure(trace: Trace) -> Figure:
    """Mean engagement by kind of token, with 95 % intervals."""
    figure, axes = _axes()
    by_kind = engagement_by_kind(trace)
    places = np.arange(len(by_kind))
    half = [0.0 if np.isnan(width) else width for _, _, width in by_kind.values()]
    axes.bar(places, [mean for _, mean, _ in by_kind.values()], yerr=half, color=GREEN, ecolor="black", capsize=3)
    axes.set_xticks(places, [f"{kind}\n({count})" for kind, (count, _, _) in by_kind.items()])
    axes.axhline(trace.engagement.mean(), color="black", ls="--", label="mean of all tokens")
    axes.set_ylabel(engagement_name(trace))
    _legend(figure)
    return figure


def drawn(trace: Trace, top_k: Trace | None) -> dict[str, Figure]:
    """All figures that the traces allow, by name; there are none where all tokens cost the same.

    Args:
        trace: the text's trace.
        top_k: its trace under top-k routing, for the causal decisions; None leaves them out.
    """
    figures: dict[str, Figure] = {}
    if trace.routed_layers or trace.experts_met is not None:
        figures |= {"routing-map": routing_map(trace)}
    if trace.routed_layers:
        name = f"{trace.told_apart_by.replace('_', '-')}s"
        figures |= {name: router_histogram(trace), "shares": shares(trace)}
    if trace.experts_met is not None:
        figures |= {"experts": experts_figure(trace)}
    if figures:
        figures |= {"entropy": entropy_figure(trace), "kinds": kinds_figure(trace)}
    if top_k is not None:
        figures["causal-decisions"] = causal_decisions(top_k)
    return figures


def svg(figure: Figure) -> str:
    """A figure as SVG, the same for the same figure."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mixture-of-depths"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save(figures: dict[str, Figure], folder: Path) -> list[Path]:
    """Writes every figure as PNG, at 200 dots per inch, and as SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        written += [folder / f"{name}.png", folder / f"{name}.svg"]
        figure.savefig(written[-2], dpi=200)
        written[-1].write_text(svg(figure))
    return written
