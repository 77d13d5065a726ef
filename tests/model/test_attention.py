"""Attention of heads that share keys, and the norms of queries and keys."""

from typing import Any

import pytest
import torch
from models import tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mixture_of_depths.model.attention import attend


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("queries_come_first", [False, True])
def test_heads_that_share_keys_attend_as_with_keys_of_their_own(
    num_queries: int, is_masked: bool, queries_come_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = F.scaled_dot_product_attention

    def laid_out(*arguments: Any, **options: Any) -> torch.Tensor:
        """As the CPU does it, or as a kernel of CUDA, which has a query's heads side by side in memory."""
        attended = library(*arguments, **options)
        return attended.transpose(1, 2).contiguous().transpose(1, 2) if queries_come_first else attended

    monkeypatch.setattr(F, "scaled_dot_product_attention", laid_out)
    query = torch.randn(2, num_queries, 6, 8, dtype=torch.float64).transpose(1, 2)
    key, value = (torch.randn(2, 2, 5, 8, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 1, num_queries, 5) < 0.7 if is_masked else None
    if mask is not None:
        mask[..., 0] = True
    is_causal = mask is None and num_queries > 1
    own_key, own_value = (states.repeat_interleave(3, dim=1) for states in (key, value))
    expected = F.scaled_dot_product_attention(query, own_key, own_value, attn_mask=mask, is_causal=is_causal)
    assert (attend(query, key, value, mask, is_causal) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_on_cuda_the_kernel_is_given_shared_keys_in_half_precision_without_a_mask_alone(
    dtype: torch.dtype, is_masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, bool]] = []

    def recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        assert key.shape == value.shape
        given.append((key.shape[1], options["enable_gqa"]))
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    # Tensors of a GPU that is not there, without values.
    with FakeTensorMode():
        query = torch.empty(2, 6, 5, 8, dtype=dtype, device="cuda")
        key, value = (torch.empty(2, 2, 5, 8, dtype=dtype, device="cuda") for _ in range(2))
        mask = torch.empty(2, 1, 5, 5, dtype=torch.bool, device="cuda") if is_masked else None
        attend(query, key, value, mask, is_causal=not is_masked)
    assert given == [(2, True) if dtype == torch.bfloat16 and not is_masked else (6, False)]


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_before_training_a_normalised_query_scores_16_with_a_key_of_its_own_direction(heads: int) -> None:
    attention = (
        tiny(query_key_norm=True, num_attention_heads=heads, num_key_value_heads=heads).model.layers[0].self_attn
    )
    state = torch.randn(attention.head_dim, dtype=torch.float64)
    score = attention.q_norm(state) @ attention.k_norm(3 * state) / attention.head_dim**0.5
    assert score.item() == pytest.approx(16, rel=1e-4)
