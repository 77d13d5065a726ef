"""Tokens one by one: the prompts through the model once, then a decode step a token, until every row has ended.

Shapes: B batch, T tokens, V vocabulary, E tokens that end a text.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mixture_of_depths.compiler import require_compiler
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.draw import TokenChoice
from mixture_of_depths.sampling.step import State, decode_step, grow, prefill

GREEDY = SamplingOptions(temperature=0)


def check_prompts(model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> None:
    """Refuses prompts the model cannot go on from.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, right padding, or too long a text.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids of shape {list(input_ids.shape)} and attention_mask of shape {list(attention_mask.shape)} "
            "must both be of shape [batch, tokens]"
        )
    if input_ids.numel() == 0 or not bool(attention_mask.any(dim=1).all()):
        raise ValueError("input_ids holds an empty prompt; give at least one token a row")
    if bool((attention_mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask pads on the right; pad prompts on the left")
    outside = input_ids[(input_ids < 0) | (input_ids >= model.config.vocab_size)]
    if len(outside) > 0:
        raise ValueError(
            f"input_ids holds {int(outside[0])}, which is outside the vocabulary of {model.config.vocab_size} tokens; "
            "use the model's own tokenizer"
        )
    longest, length = model.config.max_position_embeddings, int(attention_mask.sum(dim=1).max())
    if length + max_new_tokens > longest:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {length} tokens is more than the model's "
            f"max_position_embeddings={longest}; shorten one of them"
        )


def end_tokens(model: MoDForCausalLM) -> list[int]:
    """The tokens that end a text, none, one or several: as in `generate()`, those of the generation configuration."""
    assert model.generation_config is not None
    ends = cast(int | list[int] | None, model.generation_config.eos_token_id)
    return [] if ends is None else [ends] if isinstance(ends, int) else ends


COMPILER_OPTIONS: dict[str, Any] = {
    # Moved ahead of the attention that reads the cache, the writes to it could not happen in place.
    "reorder_for_locality": False,
    # By default graphs with branches are not kept on the disk, and compiling them anew takes seconds a block. The
    # branches are part of what names an entry there.
    "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.cond": "1"},
    # The shapes of all weights, looked at in every step.
    "size_asserts": False,
}


@torch.no_grad()
def stream(
    model: MoDForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    options: SamplingOptions = GREEDY,
    seeds: Sequence[int] | None = None,
    active_B: Tensor | None = None,
    compiled: bool = False,
    watch: Callable[[State], None] | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, [B], token by token, until all rows have ended.

    A row ends with the model's end of text, or when the owner of `active_B` says so; from then on it enters no routed
    block, and yields the end of text if the model has one.

    Args:
        model: the model, in evaluation mode.
        input_ids (torch.Tensor): left-padded prompts, of shape [B, T].
        attention_mask (torch.Tensor | None): 0 for padding; of shape [B, T]. None when there is none.
        options: how tokens are drawn; `stop` needs text and is not looked at here.
        seeds: one seed a row; by default the options' and those after it.
        active_B (torch.Tensor | None): True for rows that go on; of shape [B]. It is only read: its owner may end a
            row by writing False between two tokens.
        compiled: whether to compile the step, which needs a C++ compiler on the CPU; see docs/sampling.md for the time.
        watch: is shown the state after the prompts, and after every step, which has read the token yielded before it.

    Raises:
        ValueError: for prompts the model cannot go on from, or a compiler that is missing.
        FloatingPointError: when the model's logits are not finite.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    check_prompts(model, input_ids, attention_mask, options.max_new_tokens)
    if compiled:
        require_compiler("compiled", model.device)
    batch_size = input_ids.shape[0]
    if active_B is None:
        active_B = torch.ones(batch_size, dtype=torch.bool, device=input_ids.device)
    seeds = range(options.seed, options.seed + batch_size) if seeds is None else seeds
    choose_token = TokenChoice(options, input_ids, attention_mask, seeds)
    ends = end_tokens(model)
    ends_E = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    ended_B = torch.zeros_like(active_B)
    # Only what is marked is dynamic: another model is another graph, not one of unknown width.
    step = (
        torch.compile(decode_step, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS) if compiled else decode_step
    )
    logits_BV, state = prefill(model, input_ids, attention_mask, options.max_new_tokens)
    if watch is not None:
        watch(state)
    room = 0
    for number in range(options.max_new_tokens):
        token_B = choose_token(logits_BV)
        if ends:
            token_B = token_B.where(active_B & ~ended_B, ends[0])
            ended_B |= torch.isin(token_B, ends_E)
        yield token_B
        going_B = active_B & ~ended_B
        if number + 1 == options.max_new_tokens or not bool(going_B.any()):
            return
        if room == 0:
            room = grow(state)
        room -= 1
        # Nothing but the buffers' lengths changes between steps, and the checks would take a tenth of one.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=compiled and number > 0):
            logits_BV = step(model, token_B, going_B, state)
        if watch is not None:
            watch(state)


def compile_step(model: MoDForCausalLM) -> None:
    """Samples a few tokens, so that the compiled step is there before it is needed."""
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in stream(model, prompt, options=SamplingOptions(max_new_tokens=4, temperature=0), compiled=True):
        pass
