"""Files of tokens give their documents; what contradicts itself, or the tokenizer, is refused."""

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixture_of_depths.text import tokens as tokens_module
from mixture_of_depths.text.sources import file_facts
from mixture_of_depths.text.tokens import MEGATRON, Vocabulary, open_tokens, read_token_documents

END = 9
SMALL, LARGE = Vocabulary(99, END, None), Vocabulary(99_999, END, None)
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 10]]
ROW = [1, 2, 3, END, 4, END, 5, 6, 7, 8, 10, END]


def llm_c(tokens: list[int], magic: int, kind: str, count: int | None = None) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, dtype=kind).tobytes()


def write_megatron(folder: Path, documents: list[list[int]], kind: int = 8, dtype: str = "<u2") -> Path:
    """Two files, as Megatron-LM's builder writes them, a sequence a document."""
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    places = np.concatenate([[0], np.cumsum(lengths)])
    path = folder / "text_document.bin"
    path.write_bytes(np.array([token for document in documents for token in document], dtype=dtype).tobytes())
    head = MEGATRON + struct.pack("<QBQQ", 1, kind, len(documents), len(documents) + 1)
    pointers = (places[:-1] * np.dtype(dtype).itemsize).astype("<i8")
    firsts = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + firsts.tobytes())
    return path


def documents_of(path: Path, vocabulary: Vocabulary) -> list[list[int]]:
    file = open_tokens(path, vocabulary)
    return [document.tolist() for document in read_token_documents(file, vocabulary, 0, file.count)]


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content, vocabulary in (
        (np.array(ROW, dtype="<u2").tobytes(), SMALL),
        (np.array(ROW, dtype="<u4").tobytes(), LARGE),
        (llm_c(ROW, 20240520, "<u2"), SMALL),
        (llm_c(ROW, 20240801, "<u4"), SMALL),
        # llm.c's own scripts put the token before each document.
        (llm_c([END, *ROW[:-1]], 20240520, "<u2"), SMALL),
    ):
        path.write_bytes(content)
        assert documents_of(path, vocabulary) == DOCUMENTS
    for kind, dtype in ((8, "<u2"), (4, "<i4"), (5, "<i8")):
        assert documents_of(write_megatron(tmp_path, [*DOCUMENTS, []], kind, dtype), SMALL) == DOCUMENTS


def test_a_tokenizer_s_start_of_text_begins_a_document_too(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(np.array([8, 1, 2, 8, 3, 8, 4, END, 8, 5], dtype="<u2").tobytes())
    assert documents_of(path, Vocabulary(99, END, 8)) == [[8, 1, 2], [8, 3], [8, 4], [8, 5]]


@given(st.lists(st.integers(1, END), min_size=1, max_size=80), st.integers(1, 30), st.integers(2, 20))
def test_every_document_belongs_to_one_span_wherever_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, row: list[int], size: int, longest: int
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    path.write_bytes(np.array(row, dtype="<u2").tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "LONGEST_DOCUMENT", longest)
        file = open_tokens(path, SMALL)
        spans = [
            [document.tolist() for document in read_token_documents(file, SMALL, begin, begin + size)]
            for begin in range(0, len(row), size)
        ]
        assert [document for span in spans for document in span] == documents_of(path, SMALL)
    flat = [token for span in spans for document in span for token in document]
    assert flat == [token for token in row if token != END]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.bin has 0 bytes, which is no number of tokens of 16 bits"),
        (b"123", r"a\.bin has 3 bytes, which is no number of tokens of 16 bits, as the tokenizer's 100 need"),
        (llm_c(ROW, 20240520, "<u2", 13), "llm.c's header for 13 tokens of 16 bits and 1,048 bytes; it is cut off"),
        (llm_c(ROW, 20240520, "<u2")[:-1], "llm.c's header for 12 tokens of 16 bits and 1,047 bytes"),
        (llm_c(ROW, 20240801, "<u4", -1), "llm.c's header for -1 tokens of 32 bits"),
        (llm_c([], 20240801, "<u4"), "llm.c's header for 0 tokens of 32 bits"),
        (llm_c(ROW, 20240520, "<u2")[:12], "llm.c's header for 12 tokens of 16 bits and 12 bytes"),
        (np.array([1, 100], dtype="<u2").tobytes(), "has the token 100 at 1; the tokenizer's last is 99"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_tokenizer_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents_of(tmp_path / "a.bin", SMALL)


def edited(place: int, kind: str, value: int) -> tuple[int, bytes]:
    return place, struct.pack(kind, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b"NOT"), "has not the header of Megatron's index"),
        (edited(9, "<Q", 2), "is damaged, .*version 2"),
        (edited(17, "<B", 6), "of a kind that holds no tokens: version 1, kind 6"),
        (edited(18, "<Q", 2**60), "is damaged"),
        (edited(18, "<Q", 2), "is damaged"),
        (edited(26, "<Q", 2**61), "is damaged"),
        (edited(34, "<i", 4), "do not belong together"),
        (edited(34, "<i", -1), "do not belong together"),
        (edited(46, "<q", 2), "do not belong together"),
        (edited(54, "<q", -2), "do not belong together"),
        (edited(70, "<q", 1), "do not belong together"),
        (edited(78, "<q", 2**62), "do not belong together"),
        (edited(94, "<q", 1), "do not belong together"),
    ],
)
def test_an_index_that_contradicts_its_tokens_is_refused(
    tmp_path: Path, change: tuple[int, bytes], message: str
) -> None:
    path = write_megatron(tmp_path, DOCUMENTS)
    index = bytearray(path.with_suffix(".idx").read_bytes())
    place, content = change
    index[place : place + len(content)] = content
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(ValueError, match=message):
        documents_of(path, SMALL)
    path.with_suffix(".idx").write_bytes(index[:20])
    with pytest.raises(ValueError, match="has not the header of Megatron's index"):
        documents_of(path, SMALL)


def test_an_index_is_read_in_slices_of_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[1 + number % 8] for number in range(50_000)]
    path = write_megatron(tmp_path, documents)
    monkeypatch.setattr(tokens_module, "SLICE", 1000)
    tracemalloc.start()
    try:
        file = open_tokens(path, SMALL)
        read = [document.tolist() for document in read_token_documents(file, SMALL, 999, 1002)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == documents[999:1002]
    assert peak < 8 * len(documents) / 2
    index = bytearray(path.with_suffix(".idx").read_bytes())
    # The lengths of two sequences at either side of a slice's border.
    index[34 + 4 * 999 : 34 + 4 * 1001] = struct.pack("<ii", 2, 0)
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(ValueError, match="do not belong together"):
        open_tokens(path, SMALL)


def test_a_negative_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has the token -5 at 1"):
        documents_of(write_megatron(tmp_path, [[1, -5]], 4, "<i4"), SMALL)


def test_a_changed_index_of_megatron_s_is_another_text(tmp_path: Path) -> None:
    path = write_megatron(tmp_path, DOCUMENTS)
    before = file_facts(path)
    assert file_facts(path) == before
    index = path.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-8] + bytes(8))
    changed = file_facts(path)
    index.unlink()
    assert len({facts.sample for facts in (before, changed, file_facts(path))}) == 3
