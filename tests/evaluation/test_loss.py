"""Evaluation gives the model's own losses under both routings, and what its routers and experts do."""

import math
import weakref
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from models import routed_model, some_sequences
from runs import config_for

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.evaluation.loss import CausalEvaluation, Evaluation, ExpertEvaluation, evaluate, mean_of
from mixture_of_depths.text.batches import document_positions
from mixture_of_depths.text.corpus import Corpus, Source


def test_evaluation_tells_capacities_under_top_k_from_thresholds() -> None:
    model, sequences = (
        routed_model(routed_layers=[], capacity=0.5, num_experts=4, expert_capacity=0.5),
        some_sequences(),
    )
    found = evaluate(model, sequences, 0, 1.0)
    assert found.loss_top_k != found.loss_causal
    assert found.experts["top_k"][0].dropped > 0
    assert found.experts["causal"][0].dropped == 0


def test_several_sources_have_the_mean_of_their_figures_by_their_shares() -> None:
    nothing = some_sequences(1)
    sources = [Source("a", 3.0, nothing, 4.0, 0.75), Source("b", 1.0, nothing, 2.0, 0.25)]
    evaluations = [
        Evaluation(
            loss_top_k=2 * loss,
            loss_causal=loss,
            bits_per_byte=loss / math.log(2) / source.bytes_per_token,
            causal_routers={"threshold": CausalEvaluation(loss, loss / 4, {1: loss / 8})},
            experts={"causal": experts},
            tokens=10,
        )
        for source, loss, experts in (
            (sources[0], 1.0, {0: ExpertEvaluation([0.5, 0.5], 0.0)}),
            (sources[1], 3.0, {0: ExpertEvaluation([1.0, 0.0], 0.4), 1: ExpertEvaluation([0.25, 0.75], 0.2)}),
        )
    ]
    assert mean_of(evaluations[:1], sources[:1]) is evaluations[0]
    assert mean_of(evaluations, sources) == Evaluation(
        loss_top_k=3.0,
        loss_causal=1.5,
        bits_per_byte=1.5 / math.log(2) / 3.5,
        causal_routers={"threshold": CausalEvaluation(1.5, 0.375, {1: 0.1875})},
        experts={"causal": {0: ExpertEvaluation([0.625, 0.375], 0.1), 1: ExpertEvaluation([0.25, 0.75], 0.2)}},
        tokens=20,
    )


def test_first_tokens_that_enter_anyway_are_no_disagreement() -> None:
    model = routed_model(routed_layers=[1], capacity=0.25, first_token_enters=True, causal_router="auxiliary_loss")
    sequences = some_sequences()
    ids = torch.tensor(sequences["input_ids"])
    positions = document_positions(ids, 0)
    routing = model.eval()(ids, position_ids=positions, routing="top_k", output_routing=True).routing[1]
    agrees = ((routing.causal_logits > 0) | (positions == 0)) == routing.entered
    assert (routing.causal_logits[positions == 0] <= 0).any()
    found = evaluate(model, sequences, 0, 1.0).causal_routers["auxiliary_loss"]
    assert found.accuracy == pytest.approx(agrees.double().mean().item())


def test_evaluation_counts_what_enters_and_agrees_with_the_model(corpus: Corpus) -> None:
    model = MoDForCausalLM(config_for(corpus, capacity=(0.25,), num_hidden_layers=4)).train()
    found = evaluate(model, corpus.validation, corpus.end_of_text, 2.0, max_sequences=5, batch_size=2)
    assert model.training
    assert found.tokens == 5 * 15
    assert list(found.causal_routers) == ["predictor", "threshold"]
    for causal in found.causal_routers.values():
        assert causal.share_entering.keys() == {1, 3}
        assert 0 <= causal.accuracy <= 1
    assert found.causal_routers["predictor"].loss == found.loss_causal
    # The same by hand.
    ids = torch.tensor(
        corpus.validation[np.linspace(0, len(corpus.validation) - 1, 5).round().astype(int)]["input_ids"]
    )
    positions = document_positions(ids, corpus.end_of_text)
    model.eval()
    top_k = model(ids, position_ids=positions, routing="top_k", output_routing=True).routing
    causal = model(ids, position_ids=positions, routing="causal", output_routing=True).routing
    agreed = [((top_k[i].causal_logits > 0) == top_k[i].entered).float().mean().item() for i in (1, 3)]
    assert found.causal_routers["predictor"].accuracy == pytest.approx(sum(agreed) / 2)
    for i in (1, 3):
        share = causal[i].entered.float().mean().item()
        assert found.causal_routers["predictor"].share_entering[i] == pytest.approx(share)
    assert found.bits_per_byte == pytest.approx(found.loss_causal / math.log(2) / 2)
    dense = MoDForCausalLM(config_for(corpus, routed=False))
    without = evaluate(dense, corpus.validation, corpus.end_of_text, 2.0, max_sequences=5)
    assert without.loss_causal == without.loss_top_k
    assert without.causal_routers == {}


def test_evaluation_computes_4096_tokens_at_a_time_at_most(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MoDForCausalLM(config_for(corpus))
    sizes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, __, given: sizes.append(given["input_ids"].shape), with_kwargs=True)
    for length, batch_size in ((15, 16), (1000, 4), (5000, 1)):
        monkeypatch.setattr(model.config, "max_position_embeddings", length)
        sequences = datasets.Dataset.from_dict({"input_ids": [list(range(1, 6)) * (length // 5)] * (batch_size + 1)})
        sizes.clear()
        evaluate(model, sequences, 0, 1.0, all_causal_routers=False)
        assert max(sizes) == (batch_size, length)
        assert sum(rows for rows, _ in sizes) == 2 * (batch_size + 1)


def test_evaluation_holds_one_batch_of_the_text_whatever_its_length() -> None:
    model = routed_model(num_experts=4, expert_capacity=0.5)
    held: list[list[weakref.ref[Any]]] = []
    most = 0

    def count(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        nonlocal most
        layers = [*output.routing, *output.expert_routing]
        results = [layer[0] for layer in layers if layer is not None]
        held.append([weakref.ref(tensor) for tensor in (*given.values(), *results) if isinstance(tensor, torch.Tensor)])
        most = max(most, sum(any(ref() is not None for ref in batch) for batch in held))

    model.register_forward_hook(count, with_kwargs=True)
    evaluate(model, some_sequences(40), 0, 1.0, batch_size=2)
    # Under both routings of both of its causal routers.
    assert len(held) == 20 * 4
    # What the loop's variables hold of the batch before is let go while the next is computed.
    assert most <= 2
