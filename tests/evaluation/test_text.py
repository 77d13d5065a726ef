"""A model is judged on what its training held out, or on other text in its own tokens."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from models import SENTENCE, options, write_numbers

from mixture_of_depths.evaluation.text import text_to_judge, without_calibrating
from mixture_of_depths.text.corpus import Corpus, prepare


def described(corpus: Corpus) -> dict[str, Any]:
    """What the description of a run says of its text."""
    return {"key": corpus.key, "options": {**asdict(corpus.options), "cache_dir": str(corpus.options.cache_dir)}}


def test_without_other_text_it_is_what_the_training_held_out(corpus: Corpus, tmp_path: Path) -> None:
    for length in (None, 16):
        text = text_to_judge(tmp_path, described(corpus), corpus.tokenizer, (), None, length)
        assert text.sequences["input_ids"][:] == corpus.validation["input_ids"][:]
        assert text.sources[0].bytes_per_token == corpus.facts.validation_bytes_per_token
        assert (text.sequence_length, text.skipped) == (16, corpus.facts.skipped)


def test_of_several_sources_each_is_judged_on_what_it_held_out(tmp_path: Path) -> None:
    for name, numbers in (("a", range(40)), ("b", range(100, 120))):
        (tmp_path / name).mkdir()
        write_numbers(tmp_path / name, numbers)
    corpus = prepare(options(tmp_path, f"{tmp_path}/a:0.25", f"{tmp_path}/b:0.75"))
    text = text_to_judge(tmp_path, described(corpus), corpus.tokenizer, (), None, None)
    assert [source.share for source in text.sources] == [0.25, 0.75]
    for source, own in zip(text.sources, corpus.sources, strict=True):
        assert source.validation["input_ids"][:] == own.validation["input_ids"][:]
    others = without_calibrating([text.sources[0], replace(text.sources[1], validation=own.validation.select([0]))])
    assert [len(source.validation) for source in others] == [len(corpus.sources[0].validation) // 2, 1]


def test_other_text_is_packed_whole_in_the_length_of_the_training_or_another(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(SENTENCE * 40)
    (tmp_path / "empty.txt").write_text("")
    for length, expected in ((None, 16), (24, 24)):
        text = text_to_judge(tmp_path, described(corpus), corpus.tokenizer, (f"{tmp_path}/*.txt",), None, length)
        assert text.sequence_length == expected
        assert {len(sequence) for sequence in text.sequences["input_ids"]} == {expected}
        count = round(len((SENTENCE * 40).encode()) / text.sources[0].bytes_per_token)
        assert len(text.sequences) == count // expected
        assert text.skipped.empty == 1


@pytest.mark.parametrize(
    ("is_described", "data", "column", "length", "message"),
    [
        (False, (), None, 16, "holds no run.json of its training; give data and sequence_length"),
        (False, ("x",), None, None, "holds no run.json of its training"),
        (True, (), None, 1, "sequence_length=1 must be at least 2"),
        (True, (), "body", None, "text_column=body needs data"),
        (True, (), None, 24, "sequence_length=24 needs data; the held-out text is cut to 16"),
    ],
)
def test_what_names_no_text_is_refused(
    corpus: Corpus,
    tmp_path: Path,
    is_described: bool,
    data: tuple[str, ...],
    column: str | None,
    length: int | None,
    message: str,
) -> None:
    facts = described(corpus) if is_described else None
    with pytest.raises(ValueError, match=re.escape(message)):
        text_to_judge(tmp_path, facts, corpus.tokenizer, data, column, length)
