"""Bodies of requests: fields that are honoured, left out and refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from mixture_of_depths.serving.requests import (
    Body,
    ChatBody,
    CompletionBody,
    ResponseBody,
)


def test_a_chat_is_told_to_its_template_in_parts_of_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    said: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": "me"}, said]
    body = ChatBody.model_validate({"model": "name", "messages": messages})
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    ]


def test_what_answers_that_are_handed_back_carry_is_let_through() -> None:
    cited = [{"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 1}]
    part = {"type": "output_text", "text": "a", "annotations": cited, "logprobs": [], "image_url": None}
    item = {"type": "message", "role": "assistant", "content": [part], "id": "b", "status": "completed"}
    cached = {"type": "text", "text": "c", "prompt_cache_breakpoint": {"mode": "explicit"}, "cache_control": {}}
    for kind, field in ((ChatBody, "messages"), (ResponseBody, "input")):
        body = kind.model_validate({"model": "name", field: [item, {"role": "user", "content": [cached]}]})
        assert [message.for_template()["content"][0]["text"] for message in getattr(body, field)] == ["a", "c"]


@pytest.mark.parametrize("name", ["refusal", "reasoning", "reasoning_content"])
def test_a_message_is_taken_with_what_says_nothing_beside_its_text(name: str) -> None:
    messages = [{"role": "user", "content": "a", "type": "text"}, {"role": "assistant", "content": "", name: ""}]
    for kind, field in ((ChatBody, "messages"), (ResponseBody, "input")):
        body = kind.model_validate({"model": "name", field: messages})
        parts = [[{"type": "text", "text": text}] for text in ("a", "")]
        said = [message.for_template() for message in getattr(body, field)]
        assert said == [{"role": "user", "content": parts[0]}, {"role": "assistant", "content": parts[1]}]
        for more in ({name: "no"}, {"type": ""}, {"type": "image"}):
            with pytest.raises(ValidationError, match="is not supported"):
                kind.model_validate({"model": "name", field: [{"role": "assistant", "content": "", **more}]})


def test_a_null_reaches_the_chat_template() -> None:
    messages = [{"role": "user", "content": "fox"}]
    body = ChatBody.model_validate({"model": "name", "messages": messages, "chat_template_kwargs": {"x": None}})
    assert body.chat_template_kwargs == {"x": None}


def test_the_best_of_all_that_are_told_asks_for_nothing_more() -> None:
    for n, best_of in ((1, 1), (2, 2), (2, None)):
        CompletionBody.model_validate({"model": "name", "prompt": "fox", "n": n, "best_of": best_of})


@pytest.mark.parametrize("form", [{}, {"format": {"type": "text"}}])
@pytest.mark.parametrize("length", [{}, {"verbosity": None}, {"verbosity": "medium"}])
def test_the_defaults_of_a_response_s_text_ask_for_nothing(form: dict[str, Any], length: dict[str, Any]) -> None:
    ResponseBody.model_validate({"model": "name", "input": "fox", "text": {**form, **length}})
    with pytest.raises(ValueError, match="text"):
        ResponseBody.model_validate({"model": "name", "input": "fox", "text": {**form, "verbosity": "low"}})


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("temperature", [0, 0.01, 2.5], [-1, 0.009]),
        ("top_p", [1e-6, 1], [0, 1.1]),
        ("stop", ["end", ["a", "b", "c", "d", "e"]], ["", ["a", ""]]),
        ("n", [1, 128], [0, 129]),
    ],
)
def test_the_ranges_of_fields_are_those_that_the_docs_state(name: str, taken: list[Any], refused: list[Any]) -> None:
    chat = {"model": "name", "messages": [{"role": "user", "content": "fox"}]}
    for value in taken:
        ChatBody.model_validate({**chat, name: value})
    for value in refused:
        with pytest.raises(ValueError, match=name):
            ChatBody.model_validate({**chat, name: value})


WHOLE = ["seed", "top_k", "max_tool_calls", "n", "best_of", "top_logprobs", "min_tokens"]


@pytest.mark.parametrize("value", [1.0, 0.0, True, False, "1"])
@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (CompletionBody, {"prompt": "fox"}),
        (ChatBody, {"messages": [{"role": "user", "content": "fox"}]}),
        (ResponseBody, {"input": "fox"}),
    ],
)
def test_a_whole_number_is_neither_a_fraction_nor_a_truth(kind: type[Body], own: dict[str, Any], value: Any) -> None:
    for name in (*WHOLE, *kind.limits):
        with pytest.raises(ValidationError) as refused:
            kind.model_validate({"model": "name", **own, name: value})
        assert refused.value.errors()[0]["loc"] == (name,)
    with pytest.raises(ValueError, match="whole numbers"):
        CompletionBody.model_validate({"model": "name", "prompt": [1, value]})


OF_VLLM: dict[str, Any] = {
    "stop_token_ids": [],
    "bad_words": [],
    "length_penalty": 1.0,
    "use_beam_search": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "detokenize": True,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "include_reasoning": True,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "priority": 0,
    "prompt_logprobs": None,
    "truncate_prompt_tokens": None,
    "allowed_token_ids": None,
    "guided_json": None,
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (CompletionBody, {"prompt": "fox", "add_special_tokens": True}),
        (ChatBody, {"messages": [{"role": "user", "content": "fox"}], "add_special_tokens": False}),
        (ResponseBody, {"input": "fox"}),
    ],
)
def test_vllm_s_own_defaults_ask_for_nothing_and_other_values_are_refused(
    kind: type[Body], own: dict[str, Any]
) -> None:
    kind.model_validate({"model": "name", **own, **OF_VLLM})
    for name, value in {**OF_VLLM, "add_special_tokens": own.get("add_special_tokens", True)}.items():
        # Another value of the same type, and the same in another type.
        for other in ([1] if value == [] else not value if isinstance(value, bool) else 2, str(value), {}):
            with pytest.raises(ValidationError) as refused:
                kind.model_validate({"model": "name", **own, name: other})
            assert [error["loc"] for error in refused.value.errors()] == [(name,)]


def test_a_chunk_without_the_usage_so_far_is_what_a_stream_holds() -> None:
    options = {"include_usage": True, "continuous_usage_stats": False}
    body = {"model": "name", "prompt": "fox", "stream": True}
    CompletionBody.model_validate({**body, "stream_options": options})
    for other in (True, 0):
        with pytest.raises(ValidationError, match="continuous_usage_stats"):
            CompletionBody.model_validate({**body, "stream_options": {**options, "continuous_usage_stats": other}})


def test_a_penalty_of_nothing_is_a_zero_of_either_spelling() -> None:
    for name in ("frequency_penalty", "presence_penalty"):
        for value in (0, 0.0):
            CompletionBody.model_validate({"model": "name", "prompt": "fox", name: value})
        with pytest.raises(ValidationError, match=name):
            CompletionBody.model_validate({"model": "name", "prompt": "fox", name: False})
