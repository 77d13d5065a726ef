"""Text of any size becomes the same shards however it is divided, stopped or killed; what is wrong is said."""

import errno
import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from models import SENTENCE, options, read, sentence_tokenizer, write_chats, write_files
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text import hub as hub_module
from mixture_of_depths.text import plan as plan_module
from mixture_of_depths.text import preparation as preparation_module
from mixture_of_depths.text import work as work_module
from mixture_of_depths.text.documents import digest, is_held_out, split_documents
from mixture_of_depths.text.preparation import name_of, prepare_shards, shared_tokenizer
from mixture_of_depths.text.shards import PartWriter, Prepared, Side, open_prepared
from mixture_of_depths.text.tokenizer import load_tokenizer, tokenize


def write_words(path: Path, word: str, is_out: bool = False) -> Path:
    """One document, a word again and again; one that its content holds out, or one that it does not."""
    texts = (f"{i} " + f"{word} " * 200 for i in count())
    path.write_text(next(text for text in texts if is_held_out(digest(text), 0.2) == is_out))
    return path


def write_lines(path: Path, count: int = 200) -> None:
    path.write_text("".join(json.dumps({"text": f"{i} {SENTENCE * (i % 5)}"}) + "\n" for i in range(count)))


def text_of(tmp_path: Path, **changes: Any) -> DataOptions:
    """Lines of JSON, plain and compressed, and small files."""
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    write_lines(folder / "a.jsonl")
    write_files(folder, 10)
    return options(tmp_path, str(folder), **changes)


def tokens_of(folder: Path, prepared: Prepared, side: Side) -> np.ndarray:
    rows = [np.fromfile(folder / f"{shard.name}.bin", prepared.dtype) for shard in prepared.shards[side]]
    return np.concatenate(rows).astype(np.int32)


def left_in(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their names."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "PIECE", 4000)
    monkeypatch.setattr(work_module, "SHARD", 700)
    monkeypatch.setattr(work_module, "GROUP", 500)


@pytest.mark.usefixtures("small_pieces")
def test_shards_hold_the_split_and_the_tokens_of_the_documents_in_order(tmp_path: Path) -> None:
    opts = text_of(tmp_path)
    prepared = prepare_shards(opts, tmp_path / "out", processes=1)
    assert len(prepared.shards["train"]) > 8
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    documents, skipped = read(opts)
    train, validation, split = split_documents(documents, 0.2)
    assert (prepared.split, prepared.skipped) == (split, skipped)
    for side, texts in (("train", train), ("validation", validation)):
        assert tokens_of(tmp_path / "out", prepared, side).tolist() == tokenize(texts, tokenizer).tolist()
        assert prepared.total(side, "documents") == len(texts)
        assert prepared.total(side, "bytes") == sum(len(text.encode()) for text in texts)
        ends = [np.fromfile(tmp_path / "out" / f"{shard.name}.ends", "<u8") for shard in prepared.shards[side]]
        for shard, places in zip(prepared.shards[side], ends, strict=True):
            row = np.fromfile(tmp_path / "out" / f"{shard.name}.bin", prepared.dtype)
            assert (row[places.astype(int) - 1] == prepared.end_of_text).all()
            assert len(places) == shard.documents
    assert prepared.tokenizer_sample[0] == len(train)
    assert f"trained on {len(train)} documents" in str(prepared)


def test_several_processes_write_what_one_does_and_say_how_fast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The other processes know nothing of this test's sizes but those of the pieces.
    monkeypatch.setattr(plan_module, "PIECE", 4000)
    opts = text_of(tmp_path)
    one = prepare_shards(opts, tmp_path / "one", processes=1)
    console = Console(width=200, force_terminal=True)
    several = prepare_shards(opts, tmp_path / "several", processes=2, console=console)
    assert several.key == one.key
    sides: tuple[Side, ...] = ("train", "validation")
    for side in sides:
        expected = tokens_of(tmp_path / "one", one, side)
        assert tokens_of(tmp_path / "several", several, side).tolist() == expected.tolist()
    said = capsys.readouterr().out
    assert "documents (" in said
    assert "M tokens" in said
    assert "MB/s" in said


class Killed(BaseException):
    """As a kill: nothing is caught, and nothing is tidied."""


@pytest.mark.usefixtures("small_pieces")
def test_killed_between_any_two_writes_it_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = text_of(tmp_path)
    prepare_shards(opts, tmp_path / "whole", processes=1)
    whole = left_in(tmp_path / "whole")
    counted = 0

    def killed_at(number: int) -> Any:
        def replace_or_die(self: Path, target: Path) -> Path:
            nonlocal counted
            counted += 1
            if counted == number:
                raise Killed
            os.replace(self, target)
            return target

        return replace_or_die

    monkeypatch.setattr(PartWriter, "close", lambda self: None)
    number = 1
    while True:
        counted = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed_at(number))
            try:
                prepare_shards(opts, tmp_path / "parts", processes=1)
                break
            except Killed:
                # Another every time: what was done stays.
                number = 1 + number % 11
    assert left_in(tmp_path / "parts") == whole


@pytest.mark.usefixtures("small_pieces")
def test_a_full_disk_ends_it_with_the_reason_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = text_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    sentence_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    prepare_shards(opts, tmp_path / "whole", processes=1)
    add, added = PartWriter.add, 0

    def full(self: Any, *arguments: Any) -> None:
        nonlocal added
        added += 1
        if added > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "add", full)
        with pytest.raises(OSError, match=r"out=.*out: the disk is full .*; make room, and the same command goes on"):
            prepare_shards(opts, tmp_path / "out", processes=1)
    prepare_shards(opts, tmp_path / "out", processes=1)
    assert left_in(tmp_path / "out") == left_in(tmp_path / "whole")


def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(tmp_path: Path) -> None:
    opts = text_of(tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    sentence_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
    write_lines(tmp_path / "text" / "b.jsonl", 2000)
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="the disk is full"):
            prepare_shards(opts, tmp_path / "out", processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_is_full_of_the_tokenizer_is_told_alike_and_the_same_call_goes_on(tmp_path: Path) -> None:
    opts = text_of(tmp_path)
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        with pytest.raises(OSError, match=r"out=.*out: the disk is full .*; make room, and the same command goes on"):
            prepare_shards(opts, tmp_path / "out", processes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not list((tmp_path / "out").glob("part-*"))
    prepare_shards(opts, tmp_path / "out", processes=1)


def test_what_is_there_is_taken_and_a_changed_file_or_option_is_noticed(tmp_path: Path) -> None:
    opts, out = text_of(tmp_path), tmp_path / "out"
    first = prepare_shards(opts, out, processes=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    assert prepare_shards(opts, out, processes=2) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    # How it is cut into sequences is another affair.
    assert prepare_shards(replace(opts, sequence_length=32), out) == first
    with pytest.raises(ValueError, match=r"vocab_size=290 differs from 300, with which out=.* was prepared"):
        prepare_shards(replace(opts, vocab_size=290), out)
    path = tmp_path / "text" / "000.txt"
    path.write_text(path.read_text().replace("0", "1"))
    with pytest.raises(ValueError, match=r"000\.txt has changed since out=.* was prepared from it"):
        prepare_shards(opts, out)
    path.unlink()
    with pytest.raises(ValueError, match=r"has changed since"):
        prepare_shards(opts, out)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_mistake_that_ends_it_before_any_shard_is_mended_in_the_same_folder(
    tmp_path: Path, with_tokenizer: bool
) -> None:
    out, table, packed = tmp_path / "out", tmp_path / "a.parquet", tmp_path / "a.txt.gz"
    parquet.write_table(pyarrow.table({"text": [f"{i} {SENTENCE}" for i in range(60)]}), table)
    whole = gzip.compress("".join(f"{i} {SENTENCE}" for i in range(60)).encode(), mtime=0)
    packed.write_bytes(whole[:-12])
    tokenizer: dict[str, Any] = {}
    if with_tokenizer:
        sentence_tokenizer().save_pretrained(str(tmp_path / "tokenizer"))
        tokenizer = {"tokenizer": str(tmp_path / "tokenizer")}
    opts = options(tmp_path, str(table), **tokenizer)
    with pytest.raises(ValueError, match="text_column=txet is missing in"):
        prepare_shards(replace(opts, text_column="txet"), out, processes=1)
    opts = replace(opts, data=(str(packed), str(table)))
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        prepare_shards(opts, out, processes=1)
    packed.write_bytes(whole)
    prepare_shards(opts, out, processes=1)
    prepare_shards(opts, tmp_path / "at-once", processes=1)
    assert left_in(out) == left_in(tmp_path / "at-once")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), r"is damaged: train-.*\.bin is not the file of"),
        (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "is damaged: train-.* has changed since"),
        (lambda path: path.unlink(), r"is damaged: train-.*\.bin is not the file of"),
        (lambda path: path.with_name("prepared.json").write_text("{"), r"prepared\.json is damaged"),
        (lambda path: path.with_name("prepared.json").write_text("{}"), r"prepared\.json is damaged: version"),
        (lambda path: rename_shard(path.with_name("prepared.json"), "../x"), "is damaged: x.bin is not the file"),
    ],
)
def test_damaged_shards_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    opts, out = text_of(tmp_path), tmp_path / "out"
    prepare_shards(opts, out, processes=1)
    damage(next(out.glob("train-*.bin")))
    with pytest.raises(ValueError, match=message):
        prepare_shards(opts, out, processes=1)


def rename_shard(path: Path, name: str) -> None:
    described = json.loads(path.read_text())
    described["shards"]["train"][0]["name"] = name
    path.write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({"data": ("{}/text:0.5", "{}/text:0.5")}, None, "is named twice"),
        ({"data": ("{}/text:0.5",)}, None, "has weights, which are those of a run"),
        ({}, 0, "processes=0 must be at least 1"),
        ({"data": ("{}/empty.txt",)}, None, r"empty\.txt holds no text \(skipped: 0 not UTF-8, 1 empty"),
        ({"data": ("{}/a.bin",)}, None, r"a\.bin holds tokens; name the folder of their tokenizer"),
        ({"data": ("{}/text", "{}/a.bin")}, None, "names text and tokens"),
        (
            {"data": ("{}/text", "{}/chats.jsonl")},
            None,
            r"chats\.jsonl holds conversations, which do not go into shards",
        ),
        (
            {"data": ("{}/mixed.jsonl",)},
            None,
            r"mixed\.jsonl holds conversations, which do not go into shards; keep them",
        ),
        ({"data": ("{}/mixed.jsonl",), "max_characters": 9}, None, r"mixed\.jsonl holds conversations"),
        ({"text_column": "body"}, None, "text_column=body holds text in no line of .*a.jsonl; line 1 has: text"),
    ],
)
def test_what_cannot_be_prepared_is_refused(
    tmp_path: Path, changes: dict[str, Any], processes: int | None, message: str
) -> None:
    opts = text_of(tmp_path)
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "a.bin").write_bytes(b"1234")
    write_chats(tmp_path, 2)
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n' + (tmp_path / "chats.jsonl").read_text())
    if "data" in changes:
        changes = {"data": tuple(source.format(tmp_path) for source in changes["data"])}
    with pytest.raises(ValueError, match=message):
        prepare_shards(replace(opts, **changes), tmp_path / "out", processes=processes)


def test_a_folder_that_holds_something_else_is_refused_and_one_in_use(tmp_path: Path) -> None:
    opts = text_of(tmp_path)
    before = left_in(tmp_path / "text")
    with pytest.raises(ValueError, match="is not empty, and holds no prepared text"):
        prepare_shards(opts, tmp_path / "text", processes=1)
    assert left_in(tmp_path / "text") == before
    with pytest.raises(ValueError, match=r"is a file\); name another"):
        prepare_shards(opts, tmp_path / "text" / "000.txt")


def test_the_tokenizer_sees_a_small_source_behind_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "PIECE", 4000)
    monkeypatch.setattr(preparation_module, "SAMPLED_PIECES", 2)
    write_lines(tmp_path / "a.jsonl")
    word = str(write_words(tmp_path / "b.txt", "zyzzyva"))
    prepare_shards(options(tmp_path, str(tmp_path / "a.jsonl"), word), tmp_path / "out", processes=1)
    assert "Ġzyzzyva" in load_tokenizer(str(tmp_path / "out" / "tokenizer")).get_vocab()


def test_a_shared_tokenizer_sees_every_source_behind_a_limit_or_of_one_document_held_out(tmp_path: Path) -> None:
    first = write_words(tmp_path / "a.txt", "the router")
    second = write_words(tmp_path / "b.txt", "zyzzyva", is_out=True)
    opts = options(tmp_path, str(first), str(second), max_characters=1000)
    assert {"Ġrouter", "Ġzyzzyva"} <= set(shared_tokenizer(opts, tmp_path / "cache").get_vocab())


def test_of_one_document_the_tail_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i} {SENTENCE}" for i in range(100)))
    opts = options(tmp_path, str(tmp_path / "a.txt"))
    prepared = prepare_shards(opts, tmp_path / "out", processes=1)
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    train, validation, split = split_documents(read(opts)[0], 0.2)
    assert prepared.split == split == "tails"
    assert tokens_of(tmp_path / "out", prepared, "train").tolist() == tokenize(train, tokenizer).tolist()
    assert tokens_of(tmp_path / "out", prepared, "validation").tolist() == tokenize(validation, tokenizer).tolist()


def test_text_that_is_tokenised_becomes_the_shards_of_its_text(tmp_path: Path) -> None:
    tokenizer = sentence_tokenizer()
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    texts = [f"{i} {SENTENCE * (1 + i % 3)}" for i in range(60)]
    row = tokenize(texts, tokenizer).astype("<u2")
    (tmp_path / "a.bin").write_bytes(row.tobytes())
    opts = options(tmp_path, str(tmp_path / "a.bin"), tokenizer=str(tmp_path / "tokenizer"))
    prepared = prepare_shards(opts, tmp_path / "out", processes=1)
    sides: tuple[Side, ...] = ("train", "validation")
    rows = {side: tokens_of(tmp_path / "out", prepared, side) for side in sides}
    decoded = {side: tokenizer.decode(rows[side]).split("<|endoftext|>")[:-1] for side in sides}
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    assert prepared.total("validation", "bytes") == sum(len(text.encode()) for text in decoded["validation"])
    (tmp_path / "a.bin").write_bytes(np.array([1, 60_000], dtype="<u2").tobytes())
    with pytest.raises(ValueError, match="has the token 60000 at 1; the tokenizer's last is"):
        prepare_shards(opts, tmp_path / "other", processes=1)
    with pytest.raises(ValueError, match="max_characters=5 has no use with tokens"):
        prepare_shards(replace(opts, max_characters=5), tmp_path / "other", processes=1)


def test_a_limit_of_characters_and_a_hub_data_set_are_prepared_from_their_streams(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for part in range(2):
        write_lines(folder / f"train-{part}.jsonl", 40)
    opts = options(tmp_path, f"hub:{folder}")
    prepared = prepare_shards(opts, tmp_path / "out", processes=1)
    # By its two files, a piece each.
    assert {shard.name[:-5] for shard in prepared.shards["train"]} == {"train-000000", "train-000001"}
    assert prepared.total("train", "documents") + prepared.total("validation", "documents") == 80
    limited = prepare_shards(replace(opts, max_characters=1000), tmp_path / "limited", processes=1)
    assert limited.total("train", "bytes") + limited.total("validation", "bytes") == 1000


def move_to(hub: Path, commit: str) -> None:
    """Adds a revision to the hub's cache of a data set, which is then the newest."""
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text(commit)
    write_lines(snapshot / "train.jsonl", 20 + len(list((hub / "snapshots").iterdir())))


def test_a_new_commit_of_a_hub_data_set_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub" / "datasets--me--tiny"
    move_to(hub, "r1")
    texts = {"cached": options(tmp_path, str(hub)), "streamed": options(tmp_path, "hub:me/tiny", max_characters=1000)}
    # What the hub would answer.
    commit = SimpleNamespace(sha="r1")
    monkeypatch.setattr(hub_module, "dataset_info", lambda name: {"me/tiny": commit}[name])
    stream, records = hub_module._stream, [{"text": f"{i} {SENTENCE}"} for i in range(20)]
    monkeypatch.setattr(hub_module, "_stream", lambda *place: records if place[0] == "me/tiny" else stream(*place))
    names = {out: name_of(opts, None) for out, opts in texts.items()}
    first = {out: prepare_shards(opts, tmp_path / out, processes=1) for out, opts in texts.items()}
    assert {out: prepare_shards(opts, tmp_path / out, processes=1) for out, opts in texts.items()} == first
    move_to(hub, "r2")
    commit.sha = "r2"
    for out, changed in (("cached", r"r1/train\.jsonl"), ("streamed", "hub:me/tiny")):
        assert name_of(texts[out], None) != names[out]
        with pytest.raises(ValueError, match=f"{changed} has changed since out=.* was prepared from it"):
            prepare_shards(texts[out], tmp_path / out, processes=1)


def test_a_changed_file_of_a_data_set_s_folder_is_noticed_and_its_history_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    (folder / ".git").mkdir(parents=True)
    write_lines(folder / "train.jsonl", 20)
    opts = options(tmp_path, f"hub:{folder}")
    name = name_of(opts, None)
    (folder / ".git" / "index").write_text("")
    assert name_of(opts, None) == name
    write_lines(folder / "train.jsonl", 21)
    assert name_of(opts, None) != name


COMMAND = [sys.executable, "-m", "mixture_of_depths", "prepare"]


@pytest.mark.slow
def test_twenty_kills_at_any_moment_end_in_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        write_lines(folder / f"{number}.jsonl", 40_000)
    write = [*COMMAND, str(folder), "--vocab-size", "300", "--processes", "2", "--out"]
    began = time.monotonic()
    subprocess.run([*write, str(tmp_path / "whole")], check=True, capture_output=True)
    seconds, draw = time.monotonic() - began, random.Random(0)
    kills = 0
    for number in range(20):
        out = tmp_path / f"parts-{number // 4}"
        process = subprocess.Popen([*write, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.2, seconds / 2))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if number % 4 == 3:
            subprocess.run([*write, str(out)], check=True, capture_output=True)
            assert left_in(out) == left_in(tmp_path / "whole")
    assert kills >= 15


def ends_with(tmp_path: Path, name: str, **special: str) -> str:
    """A tokenizer's folder; all have one tokenizer.json, and special tokens of their own."""
    tokenizer = sentence_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|start|>"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.convert_tokens_to_ids("<|start|>"))]
    )
    tokenizer.save_pretrained(str(tmp_path / name))
    path = tmp_path / name / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **special}))
    return str(tmp_path / name)


@pytest.mark.parametrize("special", [{"eos_token": "<|end|>"}, {"bos_token": "<|start|>"}])
def test_tokenizers_that_end_or_begin_a_text_otherwise_are_told_apart(tmp_path: Path, special: dict[str, str]) -> None:
    opts = text_of(tmp_path, tokenizer=ends_with(tmp_path, "a"))
    other = replace(opts, tokenizer=ends_with(tmp_path, "b", **special))
    first, second = (load_tokenizer(str(each.tokenizer)) for each in (opts, other))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert name_of(opts, first) != name_of(other, second)
    prepare_shards(opts, tmp_path / "out", processes=1)
    with pytest.raises(ValueError, match=r"tokenizer=.* differs from .*, with which out=.*out was prepared"):
        prepare_shards(other, tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("plan.json", "prepared.json") for content in ("{}", "null", "[1]", "{", "7")),
        *(("plan.json", json.dumps({"made_from": of, "split": "tails"})) for of in ({}, {"options": [], "files": {}})),
    ],
)
def test_a_folder_with_records_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str, content: str
) -> None:
    opts, out = text_of(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    (out / "train-of-thought.txt").write_text("a thesis")
    before = left_in(out)
    with pytest.raises(ValueError, match=rf"out/{name} is damaged: .*; move .*out away or name another folder, and"):
        prepare_shards(opts, out, processes=1)
    assert left_in(out) == before


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["shards"], {"validation": []}),
        (["made_from"], []),
        (["made_from", "options"], None),
        (["made_from", "files"], [1]),
    ],
)
def test_an_altered_record_of_prepared_text_is_refused(tmp_path: Path, place: list[str], value: Any) -> None:
    opts, out = text_of(tmp_path), tmp_path / "out"
    prepare_shards(opts, out, processes=1)
    described = within = json.loads((out / "prepared.json").read_text())
    for name in place[:-1]:
        within = within[name]
    within[place[-1]] = value
    (out / "prepared.json").write_text(json.dumps(described))
    for use in (lambda: open_prepared(out), lambda: prepare_shards(opts, out, processes=1)):
        with pytest.raises(ValueError, match=rf"prepared\.json is damaged: {'.'.join(place)}.*; move .*out away"):
            use()


def test_an_altered_record_of_the_tokenizer_s_sample_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts, out = text_of(tmp_path), tmp_path / "out"

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(preparation_module, "carry_out", killed)
    with pytest.raises(Killed):
        prepare_shards(opts, out, processes=1)
    (out / "tokenizer" / "sample.json").write_text("null")
    with pytest.raises(ValueError, match=r"sample\.json is damaged: .*; move .*tokenizer away"):
        prepare_shards(opts, out, processes=1)


@pytest.mark.parametrize("change", [lambda path: path.write_text("other"), lambda path: path.unlink()])
def test_a_file_that_changes_while_it_is_prepared_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    opts, out, path = text_of(tmp_path), tmp_path / "out", tmp_path / "text" / "000.txt"

    def changing(*given: Any) -> None:
        work_module.carry_out(*given)
        change(path)

    with monkeypatch.context() as patched:
        patched.setattr(preparation_module, "carry_out", changing)
        with pytest.raises(ValueError, match=r"000\.txt has changed while out=.*out was prepared from it; give the"):
            prepare_shards(opts, out, processes=1)
    prepare_shards(opts, out, processes=1)
    prepare_shards(opts, tmp_path / "at-once", processes=1)
    assert left_in(out) == left_in(tmp_path / "at-once")


def test_text_that_is_too_little_to_train_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        ValueError, match=r"a\.txt is too little text to train on and hold some out: with validation_fr"
    ):
        prepare_shards(options(tmp_path, str(tmp_path / "a.txt")), tmp_path / "out", processes=1)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(300)))
    for fraction, nothing in (
        (1e-30, "nothing is held out; give more, or raise"),
        (1 - 1e-10, "nothing is trained on"),
    ):
        opts = options(tmp_path, str(tmp_path / "a.jsonl"), validation_fraction=fraction)
        with pytest.raises(ValueError, match=nothing):
            prepare_shards(opts, tmp_path / f"out-{fraction}", processes=1)
