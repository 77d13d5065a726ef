"""Tokens are drawn as their probabilities and the settings say."""

import math
from typing import Any

import pytest
import torch
from models import tiny

from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.draw import draw
from mixture_of_depths.sampling.stream import stream


def test_sampled_tokens_follow_the_settings_of_generate() -> None:
    model = tiny(routed_layers=[1]).float().eval()
    input_ids = torch.randint(0, 31, (1, 6))
    allowed = model(input_ids, use_cache=False, routing="causal").logits[0, -1].topk(3).indices.tolist()
    options = {"max_new_tokens": 1, "temperature": 3.0, "top_k": 3}
    drawn = {int(next(stream(model, input_ids, options=SamplingOptions(**options, seed=seed)))) for seed in range(60)}
    assert drawn == set(allowed)
    penalty = SamplingOptions(max_new_tokens=30, temperature=0, repetition_penalty=1.7)
    tokens = torch.stack(list(stream(model, input_ids, options=penalty)), dim=1)
    settings: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(input_ids, repetition_penalty=1.7, **settings)
    assert torch.equal(tokens, expected[:, 6:])


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, -1.0, -math.inf]])
    logits = torch.cat([logits, logits.flip(1)])
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    drawn = torch.stack([draw(logits, generators) for _ in range(4000)], dim=1)
    for row, expected in zip(drawn, logits.softmax(dim=1), strict=True):
        shares = row.bincount(minlength=6) / len(row)
        assert shares[expected == 0].sum() == 0
        # Five standard deviations of a share of a half.
        assert (shares - expected).abs().max() < 5 * 0.5 / math.sqrt(len(row))


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_outermost_random_numbers_draw_tokens_that_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    monkeypatch.setattr(torch, "rand", lambda *_, **options: torch.full((1,), number, dtype=options["dtype"]))
    # In float64 the probabilities of these sum to a little less than 1.
    logits = torch.tensor([[-math.inf, 0.0, 2.0, 1.0, -math.inf]])
    assert draw(logits, [torch.Generator()]).item() == (3 if number == 0 else 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_no_reason_to_draw(temperature: float) -> None:
    model = tiny(routed_layers=[1]).float().eval()
    model.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="logits of the next token are not finite"):
        next(stream(model, torch.ones(1, 3, dtype=torch.long), options=SamplingOptions(temperature=temperature)))
