"""The page shows what the model did, any text as itself, and asks for nothing from outside."""

import re
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from browser import watched
from models import TOKENIZER, make_checkpoint, model_with
from playwright.sync_api import sync_playwright

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.inspect.depth import coloured
from mixture_of_depths.inspect.report import report
from mixture_of_depths.inspect.trace import trace_tokens
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import sample_texts
from mixture_of_depths.serving.playground import Frame, page, play, serve, shown
from mixture_of_depths.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("played")
    make_checkpoint(folder, 512)
    return MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))


def test_the_frames_are_the_sample_with_the_blocks_its_tokens_used(pair: Any) -> None:
    model, tokenizer = pair
    options = SamplingOptions(max_new_tokens=20, seed=1)
    frames = list(play(model, tokenizer, "the fox", options))
    (sample,) = sample_texts(model, tokenizer, ["the fox"], options)
    assert frames[-1].pieces[: frames[-1].prompt_tokens] == list(frames[0].pieces[: frames[0].prompt_tokens])
    assert (
        frames[0].used == trace_tokens(model, tokenizer, sample.tokens[: frames[0].prompt_tokens]).blocks_used.tolist()
    )
    assert len(frames[0].pieces) == frames[0].prompt_tokens
    assert len(frames) == 1 + 20 + 1
    used = trace_tokens(model, tokenizer, sample.tokens).blocks_used.tolist()
    assert frames[-1].used == used
    assert frames[-2].used == used[:-1]
    assert all(len(frame.used) == len(frame.pieces) - 1 for frame in frames[1:-1])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts": 3, "num_noop_experts": 1},
        {"routed_parts": ["mlp", "block_keep_keys"], "bypass_rank": 2, "causal_router": "threshold"},
    ],
)
def test_the_share_saved_is_that_of_generate_and_inspect(changes: dict[str, Any]) -> None:
    model = model_with(**changes)
    *_, before, last = play(model, TOKENIZER, "the fox", SamplingOptions(max_new_tokens=20, seed=1))
    (sample,) = sample_texts(model, TOKENIZER, ["the fox"], SamplingOptions(max_new_tokens=20, seed=1))
    traced = trace_tokens(model, TOKENIZER, sample.tokens)
    figure = f"{1 - traced.flops.sum() / traced.dense_flops.sum():.1%}"
    assert f"{figure} of the compute saved" in shown(last, model)
    assert f"{figure} of the compute saved" in coloured(model, TOKENIZER, sample.tokens).plain
    assert f"{figure} less than if every token" in report(traced, {})
    assert before.used == traced.blocks_used.tolist()[:-1]
    if "num_experts" not in changes:
        assert before.saved == pytest.approx(trace_tokens(model, TOKENIZER, sample.tokens[:-1]).saved)


def test_a_model_that_ends_at_once_leaves_the_prompt(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = pair
    monkeypatch.setattr("mixture_of_depths.serving.playground.end_tokens", lambda model: range(model.config.vocab_size))
    (frame,) = play(model, tokenizer, "the fox", SamplingOptions())
    assert "".join(frame.pieces) == "the fox"


def test_a_port_that_is_taken_is_refused_by_name(pair: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="cannot be listened on"):
            serve(page({"model": pair}), "127.0.0.1", taken.getsockname()[1])


def test_pieces_are_escaped(pair: Any) -> None:
    html = shown(Frame(["<script>", '"&\n'], [3], 1, 1.0, 0.5), pair[0])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&quot;&amp;\n" in html


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_samples_from_two_models_side_by_side(pair: Any, width: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = page({"model": pair, "baseline": pair})
    thread = threading.Thread(target=serve, args=(blocks, "127.0.0.1", port), daemon=True)
    thread.start()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": width, "height": 900})
        errors, requests = watched(opened)
        for _ in range(100):
            try:
                opened.goto(f"http://127.0.0.1:{port}")
                break
            except Exception:
                thread.join(0.2)
        prompt = '<script>alert(1)</script> & "quotes" 😀'
        opened.get_by_label("Prompt").fill(prompt)
        opened.get_by_role("button", name="Sample").click()
        opened.wait_for_function("document.querySelectorAll('.sample').length === 2", timeout=60_000)
        opened.wait_for_timeout(4000)
        first, second = (element.text_content() for element in opened.locator(".sample").all())
        assert first is not None
        assert first.startswith(prompt)
        assert first == second
        before = opened.locator(".sample").first.text_content()
        opened.get_by_label("Seed").fill("1")
        opened.get_by_label("number input for New tokens").fill("400")
        opened.get_by_role("button", name="Sample").click()
        opened.wait_for_function("old => document.querySelector('.sample').textContent !== old", arg=before)
        opened.get_by_role("button", name="Stop").click()
        opened.wait_for_timeout(1000)
        stopped = [element.text_content() for element in opened.locator(".sample").all()]
        opened.wait_for_timeout(1000)
        assert [element.text_content() for element in opened.locator(".sample").all()] == stopped
        assert len(stopped) < 2 or stopped[1] != stopped[0]
        for facts in opened.locator(".facts").all():
            assert re.fullmatch(r"[\d.]+ tokens/s, [\d.]+% of the compute saved", facts.inner_text())
        opened.get_by_label("Prompt").fill("")
        opened.get_by_role("button", name="Sample").click()
        opened.get_by_text("is empty; give at least one character").first.wait_for(timeout=20_000)
        browser.close()
    blocks.close()
    assert [url for url in requests if f"127.0.0.1:{port}" not in url and not url.startswith(("data:", "blob:"))] == []
    assert errors == []
