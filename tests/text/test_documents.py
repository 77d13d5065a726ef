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

from mixture_of_depths.text import documents as documents_module
from mixture_of_depths.text.corpus import prepare
from mixture_of_depths.text.documents import Skipped, Span, read_documents, read_file, split_documents
from mixture_of_depths.text.sources import builtin_files


def compressed(content: bytes, codec: str) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, codec) as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


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


def test_of_a_long_text_no_more_is_read_than_a_limit_of_characters_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "LONGEST_TEXT", 1000, raising=False)
    monkeypatch.setattr(documents_module, "WINDOW", 100)
    text = "".join(f"line {i}\n" for i in range(1000))
    # What would be noticed if it were read.
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    documents, skipped = read(options(tmp_path, str(tmp_path / "a.txt"), max_characters=2500))
    assert "".join(documents) == text[:2500]
    assert max(map(len, documents)) < 1100
    assert skipped == Skipped()


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
        ("a.jsonl", b'{"text": null}', r"holds no text \(skipped: .*, 1 without text or usable messages\)"),
        ("a.txt.gz", b"no gzip", "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"x" * 5000, mtime=0)[:-12], "a.txt.gz is not a whole gzip file"),
        ("a.txt.gz", b"", "a.txt.gz is not a whole gzip file"),
        ("a.jsonl.gz", b"", r"a.jsonl.gz is not a whole gzip file \(it has no bytes\)"),
        ("a.jsonl.zst", b"", "a.jsonl.zst is not a whole zstd file"),
        ("a.parquet.gz", b"no gzip", "a.parquet.gz is not a whole gzip file"),
        ("a.parquet.gz", gzip.compress(b"no parquet", mtime=0), "a.parquet.gz is not a Parquet file"),
        ("a.txt.zst", b"no zstd", "a.txt.zst is not a whole zstd file"),
        ("a.jsonl.zst", compressed(b"{}" * 5000, "zstd")[:-9], "a.jsonl.zst is not a whole zstd file"),
        ("a.json.gz", gzip.compress(b"{}" * 5000, mtime=0)[:-9], "a.json.gz is not a whole gzip file"),
        ("a.json", b"{", r"holds no text \(skipped: .*, 1 not JSON"),
        ("a.json", b"[1, [2]]", "text_column=text holds text in no line of .*a.json; line 1 has: int"),
        ("a.json", b"[" * 100_000, r"holds no text \(skipped: .*, 1 not JSON"),
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


def test_a_compressed_file_gives_the_text_of_the_plain_one(tmp_path: Path) -> None:
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content in (
        ("a.jsonl", lines),
        ("b.jsonl.zst", compressed(lines, "zstd")),
        ("c.json.gz", gzip.compress(lines, mtime=0)),
        ("d.json.zst", compressed(b' [{"text": "one"}, {"text": "two"}]', "zstd")),
        # Several frames after one another, as parallel compressors write them.
        ("e.jsonl.zst", compressed(lines[:16], "zstd") + compressed(lines[16:], "zstd")),
        ("f.json.gz", gzip.compress(b'[1]\n{"text": "one"}\n{"text": "two"}', mtime=0)),
    ):
        (tmp_path / name).write_bytes(content)
        assert read(options(tmp_path, str(tmp_path / name)))[0] == ["one", "two"], name
    (tmp_path / "a.txt.zst").write_bytes(compressed("zwölf".encode(), "zstd"))
    assert read(options(tmp_path, str(tmp_path / "a.txt.zst")))[0] == ["zwölf"]


def test_dots_lead_into_nested_fields_unless_a_field_has_that_name(tmp_path: Path) -> None:
    rows = [{"meta": {"text": "one"}}, {"meta": {"text": None}}, {"meta": None}, {"meta": {"text": "two"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents, skipped = read(options(tmp_path, str(tmp_path / "a.parquet"), text_column="meta.text"))
    assert (documents, skipped) == (["one", "two"], Skipped(no_text=2))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, skipped = read(options(tmp_path, str(tmp_path / "a.jsonl"), text_column="meta.text"))
    assert (documents, skipped) == (["one", "two"], Skipped(no_text=2))
    pyarrow.parquet.write_table(pyarrow.table({"meta.text": ["flat"]}), tmp_path / "b.parquet")
    assert read(options(tmp_path, str(tmp_path / "b.parquet"), text_column="meta.text"))[0] == ["flat"]
    with pytest.raises(ValueError, match=r"text_column=meta\.body is missing in .*a\.parquet, which has: text"):
        read(options(tmp_path, str(tmp_path / "a.parquet"), text_column="meta.body"))
    with pytest.raises(
        ValueError, match=r"meta\.text\.more is missing in .*: before more it leads to string, no fields"
    ):
        read(options(tmp_path, str(tmp_path / "a.parquet"), text_column="meta.text.more"))


def test_a_line_that_is_too_long_for_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LONGEST_LINE", 50)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "' + "x" * 100 + '"}')
    with pytest.raises(ValueError, match=r"a\.jsonl has a line of .* GB or more, which is no record"):
        read(options(tmp_path, str(tmp_path / "a.jsonl")))
    (tmp_path / "a.json").write_text('[{"text": "' + "x" * 100 + '"}]')
    with pytest.raises(ValueError, match=r"a\.json is one list of .* GB or more; write one record a line"):
        read(options(tmp_path, str(tmp_path / "a.json")))


TEXTS = st.lists(st.sampled_from(["a", "é", "😀", " ", "\n", "bc"]), max_size=60).map("".join)


@given(TEXTS, st.integers(1, 40))
def test_the_spans_of_a_text_are_the_whole_of_it(
    tmp_path_factory: pytest.TempPathFactory, text: str, size: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    length = path.stat().st_size
    places = [*range(0, length, size)] or [0]
    spans = [Span(place, end) for place, end in zip(places, [*places[1:], None], strict=True)]
    skipped = Skipped()
    assert "".join(document for span in spans for document in read_file(path, "text", skipped, span, size)) == text
    assert skipped == Skipped()
    packed = path.with_name("a.txt.gz")
    packed.write_bytes(gzip.compress(text.encode(), mtime=0))
    assert "".join(read_file(packed, "text", skipped, longest=size)) == text
    assert skipped == Skipped()


@given(st.lists(st.sampled_from(["", "a", "long " * 5, "é"]), max_size=12), st.integers(1, 60), st.booleans())
def test_every_line_belongs_to_one_span(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n" * ends)
    places = [*range(0, path.stat().st_size, size)] or [0]
    spans = [Span(place, end) for place, end in zip(places, [*places[1:], None], strict=True)]
    assert [text for span in spans for text in read_file(path, "text", Skipped(), span)] == texts


def test_a_value_of_a_column_that_is_not_utf_8_is_counted_and_the_others_are_kept(tmp_path: Path) -> None:
    raw = pyarrow.array([b"one", b"\xff\xfe", None, b"two"], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert read(options(tmp_path, str(tmp_path / "a.parquet"))) == (["one", "two"], Skipped(not_utf8=1, no_text=1))


def test_a_column_is_found_by_its_whole_name_and_refused_where_two_have_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"meta": [{"text": "wrong"}], "meta.text": ["right"]}), path)
    assert read(options(tmp_path, str(path), text_column="meta.text"))[0] == ["right"]
    two = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(two, path)
    with pytest.raises(ValueError, match=r"text_column=text is the name of 2 columns of .*a\.parquet; rename one"):
        read(options(tmp_path, str(path)))
    pyarrow.parquet.write_table(pyarrow.table({"meta": [[{"text": "x"}]]}), path)
    with pytest.raises(ValueError, match=r"meta\.text is missing in .*: before text it leads to list<.*>, no fields"):
        read(options(tmp_path, str(path), text_column="meta.text"))


def test_zeros_after_a_gzip_file_and_any_space_before_a_list_are_no_matter(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "one"}\n', mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(whole + bytes(512))
    assert read(options(tmp_path, str(tmp_path / "a.jsonl.gz")))[0] == ["one"]
    (tmp_path / "a.jsonl.gz").write_bytes(whole + b"junk")
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        read(options(tmp_path, str(tmp_path / "a.jsonl.gz")))
    for before in (b" ", b"\xef\xbb\xbf "):
        (tmp_path / "a.json").write_bytes(before + b" \n" * 20_000 + b'[{"text": "one"}, {"text": "two"}]')
        assert read(options(tmp_path, str(tmp_path / "a.json")))[0] == ["one", "two"]


def test_rows_of_a_table_are_read_by_their_size(tmp_path: Path) -> None:
    texts = ["x" * 6_000_000 + str(i) for i in range(6)]
    table = pyarrow.table({"text": texts})
    # A page for each row: what reads one row of a page holds all of it.
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=1)
    del table
    before, held = pyarrow.total_allocated_bytes(), []
    for text in read_documents(options(tmp_path, str(tmp_path / "a.parquet")), Skipped()):
        assert len(text) == 6_000_001
        held.append(pyarrow.total_allocated_bytes() - before)
    assert len(held) == 6
    assert max(held) < 30e6


def test_a_column_of_times_is_refused_though_python_has_no_name_for_them(tmp_path: Path) -> None:
    times = [([2147483647], pyarrow.date32(), "date32"), ([1, 2], pyarrow.timestamp("us", "Foo/Bar"), "timestamp")]
    for values, kind, name in times:
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=rf"text_column=text of .*a\.parquet holds {name}.+, not text"):
            list(read_documents(options(tmp_path, str(tmp_path / "a.parquet")), Skipped()))


def test_a_table_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = tmp_path / "na\udcffme.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").rename(path)
    assert list(read_documents(options(tmp_path, str(path)), Skipped())) == ["one", "two"]
