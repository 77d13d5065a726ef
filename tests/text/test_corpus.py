"""Reading, splitting, tokenising, packing and caching text."""

import copy
import gzip
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SENTENCE, options
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text import tokenizer as tokenizer_module
from mixture_of_depths.text.batches import Collator, document_positions
from mixture_of_depths.text.corpus import prepare
from mixture_of_depths.text.documents import Skipped, builtin_files, read_documents, split_documents
from mixture_of_depths.text.pieces import tokenized
from mixture_of_depths.text.tokenizer import END_OF_TEXT, start_of_text, tokenize, train_tokenizer


def write_files(folder: Path, count: int = 40) -> None:
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"{i} {SENTENCE * 20}")


def read(opts: DataOptions) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    return list(read_documents(opts, skipped)), skipped


def test_the_builtin_corpus_is_the_standard_library_without_its_tests() -> None:
    files = builtin_files()
    assert sum(path.stat().st_size for path in files) > 8e6
    assert any(path.name == "argparse.py" for path in files)
    assert not any({"test", "site-packages"} & set(path.parts[-3:-1]) for path in files)


def test_every_kind_of_file_gives_its_text(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.md").write_text("two")
    (folder / "c.py").write_text("three = 3")
    (folder / "d.jsonl").write_text('{"text": "four"}\n\n{"text": "five"}\n')
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"six"))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}'))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eight", None]}), folder / "g.parquet")
    (folder / "h.bin").write_bytes(b"no text")
    documents, skipped = read(options(tmp_path, str(folder)))
    assert documents == ["one", "two", "three = 3", "four", "five", "six", "seven", "eight"]
    assert skipped == Skipped(empty=1)


def test_files_and_globs_are_read_in_order(tmp_path: Path) -> None:
    write_files(tmp_path, 3)
    by_glob, _ = read(options(tmp_path, str(tmp_path / "*.txt")))
    by_name, _ = read(options(tmp_path, *(str(tmp_path / f"{i:03}.txt") for i in range(3))))
    assert by_glob == by_name
    assert len(by_glob) == 3


def test_a_dataset_folder_is_streamed_through_the_datasets_library(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": f"text {i}"}) for i in range(10)))
    documents, _ = read(options(tmp_path, f"hub:{folder}", text_column="body", max_characters=15))
    assert documents == ["text 0", "text 1", "tex"]


def test_what_is_no_text_is_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe not utf-8")
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.jsonl").write_text('{"text": "kept"}\n{"text": \n{"text": ""}')
    documents, skipped = read(options(tmp_path, str(tmp_path)))
    assert documents == ["kept"]
    assert skipped == Skipped(not_utf8=1, empty=2, not_json=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}', "text_column=text is missing in line 1 of .*a.jsonl, which has: body"),
        ("a.jsonl", b"[1]", "text_column=text is missing in line 1"),
        ("a.jsonl", b'{"text": 5}', "text_column=text of .*a.jsonl holds int, not text"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-12], "a.txt.gz is not a whole gzip file"),
        ("a.parquet", b"no parquet", "a.parquet is not a Parquet file"),
        ("a.csv", b"x", "a.csv is not one of"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff", r"holds no text \(skipped: 1 not UTF-8"),
        ("a.txt", b"short", "sequence_length=16 is longer than the"),
    ],
)
def test_unusable_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, str(path)))


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column=text is missing in .*, which has: body"):
        prepare(options(tmp_path, str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("nowhere", {}, "data=.*nowhere does not exist"),
        ("", {}, "holds no file that ends in"),
        ("*.txt", {}, "holds no file that ends in"),
        ("nowhere", {"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ("nowhere", {"sequence_length": 1}, "sequence_length=1"),
        ("nowhere", {"vocab_size": 100}, "vocab_size=100"),
    ],
)
def test_wrong_paths_and_options_are_refused(tmp_path: Path, data: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, str(tmp_path / data), **changes))


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer=.*nowhere is not a folder"):
        prepare(options(tmp_path, str(tmp_path), tokenizer=str(tmp_path / "nowhere")))


@given(st.lists(st.text(min_size=1), min_size=2, max_size=30, unique=True), st.floats(0.05, 0.5))
def test_the_split_is_decided_by_content_and_loses_no_text(documents: list[str], fraction: float) -> None:
    train, validation, how = split_documents(documents, fraction)
    if how == "documents":
        assert sorted(train + validation) == sorted(documents)
        again = split_documents(documents[::-1], fraction)
        assert sorted(again[0]) == sorted(train)
    else:
        assert [a + b for a, b in zip(train, validation, strict=True)] == documents


def test_one_long_document_holds_out_its_tail() -> None:
    train, validation, how = split_documents(["a" * 900 + "b" * 100], 0.1)
    assert (train, validation, how) == (["a" * 900], ["b" * 100], "tails")


@given(st.text())
def test_the_tokenizer_gives_any_text_back(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if END_OF_TEXT not in text:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("longest", [40, 100, 1000])
def test_long_documents_are_cut_where_tokens_end(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    texts = [SENTENCE * 20, "one\n\n  two   three\t four and  " * 9, "", " x", "a é 😀 " * 30, "word" * 400]
    whole = [tokenize([text], _tokenizer()).tolist() for text in texts]
    monkeypatch.setattr(tokenizer_module, "LONGEST_PIECE", longest)
    assert ["".join(tokenizer_module.cut(text)) for text in texts] == texts
    assert all(len(piece) <= 2 * longest for text in texts for piece in tokenizer_module.cut(text))
    # All but the word that is longer than a piece has the same tokens.
    assert tokenize(texts[:-1], _tokenizer()).tolist() == [token for tokens in whole[:-1] for token in tokens]
    assert _tokenizer().decode(tokenize(texts[-1:], _tokenizer())[:-1]) == texts[-1]


@pytest.mark.parametrize("word", ["a", "ab", " ", "\n"])
def test_a_tokenizer_learns_from_a_word_of_a_million_characters_at_once(word: str) -> None:
    started = time.monotonic()
    long = train_tokenizer([SENTENCE * 50 + word * (1_000_000 // len(word))], 300)
    assert time.monotonic() - started < 5
    assert len(long.get_vocab()) == 300


def _tokenizer(cache: list[Any] = []) -> Any:  # noqa: B006
    """A tokenizer that a test may change."""
    if not cache:
        cache.append(train_tokenizer([SENTENCE * 50], 300))
    return copy.deepcopy(cache[0])


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
    _tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    corpus = prepare(options(tmp_path, str(tmp_path / "*.txt"), tokenizer=str(tmp_path / "tokenizer")))
    assert corpus.tokenizer.get_vocab() == _tokenizer().get_vocab()


def test_documents_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    write_files(tmp_path)
    plain, given = options(tmp_path, str(tmp_path / "*.txt"), tokenizer="given"), _tokenizer()
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
    given = _tokenizer()
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
        tokenizer = _tokenizer()
        tokenizer.chat_template = template
        given = options(tmp_path, str(tmp_path / "*.txt"), tokenizer="given")
        assert prepare(given, tokenizer).tokenizer.chat_template == template


def test_positions_start_again_after_every_end_of_text() -> None:
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9], [5, 5, 5, 5, 5, 9]])
    assert document_positions(tokens, 9).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_a_batch_holds_tokens_labels_and_positions() -> None:
    batch = Collator(9)([{"input_ids": [1, 9, 2]}, {"input_ids": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 9, 2], [3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]


def test_a_byte_order_mark_and_half_surrogates_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "a\\ud800b"}')
    documents, skipped = read(options(tmp_path, str(tmp_path / "a.jsonl")))
    assert documents == ["one", "a?b"]
    assert skipped == Skipped()


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
