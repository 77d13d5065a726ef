"""The text that each token adds."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from models import TOKENIZER

from mixture_of_depths.text.pieces import pieces


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_the_pieces_of_a_text_join_to_it(text: str) -> None:
    tokens: Any = TOKENIZER(text)["input_ids"]
    assert "".join(pieces(TOKENIZER, tokens)) == text


def test_a_character_that_the_tokens_break_off_is_shown_as_broken() -> None:
    tokens: Any = TOKENIZER("a€")["input_ids"]
    assert pieces(TOKENIZER, tokens[:-1])[-1] == "\ufffd"
