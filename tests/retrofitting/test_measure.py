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
    at_capacity,
    measure_importance,
    routed_from,
    routers_of,
    set_fit,
    top_k_loss,
)
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus

KIND: dict[str, Any] = {"routed_parts": "block_keep_keys", "bypass_rank": 3}
EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_capacity": 0.7}


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


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize("kind", [{}, KIND, {"router_type": "random"}])
def test_importance_is_what_the_loss_rises_by(corpus: Corpus, kind: Any, experts: Any, bf16: bool) -> None:
    dense = dense_for(corpus, **experts)
    sequences = some_sequences(dense)
    # The first sequence holds two documents.
    end = sequences[0]["input_ids"][4]
    fit = None if "router_type" in kind else fit_blocks(dense, sequences, end, kind.get("bypass_rank", 0))
    found = list(measure_importance(dense, fit, kind, sequences, end, bf16, console=QUIET))
    routed = routed_from(dense, routed_layers=list(range(4)), capacity=1.0, **kind).eval()
    if fit is not None:
        set_fit(routed, fit)
    text = list(batches(sequences, range(len(sequences)), end, 1, dense.device))
    before = top_k_loss(routed, text, bf16)
    expected = []
    for router in routers_of(routed).values():
        with at_capacity(router, MEASURED_CAPACITY):
            expected.append(top_k_loss(routed, text, bf16) - before)
    assert [block.loss for block in found] == expected
    assert before == pytest.approx(top_k_loss(dense, text, bf16), abs=2e-2 if bf16 else 1e-5)
    again = measure_importance(dense, fit, kind, sequences, end, bf16, found[:3], QUIET)
    assert list(again) == found[3:]


def test_the_expected_loss_is_in_proportion_to_what_is_missed() -> None:
    block = BlockImportance(0.3, (1.0, 0.6, 0.4, 0.1, 0.0))
    expected = [block.expected_loss(capacity) for capacity in (0, 0.25, 0.375, 0.5, 1)]
    assert expected == pytest.approx([0.75, 0.45, 0.375, 0.3, 0.0])
    assert BlockImportance(-0.3, (1.0, 0.4, 0.0)).expected_loss(0.25) == 0
