"""The fast decode step: one graph a token with static buffers and real branches, behind an eager prefill.

The prefill is the model's own causal pass. A decode step is a single function over static buffers, for `torch.compile`
to make one graph of: no Python per block, and a routed block inside `torch.cond`, so that one that no row enters reads
none of its weights.

Shapes: B batch, R rows of it, D hidden size, H key-value heads, G query heads per key-value head, h head width, S slots
of a buffer, E experts, F width of an expert, O outputs, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.compiler import any_length
from mixture_of_depths.model.attention import rotary_factors, rotate
from mixture_of_depths.model.cache import RoutedCacheLayer
from mixture_of_depths.model.experts import ExpertMLP, GroupedLinear
from mixture_of_depths.model.modeling import MLP, DecoderLayer, MoDForCausalLM
from mixture_of_depths.sampling.native import FASTEST, WAYS, Shape, attend_native, is_native, native, shape_of
from mixture_of_depths.sampling.quantization import Int8GroupedLinear, Int8Linear

# Keys and values of all rows, each [B, H, S, h], and which slots are used, [B, S].
Stored = tuple[Tensor, Tensor, Tensor]
# Buffers grow by this many slots.
GROWTH = 64
# Parts of a weight that are read at once; a single stream does not get the memory's speed.
STREAMS = 4


@dataclass
class LayerState:
    """What one block keeps.

    Attributes:
        keys, values: each of shape [B, H, S, h]; of which each row uses the first `length_B`.
        length_B (torch.Tensor): of shape [B].
        entered_B (torch.Tensor): which rows' last token entered; bool, of shape [B].
    """

    keys: Tensor
    values: Tensor
    length_B: Tensor
    entered_B: Tensor


@dataclass
class State:
    """All that a decode step reads and writes.

    Attributes:
        layers: one state a block.
        position_B (torch.Tensor): position of the next token, padding not counted; of shape [B].
        real_BS (torch.Tensor): False for the slots of padding, in the buffers of blocks that store every token; of
            shape [B, S].
    """

    layers: list[LayerState]
    position_B: Tensor
    real_BS: Tensor


def settled(values: Tensor) -> Tensor:
    """The same values, computed before they are used, and side by side in memory.

    The compiler would otherwise repeat an elementwise expression, such as the SwiGLU's exponentials, for every output
    of the reduction that reads it. `as_strided` makes it write its operand to memory first.
    """
    values = values.contiguous()
    return values.as_strided(values.shape, values.stride())


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same values in float32, which the step computes in, as exact as `dtype` has them.

    In bf16 the model's own pass rounds what every operation gives. Decoding does so, too, or its routers would see
    other hidden states than those of the prefill, and decide differently.
    """
    return values.to(dtype).float()


def matvec(layer: nn.Linear | Int8Linear, x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """`layer(x_BD)`, rounded to `dtype`; of shape [B, O]."""
    return matvecs([layer], x_BD, dtype)[0]


def matvecs(layers: Sequence[nn.Linear | Int8Linear], x_BD: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What each layer makes of the same rows, rounded to `dtype`; each of shape [B, O]."""
    x_BD, weights = settled(x_BD), [layer.weight for layer in layers]
    # What is fastest was measured on the CPU.
    is_measured = x_BD.device.type == "cpu"
    ways = [FASTEST.get(shape_of(x_BD.shape[0], weight)) if is_measured else None for weight in weights]
    if all(way == "native" for way in ways):
        # One call reads them all.
        outputs = native(weights, x_BD)
    else:
        outputs = [product(weight, x_BD, way) for weight, way in zip(weights, ways, strict=True)]
    results = []
    for layer, out_BO in zip(layers, outputs, strict=True):
        scaled_BO = out_BO * layer.scale if isinstance(layer, Int8Linear) else out_BO
        results.append(rounded(scaled_BO if layer.bias is None else scaled_BO + layer.bias.float(), dtype))
    return results


def product(weight_OD: Tensor, x_BD: Tensor, way: str | None = None) -> Tensor:
    """Rows times the transposed weight in float32, of shape [B, O], in the way that was measured as the fastest.

    Where none was, one row multiplies and sums: that is a matter of reading the weights, which compiled code does at
    the speed of memory, and a library's matrix product does not.
    """
    rows = x_BD.shape[0]
    if way is not None or (rows > 1 and weight_OD.dtype != torch.int8) or rows > 4:
        return WAYS["linear" if way is None else way]([weight_OD], x_BD)[0]
    # Reductions over equal parts of the weight become one loop that reads them side by side, for all rows at once.
    streams = 1 if weight_OD.shape[0] % STREAMS else STREAMS if rows <= 2 else STREAMS // 2
    parts = [part.float() for part in weight_OD.unflatten(0, (streams, -1)).unbind()]
    return torch.stack([torch.cat([(part * x_D).sum(dim=-1) for part in parts]) for x_D in x_BD.float().unbind()])


def weights_of(module: nn.Module) -> list[Tensor]:
    """The weights of all products of a step, or of a part of it, but those of routers."""
    return [
        layer.weight
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Int8Linear) and "router" not in name.split(".")
    ]


def product_shapes(model: MoDForCausalLM, batch_size: int) -> list[Shape]:
    """The shapes of all products of a step: of every number of rows that a routed block is compiled for, or of all."""
    return list(
        dict.fromkeys(shape_of(rows, weight) for weight in weights_of(model) for rows in row_counts(batch_size))
    )


def apply_mlp(mlp: MLP | ExpertMLP, x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """The MLP or the experts of one token a row; `dtype` is that of the model's other weights."""
    if isinstance(mlp, MLP):
        gate_BF, up_BF = matvecs([mlp.gate_proj, mlp.up_proj], x_BD, dtype)
        return matvec(mlp.down_proj, rounded(rounded(F.silu(gate_BF), dtype) * up_BF, dtype), dtype)
    router_input_B1D = x_BD[:, None].to(dtype)
    if x_BD.shape[0] > 4:
        # Rows share experts: products by expert read each once.
        return mlp(router_input_B1D, None, "causal")[0][:, 0].float()
    _, weight_BTE, _ = mlp.router(router_input_B1D, None, "causal")
    weight_BE, expert_BE = weight_BTE[:, 0].sort(dim=-1, descending=True, stable=True)
    rows = []
    for row, x_1D in enumerate(x_BD.split(1)):
        total_1D = torch.zeros_like(x_1D)
        for slot in range(mlp.config.most_experts_per_token):
            weight, expert_1 = weight_BE[row, slot], expert_BE[row, slot : slot + 1]
            total_1D = total_1D + weight * apply_expert(mlp, expert_1, weight > 0, x_1D)
        rows.append(total_1D)
    return torch.cat(rows)


def apply_expert(mlp: ExpertMLP, expert_1: Tensor, is_taken: Tensor, x_1D: Tensor) -> Tensor:
    """One expert, by its index, for one row; its weights are read only when it takes the row."""

    def product_of(layer: nn.Module, expert_1: Tensor, x_1I: Tensor) -> Tensor:
        assert isinstance(layer, GroupedLinear | Int8GroupedLinear)
        out_1O = product(layer.weight.index_select(0, expert_1)[0], settled(x_1I))
        return out_1O * layer.scale.index_select(0, expert_1) if isinstance(layer, Int8GroupedLinear) else out_1O

    def enter(x_1D: Tensor, expert_1: Tensor) -> Tensor:
        gate_1F, up_1F = product_of(mlp.gate_up_proj, expert_1, x_1D).chunk(2, dim=-1)
        return product_of(mlp.down_proj, expert_1, F.silu(gate_1F) * up_1F)

    def skip(x_1D: Tensor, expert_1: Tensor) -> Tensor:
        return torch.zeros_like(x_1D)

    if mlp.config.num_noop_experts == 0 and mlp.config.expert_capacity is None:
        return enter(x_1D, expert_1)
    return choose(is_taken, enter, skip, (x_1D, expert_1))


def normalised(norm: nn.RMSNorm | nn.Identity, x: Tensor) -> Tensor:
    """`norm(x)`, rounded to what the norm's weight is in."""
    if isinstance(norm, nn.Identity):
        return x
    return rounded(F.rms_norm(x, norm.normalized_shape, norm.weight.float(), norm.eps), norm.weight.dtype)


def attend(query_RHGh: Tensor, key_RHh: Tensor, value_RHh: Tensor, stored: Stored, row_R: Tensor) -> Tensor:
    """Attention of one token of some rows to those stored there and to itself; of shape [R, H * G * h].

    Args:
        query_RHGh, key_RHh, value_RHh: of those rows, in float32.
        stored: of all rows.
        row_R (torch.Tensor): which rows these are: all, in their order, or fewer.
    """
    query_RHGh = settled(query_RHGh * query_RHGh.shape[-1] ** -0.5)
    if is_native(stored[0]):
        return attend_native(query_RHGh, settled(key_RHh), settled(value_RHh), *stored, row_R).flatten(1)
    if len(row_R) < len(stored[0]):
        stored = stored[0][row_R], stored[1][row_R], stored[2][row_R]
    keys_RHSh, values_RHSh, used_RS = stored
    scores_RHGS = (query_RHGh[:, :, :, None, :] * keys_RHSh[:, :, None].float()).sum(dim=-1)
    scores_RHGS = scores_RHGS.masked_fill(~used_RS[:, None, None, :], -torch.inf)
    own_RHG1 = (query_RHGh * key_RHh[:, :, None]).sum(dim=-1, keepdim=True)
    largest_RHG1 = torch.maximum(scores_RHGS.amax(dim=-1, keepdim=True), own_RHG1)
    shares_RHGS, own_RHG1 = settled((scores_RHGS - largest_RHG1).exp()), (own_RHG1 - largest_RHG1).exp()
    total_RHG1 = shares_RHGS.sum(dim=-1, keepdim=True) + own_RHG1
    shares_RHGS, own_RHG1 = rounded(shares_RHGS, values_RHSh.dtype), rounded(own_RHG1, values_RHSh.dtype)
    sum_RHGh = (shares_RHGS[..., None] * values_RHSh[:, :, None].float()).sum(dim=-2)
    attended = (sum_RHGh + own_RHG1 * value_RHh[:, :, None]) / total_RHG1
    return attended.flatten(1)


def decode_key(layer: DecoderLayer, normed_BD: Tensor, cos_Bh: Tensor, sin_Bh: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of one token a row, each of shape [B, H, h]."""
    attention, dtype = layer.self_attn, layer.input_layernorm.weight.dtype
    key_BO, value_BO = matvecs([attention.k_proj, attention.v_proj], normed_BD, dtype)
    return as_key(layer, key_BO, value_BO, cos_Bh, sin_Bh)


def as_key(
    layer: DecoderLayer, key_BO: Tensor, value_BO: Tensor, cos_Bh: Tensor, sin_Bh: Tensor
) -> tuple[Tensor, Tensor]:
    """Key and value, each of shape [B, H, h], of their projections."""
    attention, rows, dtype = layer.self_attn, key_BO.shape[0], layer.input_layernorm.weight.dtype
    key = normalised(attention.k_norm, key_BO.view(rows, -1, attention.head_dim))
    return rotated(key, cos_Bh, sin_Bh, dtype), value_BO.view(rows, -1, attention.head_dim)


def rotated(states_BHh: Tensor, cos_Bh: Tensor, sin_Bh: Tensor, dtype: torch.dtype) -> Tensor:
    """RoPE of one token a row, rounded."""
    cos_B1h, sin_B1h = cos_Bh[:, None].to(dtype), sin_Bh[:, None].to(dtype)
    return rounded(rotate(states_BHh[:, None].to(dtype), cos_B1h, sin_B1h)[:, 0], dtype)


def decode_attention(
    layer: DecoderLayer,
    x_BD: Tensor,
    cos_Bh: Tensor,
    sin_Bh: Tensor,
    row_B: Tensor,
    stored: Stored,
    own: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds to one token a row, and that token's key and value, which are `own` where it has them."""
    attention, rows, dtype = layer.self_attn, x_BD.shape[0], layer.input_layernorm.weight.dtype
    normed = normalised(layer.input_layernorm, x_BD)
    if own:
        query_BO, (key, value) = matvec(attention.q_proj, normed, dtype), own
    else:
        query_BO, key_BO, value_BO = matvecs([attention.q_proj, attention.k_proj, attention.v_proj], normed, dtype)
        key, value = as_key(layer, key_BO, value_BO, cos_Bh, sin_Bh)
    query = normalised(attention.q_norm, query_BO.view(rows, -1, attention.head_dim))
    query = rotated(query, cos_Bh, sin_Bh, dtype)
    grouped = query.view(rows, key.shape[1], -1, attention.head_dim)
    attended = rounded(attend(grouped, key, value, stored, row_B), dtype)
    return matvec(attention.o_proj, attended, dtype), key, value


def decode_mlp(layer: DecoderLayer, x_BD: Tensor) -> Tensor:
    """What the MLP, or its experts, add to one token a row."""
    return apply_mlp(layer.mlp, normalised(layer.post_attention_layernorm, x_BD), layer.input_layernorm.weight.dtype)


def decode_block(layer: DecoderLayer, x_BD: Tensor, *attended_with: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a block adds to one token a row, and that token's key and value, each of shape [B, H, h].

    Args:
        layer: the block.
        x_BD (torch.Tensor): of shape [B, D].
        attended_with: the arguments of `decode_attention` after these.
    """
    dtype = layer.input_layernorm.weight.dtype
    attended, key, value = decode_attention(layer, x_BD, *attended_with)
    return rounded(attended + decode_mlp(layer, rounded(x_BD + attended, dtype)), dtype), key, value


def decode_routed(
    layer: DecoderLayer,
    x_BD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
    place: tuple[Tensor, Tensor, Tensor],
    stored: Stored,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token a row behind a routed block, which rows entered it, and the token's key and value.

    What is routed lies in a branch, and is not read when no row enters. A row that skips has a key and a value of 0
    where these are routed, too.
    """
    assert layer.router is not None
    dtype, (_, heads, _, head_dim) = layer.input_layernorm.weight.dtype, stored[0].shape
    own = ()
    if layer.part == "mlp":
        attended_BD, *own = decode_attention(layer, x_BD, *place, stored)
        x_BD = settled(rounded(x_BD + attended_BD, dtype))
    elif layer.part == "block_keep_keys":
        own = decode_key(layer, normalised(layer.input_layernorm, x_BD), *place[:2])
    router_logits, causal_logits = layer.router.logits(x_BD[:, None], position_B[:, None])
    entered_B = (causal_logits[:, 0] > 0) & active_B

    def part(stored: tuple[Tensor, ...], x_BD: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if layer.part == "mlp":
            return (decode_mlp(layer, x_BD),)
        left = decode_block(layer, x_BD, *others[:3], stored, others[3:])
        return left[:1] if layer.part == "block_keep_keys" else left

    width = x_BD.shape[1]
    if layer.part == "mlp":
        (delta_BD,) = enter_or_skip(part, (width,), entered_B, (x_BD,))
    elif layer.part == "block_keep_keys":
        (delta_BD,) = enter_or_skip(part, (width,), entered_B, (x_BD, *place, *own), stored)
    else:
        sizes = (width, heads * head_dim, heads * head_dim)
        delta_BD, *own = enter_or_skip(part, sizes, entered_B, (x_BD, *place), stored)
    key, value = (states.view(-1, heads, head_dim) for states in own)
    weight_B = layer.router.gate(router_logits[:, 0]).masked_fill(~entered_B, 0)
    x_BD = bypassed(layer, x_BD, entered_B)
    return rounded(x_BD + rounded(weight_B[:, None] * delta_BD, dtype), dtype), entered_B, key, value


def bypassed(layer: DecoderLayer, x_BD: Tensor, entered_B: Tensor) -> Tensor:
    """One token a row, with what the rows that skip take in the place of the routed part."""
    if layer.bypass is None:
        return x_BD
    dtype = layer.input_layernorm.weight.dtype
    down_BR = matvec(layer.bypass.down, normalised(layer.part_norm, x_BD), dtype)
    up_BD = matvec(layer.bypass.up, down_BR.masked_fill(entered_B[:, None], 0), dtype)
    return rounded(x_BD + up_BD, dtype)


def decode_step(model: MoDForCausalLM, token_B: Tensor, active_B: Tensor, state: State) -> Tensor:
    """One token a row through the whole model; returns float32 logits [B, V] and stores what the token leaves.

    A row that is not active, because it has ended, enters no routed block.
    """
    x_BD = rounded(model.model.embed_tokens(token_B), model.dtype)
    cos_B1h, sin_B1h = rotary_factors(model.config, state.position_B[:, None], x_BD.dtype)
    cos_Bh, sin_Bh = settled(cos_B1h[:, 0]), settled(sin_B1h[:, 0])
    row_B = torch.arange(token_B.shape[0], device=token_B.device)
    place = (cos_Bh, sin_Bh, row_B)
    for layer, stored in zip(cast(list[DecoderLayer], list(model.model.layers)), state.layers, strict=True):
        slots_S = torch.arange(stored.keys.shape[2], device=token_B.device)
        used_BS = slots_S < stored.length_B[:, None]
        if layer.part != "block":
            used_BS = used_BS & state.real_BS
        x_BD, read = settled(x_BD), (stored.keys, stored.values, used_BS)
        if layer.router is None:
            delta_BD, key, value = decode_block(layer, x_BD, *place, read)
            entered_B = torch.ones_like(token_B, dtype=torch.bool)
            x_BD = rounded(x_BD + delta_BD, model.dtype)
        else:
            x_BD, entered_B, key, value = decode_routed(layer, x_BD, state.position_B, active_B, place, read)
        # A token that skips leaves its empty key behind the last one, where the next that enters replaces it. An
        # assignment by index, unlike a scatter, compiles to a write in place.
        stored.keys[row_B, :, stored.length_B] = key.to(stored.keys.dtype)
        stored.values[row_B, :, stored.length_B] = value.to(stored.values.dtype)
        stored.length_B.add_(entered_B if layer.part == "block" else 1)
        stored.entered_B.copy_(entered_B)
    state.position_B.add_(1)
    return matvec(model.lm_head, normalised(model.model.norm, x_BD), model.dtype).float()


def row_counts(batch_size: int) -> list[int]:
    """The numbers of rows a routed block is compiled for: 1, 4, 16 and so on, and the whole batch."""
    counts = [1]
    while counts[-1] * 4 < batch_size:
        counts.append(counts[-1] * 4)
    return counts if batch_size == 1 else [*counts, batch_size]


def entering_first(entered_B: Tensor) -> Tensor:
    """The rows' numbers, those that enter before the others; of shape [B].

    By comparing all with all: the compiler calls the library for a sort, which takes longer than so few rows need.
    """
    row_B = torch.arange(entered_B.shape[0], device=entered_B.device)
    key_B = row_B + entered_B.shape[0] * (~entered_B)
    place_B = (key_B[:, None] > key_B).sum(dim=1)
    return ((place_B == row_B[:, None]) * row_B).sum(dim=1)


def enter_or_skip(
    part: Callable[..., tuple[Tensor, ...]],
    sizes: tuple[int, ...],
    entered_B: Tensor,
    operands: tuple[Tensor, ...],
    shared: tuple[Tensor, ...] = (),
) -> tuple[Tensor, ...]:
    """`part` for the rows that enter, and 0 for others; when none does, nothing of it is read.

    Args:
        part: a function of `shared` and of the operands of any number of rows.
        sizes: the widths of what it returns.
        entered_B (torch.Tensor): which rows enter; of shape [B].
        operands: its arguments, for all rows.
        shared: what it is given whole, whichever rows enter.

    Returns:
        What it returns, each of shape [B, size].
    """
    batch_size, own = entered_B.shape[0], len(operands)
    order_B = entering_first(entered_B)
    count = entered_B.sum()

    # All branches hand out one fresh tensor: their outputs must agree in strides, too.
    def skip(order_B: Tensor, count: Tensor, *operands: Tensor) -> Tensor:
        return operands[0].new_zeros(batch_size, sum(sizes))

    def enter(rows: int) -> Callable[..., Tensor]:
        def branch(order_B: Tensor, count: Tensor, *operands: Tensor) -> Tensor:
            shared, operands = operands[own:], operands[:own]
            if rows == batch_size:
                return torch.cat([values.flatten(1) for values in part(shared, *operands)], dim=1)
            index = order_B[:rows]
            left = part(shared, *(operand.index_select(0, index) for operand in operands))
            chosen = torch.cat([values.flatten(1) for values in left], dim=1)
            return operands[0].new_zeros(batch_size, sum(sizes)).index_copy(0, index, chosen)

        return branch

    def at_most(rows: list[int]) -> Callable[..., Tensor]:
        """The branch for the smallest of `rows` that holds all that enter."""
        if len(rows) == 1:
            return enter(rows[0])

        def branch(order_B: Tensor, count: Tensor, *operands: Tensor) -> Tensor:
            return choose(count <= rows[0], enter(rows[0]), at_most(rows[1:]), (order_B, count, *operands))

        return branch

    left = choose(count == 0, skip, at_most(row_counts(batch_size)), (order_B, count, *operands, *shared))
    return left.split(sizes, dim=1)


def choose(
    condition: Tensor, if_true: Callable[..., Tensor], if_false: Callable[..., Tensor], operands: tuple[Tensor, ...]
) -> Tensor:
    """One of two functions of `operands`; a real branch, compiled or not."""
    if torch.compiler.is_compiling():
        return torch.cond(condition, if_true, if_false, operands)
    return if_true(*operands) if bool(condition) else if_false(*operands)


def prefill(model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, room: int) -> tuple[Tensor, State]:
    """Runs the prompts through the model; returns the last logits [B, V] and the state to decode from.

    Args:
        model: the model.
        input_ids (torch.Tensor): left-padded prompts, of shape [B, T].
        attention_mask (torch.Tensor): 0 for padding; of shape [B, T].
        room: number of tokens that will be decoded. Routed blocks have room for what entered and grow as tokens enter.
    """
    output = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=True, routing="causal", logits_to_keep=1
    )
    batch, length = input_ids.shape
    layers = []
    for cached in output.cache.layers:
        stored_B, size = torch.full((batch,), length, device=input_ids.device), length + room
        if isinstance(cached, RoutedCacheLayer):
            # As wide as its fullest row.
            stored_B, size = cached.num_stored(), cached.slots_of(None).shape[1] + 1
        heads, head_dim = cast(int, model.config.num_key_value_heads), cast(int, model.config.head_dim)
        empty = torch.zeros(batch, heads, 0, head_dim, dtype=model.dtype, device=input_ids.device)
        keys, values = (empty if tensor is None else tensor for tensor in (cached.keys, cached.values))
        entered_B = torch.zeros_like(stored_B, dtype=torch.bool)
        layers.append(LayerState(padded(keys, size), padded(values, size), stored_B, entered_B))
    real_BS = F.pad(attention_mask.bool(), (0, _rounded(length + room) - length), value=True)
    any_length(real_BS, 1)
    return output.logits[:, -1].float(), State(layers, attention_mask.sum(dim=1), real_BS)


def grow(state: State) -> int:
    """Makes room in the routed blocks whose fullest row has reached its buffer's end; returns for how many tokens."""
    room = []
    # All at once: a device is waited for each time.
    fullest = torch.stack([layer.length_B.max() for layer in state.layers]).tolist()
    for layer, length in zip(state.layers, fullest, strict=True):
        needed = length + 1
        if needed > layer.keys.shape[2]:
            layer.keys, layer.values = padded(layer.keys, needed), padded(layer.values, needed)
        room.append(layer.keys.shape[2] - needed + 1)
    return min(room)


def _rounded(slots: int) -> int:
    return -(-slots // GROWTH) * GROWTH


def padded(buffer_BHSh: Tensor, size: int) -> Tensor:
    """The buffer with zeros behind it up to `size` slots, rounded up."""
    padded = F.pad(buffer_BHSh, (0, 0, 0, _rounded(size) - buffer_BHSh.shape[2])).contiguous()
    any_length(padded, 2)
    return padded
