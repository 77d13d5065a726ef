"""The fast decode step samples the tokens of `generate()`."""

from typing import Any

import pytest
import torch
from test_cache import left_padded
from test_modeling import tiny

from mixture_of_depths.generation import GROWTH, grow, prefill, stream
from mixture_of_depths.options import SamplingOptions


def greedy(model: Any, input_ids: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    settings: dict[str, Any] = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids, attention_mask=mask, **settings)[:, input_ids.shape[1] :]


@pytest.mark.parametrize("causal_router", ["predictor", "threshold", "auxiliary_loss"])
@pytest.mark.parametrize("routed", [[0, 2], [0, 1, 2], []])
@pytest.mark.parametrize("batch", [1, 4])
def test_streamed_tokens_equal_those_of_generate(causal_router: str, routed: list[int], batch: int) -> None:
    model = tiny(routed_layers=routed, causal_router=causal_router).float().eval()
    for length in (1, 9):
        input_ids, mask = left_padded(batch, length)
        tokens = torch.stack(
            list(stream(model, input_ids, mask, SamplingOptions(max_new_tokens=90, temperature=0))), dim=1
        )
        assert torch.equal(tokens, greedy(model, input_ids, mask, 90))


@pytest.mark.parametrize("batch", [1, 3])
def test_the_compiled_step_gives_the_same_tokens_and_compiles_once(batch: int) -> None:
    torch._dynamo.reset()
    model = tiny(routed_layers=[1], query_key_norm=True, attention_bias=True, num_hidden_layers=2).float().eval()
    model.model.layers[1].router.predictor.down_proj.bias.data.fill_(1.0)
    input_ids, mask = left_padded(batch, 9)
    torch._dynamo.utils.counters.clear()
    tokens = torch.stack(
        list(stream(model, input_ids, mask, SamplingOptions(max_new_tokens=90, temperature=0), compiled=True)), dim=1
    )
    assert torch.equal(tokens, greedy(model, input_ids, mask, 90))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_routed_block_has_room_for_what_entered_and_grows() -> None:
    model = tiny(routed_layers=[0]).float().eval()
    input_ids = torch.randint(0, 31, (1, 40))
    model.model.layers[0].router.predictor.down_proj.bias.data.fill_(-1e6)
    _, state = prefill(model, input_ids, torch.ones_like(input_ids), room=200)
    assert [layer.keys.shape[2] for layer in state.layers] == [GROWTH, 4 * GROWTH, 4 * GROWTH]
    state.layers[0].length_B.fill_(GROWTH)
    grow(state)
    assert state.layers[0].keys.shape[2] == 2 * GROWTH
