"""Tokens one by one: the prompts through the model once, then a pass or a fast step a token, until every row ends.

Shapes: B batch, T tokens given, S tokens known, L blocks, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mixture_of_depths.compiler import require_compiler
from mixture_of_depths.model.attention import Attention, HeadNorm
from mixture_of_depths.model.cache import MoDCache
from mixture_of_depths.model.experts import ExpertMLP, ExpertRouter, GroupedLinear
from mixture_of_depths.model.modeling import MLP, DecoderLayer, MoDForCausalLM, MoDModel
from mixture_of_depths.model.routing import Bypass, PreciseLinear, Predictor, Router, ZeroLinear
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.draw import TokenChoice
from mixture_of_depths.sampling.native import choose_fastest
from mixture_of_depths.sampling.own_step import OwnStep, is_own
from mixture_of_depths.sampling.quantization import Int8GroupedLinear, Int8Linear
from mixture_of_depths.sampling.step import decode_step, grow, prefill, product_shapes

if TYPE_CHECKING:
    from mixture_of_depths.sampling.graph import GraphStep

GREEDY = SamplingOptions(temperature=0)


def check_prompts(model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> bool:
    """Refuses prompts the model cannot go on from; returns whether there is padding among them.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, right padding, or too long a text.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids of shape {list(input_ids.shape)} and attention_mask of shape {list(attention_mask.shape)} "
            "must both be of shape [batch, tokens]"
        )
    # Looked at on the CPU: a device is waited for once a tensor, not once a question.
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()
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
    return not bool(attention_mask.all())


def end_tokens(model: MoDForCausalLM) -> list[int]:
    """The tokens that end a text, none, one or several: as in `generate()`, those of the generation configuration.

    One outside the vocabulary never comes.
    """
    assert model.generation_config is not None
    ends = cast(int | list[int] | None, model.generation_config.eos_token_id)
    every = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return [token for token in every if 0 <= token < model.config.vocab_size]


# Graphs of the compiled step that a process may have.
MOST_GRAPHS = 1000
COMPILER_OPTIONS: dict[str, Any] = {
    # Moved ahead of the attention that reads the cache, the writes to it could not happen in place.
    "reorder_for_locality": False,
    # By default graphs with branches are not kept on the disk, and compiling them anew takes seconds a block. The
    # branches are part of what names an entry there.
    "unsafe_marked_cacheable_functions": {"torch.ops.higher_order.cond": "1"},
    # The shapes of all weights, looked at in every step.
    "size_asserts": False,
}


class ModelPass:
    """The prompts through the model, and its own pass for every token that follows: what `generate()` runs."""

    def __init__(self, model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.model, self.attention_mask_BS = model, attention_mask
        self.cache = MoDCache(config=model.config)
        self.logits_BV = self._run(input_ids)

    def __call__(self, token_B: Tensor, going_B: Tensor | None) -> Tensor:
        """The logits after one more token a row, of shape [B, V]; a row that has ended enters no routed block.

        Args:
            token_B (torch.Tensor): of shape [B].
            going_B (torch.Tensor | None): False for rows that have ended; of shape [B]. None when there are none.
        """
        mask_BS = self.attention_mask_BS
        if mask_BS is None and going_B is not None:
            mask_BS = torch.ones(len(token_B), self.cache.get_seq_length(), dtype=torch.int64, device=token_B.device)
        if mask_BS is not None:
            going_B = torch.ones_like(token_B) if going_B is None else going_B
            self.attention_mask_BS = torch.cat([mask_BS, going_B[:, None].to(mask_BS.dtype)], dim=1)
        return self._run(token_B[:, None])

    def _run(self, input_ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.attention_mask_BS,
            cache=self.cache,
            use_cache=True,
            routing="causal",
            output_routing=True,
            logits_to_keep=1,
        )
        self.routing = output.routing
        return output.logits[:, -1].float()

    def entered(self) -> Tensor:
        """Which rows' last token entered each block; of shape [L, B]."""
        all_B = torch.ones(self.logits_BV.shape[:1], dtype=torch.bool, device=self.logits_BV.device)
        return torch.stack([all_B if layer is None else layer.entered[:, -1] for layer in self.routing])


class CompiledStep:
    """The prompts through the model, and the compiled step for every token that follows."""

    def __init__(self, model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, room: int) -> None:
        self.model, self.room, self.number = model, 0, 0
        # Only what is marked is dynamic: another model is another graph, not one of unknown width.
        self.step = torch.compile(decode_step, fullgraph=True, dynamic=False, options=COMPILER_OPTIONS)
        if model.device.type == "cpu":
            choose_fastest(product_shapes(model, input_ids.shape[0]))
        self.logits_BV, self.state = prefill(model, input_ids, attention_mask, room)
        self.all_B = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def __call__(self, token_B: Tensor, going_B: Tensor | None) -> Tensor:
        """The logits after one more token a row, of shape [B, V]; see `ModelPass`."""
        if self.room == 0:
            self.room = grow(self.state)
        self.room -= 1
        # Nothing but the buffers' lengths changes between steps, and the checks would take a tenth of one.
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=self.number > 0), self._many_graphs():
            logits_BV = self.step(self.model, token_B, self.all_B if going_B is None else going_B, self.state)
        self.number += 1
        return logits_BV

    def _many_graphs(self) -> AbstractContextManager[object]:
        """Lets a process have a graph for each model and number of rows: the compiler stops at 8 by itself."""
        if self.number > 0:
            return nullcontext()
        # A part of the module only once it is loaded.
        config: Any = torch.compiler.config
        return config.patch(recompile_limit=MOST_GRAPHS)

    def entered(self) -> Tensor:
        """Which rows' last token entered each block; of shape [L, B]."""
        return torch.stack([layer.entered_B for layer in self.state.layers])


def is_graph(model: MoDForCausalLM) -> bool:
    """Whether the fast step of a model is a CUDA graph of kernels, and not compiled.

    It is on a CUDA device, for weights of float32, bf16 or float16, without experts and without weights of 8 bits.
    """
    is_plain = not model.config.has_experts and not any(isinstance(part, Int8Linear) for part in model.modules())
    precisions = (torch.float32, torch.bfloat16, torch.float16)
    return model.device.type == "cuda" and model.dtype in precisions and is_plain


# All that a model is made of, as far as the fast step knows it.
KNOWN_LAYERS = {
    *(nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList, nn.RMSNorm),
    *(MoDModel, DecoderLayer, Attention, HeadNorm, MLP, Bypass, ZeroLinear, Router, Predictor, PreciseLinear),
    *(ExpertMLP, ExpertRouter, GroupedLinear, Int8Linear, Int8GroupedLinear),
}


def require_known_layers(model: MoDForCausalLM) -> None:
    """Refuses layers whose weights do not say all that they do, since the fast step reads weights and calls no layer.

    Raises:
        ValueError: for a layer of another class, as under adapters, or with another `forward` or hooks of its own.
    """
    for name, layer in model.named_modules():
        if layer is not model and type(layer) not in KNOWN_LAYERS:
            fault = f"{name} is a {type(layer).__module__}.{type(layer).__name__}"
            remedy = "merge the adapter first: merge_and_unload()"
        elif layer is not model and "forward" in vars(layer):
            fault, remedy = f"{name} has another forward()", "load the model anew, on one device"
        elif layer._forward_hooks or layer._forward_pre_hooks:
            fault = f"{name or 'the model'} has hooks"
            remedy = "remove them (disable_input_require_grads() removes that of gradient checkpointing)"
        else:
            continue
        raise ValueError(
            f"{fault}, and the fast step (compiled=True, --compile) reads weights and calls no layer; {remedy}, or "
            "sample without it"
        )


def fast_step(
    model: MoDForCausalLM, input_ids: Tensor, attention_mask: Tensor, room: int
) -> "CompiledStep | OwnStep | GraphStep":
    """The prompts through the model, and the fast step for `room` tokens that follow.

    Raises:
        ValueError: for layers that it does not know.
    """
    require_known_layers(model)
    if is_own(model, input_ids.shape[0]):
        return OwnStep(model, input_ids, attention_mask, room)
    if not is_graph(model):
        return CompiledStep(model, input_ids, attention_mask, room)
    # Needs Triton, which PyTorch brings for GPUs only.
    from mixture_of_depths.sampling.graph import GraphStep

    return GraphStep(model, input_ids, attention_mask, room)


@torch.no_grad()
def stream(
    model: MoDForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    options: SamplingOptions = GREEDY,
    seeds: Sequence[int] | None = None,
    active_B: Tensor | None = None,
    compiled: bool = False,
    watch: Callable[[Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of every row, [B] and on the CPU, token by token, until all rows have ended.

    A row ends with the model's end of text, or when the owner of `active_B` says so; from then on it enters no routed
    block, and yields the end of text if the model has one.

    Args:
        model: the model, in evaluation mode.
        input_ids (torch.Tensor): left-padded prompts, of shape [B, T].
        attention_mask (torch.Tensor | None): 0 for padding; of shape [B, T]. None when there is none.
        options: how tokens are drawn; `stop` needs text and is not looked at here.
        seeds: one seed a row; by default the options' and those after it.
        active_B (torch.Tensor | None): True for rows that go on; of shape [B], on the CPU. It is only read: its owner
            may end a row by writing False between two tokens.
        compiled: whether to sample by the fast step: one call to C++ on the CPU (`is_own`), a CUDA graph (`is_graph`),
            or a compiled one; docs/sampling.md has the time. On the CPU it needs a C++ compiler. Otherwise every token
            is a pass of the model.
        watch: is shown which rows entered each block, of shape [L, B], after every step, which has read the token
            yielded before it.

    Raises:
        ValueError: for prompts the model cannot go on from, a compiler that is missing, or layers that the fast step
            does not know, as under adapters.
        FloatingPointError: when the model's logits are not finite.
    """
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    is_padded = check_prompts(model, input_ids, attention_mask, options.max_new_tokens)
    if compiled:
        require_compiler("compiled", model.device)
    batch_size = input_ids.shape[0]
    seeds = range(options.seed, options.seed + batch_size) if seeds is None else seeds
    choose_token = TokenChoice(options, input_ids, attention_mask, seeds)
    if compiled:
        step = fast_step(model, input_ids, attention_mask, options.max_new_tokens)
    else:
        step = ModelPass(model, input_ids, attention_mask if is_padded else None)
    ends = end_tokens(model)
    going = [True] * batch_size if active_B is None else active_B.tolist()
    going_B = None if all(going) else torch.tensor(going, device=input_ids.device)
    logits_BV = step.logits_BV
    for number in range(options.max_new_tokens):
        token_B, is_finite_B = choose_token(logits_BV)
        if ends and going_B is not None:
            token_B = token_B.where(going_B, ends[0])
        # All at once: a device is waited for each time.
        tokens, is_finite = torch.stack([token_B, is_finite_B.long()]).tolist()
        if not all(is_finite):
            raise FloatingPointError(
                "logits of the next token are not finite; check the weights, or raise the precision"
            )
        yield torch.tensor(tokens)
        active = [True] * batch_size if active_B is None else active_B.tolist()
        still_going = [
            goes_on and is_active and token not in ends
            for goes_on, is_active, token in zip(going, active, tokens, strict=True)
        ]
        if number + 1 == options.max_new_tokens or not any(still_going):
            return
        if still_going != going:
            going, going_B = still_going, torch.tensor(still_going, device=input_ids.device)
        logits_BV = step(token_B, going_B)
        if watch is not None:
            watch(step.entered())


def compile_step(model: MoDForCausalLM) -> None:
    """Samples a few tokens, so that the compiled step is there before it is needed."""
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    for _ in stream(model, prompt, options=SamplingOptions(max_new_tokens=4, temperature=0), compiled=True):
        pass
