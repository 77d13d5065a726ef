"""The options of a run, shared by the command line and by Python; a field's docstring is also its help text.

This file imports nothing heavy, so that the command line can describe itself at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Len, Lt

from mixture_of_depths.fields import make_plain, refuse_without_use, validate_fields

BUILTIN = "builtin"

Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Below1 = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Ge(0), Le(1)]

RouterType = Literal["learned", "random"]
RouterActivation = Literal["none", "sigmoid", "tanh", "straight_through"]
CausalRouter = Literal["predictor", "auxiliary_loss", "threshold"]
RoutedPart = Literal["block", "block_keep_keys", "mlp"]
ExpertRoutingType = Literal["token_choice", "expert_choice"]
Precision = Literal["fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]
Packing = Literal["cut", "best_fit"]


@dataclass(frozen=True)
class DataOptions:
    """Where the text comes from and how it is cut into sequences."""

    data: tuple[str, ...] = (BUILTIN,)
    """Text to train on, one source or several. A source is "builtin" (the Python standard library's own source); a
    file, folder or glob of .txt, .md, .py, .jsonl, .json.gz and .parquet (also .gz and .zst); .bin of tokens; hub:NAME,
    a data set of the Hugging Face hub, which is streamed; or a folder of `mod prepare`. To mix several by weights,
    write the weight after each, as in a:0.7 b:0.3. In .jsonl, records of "messages" are conversations, cut with the
    tokenizer's chat template."""
    text_column: str = "text"
    """Field or column that holds the text in .jsonl, .parquet and hub data; dots lead into others, as in meta.text."""
    split: str = "train"
    """Split of a hub data set."""
    max_characters: Positive | None = None
    """Stop reading after this many characters; needed for a hub data set that is larger than the disk."""
    tokenizer: str | None = None
    """Folder of a tokenizer to use; by default a byte-level BPE is trained on the text."""
    vocab_size: Annotated[int, Lt(2**24)] | None = None
    """Entries of the tokenizer that is trained; by default 4096."""
    sequence_length: Annotated[int, Ge(2)] = 256
    """Tokens per sequence."""
    packing: Packing = "cut"
    """How documents become sequences: cut one after another, or packed by best fit so that few of them are cut."""
    validation_fraction: Fraction = 0.04
    """Share of the documents that is held out; which ones is decided by their content."""
    cache_dir: Path = field(default_factory=lambda: Path.home() / ".cache" / "mixture_of_depths")
    """Where prepared text is kept, under a name made from its content."""


@dataclass(frozen=True)
class ModelOptions:
    """Size of the model and what is routed; fields as in `MoDConfig`."""

    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 6
    """Number of blocks."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_key_value_heads: int | None = None
    """Number of key and value heads; by default as many as query heads."""
    intermediate_size: int | None = None
    """Width of the MLP; by default 8/3 of the hidden size."""
    query_key_norm: bool = False
    """Whether queries and keys are normalised, head by head."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths, of which the longest is nearly 2 pi times it; models of short sequences learn to copy
    sooner with a lower one."""
    tie_word_embeddings: bool = False
    """Whether the head shares its weights with the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    routed: bool = True
    """Whether any block is routed; --no-routed gives the baseline."""
    routed_layers: tuple[int, ...] | None = None
    """Indices of the routed blocks, instead of route_every and route_from."""
    route_every: int | None = None
    """Route one block in this many; by default 2."""
    route_from: int | None = None
    """Index of the first routed block; by default route_every - 1."""
    capacity: tuple[float, ...] = (0.125,)
    """Fraction of the tokens that enters a routed block; one number, or one per routed block."""
    routed_parts: Annotated[tuple[RoutedPart, ...], Len(1)] = ("block",)
    """What of a routed block a token skips: all of it, all but its key and value, or the MLP alone; one word, or one
    per routed block."""
    bypass_rank: NotNegative = 0
    """Rank of the map that a token which skips takes in the place of what it skips; 0 for none."""
    router_type: RouterType = "learned"
    """Learned routing; or random routing, as a control."""
    router_activation: RouterActivation = "sigmoid"
    """What is applied to the router's output before it scales the block's delta."""
    causal_router: CausalRouter = "predictor"
    """How a token decides in sampling whether it enters."""
    training_routing: Literal["top_k", "threshold"] = "top_k"
    """How tokens are chosen in training: the capacity's number of each sequence; or, with the causal router threshold,
    those above a running threshold, as in sampling."""
    predictor_hidden_size: int | None = None
    """Width of the predictor's MLP; by default an eighth of the hidden size."""
    num_experts: int = 1
    """Experts of every block's MLP, each of the MLP's width; 1 is the dense MLP."""
    num_experts_per_tok: int = 1
    """Experts that a token asks for."""
    expert_routing: ExpertRoutingType = "token_choice"
    """Whether tokens choose experts or experts tokens."""
    expert_capacity: float | None = None
    """Most tokens that an expert takes, as a multiple of an even share; by default no limit, 1 under expert choice."""
    num_noop_experts: int = 0
    """Experts that do nothing, beside the others: integrated Mixture-of-Depths-and-Experts."""
    noop_share: float = 0.5
    """Share of the choices that the balance loss wants to fall on the no-ops."""
    load_balance_loss_weight: float = 0.01
    """Factor of the experts' balance loss in the loss."""
    expert_z_loss_weight: float = 0.001
    """Factor of the expert router's z-loss in the loss."""


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained. Give exactly one of max_steps, max_tokens and max_flops."""

    max_steps: Positive | None = None
    """Length of the run in optimiser steps."""
    max_tokens: Annotated[float, Gt(0), Lt(1e30)] | None = None
    """Length of the run in tokens; rounded down to whole steps."""
    max_flops: Annotated[float, Gt(0), Lt(1e30)] | None = None
    """Length of the run in training FLOPs, such as 1e13; rounded down to whole steps."""
    batch_size: Positive = 16
    """Sequences per optimiser step, of all processes together."""
    gradient_accumulation_steps: Positive = 1
    """Number of parts each process computes its share of a batch in; must divide it."""
    optimizer: OptimizerName = "adamw"
    """What steps are taken: AdamW's; or, of the blocks' matrices, Muon's, which cost more."""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """Highest learning rate, after the warm-up; it then falls along a cosine to a tenth."""
    warmup_fraction: Below1 = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Weight decay; never applied to routers, norms and biases."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients are scaled down to this norm."""
    precision: Precision = "fp32"
    """Precision of the matrix products: fp32, or bf16; the weights that are trained stay in fp32."""
    compile: bool = False
    """Compile the blocks with torch.compile; needs a C++ compiler on the CPU and half a minute."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    eval_every: Positive | None = None
    """Steps between evaluations; by default a fifth of the run."""
    eval_sequences: Positive = 64
    """Sequences of validation text per evaluation."""
    save_every: Positive | None = None
    """Steps between checkpoints; by default a fifth of the run."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of initialisation, data order and random routing."""
    data_seed: Annotated[int, Ge(0), Lt(2**32)] | None = None
    """Seed of the data order, so that runs of several seeds see the same text in the same order; by default seed."""
    calibrate: bool = True
    """Whether half of the held-out text sets the causal routers at the end, so that the capacity enters, and the other
    half evaluates; --no-calibrate leaves them as trained and evaluates on all of it."""

    @property
    def order_seed(self) -> int:
        """The seed that decides the data order."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclass(frozen=True)
class RetrofitOptions:
    """How a pretrained dense model is made to skip."""

    flops_share: Fraction = 0.8
    """FLOPs per token over the dense model's, at sequence_length; it is spread over the blocks where skipping costs
    least."""
    decode_share: Fraction | None = None
    """Bytes read for a decoded token over the dense model's, after sequence_length tokens; instead of flops_share."""
    capacity: Annotated[tuple[Fraction, ...], Len(1)] = (0.125,)
    """Least fraction of the tokens that enters a routed block. With routed_layers it is the fraction itself: one number
    for all of these blocks, or one for each."""
    routed_layers: Annotated[tuple[int, ...], Len(1)] | None = None
    """Blocks to route, instead of those that measuring finds for the share; capacity is then kept."""
    routed_parts: Literal["block", "block_keep_keys"] = "block_keep_keys"
    """What of a routed block a token skips: all of it; or all but its key and value, to which later tokens attend."""
    bypass_rank: NotNegative | None = None
    """Rank of the map that a token which skips takes instead; 0 for none. By default it is a quarter of the width, and
    at most 128."""
    router_type: RouterType = "learned"
    """Learned routing; or random routing, as a control."""
    causal_router: Literal["predictor", "threshold"] = "threshold"
    """How a token decides in sampling whether it enters; a predictor needs longer tuning than a threshold."""
    tune: Literal["routers", "lora", "all"] = "all"
    """What is tuned: routers and maps; these and low-rank adapters of all projections; or everything."""
    lora_rank: Positive = 16
    """Rank of the adapters."""
    distillation: Share = 0.0
    """Share of the loss that is the divergence from the dense model's predictions; the rest is that of the text."""
    lowering_fraction: Below1 = 0.1
    """Share of the steps in which the capacity falls from 1 to its own."""
    measure_sequences: Positive = 8
    """Sequences of training text on which the importance of the model's blocks is measured."""
    fit_sequences: Positive = 64
    """Sequences of training text to which the routers and the maps are fitted."""

    def __post_init__(self) -> None:
        """Raises ValueError for an option that is out of its range, or contradicts another."""
        make_plain(self)
        validate_fields(self)
        if self.tune == "routers" and self.router_type == "random":
            raise ValueError(
                "tune=routers leaves nothing to tune with router_type=random, whose routers have no weights; give "
                "tune=lora or tune=all"
            )
        if self.routed_layers is not None:
            refuse_without_use(self, "with routed_layers", "flops_share", "decode_share", "measure_sequences")
            if len(set(self.routed_layers)) < len(self.routed_layers):
                raise ValueError(f"routed_layers={self.routed_layers} names a block twice; name each of them once")
        if self.decode_share is not None:
            refuse_without_use(self, "with decode_share", "flops_share")
        blocks = 1 if self.routed_layers is None else len(self.routed_layers)
        if len(self.capacity) not in (1, blocks):
            raise ValueError(
                f"capacity={self.capacity} has {len(self.capacity)} entries; give one number, or with routed_layers "
                "one for each of them"
            )
        if self.tune != "lora":
            refuse_without_use(self, f"with tune={self.tune}", "lora_rank")
        if self.router_type == "random":
            refuse_without_use(self, "with router_type=random", "causal_router")
            if self.bypass_rank == 0:
                refuse_without_use(self, "with router_type=random and bypass_rank=0", "fit_sequences")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn. The settings apply in the order of the fields, as in transformers' `generate()`."""

    max_new_tokens: Positive = 128
    """Most tokens to sample after a prompt; fewer when it ends by itself or by a stop string."""
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    """Divides the positive logits of tokens already there, and multiplies the negative ones; 1 for none."""
    temperature: Annotated[float, Ge(0)] = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: NotNegative = 50
    """Sample from this many likeliest tokens; 0 for all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Sample from the likeliest tokens that hold this much probability."""
    min_p: Share = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    stop: tuple[Annotated[str, Len(1)], ...] = ()
    """Texts that end the sample; they are not part of it."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the sampling; the n-th prompt of several draws with seed + n, by itself."""

    def __post_init__(self) -> None:
        """Raises ValueError for a setting that is out of its range."""
        make_plain(self)
        validate_fields(self)
        if 0 < self.temperature < 0.01:
            raise ValueError(f"temperature={self.temperature} is out of range: it must be 0, or at least 0.01")
