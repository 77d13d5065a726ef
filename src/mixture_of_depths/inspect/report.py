"""One self-contained HTML page that shows where a model spent its compute on a text."""

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mixture_of_depths.distributed import failing_together, is_main
from mixture_of_depths.inspect import figures
from mixture_of_depths.inspect.trace import Trace, trace_tokens, under_top_k
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.text.corpus import Corpus

CAPTIONS = {
    "routing-map": "Depth against sequence. A column is a token; in a blue cell it entered the block, "
    "in an orange one without meeting an expert.",
    "router-weights": "The factor of the block's result, of all tokens in all routed blocks, had they entered.",
    "causal-logits": "What decides in sampling, of all tokens in all routed blocks: a token enters where it is "
    "positive, and in some models a first token always. The factor of the block's result is 1 for all that enter.",
    "shares": "How much of the text entered each routed block, beside the capacity that training chose with.",
    "causal-decisions": "In sampling each token decides by itself; where that differs from training's top-k choice.",
    "entropy": "Do tokens use more where the next token is harder to tell? Boxes hold the middle half. "
    "The interval takes tokens as independent, which neighbours are not: it is too narrow.",
    "kinds": "The same by kind of token; keywords are Python's.",
    "experts": "How many experts took a token in a block, of those that went through it; no-ops do not count.",
}
SKIPPED = {
    "block": "the whole block",
    "block_keep_keys": "the block but its key and value",
    "mlp": "the block's MLP",
}
# From few blocks to many, light to dark: the order shows in grey, too.
SHADES = ("#FFF7E0", "#FFE3A3", "#FDC078", "#F08A5D", "#C4516C", "#7A2E7A")
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --ground: #fff; --line: #bbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --ground: #15181c; --line: #555b63; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink);
  background: var(--ground); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
#text { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: .8rem; max-height: 70vh; overflow-y: auto;
  unicode-bidi: plaintext; }
#text span { border-radius: 2px; padding: 1px 0; }
#text .line-end::before { content: "\\21B5"; opacity: .5; }
#text span:hover, #text span.chosen { outline: 2px solid #0072B2; }
#tip { position: fixed; display: none; z-index: 2; max-width: 22rem; background: var(--ground);
  border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem; font-size: 13px;
  max-height: calc(100vh - 2.5rem); overflow: hidden;
  box-shadow: 0 2px 8px #0003; pointer-events: none;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.legend span { padding: 0 .5rem; margin-right: .3rem; border-radius: 3px; font-family: ui-monospace, monospace; }
.figure { overflow-x: auto; } .figure img { width: 100%; min-width: 34rem; background: #fff; border-radius: 6px; }
""" + "".join(
    f".s{number} {{ background: {shade}; color: {'#fff' if number > 3 else '#1a1a1a'}; }}\n"
    for number, shade in enumerate(SHADES)
)
SCRIPT = """
const trace = JSON.parse(document.getElementById("trace").textContent);
const text = document.getElementById("text"), tip = document.getElementById("tip");
const number = (value, digits = 3) => value === null ? "-" : value.toFixed(digits);
function describe(i) {
  const lines = [`token ${i}: ${JSON.stringify(trace.pieces[i])} (${trace.token_ids[i]})`,
    `blocks used ${trace.blocks_used[i]} of ${trace.num_hidden_layers}`,
    `FLOPs ${(trace.flops[i] / 1e6).toFixed(3)} M, with everything ${(trace.dense_flops[i] / 1e6).toFixed(3)} M`,
    `loss ${number(trace.loss[i])}, entropy of the next ${number(trace.entropy[i])} nats`];
  trace.routed_layers.forEach((block, row) => {
    const probability = trace.predictor_probability[row][i];
    const name = trace.told_apart_by;
    lines.push(`block ${block}: ${trace.entered[row][i] ? "entered" : "skipped"}, ${name.replace("_", " ")} ` +
      number(trace[name][row][i]) + (probability === null ? "" : `, predictor ${number(probability)}`));
  });
  if (trace.experts_met !== null)
    lines.push(`experts met in blocks 0 to ${trace.num_hidden_layers - 1}: ` +
      trace.experts_met.map(block => block[i]).join(" "));
  return lines.join("\\n");
}
function show(event) {
  const span = event.target.closest("#text span");
  if (!span) { tip.style.display = "none"; return; }
  // The tokens before the last of a character's bytes have no text of their own.
  const last = Number(span.dataset.i), parts = [describe(last)];
  for (let i = last - 1; i >= 0 && trace.pieces[i] === ""; i--) parts.unshift(describe(i));
  tip.textContent = parts.join("\\n\\n");
  tip.style.display = "block";
  const place = span.getBoundingClientRect(), box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(place.left, innerWidth - box.width - 4)) + "px";
  tip.style.top = (place.bottom + box.height + 8 < innerHeight ? place.bottom + 6
    : Math.max(4, place.top - box.height - 6)) + "px";
}
text.addEventListener("mouseover", show);
text.addEventListener("click", show);
text.addEventListener("mouseleave", () => { tip.style.display = "none"; });
"""


def shade_of(used: int, least: int, most: int) -> int:
    """The place of a number of blocks between the least and the most possible, among `SHADES`."""
    return 0 if most == least else round((used - least) / (most - least) * (len(SHADES) - 1))


def report(trace: Trace, drawn: dict[str, Figure], title: str = "Where the compute goes") -> str:
    """The page: the text coloured by each token's engagement, with its numbers on hover, and the figures.

    Args:
        trace: the text's trace.
        drawn: its figures, by name.
        title: heading of the page.
    """
    least, most = trace.least_engagement, trace.num_hidden_layers
    spans = "".join(
        f'<span class="s{shade_of(count, least, most)}{_line_end(piece)}" data-i="{i}">{_as_itself(piece)}</span>'
        for i, (piece, count) in enumerate(zip(trace.pieces, trace.engagement.tolist(), strict=True))
    )
    legend = "".join(
        f'<span class="s{shade_of(count, least, most)}">{count}</span>' for count in range(least, most + 1)
    )
    images = "".join(
        f"<h2>{escape(name.replace('-', ' ').capitalize())}</h2><p>{escape(CAPTIONS[name])}</p>"
        f'<div class="figure"><img alt="{escape(CAPTIONS[name])}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(figures.svg(figure).encode()).decode()}"></div>'
        for name, figure in drawn.items()
    )
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _facts(trace).items())
    # Nothing in a script element is read as markup but its end.
    more = {"blocks_used": trace.blocks_used.tolist(), "told_apart_by": trace.told_apart_by}
    data = json.dumps(_rounded({**trace.as_dict(), **more})).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><table>{rows}</table>"
        f'<h2>The text</h2><p class="legend">{figures.engagement_name(trace)}: {legend}</p>{_several(trace)}'
        f'<div id="text">{spans}</div><div id="tip" role="status"></div>{images}'
        f'<script type="application/json" id="trace">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _several(trace: Trace) -> str:
    """What to know where characters were cut into several tokens."""
    if "" not in trace.pieces:
        return ""
    return "<p>A character of several tokens has the shade of the last; pointing at it shows the numbers of each.</p>"


def _line_end(piece: str) -> str:
    """The class of a token that begins with the end of a line, and would have no place to show its shade."""
    return " line-end" if piece.startswith(("\n", "\r")) else ""


def _as_itself(piece: str) -> str:
    """A piece as markup; browsers read a bare carriage return as the end of a line, and drop a null character."""
    return escape(piece).replace("\r", "&#13;").replace("\0", "\u2400")


def held_out_report(model: MoDForCausalLM, corpus: Corpus, path: Path) -> None:
    """Writes the page of the first sequence of held-out text, under causal routing.

    Of several processes all must call it, for the model may be spread over them; the first writes.
    """
    model.eval()
    tokens: Any = corpus.validation[0]["input_ids"]
    trace = trace_tokens(model, corpus.tokenizer, tokens)
    top_k = under_top_k(model, corpus.tokenizer, trace)
    with failing_together():
        if is_main():
            drawn = figures.drawn(trace, top_k)
            page = report(trace, drawn, "Where the compute goes on held-out text")
            path.write_text(page, encoding="utf-8")


def _facts(trace: Trace) -> dict[str, str]:
    routing = "causal: each token decides by itself" if trace.routing == "causal" else "top-k, which looks ahead"
    most = "entered every block" if trace.experts_met is None else "met an expert with every choice in every block"
    facts = {
        "tokens": f"{len(trace.pieces):,}",
        "routing": routing,
        "blocks": f"{trace.num_hidden_layers}, of them routed {len(trace.routed_layers)}",
        **_skipping(trace),
        figures.engagement_name(trace): f"{trace.engagement.mean():.2f} on average",
        "FLOPs": f"{trace.saved:.1%} less than if every token {most}",
        "loss": f"{np.nanmean(trace.loss):.3f} nats per token" if len(trace.pieces) > 1 else "-",
    }
    correlation = figures.engagement_against_entropy(trace)
    if correlation is not None:
        facts[f"{figures.engagement_name(trace)}, against entropy"] = (
            f"rank correlation {correlation.rho:+.3f}, 95 % interval {correlation.low:+.3f} to {correlation.high:+.3f}"
        )
    return facts


def _skipping(trace: Trace) -> dict[str, str]:
    """What a token skips where it does not enter, and what it takes instead."""
    parts = [SKIPPED[part] for part in dict.fromkeys(trace.routed_parts)]
    bypass = f"; a map of rank {trace.bypass_rank} instead" if trace.bypass_rank else ""
    return {"skipped": ", or ".join(parts) + bypass} if parts else {}


def _rounded(value: Any) -> Any:
    """Six digits are enough to read, and keep the page small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return value
