"""What is wrong with a body is told in plain words, by the client's own field."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from mixture_of_depths.serving.answers import misread
from mixture_of_depths.serving.requests import ChatBody, CompletionBody, ResponseBody

PROMPT = "must be a text, a list of texts, a list of tokens, which are whole numbers, or a list of such lists"
TURNS = [{"role": "user", "content": "a"}]
FINITE = "holds a number that is not finite; send finite ones"
HALF = "holds half a character (half of a surrogate pair); send whole ones"


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (CompletionBody, {"prompt": [1.5]}, "prompt", f"prompt=[1.5] {PROMPT}"),
        (CompletionBody, {"prompt": [1, True]}, "prompt", f"prompt=[1, True] {PROMPT}"),
        (CompletionBody, {"prompt": ["a", [1]]}, "prompt", f"prompt=['a', [1]] {PROMPT}"),
        (CompletionBody, {"prompt": 7}, "prompt", f"prompt=7 {PROMPT}"),
        (CompletionBody, {"prompt": "\ud800"}, "prompt", f"prompt {HALF}"),
        (CompletionBody, {"prompt": "a", "user": ["\udfff"]}, "user", f"user {HALF}"),
        (CompletionBody, {"prompt": "a", "x\ud800": 1}, r"'x\ud800'", rf"'x\ud800' {HALF}"),
        (CompletionBody, {"prompt": "a", "model": 7}, "model", "model=7 must be a text"),
        (CompletionBody, {"prompt": "a", "max_tokens": "7"}, "max_tokens", "max_tokens='7' must be a whole number"),
        (CompletionBody, {"prompt": "a", "logprobs": False}, "logprobs", "logprobs=False must be a whole number"),
        (
            CompletionBody,
            {"prompt": "a", "logprobs": 0},
            "logprobs",
            "logprobs=0 is not supported; leave it out",
        ),
        (ChatBody, {"messages": TURNS, "logprobs": 0}, "logprobs", "logprobs=0 is not supported; leave it out"),
        (CompletionBody, {"prompt": "a", "top_p": "x"}, "top_p", "top_p='x' must be a number"),
        (CompletionBody, {"prompt": "a", "stream": 1}, "stream", "stream=1 must be true or false"),
        (CompletionBody, {"prompt": "a", "stop": 7}, "stop", "stop=7 must be a text or a list of texts"),
        (CompletionBody, {"prompt": "a", "stop": ""}, "stop", "stop='' must be at least one character long"),
        (
            CompletionBody,
            {"prompt": "a", "stop": ["b", ""]},
            "stop[1]",
            "stop[1]='' is out of range: it must have at least 1 character",
        ),
        (CompletionBody, {"prompt": "a", "stop": [7]}, "stop[0]", "stop[0]=7 must be a text"),
        (CompletionBody, {"prompt": "a", "n": 2, "best_of": 1}, "best_of", "best_of=1 must be at least n=2"),
        (
            CompletionBody,
            {"prompt": "a", "n": 2, "best_of": 3},
            "best_of",
            "best_of=3 is not supported; leave it out, or give n=2",
        ),
        (CompletionBody, {"prompt": "a", "top_p": math.nan}, "top_p", f"top_p {FINITE}"),
        (CompletionBody, {"prompt": "a", "prediction": {"b": -math.inf}}, "prediction", f"prediction {FINITE}"),
        (
            ChatBody,
            {"messages": TURNS, "chat_template_kwargs": {"b": [math.nan]}},
            "chat_template_kwargs",
            f"chat_template_kwargs {FINITE}",
        ),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "foo": 1}]}]},
            "messages[0].content[0].foo",
            "messages[0].content[0].foo=1 is not supported; leave it out",
        ),
        (
            ChatBody,
            {"messages": [{"type": "message", "role": "user", "content": "a", "id": 5}]},
            "messages[0].id",
            "messages[0].id=5 must be a text",
        ),
        (ResponseBody, {"input": 5}, "input", "input=5 must be a text or a list of messages"),
        (
            ResponseBody,
            {"input": "a", "stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
            "stream_options.include_usage=True is not supported; leave it out",
        ),
        (
            CompletionBody,
            {"prompt": "a", "n": 129},
            "n",
            "n=129 is out of range: it must be less than or equal to 128",
        ),
        (ChatBody, {"messages": []}, "messages", "messages=[] must not be empty"),
        (ChatBody, {"messages": [7]}, "messages[0]", "messages[0]=7 must be an object"),
        (ResponseBody, {"input": []}, "input", "input=[] must not be empty"),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": None}]},
            "messages[0].content",
            "messages[0].content=None must be a text or a list of parts",
        ),
        (
            ChatBody,
            {"messages": [{"role": "user", "content": 7}]},
            "messages[0].content",
            "messages[0].content=7 must be a text or a list of parts",
        ),
        (
            ChatBody,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [7]}]},
            "messages[0].tool_calls",
            "messages[0].tool_calls=[7] is not supported; leave it out",
        ),
        (
            ResponseBody,
            {"input": [{"call_id": "a", "type": "function_call_output", "output": "b"}]},
            "input[0].type",
            "input[0].type='function_call_output' is not supported; leave it out",
        ),
        (ResponseBody, {"input": "a", "metadata": {"b": 1}}, "metadata.b", "metadata.b=1 must be a text"),
    ],
)
def test_a_fault_is_told_by_its_field_and_what_it_must_be(
    kind: type[CompletionBody | ChatBody | ResponseBody], body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": "name", **body})
    refused = misread(wrong.value.errors())
    assert (refused.status, refused.param, refused.message) == (400, param, message)


@pytest.mark.parametrize(
    "kind_and_prompt",
    [(CompletionBody, {"prompt": "a"}), (ChatBody, {"messages": TURNS}), (ResponseBody, {"input": "a"})],
)
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"user": 5}, "user=5 must be a text"),
        ({"safety_identifier": 5}, "safety_identifier=5 must be a text"),
        ({"service_tier": {"a": 1}}, "service_tier={'a': 1} must be a text"),
        ({"metadata": 7}, "metadata=7 must be an object"),
        ({"metadata": {"a": None}}, "metadata.a=None must be a text"),
        ({"store": "x"}, "store='x' must be true or false"),
        ({"prompt_cache_key": 5}, "prompt_cache_key=5 must be a text"),
        ({"prompt_cache_options": 5}, "prompt_cache_options=5 must be an object"),
        ({"prompt_cache_retention": 5}, "prompt_cache_retention=5 must be a text"),
        ({"prediction": "a"}, "prediction='a' must be an object"),
        ({"parallel_tool_calls": "maybe"}, "parallel_tool_calls='maybe' must be true or false"),
        ({"max_tool_calls": "1"}, "max_tool_calls='1' must be a whole number"),
        ({"tools": 5, "tool_choice": "none"}, "tools=5 must be a list"),
        ({"functions": [5], "function_call": "none"}, "functions[0]=5 must be an object"),
        ({"tools": [{}]}, "tools=[{}] is not supported; leave it out"),
        ({"tool_choice": 5}, "tool_choice=5 is out of range: it must be 'none' or 'auto'"),
    ],
)
def test_what_is_left_out_is_held_to_its_type_in_every_endpoint(
    kind_and_prompt: tuple[type[CompletionBody | ChatBody | ResponseBody], dict[str, Any]],
    body: dict[str, Any],
    message: str,
) -> None:
    kind, prompt = kind_and_prompt
    with pytest.raises(ValidationError) as wrong:
        kind.model_validate({"model": "name", **prompt, **body})
    assert misread(wrong.value.errors()).message == message


def test_many_faults_of_a_list_cost_no_more_than_one() -> None:
    for kind, body in ((ChatBody, {"messages": [7] * 1000}), (CompletionBody, {"prompt": [1.5] * 1000})):
        with pytest.raises(ValidationError) as wrong:
            kind.model_validate({"model": "name", **body})
        assert wrong.value.error_count() == 1
