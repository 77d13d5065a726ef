"""What `mod bench` measures."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import tiny

from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling import bench


def test_converted_copies_leave_the_model_as_it_is() -> None:
    model = tiny(routed_layers=[1], eos_token_id=3).float()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)):
        converted = bench.in_precision(model, precision)
        assert converted.model.embed_tokens.weight.dtype == dtype
        assert converted.generation_config.eos_token_id is None
        started = time.perf_counter()
        seconds = bench.decode_seconds(
            converted, torch.randint(0, 31, (2, 5)), SamplingOptions(max_new_tokens=6, temperature=0), compiled=False
        )
        # The mean of the last three of five steps.
        assert 0 < 3 * seconds < time.perf_counter() - started
    assert model.generation_config.eos_token_id == 3
    assert model.dtype == torch.float32


def test_the_bytes_of_the_cache_are_those_of_what_entered() -> None:
    model = tiny(routed_layers=[1], causal_router="threshold").float().eval()
    input_ids = torch.randint(0, 31, (3, 64))
    entered = model(input_ids, use_cache=False, routing="causal", output_routing=True).routing[1].entered.sum()
    per_token = 2 * 2 * 4 * 4
    assert bench.cache_of(model, input_ids) == per_token * (2 * input_ids.numel() + int(entered))


def test_stream_is_compared_with_generate_by_their_tokens_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def slow_stream(model: Any, input_ids: torch.Tensor, options: SamplingOptions) -> Iterator[torch.Tensor]:
        turns.append("stream")
        for _ in range(options.max_new_tokens):
            time.sleep(0.02)
            yield input_ids[:, 0]

    def generated(model: Any, input_ids: torch.Tensor, max_new_tokens: int) -> float:
        turns.append("generate")
        return 20.0

    monkeypatch.setattr(bench, "stream", slow_stream)
    monkeypatch.setattr(bench, "generate_tokens_per_second", generated)
    ratio = bench.stream_over_generate(tiny(), torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=4, repeats=2)
    # 50 tokens a second at most, over 20.
    assert 0.5 < ratio <= 2.5
    assert turns == ["stream", "generate"] * 3
