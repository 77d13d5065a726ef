"""How many blocks each token of a text used: coloured, and what that saved."""

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.inspect.trace import trace_tokens
from mixture_of_depths.model.modeling import MoDForCausalLM

# From few blocks to many; told apart by the colour-blind, and readable on dark and light grounds.
COLOURS = ("#0072B2", "#009E73", "#B8860B", "#D55E00", "#CC3377")


def coloured(model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Text:
    """The text of `tokens`, each coloured by how many blocks it went through, with a legend."""
    traced = trace_tokens(model, tokenizer, tokens)
    used = traced.blocks_used.tolist()
    blocks = model.config.num_hidden_layers
    dense = blocks - len(model.config.routed_layers or [])

    def colour(count: int) -> str:
        place = 0 if blocks == dense else (count - dense) / (blocks - dense)
        return COLOURS[round(place * (len(COLOURS) - 1))]

    text = Text()
    for piece, count in zip(traced.pieces, used, strict=True):
        text.append(piece, style=colour(count))
    text.append("\n\nblocks used: ", style="bold")
    for count in range(dense, blocks + 1):
        text.append(f" {count} ", style=f"bold {colour(count)}")
        text.append(f"({used.count(count) / len(used):.0%})")
    text.append(f"   mean {sum(used) / len(used):.2f} of {blocks}; {traced.saved:.1%} of the compute saved")
    return text
