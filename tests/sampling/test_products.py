"""Each kernel that multiplies does what the eager step does, for the rows that are listed alone."""

from typing import Any

import pytest
import torch
from gpus import interpreted
from torch import Tensor, nn

from mixture_of_depths.sampling.step import matvec, normalised, rounded

pytestmark = interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batches, and the rows of them that are listed: more than are taken at a time, too.
BATCHES = {1: [0], 3: [2, 0], 70: [*range(69, 0, -1)]}
# More than are taken at a time.
INPUTS = 70


def products() -> Any:
    from mixture_of_depths.sampling import products

    return products


def sizes(batch: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    import triton.language as tl

    from mixture_of_depths.sampling.graph import PRECISIONS, product_sizes

    precisions = {"DTYPE": PRECISIONS[dtype], "FACTOR": tl.float32}
    return {**product_sizes(batch, INPUTS, outputs), "BLOCK_I": 32, **precisions}


def rows(listed: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(listed, dtype=torch.int32), torch.tensor([len(listed)], dtype=torch.int32)


def norm_of(dtype: torch.dtype) -> nn.RMSNorm:
    norm = nn.RMSNorm(INPUTS, eps=1e-5).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def check(made_BO: Tensor, wanted_BO: Tensor, before_BO: Tensor, listed: list[int]) -> None:
    """Listed rows are as wanted, but for the order of sums, and others as they were."""
    others = [row for row in range(made_BO.shape[0]) if row not in listed]
    assert torch.equal(made_BO[others], before_BO[others])
    if made_BO.dtype != torch.float32:
        # Sums in another order may fall on the other side of where they are rounded.
        assert (made_BO[listed] == wanted_BO[listed].to(made_BO.dtype)).float().mean() > 0.95
        torch.testing.assert_close(made_BO[listed].float(), wanted_BO[listed], atol=0.05, rtol=0.02)
    else:
        torch.testing.assert_close(made_BO[listed], wanted_BO[listed], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_three_maps_of_a_normed_input_lie_side_by_side(dtype: torch.dtype, batch: int) -> None:
    listed, norm = BATCHES[batch], norm_of(dtype)
    input_BI, before_BO = torch.randn(batch, INPUTS).to(dtype), torch.randn(batch, 49).to(dtype)
    maps = [nn.Linear(INPUTS, outputs).to(dtype) for outputs in (25, 12, 12)]
    output_BO = before_BO.clone()
    blocks = sizes(batch, 25, dtype)
    products().linear_kernel[(-(-25 // blocks["BLOCK_O"]), 3)](
        input_BI,
        norm.weight,
        norm.eps,
        *(tensor for each in maps for tensor in (each.weight, each.bias)),
        output_BO,
        *rows(listed),
        INPUTS=INPUTS,
        FIRST=25,
        OTHERS=12,
        COLUMNS=49,
        SILU=False,
        **blocks,
    )
    normed_BI = normalised(norm, input_BI.float())
    wanted_BO = torch.cat(
        [rounded(normed_BI @ each.weight.float().T + each.bias.float(), dtype) for each in maps], dim=1
    )
    check(output_BO, wanted_BO, before_BO, listed)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_predictor_s_first_map_is_of_what_is_normed_without_weights_and_goes_through_a_silu(batch: int) -> None:
    input_BI, up, output_BO = torch.randn(batch, INPUTS).bfloat16(), nn.Linear(INPUTS, 20), torch.zeros(batch, 20)
    blocks = sizes(batch, 20, torch.float32)
    products().linear_kernel[(-(-20 // blocks["BLOCK_O"]), 1)](
        input_BI,
        None,
        1e-6,
        up.weight,
        up.bias,
        None,
        None,
        None,
        None,
        output_BO,
        *rows([*range(batch)]),
        INPUTS=INPUTS,
        FIRST=20,
        OTHERS=20,
        COLUMNS=20,
        SILU=True,
        **blocks,
    )
    wanted_BO = nn.functional.silu(up(nn.functional.rms_norm(input_BI.float(), (INPUTS,), eps=1e-6)))
    torch.testing.assert_close(output_BO, wanted_BO, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_inside_of_an_mlp_is_the_silu_of_its_gate_times_the_other_half(dtype: torch.dtype, batch: int) -> None:
    listed, norm = BATCHES[batch], norm_of(dtype)
    input_BD, before_BF = torch.randn(batch, INPUTS).to(dtype), torch.randn(batch, 37).to(dtype)
    gate, up = (nn.Linear(INPUTS, 37, bias=False).to(dtype) for _ in range(2))
    output_BF, blocks = before_BF.clone(), sizes(batch, 37, dtype)
    products().gate_kernel[(-(-37 // blocks["BLOCK_O"]),)](
        input_BD,
        norm.weight,
        norm.eps,
        gate.weight,
        up.weight,
        output_BF,
        *rows(listed),
        INPUTS=INPUTS,
        OUTPUTS=37,
        **blocks,
    )
    normed_BD = normalised(norm, input_BD.float())
    gate_BF = rounded(nn.functional.silu(matvec(gate, normed_BD, dtype)), dtype)
    check(output_BF, rounded(gate_BF * matvec(up, normed_BD, dtype), dtype), before_BF, listed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_map_is_added_to_the_hidden_state_with_what_comes_beside_it(
    dtype: torch.dtype, batch: int, is_whole: bool
) -> None:
    listed, of_map = BATCHES[batch], nn.Linear(INPUTS, 24, bias=is_whole).to(dtype)
    input_BI, hidden_BD, plus_BD = (torch.randn(batch, width).to(dtype) for width in (INPUTS, 24, 24))
    factor_B, before_BD = torch.rand(batch), hidden_BD.clone()
    sum_BD, delta_BD = (torch.zeros(batch, 24).to(dtype) for _ in range(2))
    blocks = sizes(batch, 24, dtype)
    products().add_kernel[(-(-24 // blocks["BLOCK_O"]),)](
        input_BI,
        of_map.weight,
        of_map.bias,
        *((plus_BD, factor_B, hidden_BD, sum_BD, delta_BD) if is_whole else (None, None, hidden_BD, hidden_BD, None)),
        *rows(listed),
        INPUTS=INPUTS,
        OUTPUTS=24,
        **blocks,
    )
    wanted_BD = input_BI.float() @ of_map.weight.float().T
    wanted_BD = rounded(wanted_BD if of_map.bias is None else wanted_BD + of_map.bias.float(), dtype)
    if is_whole:
        wanted_BD = rounded(factor_B[:, None] * rounded(plus_BD.float() + wanted_BD, dtype), dtype)
        check(delta_BD, wanted_BD, torch.zeros(batch, 24).to(dtype), listed)
        assert torch.equal(hidden_BD, before_BD)
    total_BD = rounded(before_BD.float() + wanted_BD, dtype)
    check(
        sum_BD if is_whole else hidden_BD, total_BD, torch.zeros(batch, 24).to(dtype) if is_whole else before_BD, listed
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_without_rows_nothing_is_read_or_written(batch: int) -> None:
    hidden_BD, nothing_DD = torch.randn(batch, INPUTS), torch.full((INPUTS, INPUTS), torch.nan)
    before_BD, blocks = hidden_BD.clone(), sizes(batch, INPUTS, torch.float32)
    grid = (-(-INPUTS // blocks["BLOCK_O"]),)
    products().add_kernel[grid](
        hidden_BD,
        nothing_DD,
        *(None, None, None),
        hidden_BD,
        hidden_BD,
        None,
        *rows([]),
        INPUTS=INPUTS,
        OUTPUTS=INPUTS,
        **blocks,
    )
    assert torch.equal(hidden_BD, before_BD)
