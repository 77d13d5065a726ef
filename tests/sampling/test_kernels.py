"""Each kernel that routes or attends does what a few lines of PyTorch do."""

from typing import Any

import pytest
import torch
from gpus import interpreted
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.model.attention import rotary_factors
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.sampling.step import attend, normalised, rotated

pytestmark = interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels() -> Any:
    from mixture_of_depths.sampling import kernels

    return kernels


def in_triton(dtype: torch.dtype) -> Any:
    from mixture_of_depths.sampling.graph import PRECISIONS

    return PRECISIONS[dtype]


def rows(*listed: int) -> tuple[Tensor, Tensor]:
    """A list of rows, behind which there are others that must not be looked at, and its count."""
    return torch.tensor([*listed, 99, 99], dtype=torch.int32), torch.tensor([len(listed)], dtype=torch.int32)


@pytest.mark.parametrize("eps", [None, 1e-6])
def test_the_router_s_output_is_its_weights_times_the_hidden_state(eps: float | None) -> None:
    hidden_BD, weight_D, logit_B = torch.randn(3, 24).bfloat16(), torch.randn(1, 24), torch.zeros(3)
    kernels().router_kernel[(3,)](hidden_BD, weight_D, eps, logit_B, WIDTH=24, BLOCK_D=32)
    x_BD = hidden_BD.float() if eps is None else F.rms_norm(hidden_BD.float(), (24,), eps=eps)
    torch.testing.assert_close(logit_B, F.linear(x_BD, weight_D)[:, 0])


@pytest.mark.parametrize("decider", ["causal logits", "threshold", "predictor", "router"])
@pytest.mark.parametrize(("activation", "batch"), [("none", 5), ("sigmoid", 1), ("tanh", 20), ("straight_through", 3)])
def test_rows_are_listed_by_what_decides_and_have_the_factor_of_their_activation(
    decider: str, activation: str, batch: int
) -> None:
    router_B, active_B = 3 * torch.randn(batch), (torch.rand(batch) < 0.8).int()
    causal_B, threshold_1, predicted_BP = torch.randn(batch), torch.tensor([0.3]), torch.randn(batch, 70)
    down_P, bias_1, scale_1 = torch.randn(1, 70), torch.randn(1), torch.randn(1)
    entered_B, entering_B, skipping_B = (torch.full((batch,), -1, dtype=torch.int32) for _ in range(3))
    entering_1, skipping_1 = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    factor_B = torch.zeros(batch)
    absent = (None, None, None, None)
    deciders, wanted_B = {
        "causal logits": ((causal_B, None, *absent), causal_B),
        "threshold": ((None, threshold_1, *absent), router_B - threshold_1),
        "predictor": (
            (None, None, predicted_BP, down_P, bias_1, scale_1),
            F.linear(predicted_BP, down_P, bias_1)[:, 0] + scale_1 * router_B,
        ),
        "router": ((None, None, *absent), router_B),
    }[decider]
    kernels().decide_kernel[(1,)](
        router_B,
        *deciders,
        active_B,
        entered_B,
        factor_B,
        entering_B,
        entering_1,
        skipping_B,
        skipping_1,
        batch,
        WIDTH=70,
        ACTIVATION=activation,
        BLOCK_B=32,
        BLOCK_P=64,
    )
    is_entering_B = (wanted_B > 0) & active_B.bool()
    assert torch.equal(entered_B.bool(), is_entering_B)
    assert entering_B[: int(entering_1)].tolist() == is_entering_B.nonzero()[:, 0].tolist()
    assert skipping_B[: int(skipping_1)].tolist() == (~is_entering_B).nonzero()[:, 0].tolist()
    gates = {"none": router_B, "sigmoid": router_B.sigmoid(), "tanh": router_B.tanh()}
    torch.testing.assert_close(factor_B, gates.get(activation, torch.ones(batch)))


def test_a_tanh_is_exact_to_the_last_digits_from_0_to_where_it_is_1() -> None:
    router_B = torch.cat([torch.zeros(1), torch.logspace(-6, 1.3, 100), torch.tensor([0.9999, 1.0, 1.0001, 1e30])])
    router_B = torch.cat([router_B, -router_B])
    batch, factor_B = len(router_B), torch.zeros(len(router_B))
    numbers = [torch.zeros(size, dtype=torch.int32) for size in (batch, batch, 1, batch, 1)]
    kernels().decide_kernel[(1,)](
        router_B,
        *[None] * 6,
        torch.ones(batch, dtype=torch.int32),
        numbers[0],
        factor_B,
        *numbers[1:],
        batch,
        WIDTH=1,
        ACTIVATION="tanh",
        BLOCK_B=256,
        BLOCK_P=1,
    )
    torch.testing.assert_close(factor_B, router_B.tanh(), atol=0, rtol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_normed", [False, True])
def test_heads_are_normed_and_turned_and_keys_go_to_the_next_slot(dtype: torch.dtype, is_normed: bool) -> None:
    batch, heads, key_heads, width, slots = 3, 4, 2, 6, 5
    projected_BO = torch.randn(batch, (heads + 2 * key_heads) * width).to(dtype)
    keys, values = (torch.zeros(batch, key_heads, slots, width, dtype=dtype) for _ in range(2))
    config = MoDConfig(hidden_size=heads * width, num_attention_heads=heads)
    cos_Th, sin_Th = (factors[0] for factors in rotary_factors(config, torch.arange(9)[None], torch.float32))
    position_B, length_B = torch.tensor([8, 1, 4]), torch.tensor([0, 4, 2], dtype=torch.int32)
    norms = [nn.RMSNorm(width, eps=1e-6).to(dtype) if is_normed else nn.Identity() for _ in range(2)]
    for norm in norms:
        for weight in norm.parameters():
            nn.init.normal_(weight)
    given = (norms[0].weight, norms[1].weight, 1e-6) if is_normed else (None, None, None)
    before_BO = projected_BO.clone()
    kernels().place_kernel[(batch, heads + key_heads)](
        projected_BO,
        *given,
        cos_Th,
        sin_Th,
        position_B,
        length_B,
        keys,
        values,
        *rows(2, 0),
        0,
        slots,
        QUERY_HEADS=heads,
        KEY_HEADS=key_heads,
        HALF=width // 2,
        BLOCK_HALF=4,
        DTYPE=in_triton(dtype),
    )
    query, key, value = before_BO.float().view(batch, -1, width).split([heads, key_heads, key_heads], dim=1)
    query = rotated(normalised(norms[0], query), cos_Th[position_B], sin_Th[position_B], dtype)
    key = rotated(normalised(norms[1], key), cos_Th[position_B], sin_Th[position_B], dtype)
    query_size = heads * width
    for row in range(batch):
        is_listed = row != 1
        wanted = query[row].flatten().to(dtype) if is_listed else before_BO[row, :query_size]
        # Without a sum of squares there is nothing to differ by.
        exact = {} if is_normed else {"atol": 0, "rtol": 0}
        torch.testing.assert_close(projected_BO[row, :query_size], wanted, **exact)
        for stored, states in ((keys, key), (values, value)):
            wanted = torch.zeros(key_heads, slots, width, dtype=dtype)
            if is_listed:
                wanted[:, length_B[row]] = states[row].to(dtype)
            torch.testing.assert_close(stored[row], wanted, **exact)
    assert torch.equal(projected_BO[:, query_size:], before_BO[:, query_size:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_attention_reads_what_a_row_has_stored_and_no_padding(dtype: torch.dtype, parts: int) -> None:
    batch, heads, key_heads, width, slots = 3, 6, 2, 6, 50
    projected_BO = torch.randn(batch, (heads + 2 * key_heads) * width).to(dtype)
    keys, values = (torch.randn(batch, key_heads, slots, width).to(dtype) for _ in range(2))
    padding_B, length_B = (torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 20, 3], [40, 49, 4]))
    for row in range(batch):
        # What is no number there is not looked at.
        for stored in (keys, values):
            stored[row, :, : padding_B[row]] = torch.nan
            stored[row, :, length_B[row] + 1 :] = torch.nan
    left_over = [torch.full((batch, heads, parts), torch.nan) for _ in range(2)]
    sums, attended_BO = torch.full((batch, heads, parts, width), torch.nan), torch.zeros(batch, heads * width).to(dtype)
    shape = {"WIDTH": width, "PARTS": parts, "BLOCK_h": 8, "DTYPE": in_triton(dtype)}
    kernels().attention_kernel[(batch, heads, parts)](
        projected_BO,
        keys,
        values,
        padding_B,
        length_B,
        *left_over,
        sums,
        *rows(0, 1, 2),
        slots,
        width**-0.5,
        QUERY_HEADS=heads,
        KEY_HEADS=key_heads,
        BLOCK_S=16,
        **shape,
    )
    kernels().combine_kernel[(batch, heads)](*left_over, sums, attended_BO, *rows(0, 1, 2), HEADS=heads, **shape)
    for row in range(batch):
        seen = slice(int(padding_B[row]), int(length_B[row]))
        query = projected_BO[row, : heads * width].float().view(1, key_heads, -1, width)
        own = (stored[row : row + 1, :, length_B[row]].float() for stored in (keys, values))
        past = (stored[row : row + 1, :, seen].contiguous() for stored in (keys, values))
        used = torch.ones(1, seen.stop - seen.start, dtype=torch.bool)
        wanted = attend(query, *own, (*past, used), torch.zeros(1, dtype=torch.int64))
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
        torch.testing.assert_close(attended_BO[row].float(), wanted[0], **tolerance)
