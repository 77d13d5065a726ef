"""The text that each token adds."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from models import TOKENIZER

from mixture_of_depths.text.pieces import NewText, pieces


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_the_pieces_of_a_text_join_to_it(text: str) -> None:
    tokens: Any = TOKENIZER(text)["input_ids"]
    assert "".join(pieces(TOKENIZER, tokens)) == text


def test_a_character_that_the_tokens_break_off_is_shown_as_broken() -> None:
    tokens: Any = TOKENIZER("a€")["input_ids"]
    assert pieces(TOKENIZER, tokens[:-1])[-1] == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=20), st.data()
)
def test_new_text_begins_with_the_character_that_the_prompt_breaks_off(text: str, draw: st.DataObject) -> None:
    text += "."
    tokens: Any = TOKENIZER(text)["input_ids"]
    cut = draw.draw(st.integers(1, len(tokens)))
    # Of this tokenizer each letter of a token stands for a byte.
    prompt_bytes = len("".join(TOKENIZER.convert_ids_to_tokens(tokens[:cut])))
    whole = max(count for count in range(len(text) + 1) if len(text[:count].encode()) <= prompt_bytes)
    new_text = NewText(TOKENIZER, tokens[:cut])
    assert "".join(map(new_text.step, tokens[cut:])) == text[whole:]


def test_a_prompt_s_broken_character_that_stays_broken_is_not_new() -> None:
    euro: Any = TOKENIZER("€")["input_ids"]
    for prompt, texts in (
        (euro[:1], {"a": "a", "€": "€"}),
        (TOKENIZER("\ufffd")["input_ids"], {"a": "a", "\ufffda": "\ufffda"}),
    ):
        for text, expected in texts.items():
            tokens: Any = TOKENIZER(text)["input_ids"]
            new_text = NewText(TOKENIZER, prompt)
            assert "".join(map(new_text.step, tokens)) == expected
