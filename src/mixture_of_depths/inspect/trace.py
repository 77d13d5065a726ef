"""What one forward pass over a text did: for every token, which routed blocks it entered, and what that cost.

Shapes: T tokens, L blocks, R routed blocks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.experts import ExpertRouting
from mixture_of_depths.model.flops import dense_token_flops, expert_rows_per_token, share_saved, token_flops
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Routing
from mixture_of_depths.text.pieces import pieces, tokenized


@dataclass(frozen=True)
class Trace:
    """A text, token by token.

    Attributes:
        pieces: the text each token adds; empty where a character's bytes are spread over several.
        token_ids (np.ndarray): int64, of shape [T].
        routing: "top_k" or "causal": what decided who enters.
        num_hidden_layers: number of blocks, routed or not.
        routed_layers: indices of the routed blocks.
        capacity: fraction of the tokens that is to enter each of them.
        routed_parts: what of each of them a token skips.
        bypass_rank: rank of the map that it takes instead; 0 for none.
        router_activation: what makes a weight of the router's output.
        entered (np.ndarray): bool, of shape [R, T].
        router_weight (np.ndarray): the factor of the block's delta, if the token entered; float32, of shape [R, T].
        causal_logit (np.ndarray): positive where the causal router lets the token in; float32, of shape [R, T].
        enters_by_itself (np.ndarray): whom causal routing lets in, a first token that always enters included; bool, of
            shape [R, T].
        predictor_probability (np.ndarray): its probability of entering; not a number without a predictor; float32, of
            shape [R, T].
        experts_met (np.ndarray | None): how many experts took the token in each block: 0 where it did not enter, asked
            for no-ops only, or found its experts full; int64, of shape [L, T]. None where all tokens inside a block
            meet equally many: without no-ops and capacity of experts.
        experts_expected: how many a token inside a block is to meet on average, by the no-ops' share and the experts'
            capacity; None as above.
        entropy (np.ndarray): of the prediction of the next token, in nats; float32, of shape [T].
        loss (np.ndarray): of the token itself, in nats; not a number for the first; float32, of shape [T].
        flops (np.ndarray): operations spent on the token in a forward pass, head included; of shape [T].
        dense_flops (np.ndarray): what it would have cost to enter every block, and to meet an expert there with every
            choice; of shape [T].
        saved: share of the operations that all tokens together spared of those.
    """

    pieces: list[str]
    token_ids: np.ndarray
    routing: Routing
    num_hidden_layers: int
    routed_layers: list[int]
    capacity: list[float]
    routed_parts: list[str]
    bypass_rank: int
    router_activation: str
    entered: np.ndarray
    router_weight: np.ndarray
    causal_logit: np.ndarray
    enters_by_itself: np.ndarray
    predictor_probability: np.ndarray
    experts_met: np.ndarray | None
    experts_expected: float | None
    entropy: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    dense_flops: np.ndarray
    saved: float

    @property
    def inside(self) -> np.ndarray:
        """Which tokens went through each block, dense ones included; bool, of shape [L, T]."""
        return _inside(self.num_hidden_layers, self.routed_layers, self.entered)

    @property
    def told_apart_by(self) -> str:
        """The field that tells a router's tokens apart: the weight, or where all weigh 1 the causal logit."""
        return "causal_logit" if self.router_activation == "straight_through" else "router_weight"

    @property
    def blocks_used(self) -> np.ndarray:
        """Number of blocks each token went through, dense ones included; of shape [T]."""
        return self.inside.sum(axis=0)

    @property
    def engagement(self) -> np.ndarray:
        """Number of blocks whose MLP, or any of its experts, each token went through; of shape [T]."""
        return self.blocks_used if self.experts_met is None else (self.experts_met > 0).sum(axis=0)

    @property
    def least_engagement(self) -> int:
        """The number of blocks whose MLP no token can go without."""
        return self.num_hidden_layers - len(self.routed_layers) if self.experts_met is None else 0

    def as_dict(self) -> dict[str, Any]:
        """All fields as lists and numbers; what is not a number is None."""
        fields: dict[str, Any] = {}
        for name, value in self.__dict__.items():
            if isinstance(value, np.ndarray):
                plain = value.astype(object)
                if value.dtype.kind == "f":
                    plain[~np.isfinite(value)] = None
                value = plain.tolist()
            fields[name] = value
        return fields

    def write_json(self, path: Path) -> None:
        """Writes all fields as one JSON object."""
        path.write_text(json.dumps(self.as_dict(), allow_nan=False))

    def write_parquet(self, path: Path) -> None:
        """Writes one row a token; what is known per routed block is a list in the order of `routed_layers`.

        `experts_met`, of all blocks, is a column if it is known.
        """
        by_token = {"piece": self.pieces, "token_id": self.token_ids, "blocks_used": self.blocks_used}
        by_token |= {name: getattr(self, name) for name in ("entropy", "loss", "flops", "dense_flops")}
        per_block = ("entered", "router_weight", "causal_logit", "enters_by_itself", "predictor_probability")
        per_block += () if self.experts_met is None else ("experts_met",)
        columns = by_token | {name: list(getattr(self, name).T) for name in per_block}
        names = ("routing", "routed_layers", "capacity", "routed_parts", "bypass_rank", "router_activation")
        facts = {name: getattr(self, name) for name in names}
        table = pa.table(columns).replace_schema_metadata({"mixture_of_depths": json.dumps(facts)})
        parquet.write_table(table, path)


@torch.no_grad()
def trace(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, routing: Routing = "causal") -> Trace:
    """Runs a text through a model once and says what the routers did.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        text: at least one character, and UTF-8.
        routing: "causal", as in sampling, or "top_k", as in training.

    Raises:
        ValueError: for a text that is empty or not UTF-8, or one longer than the model takes.
    """
    (tokens,) = tokenized(tokenizer, [text], "text", special=False)
    longest = model.config.max_position_embeddings
    if len(tokens) > longest:
        raise ValueError(
            f"text has {len(tokens)} tokens, more than the model's max_position_embeddings={longest}; shorten it"
        )
    return trace_tokens(model, tokenizer, tokens, routing)


@torch.no_grad()
def trace_tokens(
    model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int], routing: Routing = "causal"
) -> Trace:
    """As `trace`, for a text given as tokens."""
    config = model.config
    input_ids = torch.tensor([tokens], device=model.device)
    with torch.compiler.set_stance("force_eager"):
        output = model(input_ids=input_ids, use_cache=False, routing=routing, output_routing=True)
    log_p = output.logits[0].float().log_softmax(dim=-1)
    loss = F.nll_loss(log_p[:-1], input_ids[0, 1:], reduction="none")
    routed = [(i, decided) for i, decided in enumerate(output.routing) if decided is not None]
    predicts = bool(routed) and config.causal_routers[:1] == ("predictor",)

    def rows(values: list[torch.Tensor], dtype: Any) -> np.ndarray:
        kept = [value[0].float().cpu().numpy() for value in values]
        return np.array(kept, dtype=dtype).reshape(len(values), len(tokens))

    layers: Any = model.model.layers
    gates = [_gate(layers[i], decided.router_logits) for i, decided in routed]
    entered = rows([decided.entered for _, decided in routed], bool)
    causal = [decided.causal_logits.float() for _, decided in routed]
    probability = [logits.sigmoid() if predicts else torch.full_like(logits, torch.nan) for logits in causal]
    routed_layers = [i for i, _ in routed]
    inside = _inside(config.num_hidden_layers, routed_layers, entered)
    experts_met = _experts_met(output.expert_routing, inside)
    all_alike = config.num_noop_experts == 0 and config.expert_capacity is None
    return Trace(
        pieces=pieces(tokenizer, tokens),
        token_ids=np.array(tokens),
        routing=routing,
        num_hidden_layers=config.num_hidden_layers,
        routed_layers=routed_layers,
        capacity=[config.capacity_fraction(i) for i in routed_layers],
        routed_parts=[str(config.routed_part(i)) for i in routed_layers],
        bypass_rank=config.bypass_rank,
        router_activation=config.router_activation,
        entered=entered,
        router_weight=rows(gates, np.float32),
        causal_logit=rows(causal, np.float32),
        enters_by_itself=rows([decided.enters_by_itself for _, decided in routed], bool),
        predictor_probability=rows(probability, np.float32),
        experts_met=None if all_alike else experts_met,
        experts_expected=None if all_alike else expert_rows_per_token(config),
        entropy=-(log_p.exp() * log_p).sum(dim=-1).cpu().numpy(),
        loss=np.concatenate([[np.nan], loss.cpu().numpy()]).astype(np.float32),
        flops=token_flops(config, inside, experts_met),
        dense_flops=dense_token_flops(config, len(tokens)),
        saved=share_saved(config, inside, experts_met),
    )


def under_top_k(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, traced: Trace) -> Trace | None:
    """The same text's trace under top-k, which causal decisions are held against; None if the model makes none."""
    if not model.config.causal_routers:
        return None
    return traced if traced.routing == "top_k" else trace_tokens(model, tokenizer, traced.token_ids.tolist(), "top_k")


def _gate(layer: DecoderLayer, router_logits: torch.Tensor) -> torch.Tensor:
    assert layer.router is not None
    return layer.router.gate(router_logits)


def _inside(num_hidden_layers: int, routed_layers: list[int], entered: np.ndarray) -> np.ndarray:
    inside = np.ones((num_hidden_layers, entered.shape[1]), dtype=bool)
    inside[routed_layers] = entered
    return inside


def _experts_met(routing: tuple[ExpertRouting | None, ...], inside: np.ndarray) -> np.ndarray:
    """How many experts took each token in each block, of shape [L, T]; 0 everywhere without experts."""
    met = np.zeros(inside.shape, dtype=np.int64)
    for met_T, inside_T, experts in zip(met, inside, routing, strict=True):
        if experts is not None:
            met_T[inside_T] = experts.taken[0].sum(dim=-1).cpu().numpy()
    return met
