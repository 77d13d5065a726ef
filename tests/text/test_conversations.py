"""Conversations are cut with the chat template, and their positions go on from turn to turn."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEMPLATE, options, sentence_tokenizer, write_chats, write_numbers

from mixture_of_depths import prepare, prepare_shards, read_documents
from mixture_of_depths.evaluation.text import text_to_judge
from mixture_of_depths.text import corpus as corpus_module
from mixture_of_depths.text.batches import Collator, kinds
from mixture_of_depths.text.conversations import conversation_of, positions_in_sequences, render, rendered
from mixture_of_depths.text.corpus import load_prepared
from mixture_of_depths.text.documents import Skipped, holds_conversations, read_all

# Every turn ends with the end of text, as instruction models' do.
ENDING = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"


EACH_PART = "{% for p in m['content'] %}{% if p['type'] == 'text' %}<{{ p['text'] }}>{% endif %}{% endfor %}"
PARTS_ALONE = "{% for m in messages %}{{ m['role'] }}:" + EACH_PART + ";{% endfor %}"
NO_TEXT = "{% for m in messages %}{% if m['content'] is string %}{{ raise_exception('parts') }}{% endif %}"
EITHER = "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }};{% else %}" + EACH_PART


def chat_tokenizer() -> Any:
    tokenizer = sentence_tokenizer()
    tokenizer.chat_template = ENDING
    return tokenizer


def test_positions_go_on_from_turn_to_turn_and_begin_with_conversations_and_sequences() -> None:
    assert positions_in_sequences([3, 6, 2, 4], 5).tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0], [0, 0, 1, 2, 3]]


def test_sequences_of_conversations_are_the_templates_tokens_with_their_positions(tmp_path: Path) -> None:
    write_chats(tmp_path, 30)
    tokenizer = chat_tokenizer()
    corpus = prepare(options(tmp_path, str(tmp_path / "chats.jsonl"), tokenizer="its own"), tokenizer)
    assert set(kinds(corpus.train)) == {"conversations"}
    assert corpus.facts.validation_documents == 6
    (first, *_) = corpus.train["input_ids"]
    assert tokenizer.decode(first).startswith("user: Count by")
    whole, positions = (list(chain.from_iterable(corpus.train[name])) for name in ("input_ids", "position_ids"))
    ends = [place for place, token in enumerate(whole[:-1]) if token == corpus.end_of_text]
    # Four turns a conversation: three of four ends are followed by the next turn, unless a sequence begins there.
    inside = [place for place in ends if (place + 1) % 16]
    going_on = sum(positions[place + 1] == positions[place] + 1 for place in inside)
    assert 0.6 < going_on / len(inside) < 0.9
    batch = Collator(corpus.end_of_text)([corpus.train[0], corpus.train[1]])
    assert batch["position_ids"].tolist() == [positions[:16], positions[16:32]]


def test_texts_and_conversations_are_packed_each_by_itself(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    write_chats(tmp_path, 30)
    sources = [str(tmp_path / "*.txt"), str(tmp_path / "chats.jsonl")]
    tokenizer = chat_tokenizer()
    mixed = prepare(options(tmp_path, *sources, tokenizer="its own"), tokenizer)
    alone = [prepare(options(tmp_path, source, tokenizer="its own"), tokenizer) for source in sources]
    for split in ("train", "validation"):
        by_kind = kinds(getattr(mixed, split))
        for name, corpus in zip(("text", "conversations"), alone, strict=True):
            assert by_kind[name]["input_ids"] == getattr(corpus, split)["input_ids"]
        batch = Collator(mixed.end_of_text)([by_kind["text"][0]])
        assert torch.equal(
            batch["position_ids"], Collator(mixed.end_of_text)([alone[0].__dict__[split][0]])["position_ids"]
        )
    assert mixed.facts.validation_bytes == sum(corpus.facts.validation_bytes for corpus in alone)
    # Another template makes other text.
    tokenizer.chat_template = TEMPLATE
    assert prepare(options(tmp_path, *sources, tokenizer="its own"), tokenizer).key != mixed.key


@pytest.mark.parametrize("kind", ["weighted", "prepared", "large"])
def test_conversations_stand_beside_shards(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path)
    write_chats(tmp_path, 30)
    tokenizer = chat_tokenizer()
    texts, chats = str(tmp_path / "*.txt"), str(tmp_path / "chats.jsonl")
    alone = [prepare(options(tmp_path, source, tokenizer="its own"), tokenizer) for source in (texts, chats)]
    sources = {"weighted": (f"{texts}:0.25", f"{chats}:0.75"), "large": (texts, chats)}
    if kind == "prepared":
        # It has the chat template, too.
        folder = tmp_path / "prepared"
        prepare_shards(options(tmp_path, texts, tokenizer="its own"), folder, tokenizer, processes=1)
        corpus = prepare(options(tmp_path, str(folder), chats, vocab_size=None))
    else:
        monkeypatch.setattr(corpus_module, "IN_MEMORY", 1000)
        corpus = prepare(options(tmp_path, *sources[kind], tokenizer="its own"), tokenizer)
    assert corpus.weights == ([0.25, 0.75] if kind == "weighted" else None)
    # Shards are cut each by itself, and here there is one.
    assert [len(corpus.train), corpus.facts.train_tokens, corpus.facts.validation_bytes] == [
        sum(numbers)
        for numbers in zip(
            *([len(one.train), one.facts.train_tokens, one.facts.validation_bytes] for one in alone), strict=True
        )
    ]
    first_chat = len(alone[0].train)
    assert corpus.train[first_chat]["input_ids"] == alone[1].train[0]["input_ids"]
    collate = Collator(corpus.end_of_text)
    both = collate([corpus.train[3], corpus.train[first_chat + 3]])
    separate = [collate([one.train[3]]) for one in alone]
    for name in ("input_ids", "position_ids"):
        assert torch.equal(both[name], torch.cat([batch[name] for batch in separate]))
    held_out = kinds(corpus.validation)
    assert set(held_out) == {"text", "conversations"}
    assert held_out["conversations"]["position_ids"][0] == alone[1].validation["position_ids"][0]
    assert [set(kinds(source.validation)) for source in corpus.sources] == [{"text"}, {"conversations"}]
    assert load_prepared(corpus.options, corpus.key).facts == corpus.facts


def test_options_of_shards_have_no_use_with_conversations_alone(tmp_path: Path) -> None:
    write_chats(tmp_path, 30)
    opts = options(tmp_path, str(tmp_path / "chats.jsonl"), tokenizer="its own", packing="best_fit")
    with pytest.raises(ValueError, match=r"packing=best_fit has no use with data=.*chats\.jsonl, conversations alone"):
        prepare(opts, chat_tokenizer())
    write_numbers(tmp_path)
    with pytest.raises(ValueError, match="a tokenizer that is trained has no chat template"):
        prepare(options(tmp_path, f"{tmp_path}/*.txt:0.5", f"{tmp_path}/chats.jsonl:0.5"))


def test_a_model_is_judged_on_conversations(tmp_path: Path) -> None:
    write_chats(tmp_path, 3)
    judged = text_to_judge(tmp_path, None, chat_tokenizer(), (str(tmp_path / "chats.jsonl"),), None, 16)
    assert set(kinds(judged.sequences)) == {"conversations"}
    assert judged.sources[0].bytes_per_token > 1


def test_records_that_are_no_conversation_are_counted(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "x"}]
    bad: list[Any] = [[], [{"role": "user"}], ["x"], [{"role": "user", "content": [1]}], "x", {"role": "user"}]
    records = [
        {"text": "a text"},
        {"messages": good},
        {"text": "both", "messages": good},
        *({"messages": b} for b in bad),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    skipped, opts = Skipped(), options(tmp_path, str(tmp_path / "a.jsonl"))
    assert list(read_all(opts, skipped)) == ["a text", conversation_of(good), "both"]
    assert skipped == Skipped(no_text=len(bad))
    assert list(read_documents(opts, skipped := Skipped())) == ["a text", "both"]
    assert skipped == Skipped(no_text=len(bad) + 1)


def test_conversations_without_a_template_or_that_it_refuses_are_refused(tmp_path: Path) -> None:
    write_chats(tmp_path, 3)
    opts = options(tmp_path, str(tmp_path / "chats.jsonl"), tokenizer="its own")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        prepare(opts, sentence_tokenizer())
    with pytest.raises(ValueError, match="a tokenizer that is trained has no chat template"):
        prepare(options(tmp_path, str(tmp_path / "chats.jsonl")))
    strict = sentence_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    name = 'a conversation that begins with user: "one two ' + 52 * "x" + '[.]{3}"'
    with pytest.raises(ValueError, match=f"data holds {name}, which the chat template refuses: roles must alternate"):
        rendered([[{"role": "user", "content": "one\n two " + 60 * "x"}]], strict)
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ValueError, match="a single conversation, and none is left to hold out"):
        prepare(options(tmp_path, str(tmp_path / "one.jsonl"), tokenizer="its own"), chat_tokenizer())


@pytest.mark.parametrize(
    ("template", "from_text", "from_parts"),
    [
        (ENDING, "user: one<|endoftext|>", "user: one\ntwo<|endoftext|>"),
        (PARTS_ALONE, "user:<one>;", "user:<one><two>;"),
        (NO_TEXT + EACH_PART + "{% endfor %}", "<one>", "<one><two>"),
        (EITHER + "{% endif %}{% endfor %}", "one;", "one\ntwo;"),
    ],
)
def test_a_template_is_given_content_as_it_reads_it(template: str, from_text: str, from_parts: str) -> None:
    tokenizer = sentence_tokenizer()
    tokenizer.chat_template = template
    parts = [{"type": "text", "text": text} for text in ("one", "two")]
    assert rendered([[{"role": "user", "content": "one"}]], tokenizer) == [from_text]
    assert render([{"role": "user", "content": parts}], tokenizer, False) == from_parts


def test_a_template_is_given_each_role_s_content_as_it_reads_that(tmp_path: Path) -> None:
    """One writes the user's text and the parts of all others; one refuses a conversation without a system's message."""
    tokenizer = sentence_tokenizer()
    said = [{"role": role, "content": f"{role}'s"} for role in ("system", "user", "assistant", "user")]
    each_part = "{% for p in m.content %}{{ p.text }}{% endfor %};"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }};{% else %}"
        + each_part
        + "{% endif %}{% endfor %}"
    )
    assert render(said, tokenizer, False) == "system's;user's;assistant's;user's;"
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{% for m in messages %}" + each_part + "{% endfor %}"
    )
    assert render(said, tokenizer, False) == "system's;user's;assistant's;user's;"


def test_a_folder_of_conversations_may_hold_an_empty_file(tmp_path: Path) -> None:
    write_chats(tmp_path, 3)
    (tmp_path / "none.jsonl").touch()
    assert holds_conversations(str(tmp_path / "*.jsonl"), "text")
    (tmp_path / "text.jsonl").write_text('{"text": "a text"}')
    assert not holds_conversations(str(tmp_path / "*.jsonl"), "text")
