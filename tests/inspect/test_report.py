"""The page shows any text as itself, and its numbers are the trace's."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import watched
from models import TOKENIZER, model_with
from playwright.sync_api import Page, sync_playwright

from mixture_of_depths.inspect.figures import drawn
from mixture_of_depths.inspect.report import report
from mixture_of_depths.inspect.trace import Trace, trace

NASTY = (
    "<script>alert('x')</script> \"quoted\" & &amp; </span></div> 😀👩‍👩‍👧 שלום עולם مرحبا\n"
    + " " * 10_000
    + "\n</script><img src=x onerror=alert(1)>\r\n\r end"
)


class Reader(HTMLParser):
    """What a browser would take from a page: its elements, and the text of the spans in the element `text`."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.spans: list[str] = []
        self.links: list[str] = []
        self.in_text = self.in_span = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.links += [given[name] for name in ("src", "href") if name in given]
        self.in_text |= given.get("id") == "text"
        if tag == "span" and self.in_text:
            self.in_span = True
            self.spans.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_span = False
        self.in_text &= tag != "div"

    def handle_data(self, data: str) -> None:
        if self.in_span:
            self.spans[-1] += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


def traced(text: str, **changes: Any) -> Trace:
    return trace(model_with(max_position_embeddings=16_384, **changes), TOKENIZER, text)


def page_of(found: Trace, title: str = "A page") -> str:
    figures = drawn(found, None)
    return report(found, figures, title)


def test_every_token_is_escaped_and_shown_as_itself() -> None:
    found = traced(NASTY)
    reader = read(page_of(found, "<b>"))
    assert reader.spans == found.pieces
    assert "".join(reader.spans) == NASTY
    assert reader.tags.count("script") == 2
    assert "b" not in reader.tags
    assert reader.tags.count("img") == 5


def test_the_page_asks_for_nothing_from_outside() -> None:
    page = page_of(traced("plain text"))
    assert all(link.startswith("data:image/svg+xml;base64,") for link in read(page).links)
    assert "://" not in page


def test_the_numbers_in_the_page_are_the_traces() -> None:
    found = traced("the quick brown fox\n" * 8)
    page = page_of(found)
    data = json.loads(page.split('id="trace">')[1].split("</script>")[0])
    assert data["entered"] == found.entered.tolist()
    assert data["blocks_used"] == found.blocks_used.tolist()
    assert data["loss"][1] == pytest.approx(found.loss[1], rel=1e-5)


def test_the_page_says_what_a_token_skips_and_takes_instead() -> None:
    changes = {"routed_parts": ["block_keep_keys", "mlp"], "bypass_rank": 4, "router_activation": "straight_through"}
    found = traced("the quick brown fox\n" * 8, **changes)
    page = page_of(found)
    assert "<td>the block but its key and value, or the block&#x27;s MLP; a map of rank 4 instead</td>" in page
    assert "<h2>Causal logits</h2>" in page
    data = json.loads(page.split('id="trace">')[1].split("</script>")[0])
    assert data["routed_parts"] == changes["routed_parts"]
    assert data["causal_logit"][0] == pytest.approx(found.causal_logit[0].tolist(), rel=1e-5)


def test_a_model_without_routed_blocks_has_a_page_too() -> None:
    page = page_of(traced("plain text", routed_layers=[]))
    assert "".join(read(page).spans) == "plain text"
    assert "<img" not in page


@pytest.fixture(scope="module")
def browser() -> Any:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser: Any, path: Path, width: int) -> tuple[Page, list[str], list[str]]:
    """The page in a window, with what it wrote to the console as an error and what it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors, requests = watched(page)
    page.goto(path.as_uri())
    return page, errors, requests


@pytest.mark.browser
@pytest.mark.parametrize(("width", "activation"), [(1280, "sigmoid"), (400, "straight_through")])
def test_a_browser_shows_the_text_and_the_numbers_of_a_token(
    browser: Any, tmp_path: Path, width: int, activation: str
) -> None:
    found = traced(NASTY, router_activation=activation)
    name = {"sigmoid": "router_weight", "straight_through": "causal_logit"}[activation]
    word, values = name.replace("_", " "), getattr(found, name)
    (tmp_path / "report.html").write_text(page_of(found), encoding="utf-8")
    page, errors, requests = opened(browser, tmp_path / "report.html", width)
    assert page.evaluate("document.getElementById('text').textContent") == NASTY
    for i in (0, 3, len(found.pieces) - 1):
        page.locator(f"#text span[data-i='{i}']").hover()
        tip = page.locator("#tip").inner_text()
        assert f"token {i}: {json.dumps(found.pieces[i], ensure_ascii=False)}" in tip
        assert f"blocks used {found.blocks_used[i]} of 4" in tip
        for row, block in enumerate(found.routed_layers):
            entered = "entered" if found.entered[row, i] else "skipped"
            # The page keeps six digits.
            shown = float(f"{values[row, i]:.6g}")
            assert f"block {block}: {entered}, {word} {shown:.3f}" in tip
        assert f"entropy of the next {found.entropy[i]:.3f} nats" in tip
    # Nothing is wider than the window but what scrolls by itself.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.browser
def test_a_browser_shows_right_to_left_words_ends_of_lines_and_tokens_without_text(
    browser: Any, tmp_path: Path
) -> None:
    found = traced("aש ב\n\nb😀")
    assert "" in found.pieces
    (tmp_path / "report.html").write_text(page_of(found), encoding="utf-8")
    page, errors, _ = opened(browser, tmp_path / "report.html", 1280)
    places = page.evaluate("[...document.querySelectorAll('#text span')].map(span => span.getBoundingClientRect().x)")
    assert places[found.pieces.index("ש")] > places[found.pieces.index("ב")]
    for i, piece in enumerate(found.pieces):
        if piece:
            page.locator(f"#text span[data-i='{i}']").hover()
            tip = page.locator("#tip").inner_text()
            before = i
            while before > 0 and found.pieces[before - 1] == "":
                before -= 1
            assert re.findall(r"^token (\d+):", tip, re.MULTILINE) == [str(token) for token in range(before, i + 1)]
    assert errors == []
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_as_light_or_dark_as_the_reader_wants_and_readable(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    (tmp_path / "report.html").write_text(page_of(traced("the quick brown fox")), encoding="utf-8")
    page = browser.new_page(color_scheme=scheme)
    page.goto((tmp_path / "report.html").as_uri())
    for selector in ("body", "#tip"):
        style = f"getComputedStyle(document.querySelector('{selector}'))"
        ground, ink = (
            sum(map(int, re.findall(r"\d+", page.evaluate(f"{style}.{name}"))[:3]))
            for name in ("backgroundColor", "color")
        )
        assert (ground < 150 < 600 < ink) if scheme == "dark" else (ink < 150 < 600 < ground)
    page.close()


@pytest.mark.browser
def test_four_thousand_tokens_open_in_two_seconds_and_scroll(browser: Any, tmp_path: Path) -> None:
    text = "".join(f"def name_{i}(value):\n    return value + {i}\n" for i in range(400))
    tokens: Any = TOKENIZER(text)["input_ids"]
    found = traced(TOKENIZER.decode(tokens[:4096]))
    (tmp_path / "report.html").write_text(page_of(found), encoding="utf-8")
    page, errors, _ = opened(browser, tmp_path / "report.html", 1280)
    seconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    assert seconds < 2
    frames = page.evaluate(
        """async () => {
            const text = document.getElementById("text"), times = [];
            for (let i = 0; i < 60; i++) {
                text.scrollTop = i * 40;
                times.push(await new Promise(requestAnimationFrame));
            }
            return (times[59] - times[0]) / 59;
        }"""
    )
    assert frames < 50
    assert errors == []
    page.close()
