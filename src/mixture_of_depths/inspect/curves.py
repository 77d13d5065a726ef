"""Pictures drawn from records."""

from pathlib import Path

from matplotlib.figure import Figure

from mixture_of_depths.files import read_records


def training_curve(runs: dict[str, Path], out: Path) -> None:
    """Draws training loss and held-out loss against training FLOPs.

    Args:
        runs: a label and the `metrics.jsonl` of each run.
        out: the PNG to write.
    """
    figure = Figure(figsize=(7, 4.5), dpi=150)
    axes = figure.subplots()
    for (label, path), colour in zip(runs.items(), ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False):
        records = read_records(path)
        steps = [record for record in records if "loss" in record]
        flops = {record["step"]: record["flops"] for record in steps}
        axes.plot([r["flops"] for r in steps], _smooth([r["loss"] for r in steps]), color=colour, alpha=0.5, lw=1)
        held_out = [record for record in records if "eval_loss_causal" in record and record["step"] in flops]
        for key, style, name in (("eval_loss_causal", "o-", "causal routing"), ("eval_loss_top_k", "x:", "top-k")):
            if key == "eval_loss_top_k" and all(r[key] == r["eval_loss_causal"] for r in held_out):
                continue
            axes.plot(
                [flops[r["step"]] for r in held_out],
                [r[key] for r in held_out],
                style,
                color=colour,
                label=f"{label}, held-out, {name}",
            )
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out)


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, without the bias of its start."""
    smoothed, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
        smoothed.append(mean / total)
    return smoothed
