"""How many blocks each token of a text used: counted, coloured, and what that saved."""

from collections.abc import Sequence

import torch
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.flops import block_flops, expert_rows_per_token
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.text.pieces import pieces

# From few blocks to many; told apart by the colour-blind, and readable on dark and light grounds.
COLOURS = ("#0072B2", "#009E73", "#B8860B", "#D55E00", "#CC3377")


@torch.no_grad()
def blocks_used(model: MoDForCausalLM, input_ids: Tensor) -> Tensor:
    """How many blocks each token went through under causal routing, dense ones included; of shape [B, T]."""
    routing = model(input_ids=input_ids, use_cache=False, routing="causal", output_routing=True).routing
    dense = sum(layer is None for layer in routing)
    entered = [layer.entered.long() for layer in routing if layer is not None]
    return torch.stack([torch.full_like(input_ids, dense), *entered]).sum(dim=0)


def coloured(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Text:
    """The text of `tokens`, each coloured by how many blocks it went through, with a legend."""
    used = blocks_used(model, torch.tensor([tokens], device=model.device))[0].tolist()
    blocks = model.config.num_hidden_layers
    dense = blocks - len(model.config.routed_layers or [])

    def colour(count: int) -> str:
        place = 0 if blocks == dense else (count - dense) / (blocks - dense)
        return COLOURS[round(place * (len(COLOURS) - 1))]

    text = Text()
    for piece, count in zip(pieces(tokenizer, tokens), used, strict=True):
        text.append(piece, style=colour(count))
    text.append("\n\nblocks used: ", style="bold")
    for count in range(dense, blocks + 1):
        text.append(f" {count} ", style=f"bold {colour(count)}")
        text.append(f"({used.count(count) / len(used):.0%})")
    text.append(
        f"   mean {sum(used) / len(used):.2f} of {blocks}; {saved(model.config, used):.0%} of the compute saved"
    )
    return text


def saved(config: MoDConfig, used: Sequence[int]) -> float:
    """Share of the operations that tokens spare which went through `used` blocks, in the place of all of them."""
    block = block_flops(config, 1, len(used) / 2, expert_rows_per_token(config)).total
    whole = config.num_hidden_layers * block + 2 * config.hidden_size * config.vocab_size
    return (config.num_hidden_layers - sum(used) / len(used)) * block / whole
