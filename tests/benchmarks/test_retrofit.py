"""What the retrofit's comparison tells of its sides."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import tiny
from retrofit import SavedSeconds, missing_turns, summarise
from retrofit_sides import KeptTeacher


def line(side: str, share: float | None, seed: int, wikitext: float, rank: int | None = None) -> dict[str, Any]:
    right = ["Paris", *["I do not know."] * 59] if seed else ["I do not know."] * 60
    losses = {"wikitext": 3.0 + seed, "conversations": 4.0}
    left = {"loss": losses, "entering": {"wikitext": 0.4, "conversations": 0.6}, "answers": right}
    return {
        "side": side,
        "share": share,
        "seed": seed,
        "map_rank": rank,
        "perplexity": {"wikitext": wikitext},
        "conversation_loss": 2.0 + seed,
        # By rules of before.
        "answers_right": 10,
        "answers": right,
        "loss": {"wikitext": 1.0, "conversations": 2.0 + seed},
        "as_left": left if side == "ours" and seed else None,
        "flops_ratio": 0.8,
        "decode_ratio": 0.81,
        "tuning_minutes": 20.0 + seed,
        "machine": {"threads": 2 - seed},
    }


def test_a_side_is_compared_seed_by_seed_with_others_of_its_share(tmp_path: Path) -> None:
    turns = [
        ("dense", None, 0.3),
        ("dense", None, 0.2),
        ("dense", None, 0.2),
        ("ours-0.8", 128, 0.1),
        ("ours-0.8", 128, 0.2),
        ("ours-0.8", 128, 0.1),
        ("ours-0.8", 64, 0.4),
        ("vllm", None, 0.4),
    ]
    records = [
        {"side": side, "map_rank": rank, "rows": 1, "prompt": 0, "turn": turn, "seconds": seconds}
        for turn, (side, rank, seconds) in enumerate(turns)
    ]
    # Of a turn that was measured again the last counts.
    records.insert(0, {**records[0], "seconds": 9.0})
    (tmp_path / "decoding.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = [
        line("tuned", None, 1, 20.0),
        line("tuned", None, 0, 10.0),
        line("ours", 0.8, 1, 26.0, 128),
        line("ours", 0.8, 0, 12.0, 128),
        line("ours", 0.8, 0, 15.0, 64),
        line("dropped", 0.8, 1, 32.5),
        line("dropped", 0.65, 0, 30.0),
        line("linear", 0.8, 0, 16.0, 64),
    ]
    summary = summarise(lines, {}, tmp_path)
    assert summary["vllm_decode_speedup"] == pytest.approx({1: 0.5})
    sides = summary["sides"]
    names = {"tuned", "ours-0.8-rank-128", "ours-0.8-rank-64", "dropped-0.8", "dropped-0.65", "linear-0.8-rank-64"}
    assert sides.keys() == names
    ours = sides["ours-0.8-rank-128"]
    assert ours["seeds"] == [0, 1]
    assert ours["perplexity"] == {"wikitext": 19.0}
    assert ours["perplexity_by_seed"] == {"wikitext": [12.0, 26.0]}
    assert ours["ratio_to_tuned_dense"] == pytest.approx({"wikitext": (1.2 + 1.3) / 2})
    # Of the one seed that both have, at the same share.
    assert ours["ratio_to_others"]["dropped-0.8"] == pytest.approx({"wikitext": 0.8})
    assert ours["ratio_to_others"]["linear-0.8-rank-64"] == pytest.approx({"wikitext": 0.75})
    assert ours["seeds_in_common"] == {"tuned": [0, 1], "dropped-0.8": [1], "linear-0.8-rank-64": [0]}
    assert sides["ours-0.8-rank-64"]["ratio_to_others"]["dropped-0.8"] is None
    assert ours["conversation_loss"] == 2.5
    assert ours["answers_right"] == 0.5
    # Of the one seed whose line has it.
    assert ours["as_left"] == {
        "seeds": [1],
        "loss": {"wikitext": 4.0, "conversations": 4.0},
        "entering": {"wikitext": 0.4, "conversations": 0.6},
        "answers_right": 1,
    }
    assert sides["dropped-0.8"]["as_left"] is None
    assert ours["decode_speedup"] == pytest.approx({1: 2.0})
    assert sides["ours-0.8-rank-64"]["decode_speedup"] == pytest.approx({1: 0.5})
    assert sides["tuned"]["decode_speedup"] == {1: 1.0}
    assert (ours["tuning_minutes"], ours["tuning_threads"]) == ([20.0, 21.0], [2, 1])
    assert sides["tuned"]["ratio_to_tuned_dense"] == {"wikitext": 1.0}
    assert json.loads((tmp_path / "summary.json").read_text())["sides"].keys() == sides.keys()


def test_a_turn_is_measured_again_by_all_sides_where_one_of_them_lacks_it() -> None:
    ranks = {"dense": None, "ours-0.8": 128}
    every = [(rows, prompt, turn) for rows in (1, 8) for prompt in (0, 1) for turn in range(4)]
    assert missing_turns([], ranks, 2) == every
    records = [
        {"side": side, "map_rank": rank, "rows": rows, "prompt": prompt, "turn": turn}
        for side, rank in ranks.items()
        for rows, prompt, turn in every
    ]
    assert missing_turns(records, ranks, 2) == []
    assert missing_turns(records[:-1], ranks, 2) == every[-1:]
    assert missing_turns(records, {**ranks, "vllm": None}, 2) == every


def test_seconds_of_the_teacher_are_kept_with_each_checkpoint(tmp_path: Path) -> None:
    path, teacher = tmp_path / "saved_seconds.json", KeptTeacher(tiny(routed_layers=[]), tmp_path / "teacher")
    saved = SavedSeconds(teacher, path)
    teacher.saved_seconds = 3.0
    saved.on_save()
    # Then the call is killed: these are spent again by the next.
    teacher.saved_seconds = 4.0
    again = SavedSeconds(KeptTeacher(teacher.dense, tmp_path / "teacher"), path)
    assert again.seconds() == 3.0
    again.teacher.saved_seconds = 2.0
    assert again.seconds() == 5.0
