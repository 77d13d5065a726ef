"""The Mixture-of-Depths transformer: a Llama-style decoder in which some blocks are routed.

The baseline is the same model with `routed_layers=[]`, and its parameters carry Llama's names. Training, evaluation
and sampling all run this file; `attention.py` holds attention, `routing.py` the choice of tokens, `experts.py` that of
experts, `cache.py` the keys and values of the past.

Shapes: B batch, T tokens given, S tokens known (past and given), K chosen tokens per row, R rows of which tokens are
chosen, D hidden size, V vocabulary. A slot is a token's place in the padded row (see `cache.py`).
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import ModelOutput, can_return_tuple

from mixture_of_depths.files import follow_umask
from mixture_of_depths.model.attention import Attention, HeadNorm, Placement, rotary_factors, visible
from mixture_of_depths.model.cache import EMPTY, MoDCache, RoutedCacheLayer
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.experts import ExpertMLP, ExpertRouter, ExpertRouting, GroupedLinear
from mixture_of_depths.model.loss import chunked_loss, float64_loss, next_tokens
from mixture_of_depths.model.packed import Packing, documents_of, packed_positions, runs_fused
from mixture_of_depths.model.routing import (
    Bypass,
    LayerRouting,
    PreciseLinear,
    Predictor,
    Router,
    Routing,
    Selection,
    ZeroLinear,
    add_weighted,
    gather_tokens,
    with_loss,
)

# The one that accelerate keeps for the process. The compiler of torch before 2.13 cannot trace how one is made.
GRADIENT_STATE = GradientState()


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_BTD)) * self.up_proj(hidden_BTD))


class DecoderLayer(GradientCheckpointingLayer):
    """One block, attention and MLP with their norms; routed when the configuration lists it in `routed_layers`.

    What of it is routed, `routed_parts` says; `routing.py` has the equations.
    """

    def __init__(self, config: MoDConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.routed_layers is not None
        self.config = config
        self.layer_idx = layer_idx
        self.self_attn = Attention(config, layer_idx)
        self.mlp = ExpertMLP(config) if config.has_experts else MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.part = config.routed_part(layer_idx)
        self.router = Router(config, layer_idx) if self.part else None
        self.bypass = Bypass(config) if self.part and config.bypass_rank else None

    def delta(
        self, hidden_BTD: Tensor, placement: Placement, past: Cache | None, routing: Routing
    ) -> tuple[Tensor, ExpertRouting | None]:
        """What the block adds to the residual stream of the tokens it is given: f(X) of the paper's equation 1."""
        attended_BTD = self.self_attn(self.input_layernorm(hidden_BTD), placement, past)
        mlp_BTD, expert_routing = self.mlp_delta(hidden_BTD + attended_BTD, placement.real, routing)
        return attended_BTD + mlp_BTD, expert_routing

    def mlp_delta(
        self, hidden_BTD: Tensor, real_BT: Tensor | None, routing: Routing
    ) -> tuple[Tensor, ExpertRouting | None]:
        """What the MLP, or its experts, add to the residual stream."""
        normed_BTD = self.post_attention_layernorm(hidden_BTD)
        return self.mlp(normed_BTD, real_BT, routing) if self.config.has_experts else (self.mlp(normed_BTD), None)

    def chosen_delta(
        self, hidden_BTD: Tensor, selection: Selection, placement: Placement, past: Cache | None, routing: Routing
    ) -> tuple[Tensor, ExpertRouting | None]:
        """What the routed part adds to the residual stream of the chosen tokens, of shape [R, K, D]."""
        chosen_RKD = gather_tokens(hidden_BTD, selection)
        if self.part == "block":
            return self.delta(chosen_RKD, placement.of(selection, hidden_BTD.shape[0]), past, routing)
        if self.part == "mlp":
            return self.mlp_delta(chosen_RKD, selection.valid_RK, routing)
        attended_RKD = self.self_attn(self.input_layernorm(hidden_BTD), placement, past, selection)
        mlp_RKD, expert_routing = self.mlp_delta(chosen_RKD + attended_RKD, selection.valid_RK, routing)
        return attended_RKD + mlp_RKD, expert_routing

    @property
    def part_norm(self) -> nn.RMSNorm:
        """The norm with which the routed part begins."""
        return self.post_attention_layernorm if self.part == "mlp" else self.input_layernorm

    def bypassed(self, hidden_BTD: Tensor, entered_BT: Tensor) -> Tensor:
        """The residual stream, with what the tokens that skip take in the place of the routed part."""
        if self.bypass is None:
            return hidden_BTD
        return hidden_BTD + self.bypass(self.part_norm(hidden_BTD), entered_BT).to(hidden_BTD.dtype)

    def forward(
        self,
        hidden_BTD: Tensor,
        placement: Placement,
        position_BT: Tensor,
        routing: Routing,
        cache: Cache | None,
        factor: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, LayerRouting | None, ExpertRouting | None]:
        """Returns the hidden states, what the routers add to the loss, and what they decided.

        The loss lies outside the decisions and hangs on the hidden states as well: reentrant checkpointing follows only
        tensors that are returned by themselves, and whoever computes a loss from logits does not see it. It then counts
        `factor` times, which is needed under top-k routing alone.
        """
        layer_routing = None
        if self.router is None:
            delta_BTD, expert_routing = self.delta(hidden_BTD, placement, cache, routing)
            hidden_BTD, loss = self.tie_loss(hidden_BTD, None, expert_routing, factor)
            hidden_BTD = hidden_BTD + delta_BTD
        else:
            if self.part == "mlp":
                attended_BTD = self.self_attn(self.input_layernorm(hidden_BTD), placement, cache)
                hidden_BTD = hidden_BTD + attended_BTD
            selection, layer_routing = self.router(hidden_BTD, position_BT, placement.real, routing)
            bypassed_BTD = self.bypassed(hidden_BTD, layer_routing.entered)
            if cache is not None and self.part == "block":
                cast(RoutedCacheLayer, cache.layers[self.layer_idx]).see(hidden_BTD)
            if selection.index_RK.shape[1] == 0:
                if cache is not None and self.part == "block_keep_keys":
                    self.self_attn(self.input_layernorm(hidden_BTD), placement, cache, selection)
                return bypassed_BTD, None, layer_routing, None
            delta_RKD, expert_routing = self.chosen_delta(hidden_BTD, selection, placement, cache, routing)
            weight_RK = self.router.gate(gather_tokens(layer_routing.router_logits, selection))
            hidden_BTD, loss = self.tie_loss(bypassed_BTD, layer_routing, expert_routing, factor)
            hidden_BTD = add_weighted(hidden_BTD, selection, delta_RKD, weight_RK)
        return hidden_BTD, loss, layer_routing, expert_routing

    def tie_loss(
        self,
        hidden_BTD: Tensor,
        layer_routing: LayerRouting | None,
        expert_routing: ExpertRouting | None,
        factor: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream, to which the block's result is still to be added, tied to the routers' loss, and that.

        Not after the sum: hooks may change in place what the block returns, which they may not do to tied tensors.
        """
        loss = self.routers_loss(layer_routing, expert_routing)
        if loss is None:
            return hidden_BTD, None
        assert factor is not None
        return with_loss(hidden_BTD, loss, factor)

    def routers_loss(self, layer_routing: LayerRouting | None, expert_routing: ExpertRouting | None) -> Tensor | None:
        """What this block's routers add to the loss: its share of the weighted means over blocks, or None."""
        config, total = self.config, None
        if layer_routing is not None and layer_routing.loss is not None:
            assert config.routed_layers is not None
            total = layer_routing.loss * (config.router_loss_weight / len(config.routed_layers))
        if expert_routing is not None:
            for weight, part in (
                (config.load_balance_loss_weight, expert_routing.balance_loss),
                (config.expert_z_loss_weight, expert_routing.z_loss),
            ):
                if part is not None:
                    part = part * (weight / config.num_hidden_layers)
                    total = part if total is None else total + part
        return total


class OutputWithCache(ModelOutput):
    """An output whose cache is also found under the name that transformers before 5.24 looks for."""

    cache: Cache | None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


@dataclass
class MoDModelOutput(OutputWithCache):
    """Output of `MoDModel`: the base model's fields, and what the routers decided.

    Attributes:
        last_hidden_state (torch.Tensor): the residual stream after the final norm; of shape [B, T, D].
        cache (Cache | None): keys and values of past tokens; None without `use_cache`.
        hidden_states: the residual stream before each block and after the final norm; with `output_hidden_states=True`.
        routers_loss (torch.Tensor | None): sum of what the blocks' routers add to the loss; None under causal routing
            and where they add nothing. Its gradient reaches them in any backward pass through the hidden states: with
            the factor that it has in the loss, or once an optimiser step where it is no part of it.
        routing: one `LayerRouting` a block, None for dense ones.
        expert_routing: one `ExpertRouting` a block, None where there are no experts or no token entered.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    routers_loss: Tensor | None = None
    routing: tuple[LayerRouting | None, ...] | None = None
    expert_routing: tuple[ExpertRouting | None, ...] | None = None


@dataclass
class MoDCausalLMOutput(OutputWithCache):
    """Output of `MoDForCausalLM`.

    Attributes:
        loss (torch.Tensor): the language model's loss plus the weighted losses of the routers; given with labels.
        logits (torch.Tensor): of shape [B, T, V], or of the positions asked for; None with `skip_logits=True`.
        cache (Cache | None): keys and values of past tokens; None without `use_cache`.
        hidden_states: the residual stream before each block and after the final norm; with `output_hidden_states=True`.
        lm_loss (torch.Tensor): mean cross-entropy of the next token, in nats.
        router_loss (torch.Tensor): the blocks' mean cross-entropy of the causal decision against the top-k choice,
            unweighted and without a gradient of its own; given with labels under top-k routing.
        balance_loss, expert_z_loss (torch.Tensor): the blocks' mean losses of the expert routers, unweighted and
            without a gradient of their own; given with labels under top-k routing.
        routing: one `LayerRouting` a block, None for dense ones; given with `output_routing=True`.
        expert_routing: one `ExpertRouting` a block, None where there is none; given with `output_routing=True`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    router_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    expert_z_loss: Tensor | None = None
    routing: tuple[LayerRouting | None, ...] | None = None
    expert_routing: tuple[ExpertRouting | None, ...] | None = None


class MoDPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, by transformers."""

    config: MoDConfig
    config_class = MoDConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _keep_in_fp32_modules_strict = ["router"]
    _supports_sdpa = True

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        follow_umask(Path(save_directory).glob("*.safetensors"))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Predictor):
            init.ones_(module.router_scale)
        if isinstance(module, HeadNorm):
            init.constant_(module.weight, module.initial_weight())
        if isinstance(module, Router) and not module.is_random:
            init.zeros_(module.threshold)
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        if isinstance(module, GroupedLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, ExpertRouter) and module.threshold is not None:
            init.zeros_(module.threshold)


class MoDModel(MoDPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MoDConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        routing: Routing | None = None,
        **kwargs: Any,
    ) -> MoDModelOutput:
        """Runs all blocks; see `MoDForCausalLM.forward` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions=True is not supported: attention weights are never materialised")
        routing = self._resolve_routing(routing)
        if self.training and self.config.training_routing == "threshold" and self.gradient_checkpointing:
            # It runs blocks again after their thresholds have moved, with other tokens.
            raise ValueError(
                "training_routing='threshold' cannot be used with gradient checkpointing; switch that off, or train by "
                "training_routing='top_k'"
            )
        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        position_ids, documents_BT, packing = self._documents(
            hidden_BTD, attention_mask, position_ids, kwargs.get("cu_seq_lens_q")
        )
        if use_cache is None:
            use_cache = self.config.use_cache and routing == "causal" and not self.training and documents_BT is None
        self._check_cache(cache)
        if routing == "top_k" and (use_cache or cache is not None):
            raise ValueError(
                "routing='top_k' looks ahead and cannot be used with a cache; use routing='causal', or use_cache=False "
                "and no cache"
            )
        if documents_BT is not None and (use_cache or cache is not None):
            raise ValueError(
                "position_ids start again within the row: documents packed in one row cannot be used with a cache; "
                "give use_cache=False, or one document a row"
            )
        if cache is None and use_cache:
            cache = MoDCache(config=self.config)

        past_length = cache.get_seq_length() if cache is not None else 0
        position_BT, placement = self._place(
            hidden_BTD, attention_mask, position_ids, documents_BT, packing, past_length
        )
        factor = None
        if routing == "top_k":
            factor = torch.full((), 1.0 if self.training and ends_step() else 0.0, device=hidden_BTD.device)
        layer_routings, expert_routings, hidden_states, losses = [], [], [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(hidden_BTD)
            hidden_BTD, loss, layer_routing, expert_routing = layer(
                hidden_BTD, placement=placement, position_BT=position_BT, routing=routing, cache=cache, factor=factor
            )
            if loss is not None:
                losses.append(loss)
            layer_routings.append(layer_routing)
            expert_routings.append(expert_routing)
            # Outside the block, which gradient checkpointing may run twice.
            self._follow(cast(DecoderLayer, layer), layer_routing, expert_routing)
        hidden_BTD = self.norm(hidden_BTD)
        if output_hidden_states:
            hidden_states.append(hidden_BTD)
        return MoDModelOutput(
            last_hidden_state=hidden_BTD,
            cache=cache,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            # Blocks may lie on several devices.
            routers_loss=torch.stack([loss.to(hidden_BTD.device) for loss in losses]).sum() if losses else None,
            routing=tuple(layer_routings),
            expert_routing=tuple(expert_routings),
        )

    @torch.no_grad()
    def _follow(
        self, layer: DecoderLayer, layer_routing: LayerRouting | None, expert_routing: ExpertRouting | None
    ) -> None:
        """Moves the running averages of the thresholds towards where top-k and the experts' capacity cut.

        Those of frozen routers, and of routers of which only parts are trained in the place of the model's own, stay
        with the weights they belong to: adapters keep no buffers but of modules that they keep whole.
        """
        moved = []
        if layer_routing is not None and layer_routing.boundary is not None:
            assert layer.router is not None
            moved.append((layer.router, layer_routing.boundary))
        if expert_routing is not None and expert_routing.boundary is not None:
            moved.append((cast(ExpertMLP, layer.mlp).router, expert_routing.boundary))
        for router, boundary in moved:
            if isinstance(router.proj, PreciseLinear) and router.proj.weight.requires_grad:
                threshold = router.threshold
                boundary = torch.where(boundary.isfinite(), boundary.to(threshold.dtype), threshold)
                moved_to = threshold.lerp(boundary, 1 - self.config.threshold_decay)
                if self.config.training_routing == "threshold":
                    # At the 0 of a new router half of the tokens would enter, until the average has come down.
                    moved_to = torch.where(threshold == 0, boundary, moved_to)
                threshold.copy_(moved_to)

    def _resolve_routing(self, routing: str | None) -> Routing:
        if routing is None:
            return "top_k" if self.training and self.config.training_routing == "top_k" else "causal"
        if routing not in ("top_k", "causal"):
            raise ValueError(f"routing={routing!r} is unknown; choose 'top_k' or 'causal'")
        return cast(Routing, routing)

    def _check_cache(self, past: Cache | None) -> None:
        if past is None or not self.config.routed_layers:
            return
        layers = past.layers
        routed = [i for i, layer in enumerate(layers) if isinstance(layer, RoutedCacheLayer)]
        expected = [i for i, kind in enumerate(self.config.layer_types) if kind == RoutedCacheLayer._layer_type]
        if routed != expected or len(layers) != self.config.num_hidden_layers:
            raise ValueError(
                f"cache={type(past).__name__} has routed layers {routed} where this model has "
                f"{expected}; build it with MoDCache(config=model.config), which prefix tuning cannot"
            )

    def _documents(
        self,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Packing | None]:
        """Positions as far as they are given, which document of its row a token belongs to, and where documents lie.

        The second is None when no row holds several, the third where they attend under a mask. With an attention mask
        positions start again for padding, too, so that documents are told apart without one.
        """
        batch_size, num_tokens = hidden_BTD.shape[:2]
        if position_ids is not None or attention_mask is not None:
            cu_seq_lens = None
        if cu_seq_lens is not None:
            position_ids = packed_positions(cu_seq_lens, num_tokens)
        if position_ids is not None and position_ids.shape not in ((batch_size, num_tokens), (1, num_tokens)):
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected {(batch_size, num_tokens)}")
        if attention_mask is not None or position_ids is None or num_tokens == 1:
            return position_ids, None, None
        documents_BT, packing = documents_of(position_ids, batch_size, cu_seq_lens)
        assert self.config.head_dim is not None
        facts = (batch_size * num_tokens, hidden_BTD.device, hidden_BTD.dtype, self.config.head_dim)
        if packing is not None and not runs_fused(packing, *facts):
            packing = None
        return position_ids, documents_BT, packing

    def _place(
        self,
        hidden_BTD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        documents_BT: Tensor | None,
        packing: Packing | None,
        past_length: int,
    ) -> tuple[Tensor, Placement]:
        """Positions and the placement of the given tokens."""
        num_tokens, device = hidden_BTD.shape[1], hidden_BTD.device
        known_BS = None
        if attention_mask is not None:
            expected = (hidden_BTD.shape[0], past_length + num_tokens)
            if attention_mask.shape != expected:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected {expected}: batch size, and the "
                    "tokens in the cache plus those given"
                )
            known_BS = attention_mask.bool()
            # Without padding the fused causal attention serves; a compiled graph cannot look at the data.
            if not torch.compiler.is_compiling() and bool(known_BS.all()):
                known_BS = None

        slots_1S = torch.arange(past_length + num_tokens, device=device)[None]
        if position_ids is not None:
            position_BT = position_ids
        elif known_BS is not None:
            position_BT = (known_BS.cumsum(dim=1) - 1).clamp(min=0)[:, past_length:]
        else:
            position_BT = slots_1S[:, past_length:]
        key_slots_BS = slots_1S if known_BS is None else slots_1S.masked_fill(~known_BS, EMPTY)
        slots_BT = key_slots_BS[:, past_length:]
        mask = None
        is_unfused = documents_BT is not None and packing is None
        if known_BS is not None or is_unfused or (past_length > 0 and num_tokens > 1):
            mask = visible(slots_BT, key_slots_BS, documents_BT, documents_BT)
        cos_BTh, sin_BTh = rotary_factors(self.config, position_BT, hidden_BTD.dtype)
        real_BT = None if known_BS is None else known_BS[:, past_length:]
        return position_BT, Placement(cos_BTh, sin_BTh, slots_BT, documents_BT, mask, real_BT, packing=packing)


class MoDForCausalLM(MoDPreTrainedModel, GenerationMixin):
    """The language model: `MoDModel` and a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: MoDConfig) -> None:
        super().__init__(config)
        self.model = MoDModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        routing: Routing | None = None,
        output_routing: bool = False,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> MoDCausalLMOutput:
        """Predicts the next token at every position.

        Args:
            input_ids (torch.Tensor): of shape [B, T].
            attention_mask (torch.Tensor): 0 for padding; of shape [B, S], past tokens included.
            position_ids (torch.Tensor): of shape [B, T]. Without an attention mask, documents packed in one row are
                told apart by their positions: wherever a position is not the one before plus one, a new document
                starts, and attention stops there.
            cache (Cache): keys and values of past tokens, as returned by an earlier call.
            inputs_embeds (torch.Tensor): instead of `input_ids`; of shape [B, T, D].
            labels (torch.Tensor): the tokens themselves, -100 where no loss is wanted; of shape [B, T].
            use_cache: whether to return a cache; by default only under causal routing outside training.
            output_attentions: not supported; must be false.
            output_hidden_states: whether to return the residual stream before each block and after the final norm.
            logits_to_keep: how many last positions to compute logits for, 0 for all; or the positions, of shape [N], or
                [B, N] where each row has its own; or True where logits are wanted, of shape [B, T].
            num_items_in_batch: number of labels the loss is averaged over, when a batch is given in several parts; the
                routers' losses then count by this part's share of them.
            routing: "top_k" or "causal"; by default "top_k" in training mode and "causal" outside it.
            output_routing: whether to return each block's routing.
            skip_logits: whether to leave out the logits, of which the loss then needs only some at a time; it needs
                labels.
            kwargs: `cu_seq_lens_q`, where the documents packed in one row begin and end, of shape [documents + 1], in
                the place of `position_ids`; `shift_labels`, the labels already shifted; `loss_from_hidden`, in the
                place of `chunked_loss` where logits are left out. Others are ignored, as Llama does.

        Raises:
            ValueError: for arguments that contradict one another or a mask of another shape.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True needs labels: without a loss and logits nothing is left to return")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            routing=routing,
            cu_seq_lens_q=kwargs.get("cu_seq_lens_q"),
            return_dict=True,
        )
        hidden_BTD = outputs.last_hidden_state
        logits_BTV = loss = lm_loss = router_loss = balance_loss = z_loss = None
        if not (skip_logits and self._head_is_plain(hidden_BTD.device)):
            if "loss_from_hidden" in kwargs:
                raise ValueError("loss_from_hidden needs skip_logits=True, and a head without adapters, bias or hooks")
            logits_BTV = self.lm_head(at_positions(hidden_BTD, logits_to_keep))
        if labels is not None:
            target_BT = kwargs.get("shift_labels")
            if target_BT is None:
                target_BT = next_tokens(labels, attention_mask)
            if logits_BTV is None:
                loss_from_hidden = kwargs.get("loss_from_hidden", chunked_loss)
                lm_loss = loss_from_hidden(hidden_BTD, self.lm_head.weight, target_BT, num_items_in_batch)
            elif logits_BTV.dtype == torch.float64 and self.loss_function is ForCausalLMLoss:
                # The library's own computes in float32.
                lm_loss = float64_loss(logits_BTV, target_BT, num_items_in_batch)
            else:
                lm_loss = self.loss_function(
                    logits=logits_BTV,
                    labels=None,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=target_BT,
                )
            loss = lm_loss
            if outputs.routers_loss is not None:
                share = 1.0
                if num_items_in_batch is not None:
                    share = (target_BT != -100).sum().to(loss.dtype) / num_items_in_batch
                loss = loss + share * outputs.routers_loss
            router_loss = _mean_over_blocks([layer.loss for layer in outputs.routing if layer is not None])
            experts = [layer for layer in outputs.expert_routing if layer is not None]
            balance_loss = _mean_over_blocks([layer.balance_loss for layer in experts])
            z_loss = _mean_over_blocks([layer.z_loss for layer in experts])
        return MoDCausalLMOutput(
            loss=loss,
            logits=None if skip_logits else logits_BTV,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            lm_loss=lm_loss,
            router_loss=router_loss,
            balance_loss=balance_loss,
            expert_z_loss=z_loss,
            routing=outputs.routing if output_routing else None,
            expert_routing=outputs.expert_routing if output_routing else None,
        )

    def _head_is_plain(self, device: torch.device) -> bool:
        """Whether the head's weight says all that it does: no adapter, no bias, no hook, and on this device."""
        head = self.lm_head
        hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
        return type(head) is nn.Linear and head.bias is None and head.weight.device == device and not any(hooks)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Sampling never looks ahead, whatever mode the module is in."""
        # What transformers before 5.24 calls the cache, here and in `generate()`.
        if past_key_values is not None:
            if "cache" in kwargs:
                raise ValueError("cache= is past_key_values= in generate() of transformers before 5.24; give it so")
            kwargs["past_key_values"] = past_key_values
        # The mixin annotates itself with a private protocol that no public class satisfies.
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, inputs_embeds=inputs_embeds, **kwargs
        )
        if "past_key_values" in inputs:
            inputs["cache"] = inputs.pop("past_key_values")
        return {"routing": "causal", **inputs}

    def _prepare_static_cache(self, cache_implementation: str, *args: Any, **kwargs: Any) -> Cache:
        raise ValueError(
            f"cache_implementation={cache_implementation!r} has room for every token, and a routed block keeps only "
            "those that enter; leave it out, or sample with stream(..., compiled=True), whose buffers are static"
        )


def ends_step() -> bool:
    """Whether the gradients of this pass complete those of an optimiser step, as accelerate and its trainers say.

    A loss that a trainer does not see is not averaged over the parts of a batch either: it is taken on the last one.
    A compiled graph is guarded by the answer, so that there are two of them.
    """
    return GRADIENT_STATE.sync_gradients


def at_positions(hidden_BTD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states whose logits are wanted; transformers has this as a function from 5.21 on.

    Args:
        hidden_BTD (torch.Tensor): of shape [B, T, D].
        logits_to_keep (int | torch.Tensor): as in `MoDForCausalLM.forward`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_BTD[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool:
        return hidden_BTD[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return hidden_BTD.take_along_dim(logits_to_keep[..., None], dim=1)
    return hidden_BTD[:, logits_to_keep]


def _mean_over_blocks(losses: list[Tensor | None]) -> Tensor | None:
    present = [loss for loss in losses if loss is not None]
    return torch.stack([loss.detach().to(present[0].device) for loss in present]).mean() if present else None


AutoModel.register(MoDConfig, MoDModel)
AutoModelForCausalLM.register(MoDConfig, MoDForCausalLM)
# Where the library's trainer looks whether labels are to be shifted before it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MoDConfig.model_type] = MoDForCausalLM.__name__
