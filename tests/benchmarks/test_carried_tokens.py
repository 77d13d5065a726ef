"""A study's text in one file of tokens."""

import lzma
from dataclasses import replace
from pathlib import Path

import carried_tokens
import pytest
from carried_tokens import archive_of, read_tokens
from models import options, write_files

from mixture_of_depths.text.corpus import prepare


def test_a_file_of_tokens_holds_the_prepared_text_and_gives_the_same_bytes_again(tmp_path: Path) -> None:
    write_files(tmp_path)
    settings = options(tmp_path, str(tmp_path / "*.txt"))
    corpus = prepare(settings)
    archive = archive_of(corpus)
    assert archive_of(prepare(replace(settings, cache_dir=tmp_path / "other"))) == archive
    path = tmp_path / "tokens.tar.xz"
    path.write_bytes(lzma.compress(archive))
    carried = read_tokens(path, settings)
    assert carried.train["input_ids"] == corpus.train["input_ids"]
    assert carried.validation["input_ids"] == corpus.validation["input_ids"]
    assert (carried.key, carried.facts, carried.end_of_text) == (corpus.key, corpus.facts, corpus.end_of_text)
    assert carried.tokenizer.get_vocab() == corpus.tokenizer.get_vocab()
    with pytest.raises(ValueError, match=r"sequence_length=16, and the study has 8; write it again"):
        read_tokens(path, replace(settings, sequence_length=8))


def test_a_study_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["carried_tokens.py", "nowhere.yaml", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        carried_tokens.main()
    assert "study=nowhere.yaml is no file; name a study" in capsys.readouterr().err
