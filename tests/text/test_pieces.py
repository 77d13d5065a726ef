"""The text that each token adds."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from models import TOKENIZER
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

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


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: a character that is no token of its own is told by a token for each byte."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}, "\u2581a": 257, "b": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_bytes_that_are_no_character_leave_what_is_told_as_it_is() -> None:
    tokenizer = with_byte_fallback()
    accented, begun = [1 + byte for byte in "é".encode()], 1 + "€".encode()[0]
    assert pieces(tokenizer, [258, *accented, begun, 257]) == ["b", "", "é", "", "\ufffd a"]
    new_text = NewText(tokenizer, [258, *accented])
    assert [new_text.step(token) for token in (begun, 258, 257, *accented)] == ["", "\ufffdb", " a", "", "é"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([257, 258, *(1 + byte for byte in "aé€🙂".encode())]), max_size=12), st.integers(0, 12))
def test_any_tokens_have_pieces_and_those_of_whole_characters_join_to_their_text(tokens: list[int], cut: int) -> None:
    tokenizer = with_byte_fallback()
    joined, whole = "".join(pieces(tokenizer, tokens)), str(tokenizer.decode(tokens))
    if "\ufffd" not in whole:
        assert joined == whole
    new_text = NewText(tokenizer, tokens[:cut])
    assert len([new_text.step(token) for token in tokens[cut:]]) == len(tokens[cut:])


def test_a_character_before_one_that_the_last_token_breaks_off_is_told() -> None:
    two = next(token for token in range(len(TOKENIZER)) if TOKENIZER.decode([token]) == "ש\ufffd")
    new_text = NewText(TOKENIZER, [])
    assert new_text.step(two) == "ש"
    assert new_text.rest() == "\ufffd"
    assert pieces(TOKENIZER, [two]) == ["ש\ufffd"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aé€🙂日"), min_size=1, max_size=6), st.data())
def test_a_prompt_of_bytes_that_breaks_off_anywhere_is_gone_on_with_by_its_last_character(
    text: str, draw: st.DataObject
) -> None:
    tokens = [1 + byte for byte in text.encode()]
    cut = draw.draw(st.integers(0, len(tokens)))
    whole = max(count for count in range(len(text) + 1) if len(text[:count].encode()) <= cut)
    new_text = NewText(with_byte_fallback(), tokens[:cut])
    assert "".join(map(new_text.step, [*tokens[cut:], 258])) == text[whole:] + "b"


def test_special_tokens_inside_a_character_that_a_prompt_breaks_off_have_no_say() -> None:
    tokenizer = with_byte_fallback()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    end, sun, smile = tokenizer.eos_token_id, *([1 + byte for byte in letter.encode()] for letter in "日😀")
    for prompt in ([258, *sun, *smile[:3], end], [258, *sun, smile[0], end, smile[1], end, smile[2]]):
        new_text = NewText(tokenizer, prompt)
        assert [new_text.step(token) for token in (smile[3], 258)] == ["😀", "b"]
