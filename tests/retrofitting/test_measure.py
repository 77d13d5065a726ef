"""A retrofitted model starts as the dense one, with what was fitted to it, and its blocks' importance is measured."""

from typing import Any

import datasets
import pytest
import torch
from runs import QUIET, dense_for

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.retrofitting.fit import fit_blocks
from mixture_of_depths.retrofitting.measure import (
    MEASURED_CAPACITY,
    BlockImportance,
    measure_importance,
    routed_from,
    set_fit,
)
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus

KIND: dict[str, Any] = {"routed_parts": "block_keep_keys", "bypass_rank": 3}


def some_sequences(dense: MoDForCausalLM, count: int = 6, length: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": torch.randint(1, dense.config.vocab_size, (count, length)).tolist()}
    )


@pytest.mark.parametrize("router_type", ["learned", "random"])
@pytest.mark.parametrize("kind", [{}, KIND])
def test_at_capacity_one_the_retrofitted_model_is_the_dense_one(corpus: Corpus, router_type: str, kind: Any) -> None:
    dense = dense_for(corpus).double()
    model = routed_from(dense, routed_layers=[0, 2, 3], capacity=1.0, router_type=router_type, **kind)
    set_fit(model, fit_blocks(dense, some_sequences(dense), 0, kind.get("bypass_rank", 0)))
    input_ids = torch.randint(0, dense.config.vocab_size, (2, 16))
    difference = model(input_ids, routing="top_k", use_cache=False).logits - dense(input_ids).logits
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("kind", [{}, KIND])
def test_importance_is_what_the_loss_rises_by(corpus: Corpus, kind: Any) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    fit = fit_blocks(dense, sequences, 0, kind.get("bypass_rank", 0))
    found = list(measure_importance(dense, fit, kind, sequences, 0, console=QUIET))
    assert len(found) == 4

    given = next(batches(sequences, range(len(sequences)), 0, len(sequences), dense.device))
    before = dense(**given, use_cache=False).lm_loss.item()
    routed = routed_from(dense, routed_layers=[2], capacity=MEASURED_CAPACITY, **kind).eval()
    set_fit(routed, fit)
    loss = routed(**given, use_cache=False, routing="top_k").lm_loss.item()
    assert found[2].loss == pytest.approx(loss - before, abs=1e-5)
    assert list(measure_importance(dense, fit, kind, sequences, 0, measured=found[:3], console=QUIET)) == found[3:]


def test_the_expected_loss_is_in_proportion_to_what_is_missed() -> None:
    block = BlockImportance(0.3, (1.0, 0.6, 0.4, 0.1, 0.0))
    expected = [block.expected_loss(capacity) for capacity in (0, 0.25, 0.375, 0.5, 1)]
    assert expected == pytest.approx([0.75, 0.45, 0.375, 0.3, 0.0])
    assert BlockImportance(-0.3, (1.0, 0.4, 0.0)).expected_loss(0.25) == 0
