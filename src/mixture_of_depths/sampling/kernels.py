"""The kernels of the decode step on a GPU, in Triton: each asks how many rows take part, and ends at once for none.

A parameter that is named like a tensor is the address of a contiguous one, and None where there is none; names in
capitals are constants, for each of which a kernel is compiled. The first `count_1` of `row_B` are the rows of the batch
that take part. `products.py` holds the kernels that multiply, and `graph.py` launches all of them.

A kernel reads what kernels before it wrote, and its programs nothing that another of them writes. What is computed in
float32 is rounded to DTYPE, the model's, where `step.py` does so; tests hold each kernel against what is written there.

Shapes: B batch, D hidden size, P width of the predictor, O what is projected for attention, N query heads, H key-value
heads, h head width, S slots of a buffer, C parts that a row's slots are read in, T positions.
"""

# Every name is a type of its own inside a kernel, of which a type checker sees constants and addresses.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportMissingImports=false
import triton
import triton.language as tl


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """Values in float32, as exact as DTYPE has them."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        # By its bits, to the nearest and of two to the even one: Triton's interpreter would cut them off.
        bits = values.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = tl.where(values == values, nearest.to(tl.float32, bitcast=True), values)
    else:
        values = values.to(DTYPE).to(tl.float32)
    return values


@triton.jit
def router_kernel(hidden_BD, weight_D, eps, logit_B, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """The router's output before its activation, of hidden states that are normed first where there is `eps`.

    Programs: rows.
    """
    row = tl.program_id(0)
    column_D = tl.arange(0, BLOCK_D)
    is_there_D = column_D < WIDTH
    x_D = tl.load(hidden_BD + row.to(tl.int64) * WIDTH + column_D, mask=is_there_D, other=0.0).to(tl.float32)
    if eps is not None:
        x_D = x_D * tl.rsqrt(tl.sum(x_D * x_D, axis=0) / WIDTH + eps)
    tl.store(logit_B + row, tl.sum(x_D * tl.load(weight_D + column_D, mask=is_there_D, other=0.0), axis=0))


@triton.jit
def decide_kernel(
    logit_B,
    causal_B,
    threshold_1,
    predicted_BP,
    down_P,
    bias_1,
    scale_1,
    active_B,
    entered_B,
    factor_B,
    entering_B,
    entering_1,
    skipping_B,
    skipping_1,
    batch,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Which rows enter, by the causal logits, a threshold, the predictor's MLP, or the router's output itself.

    One program. It writes what is asked of each row, the factor of the block's result, and two lists with their counts:
    the rows that enter, and the others.
    """
    row_B = tl.arange(0, BLOCK_B)
    is_row_B = row_B < batch
    router_B = tl.load(logit_B + row_B, mask=is_row_B, other=0.0)
    decider_B = router_B
    if causal_B is not None:
        decider_B = tl.load(causal_B + row_B, mask=is_row_B, other=0.0)
    if threshold_1 is not None:
        decider_B = router_B - tl.load(threshold_1)
    if predicted_BP is not None:
        decider_B = router_B * tl.load(scale_1) + tl.load(bias_1)
        for first in range(0, WIDTH, BLOCK_P):
            column_P = first + tl.arange(0, BLOCK_P)
            is_there_BP = is_row_B[:, None] & (column_P < WIDTH)[None, :]
            hidden_BP = tl.load(predicted_BP + row_B[:, None] * WIDTH + column_P[None, :], mask=is_there_BP, other=0.0)
            weight_P = tl.load(down_P + column_P, mask=column_P < WIDTH, other=0.0)
            decider_B += tl.sum(hidden_BP * weight_P[None, :], axis=1)
    is_active_B = tl.load(active_B + row_B, mask=is_row_B, other=0) != 0
    is_entering_B = (decider_B > 0) & is_active_B & is_row_B
    is_skipping_B = is_row_B & (is_entering_B == 0)
    number_B = is_entering_B.to(tl.int32)
    tl.store(entered_B + row_B, number_B, mask=is_row_B)
    tl.store(entering_B + tl.cumsum(number_B, axis=0) - 1, row_B, mask=is_entering_B)
    tl.store(entering_1, tl.sum(number_B, axis=0))
    number_B = is_skipping_B.to(tl.int32)
    tl.store(skipping_B + tl.cumsum(number_B, axis=0) - 1, row_B, mask=is_skipping_B)
    tl.store(skipping_1, tl.sum(number_B, axis=0))
    if ACTIVATION == "sigmoid":
        router_B = 1.0 / (1.0 + tl.exp(-router_B))
    if ACTIVATION == "tanh":
        # Of what cannot overflow. Near 0, where the difference would lose its digits, by Lambert's continued fraction,
        # which is off by less than 1e-7 of it up to 1.
        shrunk_B = tl.exp(-2.0 * tl.abs(router_B))
        square_B = tl.minimum(tl.abs(router_B), 1.0)
        square_B = square_B * square_B
        near_B = router_B * (945.0 + square_B * (105.0 + square_B)) / (945.0 + square_B * (420.0 + 15.0 * square_B))
        far_B = tl.where(router_B < 0, -1.0, 1.0) * (1.0 - shrunk_B) / (1.0 + shrunk_B)
        router_B = tl.where(tl.abs(router_B) < 1.0, near_B, far_B)
    if ACTIVATION == "straight_through":
        router_B = tl.full([BLOCK_B], 1, tl.float32)
    tl.store(factor_B + row_B, router_B, mask=is_row_B)


@triton.jit
def place_kernel(
    projected_BO,
    query_norm_h,
    key_norm_h,
    eps,
    cos_Th,
    sin_Th,
    position_B,
    length_B,
    keys_BHSh,
    values_BHSh,
    row_B,
    count_1,
    first_head,
    slots,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Norms and rotates heads: queries stay where they are, and keys go to the row's next slot, with their values.

    Programs: places in the list of rows, and heads from `first_head` on, those of queries before those of keys. HALF is
    half of a head's width.
    """
    place = tl.program_id(0)
    if place < tl.load(count_1):
        row = tl.load(row_B + place)
        head = first_head + tl.program_id(1)
        column = tl.arange(0, BLOCK_HALF)
        is_there = column < HALF
        states = (
            projected_BO + row.to(tl.int64) * ((QUERY_HEADS + 2 * KEY_HEADS) * 2 * HALF) + head * (2 * HALF) + column
        )
        left = tl.load(states, mask=is_there, other=0.0).to(tl.float32)
        right = tl.load(states + HALF, mask=is_there, other=0.0).to(tl.float32)
        if query_norm_h is not None:
            inverse = tl.rsqrt((tl.sum(left * left, axis=0) + tl.sum(right * right, axis=0)) / (2 * HALF) + eps)
            is_query, is_key = is_there & (head < QUERY_HEADS), is_there & (head >= QUERY_HEADS)
            weight = tl.load(query_norm_h + column, mask=is_query, other=0.0).to(tl.float32)
            weight += tl.load(key_norm_h + column, mask=is_key, other=0.0).to(tl.float32)
            left = rounded(left * inverse * weight, DTYPE)
            weight = tl.load(query_norm_h + HALF + column, mask=is_query, other=0.0).to(tl.float32)
            weight += tl.load(key_norm_h + HALF + column, mask=is_key, other=0.0).to(tl.float32)
            right = rounded(right * inverse * weight, DTYPE)
        # RoPE's factors are those of the first half again in the second.
        angle = tl.load(position_B + row) * (2 * HALF) + column
        cos = rounded(tl.load(cos_Th + angle, mask=is_there, other=0.0), DTYPE)
        sin = rounded(tl.load(sin_Th + angle, mask=is_there, other=0.0), DTYPE)
        turned_left = rounded(rounded(left * cos, DTYPE) - rounded(right * sin, DTYPE), DTYPE)
        turned_right = rounded(rounded(right * cos, DTYPE) + rounded(left * sin, DTYPE), DTYPE)
        if head < QUERY_HEADS:
            tl.store(states, turned_left, mask=is_there)
            tl.store(states + HALF, turned_right, mask=is_there)
        else:
            slot = (row.to(tl.int64) * KEY_HEADS + head - QUERY_HEADS) * slots + tl.load(length_B + row)
            stored = slot * (2 * HALF) + column
            tl.store(keys_BHSh + stored, turned_left, mask=is_there)
            tl.store(keys_BHSh + stored + HALF, turned_right, mask=is_there)
            own = states + KEY_HEADS * 2 * HALF
            tl.store(values_BHSh + stored, tl.load(own, mask=is_there, other=0.0), mask=is_there)
            tl.store(values_BHSh + stored + HALF, tl.load(own + HALF, mask=is_there, other=0.0), mask=is_there)


@triton.jit
def attention_kernel(
    projected_BO,
    keys_BHSh,
    values_BHSh,
    padding_B,
    length_B,
    largest_BNC,
    total_BNC,
    sum_BNCh,
    row_B,
    count_1,
    slots,
    scale,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_h: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Attention of a token to a part of the slots that its row has stored, its own among them.

    Programs: places in the list of rows, query heads, and PARTS. Each leaves the largest score, the sum of shares over
    it, and the sum of values by their shares, which `combine_kernel` puts together; a part may be empty. Query heads
    that share keys read them each for itself.
    """
    place = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    if place < tl.load(count_1):
        row = tl.load(row_B + place).to(tl.int64)
        padding = tl.load(padding_B + row)
        used = tl.load(length_B + row) + 1 - padding
        size = (used + PARTS - 1) // PARTS
        slot = part * size
        end = tl.minimum(slot + size, used)
        column_h = tl.arange(0, BLOCK_h)
        is_column_h = column_h < WIDTH
        query = projected_BO + row * ((QUERY_HEADS + 2 * KEY_HEADS) * WIDTH) + head * WIDTH + column_h
        query_h = tl.load(query, mask=is_column_h, other=0.0).to(tl.float32) * scale
        key_head = row * KEY_HEADS + head // (QUERY_HEADS // KEY_HEADS)
        largest = float("-inf")
        total = 0.0
        sum_h = tl.full([BLOCK_h], 0, tl.float32)
        while slot < end:
            slot_S = slot + tl.arange(0, BLOCK_S)
            place_Sh = (key_head * slots + padding + slot_S)[:, None] * WIDTH + column_h[None, :]
            is_there_Sh = (slot_S < end)[:, None] & is_column_h[None, :]
            key_Sh = tl.load(keys_BHSh + place_Sh, mask=is_there_Sh, other=0.0).to(tl.float32)
            score_S = tl.where(slot_S < end, tl.sum(key_Sh * query_h[None, :], axis=1), float("-inf"))
            new_largest = tl.maximum(largest, tl.max(score_S, axis=0))
            share_S = tl.exp(score_S - new_largest)
            shrunk = tl.exp(largest - new_largest)
            total = total * shrunk + tl.sum(share_S, axis=0)
            value_Sh = tl.load(values_BHSh + place_Sh, mask=is_there_Sh, other=0.0).to(tl.float32)
            sum_h = sum_h * shrunk + tl.sum(rounded(share_S, DTYPE)[:, None] * value_Sh, axis=0)
            largest = new_largest
            slot += BLOCK_S
        left = (row * QUERY_HEADS + head) * PARTS + part
        tl.store(largest_BNC + left, largest)
        tl.store(total_BNC + left, total)
        tl.store(sum_BNCh + left * WIDTH + column_h, sum_h, mask=is_column_h)


@triton.jit
def combine_kernel(
    largest_BNC,
    total_BNC,
    sum_BNCh,
    attended_BO,
    row_B,
    count_1,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_h: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The attention of a token, of that to the parts. Programs: places in the list of rows, and query heads."""
    place = tl.program_id(0)
    if place < tl.load(count_1):
        row = tl.load(row_B + place).to(tl.int64)
        head = row * HEADS + tl.program_id(1)
        left_C = head * PARTS + tl.arange(0, PARTS)
        column_h = tl.arange(0, BLOCK_h)
        largest_C = tl.load(largest_BNC + left_C)
        share_C = tl.exp(largest_C - tl.max(largest_C, axis=0))
        total = tl.sum(share_C * tl.load(total_BNC + left_C), axis=0)
        sum_Ch = tl.load(
            sum_BNCh + left_C[:, None] * WIDTH + column_h[None, :], mask=(column_h < WIDTH)[None, :], other=0.0
        )
        attended_h = rounded(tl.sum(share_C[:, None] * sum_Ch, axis=0) / total, DTYPE)
        tl.store(attended_BO + head * WIDTH + column_h, attended_h, mask=column_h < WIDTH)
