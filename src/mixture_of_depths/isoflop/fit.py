"""The optimum of every isoFLOP curve, with an interval, and what follows from comparing them."""

from collections import defaultdict
from dataclasses import dataclass
from math import exp, inf
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t

from mixture_of_depths.isoflop.lost import lost
from mixture_of_depths.isoflop.plan import budget_name

Records = list[dict[str, Any]]
LOSSES = ("loss_causal", "loss_top_k")
# By how much of the best loss a parabola may miss what it describes.
TOLERANCE = 0.01


class Point(NamedTuple):
    """One size of a family at one budget: its parameters, forward FLOPs per token, mean loss over seeds, and seeds."""

    parameters: float
    flops_per_token: float
    loss: float
    seeds: int


@dataclass(frozen=True)
class Curve:
    """Held-out loss against size, for one family at one budget.

    Attributes:
        points: one per depth, smallest first.
        best: the point with the smallest loss.
        optimum: (parameters, loss) at the bottom of the parabola fitted to the points around the best, in the logarithm
            of the parameters; a point weighs as many times as it has seeds. None where it would rest on little: fewer
            than four points, a best point at the edge, a bottom outside the points; or where it describes them badly:
            its bottom, or any point, is off by more than `TOLERANCE` of the best loss.
    """

    points: list[Point]
    best: Point
    optimum: tuple[float, float] | None


def curve(records: Records, loss: str) -> Curve:
    """The curve through the records of one family and budget, by `loss_causal` or `loss_top_k`."""
    return curve_through(sorted(_point(runs, loss) for runs in by_size(records)))


def _point(runs: Records, loss: str) -> Point:
    """The point of the runs of one size."""
    mean = fmean(run["evaluation"][loss] for run in runs)
    return Point(runs[0]["parameters"], runs[0]["flops_per_token"], mean, len(runs))


def by_size(records: Records) -> list[Records]:
    """The records of each depth: those of its seeds."""
    depths: dict[int, Records] = defaultdict(list)
    for record in records:
        depths[record["depth"]].append(record)
    return list(depths.values())


def curve_through(points: list[Point], tolerance: float = TOLERANCE) -> Curve:
    """The curve through points, the smallest first."""
    best = min(points, key=lambda point: point.loss)
    at = points.index(best)
    around = points[max(0, at - 2) : at + 3]
    if len({point.parameters for point in around}) < 4 or at in (0, len(points) - 1):
        return Curve(points, best, None)
    size = np.log([point.parameters for point in around])
    middle = size.mean()
    # Its weights multiply the residuals before they are squared.
    weights = np.sqrt([point.seeds for point in around])
    losses = np.array([point.loss for point in around])
    bend, slope, height = parabola = np.polyfit(size - middle, losses, 2, w=weights)
    if bend <= 0 or not size[0] <= (bottom := middle - slope / (2 * bend)) <= size[-1]:
        return Curve(points, best, None)
    loss_there = float(height - slope**2 / (4 * bend))
    off = max(abs(loss_there - best.loss), *abs(losses - np.polyval(parabola, size - middle)))
    if off > tolerance * best.loss:
        return Curve(points, best, None)
    return Curve(points, best, (float(np.exp(bottom)), loss_there))


def are_parabolas(one: Curve, other: Curve) -> bool:
    """Whether two curves are compared by the bottoms of their parabolas, and not by their best points."""
    return one.optimum is not None and other.optimum is not None


def ratio_is_of(one: Curve, other: Curve) -> str:
    """What `ratio` is of."""
    return "parabolas" if are_parabolas(one, other) else "points"


def optima(one: Curve, other: Curve) -> tuple[float, float]:
    """The losses of the best sizes of two curves: of both the parabola's bottom, or of both the best point.

    A bottom lies below or above the points around it, and is not to be compared with a point.
    """
    if one.optimum and other.optimum:
        return one.optimum[1], other.optimum[1]
    return one.best.loss, other.best.loss


def ratio(one: Curve, other: Curve) -> float:
    """The ratio of the losses of the best sizes of two curves."""
    ours, theirs = optima(one, other)
    return ours / theirs


def at_each_size(records: Records, others: Records, loss: str) -> list[dict[str, Any]]:
    """A family over another at every number of blocks that both have, seed by seed.

    Runs of one seed see the same text in the same order, so that part of a seed's noise is in both. The interval, of
    95 %, is Student's of the mean logarithm; None where there is one seed.
    """
    theirs = {(run["depth"], run["seed"]): run["evaluation"][loss] for run in others}
    pairs: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for run in records:
        size = run["depth"], run["seed"]
        if size in theirs:
            pairs[run["depth"]].append((run["seed"], float(np.log(run["evaluation"][loss] / theirs[size]))))
    told = []
    for depth, of_seeds in sorted(pairs.items()):
        logarithms = np.array([logarithm for _, logarithm in of_seeds])
        count, middle, interval = len(logarithms), float(logarithms.mean()), None
        if count > 1:
            half = float(student_t.ppf(0.975, count - 1) * logarithms.std(ddof=1)) / count**0.5
            interval = [exp(middle - half), exp(middle + half)]
        seeds = sorted(seed for seed, _ in of_seeds)
        told.append({"depth": depth, "seeds": seeds, "ratio": exp(middle), "interval": interval})
    return told


def smallest_as_good(mod: Curve, loss: float) -> Point | None:
    """The point with the fewest forward FLOPs whose loss is at most `loss`; None when there is none."""
    as_good = (point for point in mod.points if point.loss <= loss)
    return min(as_good, key=lambda point: point.flops_per_token, default=None)


def _loss_at(family_curve: Curve, parameters: float) -> float:
    """The loss of the size with that many parameters."""
    return next(point.loss for point in family_curve.points if point.parameters == parameters)


def group(records: Records) -> dict[float, dict[str, Records]]:
    """Records by budget and family, without those of runs that diverged."""
    by_budget: dict[float, dict[str, Records]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["evaluation"] is not None:
            by_budget[record["budget"]][record["family"]].append(record)
    return by_budget


def run_of(records: Records, parameters: float) -> dict[str, Any]:
    """The run of the first seed among those of one size."""
    return min((record for record in records if record["parameters"] == parameters), key=lambda record: record["seed"])


def ratio_interval(
    mod: Records, baseline: Records, loss: str, draws: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % interval of `ratio`, by a paired bootstrap over seeds.

    Where the ratio is one of points, every draw compares the sizes that were the best of all runs. The best of several
    noisy sizes looks better than it is, and more so in the family that is noisier; the best of a draw's own sizes would
    look better once more.

    A draw takes as many seeds as there are, with repeats, the same for both families: what a seed does to both, such
    as by its data order, does not widen the interval. Each size then gets another mean loss, and the optima are taken
    anew. Few seeds tell little of a size's noise, and one nothing: a size's deviation at a drawn seed is that of any
    size of its family at this seed, wider by the root of n / (n - 1), as the deviations of n seeds from their own mean
    are too small. How large the noise is, few seeds do not tell either: a draw scales all deviations by the root of
    its degrees of freedom over a number of that chi-square distribution, which makes Student's t of the normal
    distribution. The degrees of freedom are the smaller ones of both families. None unless these have several seeds in
    common.
    """
    generator = np.random.default_rng(seed)
    seeds = sorted(_repeated_seeds(mod) & _repeated_seeds(baseline))
    if len(seeds) < 2:
        return None
    deviations = [_deviations(records, loss, seeds) for records in (mod, baseline)]
    most = max(len(runs) for records in (mod, baseline) for runs in by_size(records))
    drawn_seeds = generator.choice(seeds, (draws, most))
    degrees = min(sum(len(runs) - 1 for runs in by_size(records)) for records in (mod, baseline))
    scales = (degrees / generator.chisquare(degrees, draws)) ** 0.5
    ours, theirs = (
        _drawn_curves(records, loss, by_seed, drawn_seeds, scales, generator)
        for records, by_seed in zip((mod, baseline), deviations, strict=True)
    )
    our_curve, their_curve = curve(mod, loss), curve(baseline, loss)
    by_parabolas = are_parabolas(our_curve, their_curve)
    ratios = [
        ratio(one, other)
        if by_parabolas and are_parabolas(one, other)
        else _loss_at(one, our_curve.best.parameters) / _loss_at(other, their_curve.best.parameters)
        for one, other in zip(ours, theirs, strict=True)
    ]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def _repeated_seeds(records: Records) -> set[int]:
    """The seeds of the sizes that have several."""
    return {run["seed"] for runs in by_size(records) if len(runs) > 1 for run in runs}


def _deviations(records: Records, loss: str, seeds: list[int]) -> dict[int, np.ndarray]:
    """By seed, how far the sizes that have several seeds lie from their means with it; in the mean of all seeds 0."""
    by_seed: dict[int, list[float]] = {seed: [] for seed in seeds}
    for runs in by_size(records):
        if len(runs) > 1:
            mean, widening = fmean(run["evaluation"][loss] for run in runs), (len(runs) / (len(runs) - 1)) ** 0.5
            for run in runs:
                if run["seed"] in by_seed:
                    by_seed[run["seed"]].append(widening * (run["evaluation"][loss] - mean))
    # Sizes that lack a seed that others have leave the rest off centre.
    centre = fmean(fmean(pool) for pool in by_seed.values())
    return {seed: np.array(pool) - centre for seed, pool in by_seed.items()}


def _drawn_curves(
    records: Records,
    loss: str,
    by_seed: dict[int, np.ndarray],
    drawn_seeds: np.ndarray,
    scales: np.ndarray,
    generator: np.random.Generator,
) -> list[Curve]:
    """The curve of every draw; `drawn_seeds` has a row for each, and `scales` a factor of its deviations."""
    points, means = [], []
    for runs in by_size(records):
        drawn = drawn_seeds[:, : len(runs)]
        deviations = np.empty(drawn.shape)
        for seed, pool in by_seed.items():
            deviations[drawn == seed] = generator.choice(pool, int((drawn == seed).sum()))
        points.append(_point(runs, loss))
        means.append(points[-1].loss + scales * deviations.mean(axis=1))
    # Whether parabolas describe the sizes, the runs themselves have decided; the noise that a draw adds is no sign
    # against it.
    return [
        curve_through(
            sorted(point._replace(loss=float(mean)) for point, mean in zip(points, of_draw, strict=True)),
            tolerance=inf,
        )
        for of_draw in zip(*means, strict=True)
    ]


def seed_deviation(records: Records, loss: str) -> float | None:
    """The standard deviation of the loss between seeds, over the loss, pooled over sizes; None for one seed each."""
    squares = degrees = 0.0
    for runs in by_size(records):
        losses = np.array([run["evaluation"][loss] for run in runs])
        squares += float(((losses / losses.mean() - 1) ** 2).sum())
        degrees += len(losses) - 1
    return (squares / degrees) ** 0.5 if degrees else None


@dataclass(frozen=True)
class Comparison:
    """What stands against each other at one budget.

    Attributes:
        curves: by family, then by `loss_causal` and `loss_top_k`.
        baseline: the baseline's best run.
        mod: the best run of Mixture-of-Depths.
        equal: the run of Mixture-of-Depths with the fewest forward FLOPs that is at least as good as the best baseline;
            None when there is none.
    """

    curves: dict[str, dict[str, Curve]]
    baseline: dict[str, Any]
    mod: dict[str, Any]
    equal: dict[str, Any] | None


def comparisons(records: Records, baseline: str, mod: str) -> dict[str, Comparison]:
    """Per budget at which both families have runs, what is compared under causal routing."""
    by_budget = {}
    for budget, families in sorted(group(records).items()):
        if baseline not in families or mod not in families:
            continue
        curves = {name: {loss: curve(runs, loss) for loss in LOSSES} for name, runs in families.items()}
        ours, theirs = curves[mod]["loss_causal"], curves[baseline]["loss_causal"]
        equal = smallest_as_good(ours, theirs.best.loss)
        by_budget[budget_name(budget)] = Comparison(
            curves=curves,
            baseline=run_of(families[baseline], theirs.best.parameters),
            mod=run_of(families[mod], ours.best.parameters),
            equal=None if equal is None else run_of(families[mod], equal.parameters),
        )
    return by_budget


def summarise(
    records: Records, baseline: str, mod: str, stochastic: str, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """What is compared, per budget: the optima of both families and of all others, under both routings.

    Args:
        records: of all runs.
        baseline, mod, stochastic: names of families; without runs of the last its ratio is None.
        measured: what `measure` found on the trained models, by budget; what is not there, or was measured on other
            models than are compared now, is None.
    """
    by_budget = {budget_name(budget): families for budget, families in group(records).items()}
    summary: dict[str, Any] = {}
    for budget, compared in comparisons(records, baseline, mod).items():
        families, curves, equal = by_budget[budget], compared.curves, compared.equal
        ours, theirs = curves[mod]["loss_causal"], curves[baseline]["loss_causal"]
        ours_top_k, theirs_top_k = curves[mod]["loss_top_k"], curves[baseline]["loss_top_k"]
        random = curves.get(stochastic)
        on_models = measured_on(compared, measured.get(budget, {}))
        mod_best_loss, baseline_best_loss = optima(ours, theirs)
        row: dict[str, Any] = {
            "baseline_best_loss": baseline_best_loss,
            "mod_best_loss": mod_best_loss,
            "loss_ratio": mod_best_loss / baseline_best_loss,
            "loss_ratio_interval": ratio_interval(families[mod], families[baseline], "loss_causal"),
            "loss_ratio_is_of": ratio_is_of(ours, theirs),
            "loss_ratio_of_points": ours.best.loss / theirs.best.loss,
            "loss_ratio_top_k": ratio(ours_top_k, theirs_top_k),
            "loss_ratio_top_k_is_of": ratio_is_of(ours_top_k, theirs_top_k),
            "baseline_best_parameters": theirs.best.parameters,
            "mod_best_parameters": ours.best.parameters,
            "baseline_best_flops_per_token": theirs.best.flops_per_token,
            "mod_best_flops_per_token": ours.best.flops_per_token,
            "equal_loss_mod_parameters": None if equal is None else equal["parameters"],
            "equal_loss_mod_flops_ratio": None
            if equal is None
            else equal["flops_per_token"] / theirs.best.flops_per_token,
            "equal_loss_sampling_speedup": on_models.get("sampling_speedup"),
            "equal_loss_sampling_speedup_bf16": on_models.get("sampling_speedup_bf16"),
            "train_wall_ratio": on_models.get("train_wall_ratio"),
            "causal_gap": ours.best.loss / _loss_at(curves[mod]["loss_top_k"], ours.best.parameters) - 1,
            "gain_from_later_tokens": on_models.get("gain_from_later_tokens"),
            "stochastic_loss_ratio": None if random is None else ratio(random["loss_causal"], theirs),
            "families": {
                name: {
                    "best_loss": by_loss["loss_causal"].best.loss,
                    "best_loss_top_k": by_loss["loss_top_k"].best.loss,
                    "ratio_to_baseline": ratio(by_loss["loss_causal"], theirs),
                    "ratio_interval": None
                    if name == baseline
                    else ratio_interval(families[name], families[baseline], "loss_causal"),
                    "ratio_is_of": ratio_is_of(by_loss["loss_causal"], theirs),
                    "over_baseline_at_each_size": None
                    if name == baseline
                    else at_each_size(families[name], families[baseline], "loss_causal"),
                    "over_family_at_each_size": None
                    if name in (baseline, mod)
                    else at_each_size(families[name], families[mod], "loss_causal"),
                    "flops_per_token": by_loss["loss_causal"].best.flops_per_token,
                    "parameters": by_loss["loss_causal"].best.parameters,
                    "optimum_parameters": by_loss["loss_causal"].optimum and by_loss["loss_causal"].optimum[0],
                    "optimum_loss": by_loss["loss_causal"].optimum and by_loss["loss_causal"].optimum[1],
                    "seed_deviation": seed_deviation(families[name], "loss_causal"),
                    "runs": len(families[name]),
                }
                for name, by_loss in curves.items()
            },
            "diverged": [r["name"] for r in records if r["evaluation"] is None and budget_name(r["budget"]) == budget],
            "lost": lost(record for runs in families.values() for record in runs),
            "not_known_whether_lost": sum("loss_rise" not in r for runs in families.values() for r in runs),
        }
        summary[budget] = row
    return summary


def models_of(compared: Comparison) -> dict[str, str | None]:
    """The names of the runs that stand against each other."""
    return {
        "baseline": compared.baseline["name"],
        "mod": compared.mod["name"],
        "equal": None if compared.equal is None else compared.equal["name"],
    }


def measured_on(compared: Comparison, row: dict[str, Any]) -> dict[str, Any]:
    """What `measure` found, if it was on the models that stand against each other now; else nothing."""
    return row if row.get("models") == models_of(compared) else {}
