"""The commands that sample: generate and answer."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch._inductor.config
from command import run
from models import make_checkpoint
from safetensors.torch import load_file, save_file

from mixture_of_depths.sampling.answers import only_answers


def test_generate_repeats_with_its_seed_and_shows_depth(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router [red]", "--max-new-tokens", "12"]
    first = run(monkeypatch, capsys, *arguments)
    assert first[0] == 0
    assert first[1].startswith("The router [red]")
    assert run(monkeypatch, capsys, *arguments) == first
    assert run(monkeypatch, capsys, *arguments, "--seed", "1") != first
    greedy = [run(monkeypatch, capsys, *arguments, "--temperature", "0", "--seed", seed)[1] for seed in "12"]
    assert greedy[0] == greedy[1]
    status, output, _ = run(monkeypatch, capsys, *arguments, "--show-depth")
    assert status == 0
    assert output.startswith(first[1].rstrip("\n"))
    assert re.search(r"blocks used:  2 \(\d+%\) 3 \(\d+%\)   mean \d\.\d\d of 3", output)


def test_a_streamed_sample_is_the_same_text(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router", "--max-new-tokens", "12"]
    assert run(monkeypatch, capsys, *arguments, "--stream") == run(monkeypatch, capsys, *arguments)


def test_prompts_of_a_file_give_json_lines_whatever_the_batch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["The router", 'A "quoted"\nline', "x"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    arguments = ["generate", str(checkpoint), "--prompts", str(prompts), "--max-new-tokens", "9"]
    out = tmp_path / "out.jsonl"
    assert run(monkeypatch, capsys, *arguments, "--out", str(out), "--batch-size", "2") == (0, "", "")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["prompt"] for record in records] == texts
    assert {record["ended"] for record in records} <= {"length", "end_of_text"}
    status, output, _ = run(monkeypatch, capsys, *arguments, "--batch-size", "1")
    assert status == 0
    assert [json.loads(line) for line in output.splitlines()] == records
    status, _, errors = run(monkeypatch, capsys, *arguments, "--out", str(out))
    assert status == 2
    assert "exists; name another file" in errors
    prompts.write_text('{"text": "x"}\n')
    status, _, errors = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert 'line 1: needs an object with the field "prompt"' in errors
    prompts.write_text('{"prompt": "x"}\n\n{"prompt": ""}\n')
    status, _, errors = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert 'line 3: "prompt" is empty' in errors
    missing = tmp_path / "missing"
    status, _, errors = run(monkeypatch, capsys, *arguments, "--out", str(missing / "out.jsonl"))
    assert status == 2
    assert f"out={missing / 'out.jsonl'} cannot be written: there is no folder {missing}" in errors
    status, _, errors = run(monkeypatch, capsys, *arguments[:2], "--prompts", str(missing))
    assert status == 2
    assert f"prompts={missing} is not a file" in errors


def test_without_a_compiler_it_says_so_and_samples(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "The router", "--max-new-tokens", "5"]
    plain = run(monkeypatch, capsys, *arguments)
    with torch._inductor.config.patch({"cpp.cxx": ("nowhere-g++",)}):
        status, output, errors = run(monkeypatch, capsys, *arguments, "--compile")
    assert (status, output) == (0, plain[1])
    assert "sampling without compilation, which needs a C++ compiler" in errors


def test_precision_is_that_of_the_products_in_every_command_that_samples_or_looks(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def trace(name: str, *precision: str) -> str:
        arguments = ("--text", "the", "--out", str(tmp_path / f"{name}.html"), "--trace", str(tmp_path / name))
        assert run(monkeypatch, capsys, "inspect", str(checkpoint), *arguments, *precision)[0] == 0
        return (tmp_path / name).read_text()

    assert trace("a.json") == trace("b.json", "--precision", "fp32") != trace("c.json", "--precision", "bf16")
    sample = ("generate", str(checkpoint), "--prompt", "the", "--max-new-tokens", "3", "--precision", "bf16")
    assert run(monkeypatch, capsys, *sample)[0] == 0


def test_answers_go_on_with_the_file_and_belong_to_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, questions, out = tmp_path / "model", tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    make_checkpoint(model)
    asked = [{"role": "user", "content": f"the quick {i}"} for i in range(3)]
    questions.write_text("".join(json.dumps({"messages": [message]}) + "\n" for message in asked))
    words = ["answer", str(model), "--data", str(questions), "--out", str(out), "--max-new-tokens", "4"]
    status, _, errors = run(monkeypatch, capsys, *words, "--batch-size", "2")
    assert (status, "3 of 3 answered" in errors) == (0, True), errors
    whole = out.read_text()
    chats = [json.loads(line)["messages"] for line in whole.splitlines()]
    assert [(first, second["role"]) for first, second in chats] == [(message, "assistant") for message in asked]
    assert [json.loads(line)["cut"] for line in whole.splitlines()] == [1, 1, 1]
    assert "3 answers broke off at max_new_tokens=4" in errors
    out.write_text(whole[: whole.index("\n") + 20])
    assert run(monkeypatch, capsys, *words, "--batch-size", "1")[0] == 0
    assert out.read_text() == whole
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, "all 3 are answered" in errors) == (0, True)
    status, _, errors = run(monkeypatch, capsys, *words, "--seed", "5")
    assert (status, "with other options, or does not say, in line 1" in errors) == (2, True)
    # The model as it was calibrated, and with another template.
    weights = load_file(model / "model.safetensors")
    calibrated = {**weights, "model.layers.1.router.threshold": weights["model.layers.1.router.threshold"] + 1}
    save_file(calibrated, model / "model.safetensors", {"format": "pt"})
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, "was answered by another model or with" in errors, out.read_text()) == (2, True, whole), errors
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert run(monkeypatch, capsys, *words)[0] == 0
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + " ")
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, "was answered by another model or with" in errors, out.read_text()) == (2, True, whole), errors
    (model / "chat_template.jinja").write_text(template)
    questions.write_text(json.dumps({"messages": asked[:1]}))
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, "answers 3 conversations of which data has 1" in errors) == (2, True)
    questions.write_text("".join(json.dumps({"messages": [message]}) + "\n" for message in asked[1:] + asked[:1]))
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, "answers other conversations, from line 1 on" in errors) == (2, True)


@pytest.mark.parametrize(
    "content",
    [
        "notes",
        "first notes\nand second",
        '{"prompt": "x"}',
        "[1]",
        '{"messages": null}',
        '{"messages": [{"role": "user", "content": "the"}]}',
    ],
)
def test_a_file_that_holds_no_answers_is_refused_and_left_as_it_is(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "the"}]}')
    out.write_text(content)
    status, _, errors = run(monkeypatch, capsys, "answer", "nowhere", "--data", str(questions), "--out", str(out))
    assert (status, "is no file of answers" in errors, out.read_text()) == (2, True, content)


def test_what_is_no_conversation_is_told_and_the_rest_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, questions, out = tmp_path / "model", tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    make_checkpoint(model)
    lines = [json.dumps({"messages": [{"role": "user", "content": "the quick"}]}), "{broken", '{"text": "a text"}']
    questions.write_text("".join(line + "\n" for line in lines))
    words = ("answer", str(model), "--data", str(questions), "--out", str(out), "--max-new-tokens", "2")
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, len(out.read_text().splitlines())) == (0, 1)
    assert "skipped: 0 not UTF-8, 0 empty, 1 not JSON, 0 without text or usable messages" in errors
    assert "left out for want of messages: 1" in errors
    assert "ask nothing" not in errors


def test_conversations_that_ask_nothing_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, questions, out = tmp_path / "model", tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    make_checkpoint(model)
    asked = {"role": "user", "content": "the quick"}
    talks = [[asked], [asked, {"role": "assistant", "content": "fox"}], [{"role": "system", "content": "brown"}]]
    questions.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ("answer", str(model), "--data", str(questions), "--out", str(out), "--max-new-tokens", "2")
    status, _, errors = run(monkeypatch, capsys, *words)
    assert (status, f"2 ask nothing, and stand in {out} as they were" in errors) == (0, True), errors
    assert [json.loads(line)["messages"] for line in out.read_text().splitlines()][1:] == talks[1:]


def test_answers_go_on_where_a_text_holds_what_ends_a_line_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, questions, out = tmp_path / "model", tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    make_checkpoint(model)
    lines = [json.dumps({"messages": [{"role": "user", "content": f"the\u2028quick\u0085{i}"}]}) for i in range(3)]
    words = ["answer", str(model), "--data", str(questions), "--out", str(out), "--max-new-tokens", "2"]
    for count in (2, 3):
        questions.write_text("\n".join(lines[:count]))
        status, _, errors = run(monkeypatch, capsys, *words)
        assert (status, f"{count} of {count} answered" in errors) == (0, True), errors


def test_no_question_is_answered_before_all_are_known_to_be_answerable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, questions, out = tmp_path / "model", tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    make_checkpoint(model)
    asked = [[{"role": "user", "content": words}] for words in ("the quick", "so long " + 2000 * "the ")]
    questions.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in asked))
    words = ("answer", str(model), "--data", str(questions), "--out", str(out), "--batch-size", "1")
    status, _, errors = run(monkeypatch, capsys, *words, "--max-new-tokens", "4")
    assert (status, 'begins with user: "so long the the' in errors, out.exists()) == (2, True, False), errors


def test_two_calls_do_not_write_one_file_of_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    questions, out = tmp_path / "questions.jsonl", tmp_path / "chats.jsonl"
    questions.write_text('{"messages": [{"role": "user", "content": "the"}]}')
    with only_answers(out):
        status, _, errors = run(monkeypatch, capsys, "answer", "nowhere", "--data", str(questions), "--out", str(out))
    assert (status, "is being written by another call" in errors) == (2, True)
