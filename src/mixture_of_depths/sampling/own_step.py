"""The decode step on a CPU in one call to C++ (`step.cpp`), which is compiled once for all models.

It computes what `decode_step` of `step.py` does, whose graph is compiled for each model and number of rows.

Shapes: B batch, h head width, L blocks, T positions, V vocabulary.
"""

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixture_of_depths.model.attention import rotary_factors
from mixture_of_depths.model.modeling import MLP, DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Router
from mixture_of_depths.sampling.native import is_native_fastest, require_native
from mixture_of_depths.sampling.quantization import Int8Linear
from mixture_of_depths.sampling.step import grow, prefill, weights_of

PARTS = {None: 0, "block": 1, "block_keep_keys": 2, "mlp": 3}
ACTIVATIONS = {"none": 0, "sigmoid": 1, "tanh": 2, "straight_through": 3}


class CLinear(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("bytes", c_int64),
    ]


class CNorm(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("eps", c_double)]


class CRouter(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("eps", c_double),
        ("threshold", c_void_p),
        ("up", CLinear),
        ("down", CLinear),
        ("predictor_scale", c_void_p),
        ("predictor_eps", c_double),
        ("random_logits", c_void_p),
        ("random_causal", c_void_p),
    ]


class CLayer(ctypes.Structure):
    _fields_ = [
        ("part", c_int64),
        *((name, CNorm) for name in ("attention_norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, CLinear) for name in ("query", "key", "value", "output", "gate", "up", "down")),
        *((name, CLinear) for name in ("bypass_down", "bypass_up")),
        ("router", CRouter),
        *((name, c_void_p) for name in ("keys", "values")),
        ("slots", c_int64),
        *((name, c_void_p) for name in ("length", "entered")),
    ]


class CStep(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "width", "heads", "key_heads", "head_width", "blocks", "bytes")),
        *((name, c_int64) for name in ("activation", "threads")),
        ("embedding", c_void_p),
        ("norm", CNorm),
        ("head", CLinear),
        *((name, c_void_p) for name in ("cos", "sin", "position", "padding")),
        ("layers", POINTER(CLayer)),
    ]


def is_own(model: MoDForCausalLM, batch_size: int) -> bool:
    """Whether the step of a model is that in C++: on a CPU, for weights of float32, bf16 and 8 bits, without experts.

    Where PyTorch's products of so many rows are faster, as on processors with units for matrices, it is not, nor where
    single layers are in another precision than the others.
    """
    if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16) or model.config.has_experts:
        return False
    tensors = [*model.parameters(), *model.buffers()]
    if not all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous() for tensor in tensors):
        return False
    if any(tensor.dtype != torch.float32 for router in _routers(model) for tensor in router.state_dict().values()):
        return False
    groups = [weights_of(layer) for layer in model.model.layers] + [weights_of(model.lm_head)]
    for weights in groups:
        dtypes = {weight.dtype for weight in weights}
        if len(dtypes) > 1 or not dtypes <= {model.dtype, torch.int8}:
            return False
    return is_native_fastest([weight for weights in groups for weight in weights], batch_size)


def _routers(model: MoDForCausalLM) -> list[Router]:
    return [part for part in model.modules() if isinstance(part, Router)]


class OwnStep:
    """The prompts through the model, and one call to C++ for every token that follows."""

    @torch.no_grad()
    def __init__(self, model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, room: int) -> None:
        self.model, self.room, self.left, self.library = model, 0, room, require_native()
        assert self.library.size_of_step() == ctypes.sizeof(CStep) + ctypes.sizeof(CLayer)
        # What C++ reads, which must not go before this object does.
        self.kept: list[Any] = []
        self.logits_BV, self.state = prefill(model, input_ids, attention_mask, room)
        for stored in self.state.layers:
            # Autocast may have left others.
            stored.keys, stored.values = stored.keys.to(model.dtype), stored.values.to(model.dtype)
        config, (batch, length) = model.config, input_ids.shape
        self.next_logits_BV = torch.empty(self.logits_BV.shape, dtype=torch.float32, device="cpu")
        self.all_B = torch.ones(batch, dtype=torch.bool, device="cpu")
        positions_1T = torch.arange(length + room, device="cpu")[None]
        cos_Th, sin_Th = (
            factors[0].to(model.dtype).float() for factors in rotary_factors(config, positions_1T, torch.float32)
        )
        layers = cast(list[DecoderLayer], list(model.model.layers))
        self.layers = (CLayer * len(layers))(*(self._layer(layer, positions_1T) for layer in layers))
        for layer, stored in zip(self.layers, self.state.layers, strict=True):
            layer.length = self._at(stored.length_B, torch.int64)
            layer.entered = self._at(stored.entered_B, torch.bool)
        for layer, stored in zip(layers, self.state.layers, strict=True):
            if layer.router is None:
                stored.entered_B.fill_(True)
        self.step = CStep(
            batch=batch,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_width=config.head_dim,
            blocks=len(layers),
            bytes=model.dtype.itemsize,
            activation=ACTIVATIONS[config.router_activation],
            embedding=self._at(model.model.embed_tokens.weight, model.dtype),
            norm=self._norm(model.model.norm),
            head=self._linear(model.lm_head),
            cos=self._at(cos_Th),
            sin=self._at(sin_Th),
            position=self._at(self.state.position_B, torch.int64),
            padding=self._at(length - self.state.position_B, torch.int64),
            layers=self.layers,
        )

    def __call__(self, token_B: Tensor, going_B: Tensor | None) -> Tensor:
        """The logits after one more token a row, of shape [B, V]; a row that has ended enters no routed block.

        They are overwritten by the next call.

        Args:
            token_B (torch.Tensor): of shape [B].
            going_B (torch.Tensor | None): False for rows that have ended; of shape [B]. None when there are none.
        """
        if self.room == 0:
            self.room = grow(self.state)
            for layer, stored in zip(self.layers, self.state.layers, strict=True):
                layer.keys, layer.values = stored.keys.data_ptr(), stored.values.data_ptr()
                layer.slots = stored.keys.shape[2]
        self.room -= 1
        assert self.left > 0
        self.left -= 1
        active_B = self.all_B if going_B is None else going_B.bool().contiguous()
        token_B = token_B.long().contiguous()
        self.step.threads = torch.get_num_threads()
        self.library.decode_step(ctypes.byref(self.step), *map(_pointer, (token_B, active_B, self.next_logits_BV)))
        return self.next_logits_BV

    def entered(self) -> Tensor:
        """Which rows' last token entered each block; of shape [L, B]."""
        return torch.stack([layer.entered_B for layer in self.state.layers])

    def _at(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Where a tensor of this type begins in memory."""
        assert tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.dtype == dtype
        # Detached, it keeps this memory whatever the parameter gets later.
        self.kept.append(tensor.detach())
        return tensor.data_ptr()

    def _norm(self, norm: nn.Module) -> CNorm:
        # Without a weight where there is no norm.
        return CNorm(self._at(norm.weight.float()), norm.eps) if isinstance(norm, nn.RMSNorm) else CNorm()

    def _linear(self, linear: nn.Linear | Int8Linear) -> CLinear:
        outputs, inputs = linear.weight.shape
        return CLinear(
            weight=self._at(linear.weight, linear.weight.dtype),
            scale=self._at(linear.scale) if isinstance(linear, Int8Linear) else None,
            bias=None if linear.bias is None else self._at(linear.bias.float()),
            outputs=outputs,
            inputs=inputs,
            bytes=linear.weight.dtype.itemsize,
        )

    def _layer(self, layer: DecoderLayer, positions_1T: Tensor) -> CLayer:
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(mlp, MLP)
        bypass = {}
        if layer.bypass is not None:
            bypass = {"bypass_down": self._linear(layer.bypass.down), "bypass_up": self._linear(layer.bypass.up)}
        return CLayer(
            part=PARTS[layer.part],
            attention_norm=self._norm(layer.input_layernorm),
            mlp_norm=self._norm(layer.post_attention_layernorm),
            query_norm=self._norm(attention.q_norm),
            key_norm=self._norm(attention.k_norm),
            query=self._linear(attention.q_proj),
            key=self._linear(attention.k_proj),
            value=self._linear(attention.v_proj),
            output=self._linear(attention.o_proj),
            gate=self._linear(mlp.gate_proj),
            up=self._linear(mlp.up_proj),
            down=self._linear(mlp.down_proj),
            router=CRouter() if layer.router is None else self._router(layer.router, positions_1T),
            **bypass,
        )

    def _router(self, router: Router, positions_1T: Tensor) -> CRouter:
        config = self.model.config
        if router.is_random:
            # Of a random router they are all that matters.
            hidden_1TD = torch.empty(1, positions_1T.shape[1], 0, dtype=torch.float32, device="cpu")
            logits = router.logits(hidden_1TD, positions_1T)
            return CRouter(
                **{
                    f"random_{name}": self._at(logits_1T)
                    for name, logits_1T in zip(("logits", "causal"), logits, strict=True)
                }
            )
        predictor: dict[str, Any] = {}
        if router.predictor is not None:
            predictor = {
                "up": self._linear(router.predictor.up_proj),
                "down": self._linear(router.predictor.down_proj),
                "predictor_scale": self._at(router.predictor.router_scale),
                "predictor_eps": router.predictor.eps,
            }
        return CRouter(
            weight=self._at(router.proj.weight),
            eps=config.rms_norm_eps if config.router_norm else -1.0,
            threshold=self._at(router.threshold) if config.causal_router == "threshold" else None,
            **predictor,
        )


def _pointer(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
