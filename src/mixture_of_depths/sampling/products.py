"""The products of the decode step on a GPU, in Triton; `kernels.py` holds the other kernels, and how to read them.

A program makes BLOCK_O outputs of ROWS rows at a time: of 1, where a batch has no more, by multiplying and summing, and
otherwise by products of matrices, with factors of type FACTOR and sums in float32.

Shapes: B batch, R rows taken at a time, D hidden size, F width of the MLP, I inputs, O outputs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false
# pyright: reportPossiblyUnboundVariable=false
import triton
import triton.language as tl

from mixture_of_depths.sampling.kernels import rounded


@triton.jit
def product(
    input_BI,
    norm_I,
    eps,
    weight_OI,
    row_R,
    is_row_R,
    output_O,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Rows times the transposed weight in float32, [R, O]; with `eps` they are normed first, by `norm_I` or without."""
    input_R1 = input_BI + row_R[:, None].to(tl.int64) * INPUTS
    is_output_O = output_O < OUTPUTS
    if eps is not None:
        square_RI = tl.full([ROWS, BLOCK_I], 0, tl.float32)
        for first in range(0, INPUTS, BLOCK_I):
            input_I = first + tl.arange(0, BLOCK_I)
            is_there_RI = is_row_R[:, None] & (input_I < INPUTS)[None, :]
            x_RI = tl.load(input_R1 + input_I[None, :], mask=is_there_RI, other=0.0).to(tl.float32)
            square_RI += x_RI * x_RI
        inverse_R1 = tl.rsqrt(tl.sum(square_RI, axis=1) / INPUTS + eps)[:, None]
    total = tl.full([BLOCK_O, BLOCK_I], 0, tl.float32) if ROWS == 1 else tl.full([ROWS, BLOCK_O], 0, tl.float32)
    for first in range(0, INPUTS, BLOCK_I):
        input_I = first + tl.arange(0, BLOCK_I)
        is_input_I = input_I < INPUTS
        is_there_RI = is_row_R[:, None] & is_input_I[None, :]
        x_RI = tl.load(input_R1 + input_I[None, :], mask=is_there_RI, other=0.0).to(tl.float32)
        if eps is not None:
            x_RI = x_RI * inverse_R1
            if norm_I is not None:
                x_RI = x_RI * tl.load(norm_I + input_I, mask=is_input_I, other=0.0).to(tl.float32)[None, :]
            x_RI = rounded(x_RI, DTYPE)
        if ROWS == 1:
            place_OI = output_O[:, None].to(tl.int64) * INPUTS + input_I[None, :]
            is_there_OI = is_output_O[:, None] & is_input_I[None, :]
            total += tl.load(weight_OI + place_OI, mask=is_there_OI, other=0.0).to(tl.float32) * x_RI
        else:
            place_IO = output_O[None, :].to(tl.int64) * INPUTS + input_I[:, None]
            is_there_IO = is_output_O[None, :] & is_input_I[:, None]
            weight_IO = tl.load(weight_OI + place_IO, mask=is_there_IO, other=0.0).to(FACTOR)
            total = tl.dot(x_RI.to(FACTOR), weight_IO, total, input_precision="ieee")
    if ROWS == 1:
        total = tl.sum(total, axis=1)[None, :]
    return total


@triton.jit
def linear(
    input_BI,
    norm_I,
    eps,
    weight_OI,
    bias_O,
    output_BO,
    row_B,
    count_1,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A linear map of what may be normed, rounded and written to rows of COLUMNS, behind a SiLU or as it is."""
    output_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output_O = output_O < OUTPUTS
    count = tl.load(count_1)
    first_row = 0
    while first_row < count:
        place_R = first_row + tl.arange(0, ROWS)
        is_row_R = place_R < count
        row_R = tl.load(row_B + place_R, mask=is_row_R, other=0)
        total_RO = product(
            input_BI,
            norm_I,
            eps,
            weight_OI,
            row_R,
            is_row_R,
            output_O,
            INPUTS,
            OUTPUTS,
            ROWS,
            BLOCK_O,
            BLOCK_I,
            DTYPE,
            FACTOR,
        )
        if bias_O is not None:
            total_RO += tl.load(bias_O + output_O, mask=is_output_O, other=0.0).to(tl.float32)[None, :]
        total_RO = rounded(total_RO, DTYPE)
        if SILU:
            total_RO = total_RO / (1.0 + tl.exp(-total_RO))
        place_RO = row_R[:, None].to(tl.int64) * COLUMNS + output_O[None, :]
        tl.store(output_BO + place_RO, total_RO, mask=is_row_R[:, None] & is_output_O[None, :])
        first_row += ROWS


@triton.jit
def linear_kernel(
    input_BI,
    norm_I,
    eps,
    first_OI,
    first_O,
    second_OI,
    second_O,
    third_OI,
    third_O,
    output_BO,
    row_B,
    count_1,
    INPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    OTHERS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Up to three linear maps of the same input, whose outputs lie side by side: FIRST of one, OTHERS of each other.

    Programs: blocks of outputs, and the maps.
    """
    which = tl.program_id(1)
    if which == 0:
        linear(
            input_BI,
            norm_I,
            eps,
            first_OI,
            first_O,
            output_BO,
            row_B,
            count_1,
            INPUTS,
            FIRST,
            COLUMNS,
            SILU,
            ROWS,
            BLOCK_O,
            BLOCK_I,
            DTYPE,
            FACTOR,
        )
    # What is None is known when this is compiled, and must not be looked at together with what is not.
    if second_OI is not None:  # noqa: SIM102
        if (which == 1) & (tl.program_id(0) * BLOCK_O < OTHERS):
            linear(
                input_BI,
                norm_I,
                eps,
                second_OI,
                second_O,
                output_BO + FIRST,
                row_B,
                count_1,
                INPUTS,
                OTHERS,
                COLUMNS,
                SILU,
                ROWS,
                BLOCK_O,
                BLOCK_I,
                DTYPE,
                FACTOR,
            )
    if third_OI is not None:  # noqa: SIM102
        if (which == 2) & (tl.program_id(0) * BLOCK_O < OTHERS):
            linear(
                input_BI,
                norm_I,
                eps,
                third_OI,
                third_O,
                output_BO + FIRST + OTHERS,
                row_B,
                count_1,
                INPUTS,
                OTHERS,
                COLUMNS,
                SILU,
                ROWS,
                BLOCK_O,
                BLOCK_I,
                DTYPE,
                FACTOR,
            )


@triton.jit
def gate_kernel(
    input_BD,
    norm_D,
    eps,
    gate_FD,
    up_FD,
    output_BF,
    row_B,
    count_1,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The inside of a SwiGLU, SiLU of the gate times the other half, of what is normed first.

    Programs: blocks of outputs.
    """
    output_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    count = tl.load(count_1)
    first_row = 0
    while first_row < count:
        place_R = first_row + tl.arange(0, ROWS)
        is_row_R = place_R < count
        row_R = tl.load(row_B + place_R, mask=is_row_R, other=0)
        gate_RO = product(
            input_BD,
            norm_D,
            eps,
            gate_FD,
            row_R,
            is_row_R,
            output_O,
            INPUTS,
            OUTPUTS,
            ROWS,
            BLOCK_O,
            BLOCK_I,
            DTYPE,
            FACTOR,
        )
        up_RO = product(
            input_BD,
            norm_D,
            eps,
            up_FD,
            row_R,
            is_row_R,
            output_O,
            INPUTS,
            OUTPUTS,
            ROWS,
            BLOCK_O,
            BLOCK_I,
            DTYPE,
            FACTOR,
        )
        gate_RO = rounded(gate_RO, DTYPE)
        gate_RO = rounded(gate_RO / (1.0 + tl.exp(-gate_RO)), DTYPE)
        gated_RO = rounded(gate_RO * rounded(up_RO, DTYPE), DTYPE)
        place_RO = row_R[:, None].to(tl.int64) * OUTPUTS + output_O[None, :]
        tl.store(output_BF + place_RO, gated_RO, mask=is_row_R[:, None] & (output_O < OUTPUTS)[None, :])
        first_row += ROWS


@triton.jit
def add_kernel(
    input_BI,
    weight_DI,
    bias_D,
    plus_BD,
    factor_B,
    hidden_BD,
    sum_BD,
    delta_BD,
    row_B,
    count_1,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    DTYPE: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A linear map, plus `plus_BD`, times the row's factor, added to the hidden state; `sum_BD` may be that itself.

    Programs: blocks of outputs. `delta_BD` gets what was added.
    """
    output_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output_O = output_O < OUTPUTS
    count = tl.load(count_1)
    first_row = 0
    while first_row < count:
        place_R = first_row + tl.arange(0, ROWS)
        is_row_R = place_R < count
        row_R = tl.load(row_B + place_R, mask=is_row_R, other=0)
        delta_RO = product(
            input_BI,
            None,
            None,
            weight_DI,
            row_R,
            is_row_R,
            output_O,
            INPUTS,
            OUTPUTS,
            ROWS,
            BLOCK_O,
            BLOCK_I,
            DTYPE,
            FACTOR,
        )
        if bias_D is not None:
            delta_RO += tl.load(bias_D + output_O, mask=is_output_O, other=0.0).to(tl.float32)[None, :]
        delta_RO = rounded(delta_RO, DTYPE)
        place_RO = row_R[:, None].to(tl.int64) * OUTPUTS + output_O[None, :]
        is_there_RO = is_row_R[:, None] & is_output_O[None, :]
        if plus_BD is not None:
            plus_RO = tl.load(plus_BD + place_RO, mask=is_there_RO, other=0.0).to(tl.float32)
            delta_RO = rounded(plus_RO + delta_RO, DTYPE)
        if factor_B is not None:
            factor_R = tl.load(factor_B + row_R, mask=is_row_R, other=0.0)
            delta_RO = rounded(factor_R[:, None] * delta_RO, DTYPE)
        if delta_BD is not None:
            tl.store(delta_BD + place_RO, delta_RO, mask=is_there_RO)
        hidden_RO = tl.load(hidden_BD + place_RO, mask=is_there_RO, other=0.0).to(tl.float32)
        tl.store(sum_BD + place_RO, rounded(hidden_RO + delta_RO, DTYPE), mask=is_there_RO)
        first_row += ROWS
