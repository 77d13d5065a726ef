"""A page to sample from a model, its tokens coloured by the blocks they used, with a baseline beside it if wanted."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

# Before the library is loaded: it would report its use.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio
import numpy as np
import torch
from gradio import themes
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.inspect.report import SHADES, shade_of
from mixture_of_depths.inspect.trace import trace_tokens
from mixture_of_depths.model.flops import expert_rows_per_token, share_saved
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stream import compile_step, end_tokens, stream
from mixture_of_depths.sampling.texts import begin
from mixture_of_depths.serving.address import check_address
from mixture_of_depths.text.pieces import pieces

Models = dict[str, tuple[MoDForCausalLM, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Frame:
    """What is on the page before the first new token, or after one.

    Attributes:
        pieces: text of the prompt's and the new tokens.
        used: blocks that each of them used; one fewer while tokens come, the newest of which has not been read.
        prompt_tokens: how many of them are the prompt's.
        tokens_per_second: speed after the first new token; 0 before.
        saved: share of the compute that the tokens read so far spared.
    """

    pieces: list[str]
    used: list[int]
    prompt_tokens: int
    tokens_per_second: float
    saved: float


def play(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: SamplingOptions,
    compiled: bool = False,
) -> Iterator[Frame]:
    """Samples after a prompt: one frame of the prompt alone, one a token, and one with all tokens read.

    Before the last frame the experts a token met are taken to be as many as expected.

    Raises:
        ValueError: for a prompt the model cannot go on from.
    """
    (sample,) = begin(tokenizer, [prompt])
    traced = trace_tokens(model, tokenizer, sample.tokens)
    tokens, inside_LT = list(sample.tokens), traced.inside

    def watch(entered_LB: torch.Tensor) -> None:
        nonlocal inside_LT
        inside_LT = np.column_stack([inside_LT, entered_LB[:, 0].cpu().numpy()])

    prompt_tokens, speed = len(tokens), 0.0
    yield Frame(traced.pieces, traced.blocks_used.tolist(), prompt_tokens, speed, traced.saved)
    ends, first = end_tokens(model), None
    for token_B in stream(
        model, torch.tensor([tokens], device=model.device), options=options, compiled=compiled, watch=watch
    ):
        now = time.perf_counter()
        first = first or now
        if int(token_B[0]) in ends:
            break
        tokens.append(int(token_B[0]))
        count = len(tokens) - prompt_tokens - 1
        speed = count / (now - first) if count else 0.0
        used = inside_LT.sum(axis=0).tolist()
        saved = share_saved(model.config, inside_LT, inside_LT * expert_rows_per_token(model.config))
        yield Frame(pieces(tokenizer, tokens), used, prompt_tokens, speed, saved)
    if len(tokens) > prompt_tokens:
        traced = trace_tokens(model, tokenizer, tokens)
        yield Frame(traced.pieces, traced.blocks_used.tolist(), prompt_tokens, speed, traced.saved)


def shown(frame: Frame, model: MoDForCausalLM) -> str:
    """A frame as HTML."""
    most = model.config.num_hidden_layers
    least = most - len(model.config.routed_layers or [])
    blocks = range(least, most + 1)
    legend = "".join(f' <span style="{_shade(count, least, most)};padding:0 .4em">{count}</span>' for count in blocks)
    spans = []
    for i, piece in enumerate(frame.pieces):
        if i < len(frame.used):
            style = f"{_shade(frame.used[i], least, most)};opacity:{0.6 if i < frame.prompt_tokens else 1}"
            # The end of a line has no place of its own to show its shade.
            ends_line = piece.startswith(("\n", "\r"))
            sign = '<span aria-hidden="true" style="user-select:none">\u21b5</span>' if ends_line else ""
            spans.append(f'<span title="{frame.used[i]} blocks" style="{style}">{sign}{escape(piece)}</span>')
        else:
            spans.append(f"<span>{escape(piece)}</span>")
    facts = f"{frame.tokens_per_second:.1f} tokens/s, {frame.saved:.1%} of the compute saved"
    # Each line goes in the direction of its first letter.
    box = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;unicode-bidi:plaintext"
    return (
        f'<p class="facts">{facts}</p><p>blocks used:{legend}</p>'
        f'<div class="sample" style="{box}">{"".join(spans)}</div>'
    )


def _shade(used: int, least: int, most: int) -> str:
    number = shade_of(used, least, most)
    return f"background:{SHADES[number]};color:{'#fff' if number > 3 else '#1a1a1a'}"


def page(models: Models, compiled: bool = False) -> gradio.Blocks:
    """The page for one model, or for two beside one another.

    Args:
        models: model and tokenizer by name.
        compiled: whether to compile the sampling steps, now.
    """
    if compiled:
        for model, _ in models.values():
            compile_step(model)

    def answer(
        prompt: str, new_tokens: float, temperature: float, top_k: float, top_p: float, seed: float | None
    ) -> Any:
        outputs = [""] * len(models)
        try:
            if seed is None:
                raise ValueError("Seed is empty; give a whole number")
            options = SamplingOptions(
                max_new_tokens=int(new_tokens), temperature=temperature, top_k=int(top_k), top_p=top_p, seed=int(seed)
            )
            for place, (model, tokenizer) in enumerate(models.values()):
                for frame in play(model, tokenizer, prompt, options, compiled):
                    outputs[place] = shown(frame, model)
                    yield outputs if len(outputs) > 1 else outputs[0]
        except (ValueError, FloatingPointError) as error:
            raise gradio.Error(escape(str(error)), print_exception=False) from error

    with gradio.Blocks(title="Mixture-of-Depths playground", analytics_enabled=False) as blocks:
        gradio.Markdown("# Mixture-of-Depths playground\nTokens are coloured by the number of blocks they used.")
        prompt = gradio.Textbox("def read_file(path):\n", label="Prompt", lines=4)
        with gradio.Row():
            new_tokens = gradio.Slider(1, 512, 96, step=1, label="New tokens")
            temperature = gradio.Slider(0, 2, 0.8, step=0.05, label="Temperature")
            top_k = gradio.Slider(0, 200, 50, step=1, label="Top k", info="0 for all")
            top_p = gradio.Slider(0.05, 1, 1, step=0.05, label="Top p")
            seed = gradio.Number(0, precision=0, label="Seed")
        with gradio.Row():
            button = gradio.Button("Sample", variant="primary")
            stop = gradio.Button("Stop")
        with gradio.Row():
            columns = []
            for name in models:
                with gradio.Column():
                    gradio.Textbox(name, label="Model", interactive=False)
                    columns.append(gradio.HTML())
        sampling = button.click(answer, [prompt, new_tokens, temperature, top_k, top_p, seed], columns)
        stop.click(None, cancels=[sampling])
    return blocks


def serve(blocks: gradio.Blocks, host: str, port: int) -> None:
    """Shows the page, and says where, until it is told to stop.

    Raises:
        ValueError: when the address cannot be listened on.
    """
    theme = themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks.queue()
    check_address(host, port)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=theme,
            quiet=True,
            footer_links=[],
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ValueError(f"port={port} of host={host} cannot be listened on; name one that is free") from error
    print(blocks.local_url, flush=True)
    # The library's own waiting ends on Ctrl-C as if nothing had been stopped.
    try:
        while blocks.is_running:
            time.sleep(0.1)
    finally:
        blocks.close(verbose=False)
