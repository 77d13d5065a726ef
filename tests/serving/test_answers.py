"""What is wrong with a body is told in plain words, by the client's own field."""

from typing import Any

import pytest
from pydantic import ValidationError

from mixture_of_depths.serving.answers import misread
from mixture_of_depths.serving.requests import ChatBody, CompletionBody, ResponseBody

PROMPT = "must be a text, a list of texts, a list of tokens, which are whole numbers, or a list of such lists"
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
        (CompletionBody, {"prompt": "a", "x\ud800": 1}, "x?", f"x? {HALF}"),
        (CompletionBody, {"prompt": "a", "model": 7}, "model", "model=7 must be a text"),
        (CompletionBody, {"prompt": "a", "max_tokens": "7"}, "max_tokens", "max_tokens='7' must be a whole number"),
        (CompletionBody, {"prompt": "a", "top_p": "x"}, "top_p", "top_p='x' must be a number"),
        (CompletionBody, {"prompt": "a", "stream": 1}, "stream", "stream=1 must be true or false"),
        (CompletionBody, {"prompt": "a", "stop": 7}, "stop", "stop=7 must be a list"),
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


def test_many_faults_of_a_list_cost_no_more_than_one() -> None:
    for kind, body in ((ChatBody, {"messages": [7] * 1000}), (CompletionBody, {"prompt": [1.5] * 1000})):
        with pytest.raises(ValidationError) as wrong:
            kind.model_validate({"model": "name", **body})
        assert wrong.value.error_count() == 1
