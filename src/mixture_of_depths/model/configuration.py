"""The configuration of a Mixture-of-Depths transformer and of its baseline."""

import math
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from transformers import AutoConfig, PreTrainedConfig

from mixture_of_depths.fields import validate_fields
from mixture_of_depths.options import (
    Below1,
    CausalRouter,
    ExpertRoutingType,
    Fraction,
    NotNegative,
    Positive,
    RoutedPart,
    RouterActivation,
    RouterType,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_NUMBERS = (
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
)
# With these at None, transformers takes the value of the scaling's paper.
OPTIONAL_ROPE_NUMBERS = ("attention_factor", "beta_fast", "beta_slow")
Weight = Annotated[float, Ge(0)]
Capacity = Annotated[float, Gt(0), Le(1)]


class MoDConfig(PreTrainedConfig):
    """Llama-style decoder in which some blocks are routed: only the top-k tokens of a sequence enter them.

    The baseline transformer is the same model with `routed_layers=[]`. All fields are keyword arguments, and a
    configuration that cannot work is refused at construction.

    Args:
        vocab_size: number of entries of the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP; by default 8/3 of `hidden_size`, rounded up to a multiple of 64.
        num_hidden_layers: number of blocks, routed and dense.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads (grouped-query attention); by default as many as query
            heads.
        head_dim: width of a head; by default `hidden_size // num_attention_heads`.
        hidden_act: activation of the MLP's gate; only "silu" (SwiGLU).
        max_position_embeddings: longest sequence the model is meant for.
        rms_norm_eps: epsilon of the RMSNorms.
        rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0}` or one of transformers' scaled variants.
        attention_bias: whether the query, key, value and output projections have a bias.
        query_key_norm: whether queries and keys are RMS-normalised per head before RoPE. The norms' initial weights let
            a query score 16 with a key of its own direction, whatever the head's width.
        tie_word_embeddings: whether the head shares its weights with the embedding.
        initializer_range: standard deviation of the initial weights.
        use_cache: whether a causal forward pass outside training returns a key-value cache by default.
        routed_layers: indices of the routed blocks. When absent, built from the keyword arguments `route_every`
            (default 2) and `route_from` (default `route_every - 1`): blocks `route_from, route_from + route_every, …`.
            Routing every other block was best in the paper (section 4.1).
        capacity: fraction of the sequence that enters a routed block, one number or one per routed block; 0.125 was
            best in the paper. A sequence of S tokens, padding not counted, gives `max(1, floor(capacity * S))` places.
        routed_parts: what of a routed block tokens skip, one word or one per routed block: "block", all of it, as in
            the paper; "block_keep_keys", all but its keys and values, so that chosen tokens attend to every token
            before them; or "mlp", its MLP alone, while attention runs for every token. Equal words become one.
        bypass_rank: rank of the linear map of its normed hidden state that a token which skips takes in the place of
            the routed part; 0 for none, as in the paper.
        router_type: "learned", a linear projection; or "random", weights drawn from a Gaussian, the paper's
            stochastic control.
        router_activation: what is applied to the router's output before it scales the block's delta: "none" (the
            paper's equation 1), "sigmoid", "tanh", or "straight_through": a factor of 1, so that chosen tokens meet the
            block of a dense model unchanged, whose gradient by the router's weights is that of the router's output.
        router_norm: whether the router reads hidden states that are scaled to a root mean square of 1, as suits the
            large residual streams of pretrained models.
        first_token_enters: whether the token at position 0 of every sequence enters every routed block, whatever its
            weight, as suits pretrained attention, which rests on it where there is nothing to attend to
            (arXiv:2309.17453).
        causal_router: how a token decides without looking ahead whether it enters (section 3.5): "predictor", an MLP
            behind a stop-gradient; "auxiliary_loss", the router itself, trained to be positive for chosen tokens; or
            "threshold", the router's output against a running average of the top-k threshold, which is kept with the
            weights of every learned router and costs nothing.
        predictor_hidden_size: width of the predictor's MLP; by default `hidden_size // 8`, at least 16.
        predictor_loss_weight: factor of the predictor's cross-entropy in the loss. It does not reach the language
            model's weights, but counts in the norm by which gradients are clipped.
        auxiliary_loss_weight: factor of the router's cross-entropy in the loss.
        threshold_decay: how much of the running averages of where top-k and the experts' capacity cut is kept by a
            forward pass in training.
        router_seed: seed of the Gaussian weights of `router_type="random"` outside training.
        training_routing: how tokens are chosen in training mode: "top_k", as the paper trains; or "causal", as they are
            in sampling, for tuning against a reference that is computed outside training mode, such as DPO's. Under
            "causal" predictors, auxiliary losses and thresholds stay as they are. With "threshold" tokens enter as in
            sampling, too, by the running threshold, which goes on following where top-k would have cut (expert
            threshold, arXiv:2603.11535): how many enter is the capacity in the mean only. It needs `causal_router`
            "threshold", and neither experts nor gradient checkpointing.
        num_experts: number of SwiGLU experts of every block's MLP, each of `intermediate_size`; 1 is the dense MLP.
        num_experts_per_tok: number of experts that a token asks for; under expert choice, how many it gets on average
            at an `expert_capacity` of 1.
        expert_routing: "token_choice", a token asks for the experts it gives most weight; or "expert_choice", an expert
            takes the tokens that give it most.
        expert_capacity: how many tokens an expert takes at most, as a multiple of an even share of the sequence's,
            padding not counted; the others are dropped and keep their residual. None for no limit; expert choice needs
            one, by default 1.
        num_noop_experts: number of experts that do nothing, beside the others: a token that asks for one keeps its
            residual (integrated Mixture-of-Depths-and-Experts, section 4.3).
        noop_share: share of the choices that the balance loss wants to fall on the no-ops together.
        load_balance_loss_weight: factor of the experts' balance loss in the loss.
        expert_z_loss_weight: factor of the expert router's z-loss in the loss.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """

    model_type = "mixture_of_depths"
    # trl asks every configuration whose classes are not transformers' own for those that come with a checkpoint.
    auto_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cache",
        "lm_loss",
        "router_loss",
        "balance_loss",
        "expert_z_loss",
        "routing",
        "expert_routing",
    ]

    vocab_size: Positive = 4096
    hidden_size: Positive = 512
    intermediate_size: Positive | None = None
    num_hidden_layers: Positive = 8
    num_attention_heads: Positive = 8
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Positive = 2048
    rms_norm_eps: Fraction = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    query_key_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: Fraction = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    routed_layers: list[int] | None = None
    capacity: Capacity | list[Capacity] = 0.125
    routed_parts: RoutedPart | list[RoutedPart] = "block"
    bypass_rank: NotNegative = 0
    router_type: RouterType = "learned"
    router_activation: RouterActivation = "sigmoid"
    router_norm: bool = False
    first_token_enters: bool = False
    causal_router: CausalRouter = "predictor"
    predictor_hidden_size: Positive | None = None
    predictor_loss_weight: Weight = 0.1
    auxiliary_loss_weight: Weight = 0.01
    threshold_decay: Below1 = 0.99
    router_seed: NotNegative = 0
    training_routing: Literal["top_k", "causal", "threshold"] = "top_k"

    num_experts: Positive = 1
    num_experts_per_tok: Positive = 1
    expert_routing: ExpertRoutingType = "token_choice"
    expert_capacity: Annotated[float, Gt(0)] | None = None
    num_noop_experts: NotNegative = 0
    noop_share: Fraction = 0.5
    load_balance_loss_weight: Weight = 0.01
    expert_z_loss_weight: Weight = 0.001

    def __post_init__(self, **kwargs: Any) -> None:
        # The library keeps every keyword it does not know, and these would leave other blocks routed than was meant.
        for name, meant in (("every", "route_every"), ("offset", "route_from")):
            if name in kwargs:
                raise ValueError(f"{name}={kwargs[name]!r} is no field; give {meant}")
        route_every, route_from = kwargs.pop("route_every", None), kwargs.pop("route_from", None)
        if isinstance(self.capacity, int | float) and not 0 < self.capacity <= 1:
            raise ValueError(
                f"capacity={self.capacity} must be a share of the tokens, above 0 and at most 1; 0.125 is 12.5 %"
            )
        validate_fields(self)
        if self.intermediate_size is None:
            self.intermediate_size = 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; change one of them, or give MoDConfig a head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.predictor_hidden_size is None:
            self.predictor_hidden_size = max(16, self.hidden_size // 8)
        if self.expert_capacity is None and self.expert_routing == "expert_choice":
            self.expert_capacity = 1.0
        if self.routed_layers is None:
            self.routed_layers = self._layers_from(route_every, route_from)
        elif route_every is not None or route_from is not None:
            raise ValueError(
                f"routed_layers={self.routed_layers} was given together with route_every={route_every}, "
                f"route_from={route_from}; give either the list or route_every and route_from"
            )
        # What is inherited reads both before `validate` can look at them.
        self._validate_routed_layers()
        if isinstance(self.routed_parts, list) and len(set(self.routed_parts)) < 2:
            self.routed_parts = self.routed_parts[0] if self.routed_parts else "block"
        if not isinstance(self.rope_parameters, dict | None):
            raise ValueError(f"rope_parameters={self.rope_parameters!r} must be a mapping, such as of rope_theta")
        super().__post_init__(**kwargs)
        self.validate()

    def _layers_from(self, route_every: int | None, route_from: int | None) -> list[int]:
        route_every = 2 if route_every is None else route_every
        if not _is_integer(route_every) or route_every < 1:
            raise ValueError(
                f"route_every={route_every!r} must be an integer of at least 1; 2 routes every other block"
            )
        route_from = route_every - 1 if route_from is None else route_from
        if not _is_integer(route_from) or not 0 <= route_from < self.num_hidden_layers:
            raise ValueError(
                f"route_from={route_from!r} must be the index of a block, 0 to {self.num_hidden_layers - 1}; lower it, "
                "lower route_every, add blocks, or route none by routed_layers=[] (--no-routed)"
            )
        return list(range(route_from, self.num_hidden_layers, route_every))

    def validate(self) -> None:
        """Checks all fields, at construction and again before saving.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        validate_fields(self)
        assert self.num_key_value_heads is not None and self.head_dim is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, as RoPE rotates pairs; change head_dim")
        assert self.rope_parameters is not None
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters has rope_type={rope_type!r}; choose one of {', '.join(ROPE_TYPES)}")
        for name in ROPE_NUMBERS:
            value = self.rope_parameters.get(name, 1)
            if value is None and name in OPTIONAL_ROPE_NUMBERS:
                continue
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"rope_parameters has {name}={value!r}; give a positive number")
        self.validate_rope()
        self._validate_routed_layers()
        self._validate_experts()
        if self.training_routing == "threshold":
            self._validate_training_by_threshold()

    def _validate_routed_layers(self) -> None:
        layers, capacity = self.routed_layers, self.capacity
        assert layers is not None
        if layers != sorted(set(layers)):
            raise ValueError(f"routed_layers={layers} must be in rising order and without repeats")
        if layers and not (layers[0] >= 0 and layers[-1] < self.num_hidden_layers):
            raise ValueError(
                f"routed_layers={layers} names a block that is not there; with num_hidden_layers="
                f"{self.num_hidden_layers} the indices are 0 to {self.num_hidden_layers - 1}"
            )
        for name, values, one in (("capacity", capacity, "number"), ("routed_parts", self.routed_parts, "word")):
            if isinstance(values, list) and len(values) != len(layers):
                raise ValueError(
                    f"{name}={values} has {len(values)} entries for {len(layers)} routed blocks; give one {one}, or "
                    "one for each of routed_layers"
                )
        if self.bypass_rank > self.hidden_size:
            raise ValueError(
                f"bypass_rank={self.bypass_rank} is more than hidden_size={self.hidden_size}, the rank of any map of "
                "hidden states; lower it"
            )

    def _validate_training_by_threshold(self) -> None:
        # Experts' balance is learned, and their thresholds move, under top-k only.
        needed = {"causal_router": "threshold", "router_type": "learned", "num_experts": 1, "num_noop_experts": 0}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"training_routing='threshold' needs {name}={value!r}, not {getattr(self, name)!r}; change one of "
                    "them"
                )

    def _validate_experts(self) -> None:
        if self.num_experts_per_tok > self.num_experts + self.num_noop_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than the {self.num_experts} experts and "
                f"{self.num_noop_experts} no-ops there are; lower it"
            )
        capacity = self.expert_capacity
        if not self.has_experts:
            for name in (
                "expert_routing",
                "expert_capacity",
                "noop_share",
                "load_balance_loss_weight",
                "expert_z_loss_weight",
            ):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"{name}={getattr(self, name)!r} needs experts; give num_experts of at least 2")
        if self.expert_routing == "expert_choice" and capacity is None:
            raise ValueError("expert_capacity=None needs expert_routing='token_choice'; give a number, such as 1.0")
        if self.num_noop_experts and self.expert_routing == "expert_choice":
            raise ValueError(
                f"num_noop_experts={self.num_noop_experts} needs expert_routing='token_choice': a token that no expert "
                "chooses keeps its residual already"
            )
        if self.num_noop_experts:
            # A token asks for different ones.
            per_token = self.num_experts_per_tok
            least, most = (
                1 - min(self.num_experts, per_token) / per_token,
                min(self.num_noop_experts, per_token) / per_token,
            )
            if not least <= self.noop_share <= most:
                raise ValueError(
                    f"noop_share={self.noop_share} cannot be reached: with num_experts={self.num_experts}, "
                    f"num_noop_experts={self.num_noop_experts} and num_experts_per_tok={per_token} it lies between "
                    f"{least:.3g} and {most:.3g}"
                )

    def changed(self, **fields: Any) -> "MoDConfig":
        """A configuration that differs from this one in the given fields.

        Raises:
            ValueError: when it cannot work.
        """
        own = {name: value for name, value in self.to_dict().items() if name in self.__dataclass_fields__}
        return MoDConfig(**{**own, **fields})

    @property
    def has_experts(self) -> bool:
        """Whether blocks have a mixture of experts in the place of their MLP."""
        return self.num_experts > 1 or self.num_noop_experts > 0

    @property
    def looks_ahead(self) -> bool:
        """Whether top-k routing differs from causal routing: blocks are routed, or experts have a capacity."""
        return bool(self.routed_layers) or self.expert_capacity is not None

    @property
    def causal_routers(self) -> tuple[CausalRouter, ...]:
        """The causal decisions a trained model can make: the one it was trained for, first, and the threshold."""
        if not self.routed_layers or self.router_type == "random":
            return ()
        return tuple(dict.fromkeys((self.causal_router, "threshold")))

    @property
    def router_loss_weight(self) -> float:
        """The factor in the loss of the routers' cross-entropy against the top-k choice."""
        return self.predictor_loss_weight if self.causal_router == "predictor" else self.auxiliary_loss_weight

    @property
    def target_noop_share(self) -> float:
        """The share of the choices that should fall on no-ops; 0 without any."""
        return self.noop_share if self.num_noop_experts else 0.0

    @property
    def most_experts_per_token(self) -> int:
        """The largest number of experts that can take one token."""
        if self.expert_routing == "expert_choice":
            return self.num_experts
        return min(self.num_experts, self.num_experts_per_tok)

    @property
    def expert_fraction(self) -> float:
        """The fraction of a sequence's tokens that an expert takes at most under top-k routing, with a capacity."""
        assert self.expert_capacity is not None
        return self.expert_capacity * self.num_experts_per_tok / self.num_experts

    def expert_places(self, tokens: int) -> int:
        """The number of tokens of a sequence that an expert takes at most under top-k routing, with a capacity."""
        return min(tokens, capacity_tokens(self.expert_fraction, tokens))

    def expert_rows(self, tokens: int) -> int:
        """The number of products of an expert and a token of a sequence, at most, under top-k routing."""
        asked = tokens * self.most_experts_per_token
        return asked if self.expert_capacity is None else min(asked, self.num_experts * self.expert_places(tokens))

    @property
    def layer_types(self) -> list[str]:
        """The kind of cache each block needs, read by transformers when it builds a cache for `generate()`."""
        return [
            "mixture_of_depths_routed" if self.routed_part(layer) == "block" else "full_attention"
            for layer in range(self.num_hidden_layers)
        ]

    def routed_part(self, layer_idx: int) -> RoutedPart | None:
        """What of block `layer_idx` tokens skip; None for a dense block."""
        assert self.routed_layers is not None
        if layer_idx not in self.routed_layers:
            return None
        if isinstance(self.routed_parts, list):
            return self.routed_parts[self.routed_layers.index(layer_idx)]
        return self.routed_parts

    def capacity_fraction(self, layer_idx: int) -> float:
        """The fraction of tokens that enters block `layer_idx`: its capacity, or 1 for a dense block."""
        assert self.routed_layers is not None
        if layer_idx not in self.routed_layers:
            return 1.0
        if isinstance(self.capacity, list):
            return self.capacity[self.routed_layers.index(layer_idx)]
        return self.capacity

    def capacity_tokens(self, layer_idx: int, sequence_length: int) -> int:
        """The number of tokens of a sequence that enters block `layer_idx` under top-k routing."""
        return capacity_tokens(self.capacity_fraction(layer_idx), sequence_length)

    def check_length(self, sequence_length: int) -> None:
        """Raises ValueError for sequences longer than the model has positions."""
        if sequence_length > self.max_position_embeddings:
            raise ValueError(
                f"sequence_length={sequence_length} is more than the model's max_position_embeddings="
                f"{self.max_position_embeddings}; give a shorter one"
            )


def capacity_tokens(fraction: float, sequence_length: int) -> int:
    """The number of tokens of a sequence that `fraction` stands for; at least one."""
    # The small term keeps products such as 0.29 * 100 from falling just below a whole number.
    return max(1, math.floor(fraction * sequence_length + 1e-9))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


AutoConfig.register(MoDConfig.model_type, MoDConfig)
