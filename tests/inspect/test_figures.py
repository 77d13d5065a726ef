"""The statistics behind the figures, and figures for every kind of model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt
from scipy.stats import spearmanr
from test_trace import TEXT, TOKENIZER, model_with

from mixture_of_depths.inspect.figures import (
    accuracy,
    drawn,
    engagement_against_entropy,
    engagement_by_kind,
    kind_of,
    save,
    svg,
)
from mixture_of_depths.inspect.trace import trace


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("def", "keyword"),
        (" return", "keyword"),
        (" name", "name"),
        ("été", "name"),
        ("   ", "space"),
        ("\n    ", "end of line"),
        ("\r\n", "end of line"),
        ("42", "digit"),
        ("):", "other"),
        ("", "other"),
    ],
)
def test_kinds_of_tokens(piece: str, kind: str) -> None:
    assert kind_of(piece) == kind


def test_the_correlation_is_spearmans_and_lies_in_its_interval() -> None:
    found = trace(model_with(), TOKENIZER, TEXT)
    correlation = engagement_against_entropy(found)
    assert correlation is not None
    assert correlation.rho == pytest.approx(spearmanr(found.blocks_used, found.entropy)[0])
    assert correlation.low < correlation.rho < correlation.high
    assert correlation.tokens == len(found.pieces)
    assert engagement_against_entropy(trace(model_with(routed_layers=[]), TOKENIZER, TEXT)) is None


def test_kinds_share_out_all_tokens() -> None:
    found = trace(model_with(), TOKENIZER, TEXT)
    kinds = engagement_by_kind(found)
    assert sum(count for count, _, _ in kinds.values()) == len(found.pieces)
    assert sum(count * mean for count, mean, _ in kinds.values()) == pytest.approx(found.blocks_used.sum())


def test_right_and_wrong_decisions_are_all_decisions() -> None:
    found = trace(model_with(), TOKENIZER, TEXT, "top_k")
    for (right, let_in, kept_out), decided, chosen in zip(
        accuracy(found), found.enters_by_itself, found.entered, strict=True
    ):
        assert right + let_in + kept_out == pytest.approx(1)
        assert let_in == pytest.approx(np.mean(decided & ~chosen))


@pytest.mark.parametrize(
    "changes",
    [{}, {"router_type": "random"}, {"router_activation": "straight_through"}, {"num_hidden_layers": 1, "every": 1}],
)
@pytest.mark.parametrize("text", [TEXT, "a"])
def test_figures_are_drawn_for_every_model_and_text(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    found = trace(model_with(**changes), TOKENIZER, text)
    with drawn(found, trace(model_with(**changes), TOKENIZER, text, "top_k")) as figures:
        assert sorted(figures) == ["causal-decisions", "entropy", "kinds", "router-weights", "routing-map", "shares"]
        written = save(figures, tmp_path)
    assert len(written) == 12
    assert all(path.stat().st_size > 1000 for path in written)
    assert plt.get_fignums() == []


def test_the_same_trace_draws_the_same_picture() -> None:
    found = trace(model_with(), TOKENIZER, TEXT)
    pictures = []
    for _ in range(2):
        with drawn(found, None) as figures:
            pictures.append(svg(figures["shares"]))
    assert pictures[0] == pictures[1]
    with drawn(trace(model_with(routed_layers=[]), TOKENIZER, TEXT), None) as figures:
        assert figures == {}
