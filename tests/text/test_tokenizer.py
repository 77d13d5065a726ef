"""A tokenizer gives back every text, and takes documents and words of any length."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import SENTENCE, sentence_tokenizer

from mixture_of_depths import ModelOptions, model_config
from mixture_of_depths.text import encoder as encoder_module
from mixture_of_depths.text.tokenizer import END_OF_TEXT, load_tokenizer, tokenize, train_tokenizer


@given(st.text())
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = sentence_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if END_OF_TEXT not in text:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("longest", [40, 100, 1000])
def test_long_documents_are_cut_where_tokens_end(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    texts = [SENTENCE * 20, "one\n\n  two   three\t four and  " * 9, "", " x", "a é 😀 " * 30, "word" * 400]
    whole = [tokenize([text], sentence_tokenizer()).tolist() for text in texts]
    monkeypatch.setattr(encoder_module, "LONGEST_PIECE", longest)
    assert ["".join(encoder_module.cut(text)) for text in texts] == texts
    assert all(len(piece) <= 2 * longest for text in texts for piece in encoder_module.cut(text))
    # All but the word that is longer than a piece has the same tokens.
    assert tokenize(texts[:-1], sentence_tokenizer()).tolist() == [token for tokens in whole[:-1] for token in tokens]
    assert sentence_tokenizer().decode(tokenize(texts[-1:], sentence_tokenizer())[:-1]) == texts[-1]


@pytest.mark.parametrize("word", ["a", "ab", " ", "\n"])
def test_a_tokenizer_learns_from_a_word_of_a_million_characters_no_slower_than_from_sentences(word: str) -> None:
    def learned(text: str) -> tuple[float, int]:
        started = time.monotonic()
        tokenizer = train_tokenizer([text], 300)
        return time.monotonic() - started, len(tokenizer.get_vocab())

    in_sentences, _ = learned(SENTENCE * (1_000_000 // len(SENTENCE)))
    seconds, size = learned(SENTENCE * 50 + word * (1_000_000 // len(word)))
    assert seconds < in_sentences
    assert size == 300


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer"])
def test_a_folder_without_a_vocabulary_is_no_tokenizer(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match=r"tokenizer=.* has no vocabulary but special tokens"):
        load_tokenizer(str(tmp_path))


def test_a_model_has_an_entry_for_every_token_also_where_numbers_are_left_out(tmp_path: Path) -> None:
    sentence_tokenizer().save_pretrained(str(tmp_path))
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(described["model"]["vocab"], key=described["model"]["vocab"].get)
    described["model"]["vocab"][last] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert model_config(ModelOptions(), load_tokenizer(str(tmp_path)), 16).vocab_size == 5001


def test_a_tokenizer_with_one_number_for_two_tokens_is_refused(tmp_path: Path) -> None:
    sentence_tokenizer().save_pretrained(str(tmp_path))
    described = json.loads((tmp_path / "tokenizer.json").read_text())
    numbers = described["model"]["vocab"]
    numbers["".join(described["model"]["merges"][0])] = numbers["".join(described["model"]["merges"][1])]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"tokenizer=.* has a damaged tokenizer.json: .* out of vocabulary"):
        load_tokenizer(str(tmp_path))
