"""What `mod bench` measures."""

import time

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
