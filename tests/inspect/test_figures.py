"""The statistics behind the figures, and figures for every kind of model."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import image
from matplotlib import pyplot as plt
from models import TEXT, TOKENIZER, model_with
from scipy.stats import spearmanr

from mixture_of_depths import MoDCache
from mixture_of_depths.inspect.figures import (
    accuracy,
    drawn,
    engagement_against_entropy,
    engagement_by_kind,
    kind_of,
    routing_map,
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
    ("changes", "text"),
    [
        ({}, TEXT),
        ({"router_type": "random"}, "a"),
        ({"router_activation": "straight_through"}, TEXT),
        ({"num_hidden_layers": 1, "route_every": 1}, "a"),
        pytest.param({}, "a", marks=pytest.mark.slow),
        pytest.param({"router_type": "random"}, TEXT, marks=pytest.mark.slow),
        pytest.param({"router_activation": "straight_through"}, "a", marks=pytest.mark.slow),
        pytest.param({"num_hidden_layers": 1, "route_every": 1}, TEXT, marks=pytest.mark.slow),
    ],
)
def test_figures_are_drawn_for_every_model_and_text(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    found = trace(model_with(**changes), TOKENIZER, text)
    figures = drawn(found, trace(model_with(**changes), TOKENIZER, text, "top_k"))
    all_weigh_one = changes.get("router_activation") == "straight_through"
    told_apart = "causal-logits" if all_weigh_one else "router-weights"
    assert set(figures) == {"causal-decisions", "entropy", "kinds", told_apart, "routing-map", "shares"}
    written = save(figures, tmp_path)
    assert len(written) == 12
    assert all(path.stat().st_size > 1000 for path in written)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("routed", [{}, {"routed_layers": []}])
def test_figures_show_where_no_expert_took_a_token(routed: dict[str, Any]) -> None:
    found = trace(model_with(num_experts=3, num_noop_experts=2, noop_share=0.4, **routed), TOKENIZER, TEXT, "top_k")
    assert found.experts_met is not None
    figures = drawn(found, None)
    names = sorted(figures)
    axes = figures["experts"].axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    outlines = {patch.get_gid(): patch.get_path() for patch in figures["routing-map"].axes[0].patches}
    expected = ["entropy", "experts", "kinds", "routing-map"]
    assert names == sorted(expected + (["router-weights", "shares"] if found.routed_layers else []))
    assert heights == pytest.approx(found.experts_met.sum(axis=1) / found.inside.sum(axis=1))
    for block in range(4):
        corners = outlines[f"no-expert-{block}"].vertices.reshape(-1, 5, 2)
        widths = corners[:, 1, 0] - corners[:, 0, 0]
        assert widths.sum() == (found.inside[block] & (found.experts_met[block] == 0)).sum() > 0


def test_the_same_trace_draws_the_same_picture() -> None:
    found = trace(model_with(), TOKENIZER, TEXT)
    pictures = []
    for _ in range(2):
        figures = drawn(found, None)
        pictures.append(svg(figures["shares"]))
    assert pictures[0] == pictures[1]
    figures = drawn(trace(model_with(routed_layers=[]), TOKENIZER, TEXT), None)
    assert figures == {}


@pytest.mark.parametrize("changes", [{}, {"route_every": 1, "route_from": 0}])
def test_the_map_colours_as_many_entries_per_block_as_the_cache_stored(changes: dict[str, Any], tmp_path: Path) -> None:
    # More tokens than the picture has columns of pixels.
    model = model_with(max_position_embeddings=4096, **changes)
    found = trace(model, TOKENIZER, "".join(f"{i} the lazy dog\n" for i in range(200)))
    length = len(found.pieces)
    assert length > 1400
    cache = MoDCache(model.config)
    model(torch.tensor([found.token_ids.tolist()]), cache=cache, use_cache=True)
    layers: Any = [cache.layers[block] for block in found.routed_layers]
    stored = [int(layer.num_stored()) for layer in layers]
    assert 0 < min(stored) < length

    figure = routing_map(found)
    drawn_as = svg(figure)
    # Where the axes lie, in the picture's points and as shares of it.
    left, low, width, height = figure.axes[0].get_position().bounds
    for block, count in zip(found.routed_layers, stored, strict=True):
        (outline,) = re.findall(f'id="entered-{block}">\\s*<path d="([^"]*)"', drawn_as)
        x = np.array([float(value) for value in re.findall(r"[ML] (\S+)", outline)]).reshape(-1, 4)
        assert (x.max(axis=1) - x.min(axis=1)).sum() * length / (width * 72 * 7) == pytest.approx(count, abs=0.01)

    save({"map": figure}, tmp_path)
    plt.close(figure)
    pixels = image.imread(tmp_path / "map.png")[::-1, :, 0]
    tall, wide = pixels.shape
    for block, count in zip(found.routed_layers, stored, strict=True):
        row = pixels[round(tall * (low + height * (block + 0.5) / model.config.num_hidden_layers))]
        inside = row[round(wide * left) + 3 : round(wide * (left + width)) - 3]
        # Red goes from that of the skipped, 0xF0, to that of those that entered, 0.
        assert (1 - inside / (0xF0 / 255)).mean() == pytest.approx(count / length, abs=0.01)
