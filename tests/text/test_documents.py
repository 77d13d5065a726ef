"""Every source gives its documents, and the split of them loses none."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import options, read, write_files

from mixture_of_depths.text.corpus import prepare
from mixture_of_depths.text.documents import Skipped, builtin_files, split_documents


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
    (folder / "e.txt.gz").write_bytes(gzip.compress(b"six", mtime=0))
    (folder / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "seven"}', mtime=0))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eight", None]}), folder / "g.parquet")
    (folder / "h.bin").write_bytes(b"no text")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["nine"]}), tmp_path / "i.parquet")
    (folder / "i.parquet.gz").write_bytes(gzip.compress((tmp_path / "i.parquet").read_bytes(), mtime=0))
    documents, skipped = read(options(tmp_path, str(folder)))
    assert documents == ["one", "two", "three = 3", "four", "five", "six", "seven", "eight", "nine"]
    assert skipped == Skipped(no_text=1)


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
    (tmp_path / "d.jsonl").write_text('{"body": "x"}\n[1]\n"x"\nnull\n{"text": 5}\n{"text": null}\n{"text": "also"}')
    documents, skipped = read(options(tmp_path, str(tmp_path)))
    assert documents == ["kept", "also"]
    assert skipped == Skipped(not_utf8=1, empty=2, not_json=1, no_text=6)


def test_a_line_with_a_number_too_long_to_read_is_counted_as_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "lost", "id": ' + "9" * 5000 + '}\n{"text": "two"}')
    assert read(options(tmp_path, str(tmp_path / "a.jsonl"))) == (["one", "two"], Skipped(not_json=1))


def test_a_line_that_is_not_utf_8_is_counted_and_the_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "lo\xffst"}\n{"text": "tw\xc3\xb6"}\n\xff\n')
    assert read(options(tmp_path, str(tmp_path / "a.jsonl"))) == (["one", "twö"], Skipped(not_utf8=2))


def test_nulls_of_a_data_set_are_counted_as_those_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}')
    assert read(options(tmp_path, f"hub:{folder}")) == (["one", "two"], Skipped(no_text=1))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n[1]', "text_column=text holds text in no line of .*a.jsonl; line 1 has: body"),
        ("a.jsonl", b"\n[1]", "text_column=text holds text in no line of .*a.jsonl; line 2 has: list"),
        ("a.jsonl", b'{"text": 5}', "text_column=text holds text in no line of .*a.jsonl; line 1 has: int"),
        ("a.jsonl", b'{"text": null}', r"holds no text \(skipped: .*, 1 without text\)"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-12], "a.txt.gz is not a whole gzip file"),
        ("a.parquet.gz", b"no gzip", "a.parquet.gz is not a whole gzip file"),
        ("a.parquet.gz", gzip.compress(b"no parquet", mtime=0), "a.parquet.gz is not a Parquet file"),
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


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "data='' names no text; give a file"),
        ("hub:", "data=hub: names no data set; give hub:NAME"),
        ("hub::english", "data=hub: names no data set; give hub:NAME"),
    ],
)
def test_a_source_without_a_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text("text of the working directory")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        read(options(tmp_path, source))


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column=text is missing in .*, which has: body"):
        prepare(options(tmp_path, str(tmp_path / "a.parquet")))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column=text of .*a\.parquet holds int, not text"):
        prepare(options(tmp_path, str(tmp_path / "a.parquet")))


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


def test_a_byte_order_mark_and_half_surrogates_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "a\\ud800b"}')
    documents, skipped = read(options(tmp_path, str(tmp_path / "a.jsonl")))
    assert documents == ["one", "a?b"]
    assert skipped == Skipped()
