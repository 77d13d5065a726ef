"""Reading, splitting, tokenising, packing and caching text."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from models import SENTENCE, options, read, sentence_tokenizer, write_files, write_numbers
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from mixture_of_depths.files import seal
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text import corpus as corpus_module
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus, load_prepared, prepare
from mixture_of_depths.text.documents import split_documents
from mixture_of_depths.text.pieces import tokenized
from mixture_of_depths.text.preparation import prepare_shards
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


def prepared_numbers(tmp_path: Path, name: str, numbers: range, **changes: Any) -> Path:
    """A folder of prepared text: the multiples of some numbers."""
    folder = tmp_path / f"text-{name}"
    folder.mkdir()
    write_numbers(folder, numbers)
    prepare_shards(options(tmp_path, str(folder), **changes), tmp_path / name, processes=1)
    return tmp_path / name


def from_shards(tmp_path: Path, *data: str, **changes: Any) -> Corpus:
    sources = {"data": data, "sequence_length": 16, "cache_dir": tmp_path / "cache", **changes}
    return prepare(DataOptions(**sources))


def test_a_prepared_folder_trains_as_the_text_that_it_was_made_of(tmp_path: Path) -> None:
    folder = prepared_numbers(tmp_path, "a", range(40))
    corpus = from_shards(tmp_path, str(folder))
    direct = prepare(options(tmp_path, str(tmp_path / "text-a")))
    tokens = np.concatenate([row["input_ids"] for row in corpus.train])
    assert tokens.tolist() == [token for row in direct.train["input_ids"] for token in row]
    assert corpus.validation["input_ids"][:] == direct.validation["input_ids"][:]
    assert replace(corpus.facts, cut=None) == direct.facts
    assert corpus.facts.cut is not None
    assert corpus.facts.cut.dropped_tokens == direct.facts.train_tokens % 16
    assert "documents cut, " in str(corpus.facts)
    assert corpus.sources == ()
    assert from_shards(tmp_path, str(folder)).key == corpus.key
    assert from_shards(tmp_path, str(folder), sequence_length=8).key != corpus.key
    # Elsewhere it is the same text.
    folder.rename(tmp_path / "b")
    assert from_shards(tmp_path, str(tmp_path / "b")).key == corpus.key
    assert load_prepared(corpus.options, corpus.key).facts == corpus.facts


def test_weighted_sources_are_one_text_with_a_tokenizer_and_each_its_held_out_part(tmp_path: Path) -> None:
    for name, numbers in (("a", range(40)), ("b", range(100, 120))):
        (tmp_path / name).mkdir()
        write_numbers(tmp_path / name, numbers)
    opts = options(tmp_path, f"{tmp_path}/a:0.25", f"{tmp_path}/b:0.75")
    corpus = prepare(opts)
    assert corpus.weights == [0.25, 0.75]
    assert [source.name for source in corpus.sources] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    held_out = [len(source.validation) for source in corpus.sources]
    whole = [row for source in corpus.sources for row in source.validation["input_ids"][:]]
    assert all(row in whole for row in corpus.validation["input_ids"][:])
    rows, of_a, of_b = (part["input_ids"][:] for part in (corpus.validation, *(s.validation for s in corpus.sources)))
    first = round(len(rows) * 0.25 / 2) * 2
    assert (rows[:first], rows[first:]) == (of_a[:first], of_b[: len(rows) - first])
    assert min(held_out) > 2
    assert prepare(opts).key == corpus.key
    assert prepare(replace(opts, data=(f"{tmp_path}/a:0.5", f"{tmp_path}/b:0.5"))).key != corpus.key
    # Where the text is gone, what was prepared of it is still there.
    (tmp_path / "a" / "0.txt").unlink()
    assert load_prepared(opts, corpus.key).facts == corpus.facts


def test_prepared_folders_are_joined_by_size_and_must_have_one_tokenizer(tmp_path: Path) -> None:
    first = prepared_numbers(tmp_path, "a", range(40))
    tokenizer = str(first / "tokenizer")
    second = prepared_numbers(tmp_path, "b", range(100, 120), tokenizer=tokenizer)
    corpus = from_shards(tmp_path, str(first), str(second))
    assert corpus.weights is None
    assert len(corpus.train) == sum(len(from_shards(tmp_path, str(folder)).train) for folder in (first, second))
    assert [source.name for source in corpus.sources] == [str(first), str(second)]
    third = prepared_numbers(tmp_path, "c", range(100, 120))
    with pytest.raises(
        ValueError, match=r"data=.*c was prepared with another tokenizer; prepare all|another tokenizer, "
    ):
        from_shards(tmp_path, str(first), str(third))
    with pytest.raises(ValueError, match=r"validation_fraction=0.5 has no use with data=.*a, which is prepared"):
        from_shards(tmp_path, str(first), validation_fraction=0.5)
    with pytest.raises(ValueError, match="sequence_length=100000 is longer than every shard of the training text"):
        from_shards(tmp_path, str(first), sequence_length=100_000)
    with pytest.raises(ValueError, match="holds prepared text, which only training reads"):
        read(options(tmp_path, str(first)))


def test_text_that_is_more_than_is_held_in_memory_goes_to_shards_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    opts = options(tmp_path, str(tmp_path / "*.txt"))
    in_memory = prepare(opts)
    monkeypatch.setattr(corpus_module, "IN_MEMORY", 1000)
    sharded = prepare(opts)
    assert replace(sharded.facts, cut=None) == in_memory.facts
    assert list(opts.cache_dir.glob("shards-*/prepared.json"))
    (tmp_path / "000.txt").write_text("other " + SENTENCE * 20)
    changed = prepare(opts)
    assert changed.key != sharded.key
    assert len(list(opts.cache_dir.glob("shards-*"))) == 2


def test_compressed_text_goes_to_shards_by_what_it_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"{i} {SENTENCE}" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "c.parquet", compression="zstd")
    limit = 2 * max(path.stat().st_size for path in (tmp_path / "b.txt.gz", tmp_path / "c.parquet"))
    assert limit < len(text)
    monkeypatch.setattr(corpus_module, "IN_MEMORY", limit)
    for number, name in enumerate(("a.txt", "b.txt.gz", "c.parquet"), start=1):
        prepare(options(tmp_path, str(tmp_path / name)))
        assert len(list((tmp_path / "cache").glob("shards-*"))) == number


def test_packed_sequences_have_whole_documents_and_of_cut_ones_a_beginning_at_the_end(tmp_path: Path) -> None:
    write_files(tmp_path)
    corpus = prepare(options(tmp_path, str(tmp_path / "*.txt"), packing="best_fit", sequence_length=100))
    again = prepare(options(tmp_path, str(tmp_path / "*.txt"), packing="best_fit", sequence_length=100))
    assert again.key == corpus.key
    assert corpus.facts.cut is not None
    assert corpus.facts.cut.longer == corpus.facts.train_documents
    ends = np.array([row["input_ids"][:-1] == corpus.end_of_text for row in corpus.train])
    batch = next(batches(corpus.train, range(len(corpus.train)), corpus.end_of_text, 1000, torch.device("cpu")))
    assert batch["input_ids"].shape == (len(corpus.train), 100)
    assert ((batch["position_ids"][:, 1:] == 0).numpy() == ends).all()
    assert ends.any()
    plain = prepare(options(tmp_path, str(tmp_path / "*.txt"), sequence_length=100))
    assert len(corpus.train) == len(plain.train)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["b.bin"], r"data=.*b\.bin holds tokens; name the folder of their tokenizer, as tokenizer"),
        (["a.txt:0.5", "b.bin:0.5"], r"data=.*b\.bin holds tokens; name the folder of their tokenizer, as tokenizer"),
        (["a.txt", "b.bin"], "names text and tokens; give one kind, or each a weight"),
    ],
)
def test_tokens_without_their_tokenizer_are_refused(tmp_path: Path, data: list[str], message: str) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE * 100)
    np.arange(500, dtype="<u2").tofile(tmp_path / "b.bin")
    with pytest.raises(ValueError, match=message):
        prepare(options(tmp_path, *(str(tmp_path / source) for source in data)))


def test_a_prepared_folder_that_holds_other_text_or_another_tokenizer_than_before_is_refused(tmp_path: Path) -> None:
    folder = prepared_numbers(tmp_path, "a", range(40))
    corpus = from_shards(tmp_path, str(folder))
    shutil.rmtree(folder)
    other = prepared_numbers(tmp_path, "b", range(100, 140))
    other.rename(folder)
    with pytest.raises(ValueError, match=r"data=.*a is not what it was: .*a holds other text than was trained on"):
        load_prepared(corpus.options, corpus.key)
    train_tokenizer(["another text"], 280).save_pretrained(str(folder / "tokenizer"))
    with pytest.raises(ValueError, match=r"data=.*a is damaged: .*tokenizer is not the tokenizer that made its tokens"):
        from_shards(tmp_path, str(folder))


def test_a_file_that_changes_while_it_is_read_into_memory_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": SENTENCE}) + "\n" for _ in range(40)))
    read_all = corpus_module.read_all

    def changing(*arguments: Any) -> Any:
        yield from read_all(*arguments)
        path.write_text(json.dumps({"text": "another"}))

    monkeypatch.setattr(corpus_module, "read_all", changing)
    with pytest.raises(ValueError, match=r"data=.*text\.jsonl has changed while it was read"):
        prepare(options(tmp_path, str(path)))


def test_a_share_that_holds_out_nothing_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(ValueError, match="validation_fraction=1e-17 holds out nothing of 40 documents; raise it"):
        prepare(options(tmp_path, str(tmp_path), validation_fraction=1e-17))


def test_a_name_that_is_no_text_is_refused_where_shards_are_named_by_it(tmp_path: Path) -> None:
    write_files(tmp_path)
    with pytest.raises(ValueError, match=r"data='.*\\udcff.txt' is not UTF-8"):
        prepare(options(tmp_path, str(tmp_path / "000.txt"), str(tmp_path / "\udcff.txt"), packing="best_fit"))
    with pytest.raises(ValueError, match=r"out='.*\\udcff' is not UTF-8"):
        prepare_shards(options(tmp_path, str(tmp_path)), tmp_path / "\udcff")
