"""The decode step on a CUDA GPU: fixed buffers, and the kernels of a token recorded once in a CUDA graph.

A replay launches the same kernels for every token, and nothing on the host looks at what routers decide: the kernels of
a routed block read how many rows enter, and end at once when none does. What is computed is `decode_step` of `step.py`,
which rounds where the model does. On the CPU the kernels run one by one, by Triton's interpreter, as tests have it.

Shapes: B batch, D hidden size, F width of the MLP, P width of the predictor, r rank of the bypass, O what is projected
for attention, N query heads, H key-value heads, h head width, S slots of a buffer, C parts of a row's slots, T
positions, L blocks, V vocabulary.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from mixture_of_depths.model.attention import rotary_factors
from mixture_of_depths.model.modeling import MLP, DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Router
from mixture_of_depths.sampling.kernels import (
    attention_kernel,
    combine_kernel,
    decide_kernel,
    place_kernel,
    router_kernel,
)
from mixture_of_depths.sampling.products import add_kernel, gate_kernel, linear_kernel
from mixture_of_depths.sampling.step import LayerState, padded, prefill

PRECISIONS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# The sizes below are chosen by what registers hold and not measured.
# Programs that a launch of attention should have, and the most parts that it reads a row's slots in for them.
PROGRAMS, MOST_PARTS = 256, 16

Launch = Callable[[], object]

# PyTorch makes one recording at a time in a process.
RECORDING = threading.Lock()


@dataclass
class Rows:
    """Rows of the batch that take part: the first `count_1` of `index_B`."""

    index_B: Tensor
    count_1: Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Launch:
    """The launch of a kernel on these buffers, whenever it is called."""
    return partial(kernel[grid], *arguments, **{"num_warps": 4, "num_stages": 2, **constants})


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def blocks_of(outputs: int, at_once: int) -> int:
    """The number of programs that make `outputs`, each as many as `at_once`."""
    return -(-outputs // at_once)


def product_sizes(batch: int, inputs: int, outputs: int) -> dict[str, int]:
    """How many rows, outputs and inputs a program of a product takes at a time, and its warps."""
    is_long = outputs > 8192
    if batch == 1:
        at_once = 32 if is_long else 8
        return {"ROWS": 1, "BLOCK_O": at_once, "BLOCK_I": min(4096 // at_once, power_of_2(inputs)), "num_warps": 4}
    # Products of matrices begin at 16 of each.
    rows, at_once = min(64, max(16, power_of_2(batch))), 64 if is_long else 16
    block_i = min(64, max(16, power_of_2(inputs)))
    return {"ROWS": rows, "BLOCK_O": at_once, "BLOCK_I": block_i, "num_warps": 4 if rows == 16 else 8}


def parts_of(slots: int, batch: int, heads: int) -> int:
    """In how many parts, a power of two, attention reads a row's slots."""
    wanted = min(MOST_PARTS, PROGRAMS // (batch * heads), slots // 64)
    return 1 << (max(1, wanted).bit_length() - 1)


def draw(router: Router, hidden_BD: Tensor, position_B: Tensor, router_B: Tensor, causal_B: Tensor) -> None:
    """What a random router gives each row, by its position, into the last two.

    No method: a launch that held the step that holds it would keep both until the collector of cycles comes.
    """
    router_B1, causal_B1 = router.logits(hidden_BD[:, None], position_B[:, None])
    router_B.copy_(router_B1[:, 0])
    causal_B.copy_(causal_B1[:, 0])


def recorded(run: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """The graph of what `run` launches on a device, which must be the current one."""
    graph = torch.cuda.CUDAGraph()
    # PyTorch's own stream for recordings is one for all, and lies on the device of the first. Other threads may go on
    # with work of their own.
    with (
        RECORDING,
        torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
    ):
        run()
    return graph


class GraphStep:
    """The prompts through the model, and one replay of a CUDA graph for every token that follows.

    The first token's launches compile the kernels, and those of the second are recorded. Buffers and graph are held as
    long as this object is.
    """

    def __init__(self, model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, room: int) -> None:
        self.model, self.device, self.graph = model, input_ids.device, None
        self.is_warm = False
        self.logits_BV, state = prefill(model, input_ids, attention_mask, room)
        config, (batch, length) = model.config, input_ids.shape
        assert config.head_dim is not None and config.num_key_value_heads is not None
        assert config.intermediate_size is not None and config.predictor_hidden_size is not None
        self.batch, self.width = batch, config.hidden_size
        self.heads, self.key_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        query_size, blocks = self.heads * self.head_dim, config.num_hidden_layers

        empty = partial(torch.empty, dtype=model.dtype, device=self.device)
        precise = partial(torch.empty, dtype=torch.float32, device=self.device)
        whole = partial(torch.zeros, dtype=torch.int32, device=self.device)
        # What a token comes with.
        self.token_B = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.active_B, self.position_B = whole(batch) + 1, state.position_B
        # What blocks keep: of those that store every token, the slots of left padding are not looked at.
        self.length_LB = torch.stack([layer.length_B for layer in state.layers]).int()
        self.padding_B, self.no_padding_B = (length - state.position_B).int(), whole(batch)
        self.entered_LB = whole(blocks, batch) + 1
        stores_all = [[layer.part != "block"] for layer in self._layers()]
        self.stores_all_L1 = torch.tensor(stores_all, dtype=torch.int32, device=self.device)
        # What kernels hand to one another within a block.
        self.hidden_BD, self.attended_BD, self.added_BD = (empty(batch, self.width) for _ in range(3))
        self.projected_BO = empty(batch, query_size + 2 * self.key_heads * self.head_dim)
        self.heads_BO, self.gated_BF = empty(batch, query_size), empty(batch, config.intermediate_size)
        self.bypass_Br = empty(batch, max(1, config.bypass_rank))
        self.largest_BNC, self.total_BNC = (precise(batch, self.heads, MOST_PARTS) for _ in range(2))
        self.sum_BNCh = precise(batch, self.heads, MOST_PARTS, self.head_dim)
        self.router_B, self.causal_B, self.factor_B = (precise(batch) for _ in range(3))
        self.predicted_BP = precise(batch, config.predictor_hidden_size)
        self.next_logits_BV = precise(batch, config.vocab_size)
        all_B = torch.arange(batch, dtype=torch.int32, device=self.device)
        self.every = Rows(all_B, whole(1) + batch)
        self.entering, self.skipping = (Rows(whole(batch), whole(1)) for _ in range(2))
        # A table, since some kinds of RoPE make their frequencies on the CPU.
        positions_1T = torch.arange(length + room, device=self.device)[None]
        self.cos_Th, self.sin_Th = (
            factors[0].contiguous() for factors in rotary_factors(config, positions_1T, torch.float32)
        )
        self.layers = state.layers
        for layer, stored in zip(self._layers(), self.layers, strict=True):
            if layer.part == "block":
                # As many may enter as tokens follow.
                size = stored.keys.shape[2] + room
                stored.keys, stored.values = padded(stored.keys, size), padded(stored.values, size)
        self.launches = [
            each
            for number, (layer, stored) in enumerate(zip(self._layers(), self.layers, strict=True))
            for each in self._block(number, layer, stored)
        ]
        self.launches.append(
            self._linear(self.hidden_BD, model.model.norm, [model.lm_head], self.next_logits_BV, self.every)
        )

    def _layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.model.model.layers))

    @torch.no_grad()
    def __call__(self, token_B: Tensor, going_B: Tensor | None) -> Tensor:
        """The logits after one more token a row, of shape [B, V]; a row that has ended enters no routed block.

        They are overwritten by the next call.

        Args:
            token_B (torch.Tensor): of shape [B].
            going_B (torch.Tensor | None): False for rows that have ended; of shape [B]. None when there are none.
        """
        is_cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if is_cuda else nullcontext():
            self.token_B.copy_(token_B)
            if going_B is not None:
                self.active_B.copy_(going_B)
            if is_cuda and self.is_warm and self.graph is None:
                self.graph = recorded(self._run, self.device)
            if self.graph is None:
                self._run()
            else:
                self.graph.replay()
            self.is_warm = True
        return self.next_logits_BV

    def entered(self) -> Tensor:
        """Which rows' last token entered each block; of shape [L, B]."""
        return self.entered_LB.bool()

    def _run(self) -> None:
        """Everything between a token and the logits of the next: nothing here waits for the device."""
        torch.index_select(self.model.model.embed_tokens.weight.detach(), 0, self.token_B, out=self.hidden_BD)
        for each in self.launches:
            each()
        self.length_LB.add_(torch.maximum(self.entered_LB, self.stores_all_L1))
        self.position_B.add_(1)

    def _block(self, number: int, layer: DecoderLayer, stored: LayerState) -> list[Launch]:
        """One block for one token a row."""
        if layer.router is None:
            return [*self._attend(number, layer, stored, self.every), *self._feed(layer, self.every)]
        if layer.part == "mlp":
            return [
                *self._attend(number, layer, stored, self.every),
                *self._route(number, layer, layer.router),
                *self._bypass(layer),
                *self._feed(layer, self.entering),
            ]
        return [
            *(self._keep_keys(number, layer, stored) if layer.part == "block_keep_keys" else []),
            *self._route(number, layer, layer.router),
            *self._bypass(layer),
            *self._attend(number, layer, stored, self.entering),
            *self._feed(layer, self.entering),
        ]

    def _keep_keys(self, number: int, layer: DecoderLayer, stored: LayerState) -> list[Launch]:
        """Every row's key and value."""
        attention, keys_BO = layer.self_attn, self.projected_BO[:, self.heads * self.head_dim :]
        maps = [attention.k_proj, attention.v_proj]
        return [
            self._linear(self.hidden_BD, layer.input_layernorm, maps, keys_BO, self.every),
            self._place(number, layer, stored, self.every, range(self.heads, self.heads + self.key_heads)),
        ]

    def _attend(self, number: int, layer: DecoderLayer, stored: LayerState, rows: Rows) -> list[Launch]:
        """What attention adds, and the hidden states with it; the keys and values, too, where they are not kept yet."""
        attention, is_kept = layer.self_attn, layer.part == "block_keep_keys"
        maps = [attention.q_proj] if is_kept else [attention.q_proj, attention.k_proj, attention.v_proj]
        slots, block_h = stored.keys.shape[2], power_of_2(self.head_dim)
        parts = parts_of(slots, self.batch, self.heads)
        left_over = (self.largest_BNC, self.total_BNC, self.sum_BNCh)
        shape = {"WIDTH": self.head_dim, "PARTS": parts, "BLOCK_h": block_h, "DTYPE": self._precision()}
        # Where the MLP alone is routed, its router reads what attention has been added to.
        is_last = layer.part == "mlp"
        return [
            self._linear(self.hidden_BD, layer.input_layernorm, maps, self.projected_BO, rows),
            self._place(number, layer, stored, rows, range(self.heads + (0 if is_kept else self.key_heads))),
            launch(
                attention_kernel,
                (self.batch, self.heads, parts),
                self.projected_BO,
                stored.keys,
                stored.values,
                self.no_padding_B if layer.part == "block" else self.padding_B,
                self.length_LB[number],
                *left_over,
                rows.index_B,
                rows.count_1,
                slots,
                self.head_dim**-0.5,
                QUERY_HEADS=self.heads,
                KEY_HEADS=self.key_heads,
                BLOCK_S=max(16, min(64, 4096 // block_h)),
                **shape,
            ),
            launch(
                combine_kernel,
                (self.batch, self.heads),
                *left_over,
                self.heads_BO,
                rows.index_B,
                rows.count_1,
                HEADS=self.heads,
                **shape,
            ),
            self._add(
                self.heads_BO,
                attention.o_proj,
                rows,
                total=self.hidden_BD if is_last else self.attended_BD,
                delta=None if is_last else self.added_BD,
            ),
        ]

    def _feed(self, layer: DecoderLayer, rows: Rows) -> list[Launch]:
        """The MLP, and the block's result on the residual stream."""
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        assert isinstance(mlp, MLP)
        is_alone, width = layer.part == "mlp", self.gated_BF.shape[1]
        sizes = product_sizes(self.batch, self.width, width)
        inside = launch(
            gate_kernel,
            (blocks_of(width, sizes["BLOCK_O"]),),
            self.hidden_BD if is_alone else self.attended_BD,
            norm.weight,
            norm.eps,
            self._weight(mlp.gate_proj),
            self._weight(mlp.up_proj),
            self.gated_BF,
            rows.index_B,
            rows.count_1,
            INPUTS=self.width,
            OUTPUTS=width,
            DTYPE=self._precision(),
            FACTOR=self._factor(mlp.gate_proj),
            **sizes,
        )
        plus, factor = None if is_alone else self.added_BD, None if layer.router is None else self.factor_B
        return [inside, self._add(self.gated_BF, mlp.down_proj, rows, plus=plus, factor=factor)]

    def _route(self, number: int, layer: DecoderLayer, router: Router) -> list[Launch]:
        """Which rows enter, and those lists; everything in float32."""
        config = self.model.config
        causal_B = threshold_1 = None
        predictor: tuple[Tensor | None, ...] = (None, None, None, None)
        if router.is_random:
            # Of the position alone: a few operations on one number a row.
            buffers = (self.hidden_BD, self.position_B, self.router_B, self.causal_B)
            launches, causal_B = [partial(draw, router, *buffers)], self.causal_B
        else:
            eps = config.rms_norm_eps if config.router_norm else None
            weight_D, block_D = self._weight(router.proj), power_of_2(self.width)
            launches = [
                launch(
                    router_kernel,
                    (self.batch,),
                    self.hidden_BD,
                    weight_D,
                    eps,
                    self.router_B,
                    WIDTH=self.width,
                    BLOCK_D=block_D,
                )
            ]
            if config.causal_router == "threshold":
                threshold_1 = router.threshold
            elif router.predictor is not None:
                up, down, scale_1 = router.predictor.up_proj, router.predictor.down_proj, router.predictor.router_scale
                predictor = (self.predicted_BP, self._weight(down), down.bias, scale_1)
                launches.append(
                    self._linear(
                        self.hidden_BD, router.predictor.eps, [up], self.predicted_BP, self.every, is_activated=True
                    )
                )
        predictor_width = self.predicted_BP.shape[1]
        decide = launch(
            decide_kernel,
            (1,),
            self.router_B,
            causal_B,
            threshold_1,
            *predictor,
            self.active_B,
            self.entered_LB[number],
            self.factor_B,
            self.entering.index_B,
            self.entering.count_1,
            self.skipping.index_B,
            self.skipping.count_1,
            self.batch,
            WIDTH=predictor_width,
            ACTIVATION=config.router_activation,
            BLOCK_B=max(16, power_of_2(self.batch)),
            BLOCK_P=min(64, power_of_2(predictor_width)),
        )
        return [*launches, decide]

    def _bypass(self, layer: DecoderLayer) -> list[Launch]:
        """What the rows that skip take in the place of the routed part."""
        if layer.bypass is None:
            return []
        return [
            self._linear(self.hidden_BD, layer.part_norm, [layer.bypass.down], self.bypass_Br, self.skipping),
            self._add(self.bypass_Br, layer.bypass.up, self.skipping),
        ]

    def _place(self, number: int, layer: DecoderLayer, stored: LayerState, rows: Rows, heads: range) -> Launch:
        """Norm and RoPE of these heads, and the keys and values of those among them to the buffers."""
        attention, half = layer.self_attn, self.head_dim // 2
        norms: tuple[Any, ...] = (None, None, None)
        if isinstance(attention.q_norm, nn.RMSNorm) and isinstance(attention.k_norm, nn.RMSNorm):
            norms = (attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
        return launch(
            place_kernel,
            (self.batch, len(heads)),
            self.projected_BO,
            *norms,
            self.cos_Th,
            self.sin_Th,
            self.position_B,
            self.length_LB[number],
            stored.keys,
            stored.values,
            rows.index_B,
            rows.count_1,
            heads.start,
            stored.keys.shape[2],
            QUERY_HEADS=self.heads,
            KEY_HEADS=self.key_heads,
            HALF=half,
            BLOCK_HALF=power_of_2(half),
            DTYPE=self._precision(),
        )

    def _linear(
        self,
        source: Tensor,
        norm: nn.RMSNorm | float,
        maps: list[nn.Linear],
        output: Tensor,
        rows: Rows,
        is_activated: bool = False,
    ) -> Launch:
        """Linear maps of what is normed, by a module or with an epsilon alone, to the columns of `output`."""
        weight, eps = (norm.weight, norm.eps) if isinstance(norm, nn.RMSNorm) else (None, norm)
        sizes = [each.out_features for each in maps]
        pairs = [(self._weight(each), each.bias) for each in maps] + [(None, None)] * (3 - len(maps))
        blocks = product_sizes(self.batch, maps[0].in_features, max(sizes))
        return launch(
            linear_kernel,
            (blocks_of(max(sizes), blocks["BLOCK_O"]), len(maps)),
            source,
            weight,
            eps,
            *(tensor for pair in pairs for tensor in pair),
            output,
            rows.index_B,
            rows.count_1,
            INPUTS=maps[0].in_features,
            FIRST=sizes[0],
            OTHERS=sizes[-1],
            COLUMNS=output.stride(0),
            SILU=is_activated,
            # Predictors are in float32 throughout.
            DTYPE=tl.float32 if is_activated else self._precision(),
            FACTOR=self._factor(maps[0]),
            **blocks,
        )

    def _add(
        self,
        source: Tensor,
        map_of: nn.Linear,
        rows: Rows,
        plus: Tensor | None = None,
        factor: Tensor | None = None,
        total: Tensor | None = None,
        delta: Tensor | None = None,
    ) -> Launch:
        """A linear map added to the hidden states, in place unless `total` is another buffer."""
        sizes = product_sizes(self.batch, map_of.in_features, map_of.out_features)
        return launch(
            add_kernel,
            (blocks_of(map_of.out_features, sizes["BLOCK_O"]),),
            source,
            self._weight(map_of),
            map_of.bias,
            plus,
            factor,
            self.hidden_BD,
            self.hidden_BD if total is None else total,
            delta,
            rows.index_B,
            rows.count_1,
            INPUTS=map_of.in_features,
            OUTPUTS=map_of.out_features,
            DTYPE=self._precision(),
            FACTOR=self._factor(map_of),
            **sizes,
        )

    def _weight(self, map_of: nn.Linear) -> Tensor:
        """A weight as kernels read it: by rows that lie one behind the other."""
        assert map_of.weight.is_contiguous()
        return map_of.weight.detach()

    def _precision(self) -> Any:
        return PRECISIONS[self.model.dtype]

    def _factor(self, map_of: nn.Linear) -> Any:
        """What factors of products of matrices are in; the interpreter cannot multiply bf16, which float32 holds."""
        return tl.float32 if self.device.type == "cpu" else PRECISIONS[map_of.weight.dtype]
