"""Kernels for chosen tokens give what vLLM's layers give, and numbers of rows are few."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from mixture_of_depths.serving.vllm.untraced import Activation, normed, num_rows, turn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 68])
def test_norm_and_activation_are_those_of_vllm_s_layers(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Every other row, as where states are a part of a product.
    states = torch.randn(5, 2, 2 * width)[:, 1].to(dtype)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    with set_current_vllm_config(VllmConfig()):
        norm = RMSNorm(width, eps=1e-5, dtype=dtype)
        norm.weight.data.normal_()
        torch.testing.assert_close(normed(states[:, :width], norm), norm.forward_native(states[:, :width]), **tolerance)
        torch.testing.assert_close(Activation()(states.contiguous()), SiluAndMul.forward_native(states), **tolerance)


@pytest.mark.parametrize("with_key", [False, True])
def test_queries_and_keys_are_turned_like_vllm_s_in_place(with_key: bool) -> None:
    torch.manual_seed(0)
    positions = torch.tensor([3, 0, 511, 70])
    query, key = torch.randn(4, 6 * 32).split([4 * 32, 2 * 32], dim=-1)
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(32, max_position=512, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    expected_query, expected_key = rotary.forward_native(positions, query.clone(), key.clone())
    if not with_key:
        query = query.contiguous()
    turn(rotary, positions, query, key if with_key else None)
    torch.testing.assert_close(query, expected_query)
    if with_key:
        torch.testing.assert_close(key, expected_key)


@given(st.integers(1, 100_000))
def test_at_most_one_row_in_eight_is_for_nothing(count: int) -> None:
    assert count <= num_rows(count) <= count * 8 / 7


def test_there_are_few_numbers_of_rows() -> None:
    assert len({num_rows(count) for count in range(1, 8193)}) < 100
    assert [num_rows(count) for count in range(1, 17)] == list(range(1, 17))
