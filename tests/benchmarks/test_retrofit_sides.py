"""What the sides of the retrofit's comparison are tuned on."""

import json
from pathlib import Path

import pytest
import torch
from models import tiny
from retrofit_questions import is_right
from retrofit_sides import (
    PIECE,
    KeptTeacher,
    Sides,
    characters_said,
    map_rank,
    pieces_of,
    replaced,
    without,
    write_once,
)
from torch import nn

from mixture_of_depths import MoDConfig, RetrofitOptions, forward_flops_per_token
from mixture_of_depths.retrofitting.fit import Fit


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


def test_a_dropped_block_is_gone_and_the_others_are_as_they_were() -> None:
    dense = tiny(routed_layers=[], num_hidden_layers=4).eval()
    tokens = torch.arange(24).view(2, 12)
    shorter = without(dense, [1, 2]).eval()
    dense.model.layers = nn.ModuleList([dense.model.layers[0], dense.model.layers[3]])
    expected = dense.double()(tokens, use_cache=False).logits
    assert torch.allclose(shorter.double()(tokens, use_cache=False).logits, expected, atol=1e-6)


def test_all_tokens_but_the_first_take_the_map_of_a_replaced_block() -> None:
    dense = tiny(routed_layers=[], num_hidden_layers=3).float().eval()
    down_LRD, up_LDR = torch.randn(3, 2, 16), torch.randn(3, 16, 2)
    model = replaced(dense, Fit(torch.zeros(3, 16), down_LRD, up_LDR), [1], 12).eval()
    tokens = torch.arange(24).view(2, 12)
    before_BTD, after_BTD = model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states[1:3]
    mapped_BTD = dense.model.layers[1].input_layernorm(before_BTD) @ down_LRD[1].T @ up_LDR[1].T
    assert torch.allclose((after_BTD - before_BTD)[:, 1:], mapped_BTD[:, 1:], atol=1e-5)
    # The first is alone in the block, so that it attends to itself.
    whole_BTD = dense.model(tokens[:, :1], use_cache=False, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(after_BTD[:, :1], whole_BTD, atol=1e-5)


def test_the_blocks_that_cost_least_are_taken_until_the_share_is_kept() -> None:
    dense = tiny(routed_layers=[], num_hidden_layers=6)
    sides = object.__new__(Sides)
    sides.dense, sides.length = dense, 12

    def config_of(blocks: list[int]) -> MoDConfig:
        return dense.config.changed(num_hidden_layers=6 - len(blocks))

    def share(count: int) -> float:
        return forward_flops_per_token(config_of(list(range(count))), 12) / forward_flops_per_token(dense.config, 12)

    rises = [0.5, 0.1, 0.4, -0.2, 0.3, 0.9]
    assert sides.cheapest(rises, config_of, share(2)) == [1, 3]
    assert sides.cheapest(rises, config_of, share(2) - 1e-9) == [1, 3, 4]
    with pytest.raises(ValueError, match=r"share=0\.001 is less than the embedding and the head alone"):
        sides.cheapest(rises, config_of, 0.001)


@pytest.mark.parametrize(
    ("said", "words", "right"),
    [
        ("It is Paris.", ("Paris",), True),
        ("it is paris", ("Paris",), True),
        ("Comparison", ("Paris",), False),
        ("The Parisians", ("Paris",), False),
        ("There are 24 hours", ("24", "twenty-four"), True),
        ("There are 240 hours", ("24", "twenty-four"), False),
        ("It takes 2.24 hours", ("24", "twenty-four"), False),
        ("About 24.5 hours", ("24", "twenty-four"), False),
        ("24.", ("24", "twenty-four"), True),
        ("Twenty-four of them", ("24", "twenty-four"), True),
        ("At 0°C", ("0 degrees", "0°"), True),
        ("At 100°C", ("0 degrees", "0°"), False),
        ("", ("Paris",), False),
    ],
)
def test_an_answer_is_right_that_holds_one_of_the_words_by_itself(
    said: str, words: tuple[str, ...], right: bool
) -> None:
    assert is_right(said, words) is right
