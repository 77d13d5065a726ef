"""Conversations are cut with the chat template, and their positions go on from turn to turn."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TEMPLATE, options, sentence_tokenizer, write_chats, write_numbers

from mixture_of_depths import prepare, read_documents
from mixture_of_depths.evaluation.text import text_to_judge
from mixture_of_depths.text.batches import Collator, kinds
from mixture_of_depths.text.conversations import conversation_of, positions_in_sequences, rendered
from mixture_of_depths.text.documents import Skipped, read_all

# Every turn ends with the end of text, as instruction models' do.
ENDING = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"


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


def test_a_model_is_judged_on_conversations(tmp_path: Path) -> None:
    write_chats(tmp_path, 3)
    judged = text_to_judge(tmp_path, None, chat_tokenizer(), (str(tmp_path / "chats.jsonl"),), None, 16)
    assert set(kinds(judged.sequences)) == {"conversations"}
    assert judged.bytes_per_token > 1


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
    with pytest.raises(ValueError, match="a conversation that the chat template refuses: roles must alternate"):
        rendered([[{"role": "user", "content": "x"}]], strict)
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(ValueError, match="a single conversation, and none is left to hold out"):
        prepare(options(tmp_path, str(tmp_path / "one.jsonl"), tokenizer="its own"), chat_tokenizer())
