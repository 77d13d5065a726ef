"""Reading, splitting, tokenising, packing and caching text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import SENTENCE, options, read, sentence_tokenizer, write_files
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from mixture_of_depths.files import seal
from mixture_of_depths.text.corpus import load_prepared, prepare
from mixture_of_depths.text.documents import split_documents
from mixture_of_depths.text.pieces import tokenized
from mixture_of_depths.text.tokenizer import END_OF_TEXT, start_of_text, train_tokenizer


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("nowhere", {}, "data=.*nowhere does not exist"),
        ("", {}, "holds no file that ends in"),
        ("*.txt", {}, "holds no file that ends in"),
        ("nowhere", {"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ("nowhere", {"sequence_length": 1}, "sequence_length=1"),
        ("nowhere", {"vocab_size": 100}, "vocab_size=100"),
        ("nowhere", {"vocab_size": 4096, "tokenizer": "x"}, "vocab_size=4096 has no use with tokenizer=x"),
        ("nowhere", {"split": "test"}, "split=test has no use without a data set of the hub, hub:NAME, in data"),
    ],
)
def test_wrong_paths_and_options_are_refused(tmp_path: Path, data: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, str(tmp_path / data), **changes))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer=.*nowhere is not a folder"):
        prepare(options(tmp_path, str(tmp_path), tokenizer=str(tmp_path / "nowhere")))


def test_sequences_hold_the_documents_in_order_with_end_of_text_between(tmp_path: Path) -> None:
    write_files(tmp_path)
    corpus = prepare(options(tmp_path, str(tmp_path)))
    documents, _ = read(options(tmp_path, str(tmp_path)))
    train, _, _ = split_documents(documents, 0.2)
    tokens = [token for block in corpus.train["input_ids"] for token in block]
    text = corpus.tokenizer.decode(tokens)
    assert END_OF_TEXT.join(train).startswith(text)
    assert corpus.facts.train_tokens - len(tokens) < 16
    assert corpus.facts.train_documents == len(train)


def test_prepared_text_is_cached_by_content(tmp_path: Path) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    first = prepare(opts)
    entries = sorted((tmp_path / "cache").iterdir())
    stamps = [entry.stat().st_mtime_ns for entry in entries]
    second = prepare(opts)
    assert [entry.stat().st_mtime_ns for entry in sorted((tmp_path / "cache").iterdir())] == stamps
    assert first.train["input_ids"] == second.train["input_ids"]
    assert first.facts == second.facts
    for changed in (replace(opts, sequence_length=8), replace(opts, vocab_size=290)):
        prepare(changed)
    (tmp_path / "000.txt").write_text("other " + SENTENCE * 20)
    prepare(opts)
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 4


def test_what_was_left_out_is_that_of_the_files_read_though_others_of_the_same_text_are_cached(tmp_path: Path) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    first = prepare(opts)
    (tmp_path / "empty.txt").write_text("")
    again = prepare(opts)
    assert (first.key, first.facts.skipped.empty) == (again.key, 0)
    assert again.facts.skipped.empty == 1


def test_an_entry_of_before_records_without_text_were_counted_is_still_read(tmp_path: Path) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    first = prepare(opts)
    entry = opts.cache_dir / first.key
    facts = json.loads((entry / "facts.json").read_text())
    del facts["skipped"]["no_text"]
    (entry / "facts.json").write_text(json.dumps(facts))
    seal(entry)
    assert load_prepared(opts, first.key).facts == first.facts


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_cache_entry_is_prepared_again(tmp_path: Path, damage: str) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    first = prepare(opts)
    path = next((opts.cache_dir / first.key / "train").glob("*.arrow"))
    whole = path.read_bytes()
    path.unlink()
    if damage != "remove":
        path.write_bytes(whole[:-9] if damage == "cut" else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    again = prepare(opts)
    assert path.read_bytes() == whole
    assert again.train["input_ids"] == first.train["input_ids"]


def test_what_a_killed_preparation_left_aside_makes_way(tmp_path: Path) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    key = prepare(opts).key
    (opts.cache_dir / key).rename(opts.cache_dir / f".preparing-{key}")
    (opts.cache_dir / f".preparing-{key}" / "facts.json").write_text("{")
    assert prepare(opts).key == key
    assert sorted(path.name for path in opts.cache_dir.iterdir()) == [f".{key}.lock", key]


def test_an_existing_tokenizer_is_used_as_it_is(tmp_path: Path) -> None:
    write_files(tmp_path)
    sentence_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    corpus = prepare(options(tmp_path, str(tmp_path / "*.txt"), tokenizer=str(tmp_path / "tokenizer")))
    assert corpus.tokenizer.get_vocab() == sentence_tokenizer().get_vocab()


def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    write_files(tmp_path)
    plain, given = options(tmp_path, str(tmp_path / "*.txt"), tokenizer="given"), sentence_tokenizer()
    without = prepare(plain, given)
    given.add_special_tokens({"bos_token": "<s>"})
    assert start_of_text(given) == []
    given.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", given.bos_token_id)]
    )
    assert start_of_text(given) == [given.bos_token_id]
    corpus = prepare(plain, given)
    assert corpus.key != without.key
    tokens = [token for block in corpus.validation["input_ids"] for token in block]
    after = {tokens[i + 1] for i in range(len(tokens) - 1) if tokens[i] == corpus.end_of_text}
    assert {tokens[0]} | after == {given.bos_token_id}
    assert tokens.count(given.bos_token_id) == 1 + tokens.count(corpus.end_of_text)
    (prompt, chat) = tokenized(given, ["the router", "<s>the router"], "prompt", special=True)
    assert prompt == chat == given("the router")["input_ids"]


def test_a_tokenizer_s_state_of_an_earlier_use_does_not_change_the_text_s_key(tmp_path: Path) -> None:
    write_files(tmp_path)
    given = sentence_tokenizer()
    given.backend_tokenizer.enable_truncation(7)
    given.backend_tokenizer.enable_padding()
    given.save_pretrained(str(tmp_path / "tokenizer"))
    opts = options(tmp_path, str(tmp_path / "*.txt"), tokenizer=str(tmp_path / "tokenizer"))
    corpus = prepare(opts)
    corpus.tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    assert prepare(opts).key == corpus.key


def test_a_chat_template_is_kept_where_the_cache_holds_the_same_tokenizer_with_another(tmp_path: Path) -> None:
    write_files(tmp_path)
    for template in ("one", "two"):
        tokenizer = sentence_tokenizer()
        tokenizer.chat_template = template
        given = options(tmp_path, str(tmp_path / "*.txt"), tokenizer="given")
        assert prepare(given, tokenizer).tokenizer.chat_template == template


def test_end_of_text_in_a_document_is_text_not_a_border(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "b.txt").write_text(f"{SENTENCE}{END_OF_TEXT}{SENTENCE}" * 20)
    corpus = prepare(options(tmp_path, str(tmp_path / "*.txt")))
    tokens = [token for split in (corpus.train, corpus.validation) for block in split["input_ids"] for token in block]
    assert tokens.count(corpus.end_of_text) <= 41


def test_bytes_per_token_count_the_validation_text(tmp_path: Path) -> None:
    write_files(tmp_path)
    corpus = prepare(options(tmp_path, str(tmp_path / "*.txt")))
    documents, _ = read(options(tmp_path, str(tmp_path / "*.txt")))
    _, validation, _ = split_documents(documents, 0.2)
    tokens = sum(len(corpus.tokenizer(text)["input_ids"]) + 1 for text in validation)
    expected = sum(len(text.encode()) for text in validation) / tokens
    assert corpus.facts.validation_bytes_per_token == pytest.approx(expected)


def test_a_tokenizer_that_normalises_has_its_own_cache_entry(tmp_path: Path) -> None:
    write_files(tmp_path)
    counts = []
    for name, normalizer in (("plain", None), ("lower", normalizers.Replace("e", "eeee"))):
        tokenizer = train_tokenizer([SENTENCE * 50], 300)
        if normalizer is not None:
            tokenizer.backend_tokenizer.normalizer = normalizer
        tokenizer.save_pretrained(str(tmp_path / name))
        corpus = prepare(options(tmp_path, str(tmp_path / "*.txt"), tokenizer=str(tmp_path / name)))
        counts.append(corpus.facts.train_tokens)
    assert counts[1] > counts[0]
