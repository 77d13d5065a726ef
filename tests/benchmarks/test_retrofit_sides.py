"""What the sides of the retrofit's comparison are tuned on."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny
from retrofit_sides import PIECE, KeptTeacher, characters_said, map_rank, pieces_of, write_once

from mixture_of_depths import MoDConfig, RetrofitOptions


def test_pieces_come_from_all_over_the_texts_and_have_one_length() -> None:
    texts = ["".join(f"{i:8d}" for i in range(first, first + 5000)) for first in (0, 10_000, 20_000)]
    pieces = pieces_of([*texts, "short"], 6 * PIECE + 1)
    assert [len(piece) for piece in pieces] == [PIECE] * 6
    assert len(set(pieces)) == 6
    assert [sum(piece in text for piece in pieces) for text in texts] == [2, 2, 2]


def test_there_are_no_more_pieces_than_the_texts_give() -> None:
    assert pieces_of(["a" * PIECE + "b" * (PIECE - 1)], 10 * PIECE) == ["a" * PIECE]
    assert pieces_of(["a" * 10], 10 * PIECE) == []


def test_characters_are_counted_of_messages_and_a_file_without_any_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    said = [{"role": "user", "content": "12345"}, {"role": "assistant", "content": "678"}]
    path.write_text(json.dumps({"messages": said}) + "\n" + json.dumps({"text": "no conversation"}) + "\n")
    assert characters_said(str(path)) == 8
    path.write_text(json.dumps({"text": "no conversation"}) + "\n")
    with pytest.raises(ValueError, match="holds no conversation; give"):
        characters_said(str(path))


def test_a_file_that_is_there_and_the_same_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "tuning.jsonl"
    write_once(path, "one")
    first = path.stat().st_ino
    write_once(path, "one")
    assert path.stat().st_ino == first
    write_once(path, "another")
    assert path.read_text() == "another"


def test_what_the_teacher_says_of_a_sequence_is_computed_once(tmp_path: Path) -> None:
    dense = tiny(routed_layers=[]).eval()
    tokens = torch.arange(24).view(2, 12)
    positions = torch.arange(12)[None]
    expected = dense.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    first, again = KeptTeacher(dense, tmp_path), KeptTeacher(dense, tmp_path)
    assert torch.equal(first.model(tokens, positions, use_cache=False).last_hidden_state, expected)
    assert first.saved_seconds == 0
    assert torch.equal(again.model(tokens, positions, use_cache=False).last_hidden_state, expected)
    assert again.saved_seconds > 0
    assert again.lm_head is dense.lm_head
    # Other tokens, or other positions, are another sequence.
    for others in ((tokens + 1, positions), (tokens, torch.tensor([[*range(6), *range(6)]]))):
        again.model(*others, use_cache=False)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("side", "rank"),
    [("ours", 7), ("linear", 7), ("random", 7), ("former", None), ("dropped", None), ("tuned", None), ("dense", None)],
)
def test_a_record_is_told_by_the_rank_of_its_maps_where_the_side_has_some(side: str, rank: int | None) -> None:
    assert map_rank(side, MoDConfig(hidden_size=64), RetrofitOptions(bypass_rank=7)) == rank
