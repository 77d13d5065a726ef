"""OpenAI's answers: whole, as the events of a stream, and those that say what is wrong."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.texts import Sample
from mixture_of_depths.serving.requests import ChoicesBody, ResponseBody, named, shown

# What a value of another type must be, in the words of JSON's readers instead of pydantic's.
KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
        status: of HTTP.
        message: what is wrong, for a human.
        param: the field of the request that is to blame, by the client's own name; as `named` shows it.
        code: the kind of fault, where OpenAI has a name for it.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def told(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def misread(errors: Sequence[Any]) -> RequestError:
    """The first of pydantic's reasons why a body is not a request, in our words."""
    problem = errors[0]
    # Where pydantic stood: in the body, in a field, in a part of it.
    first, *parts = problem["loc"] or (None,)
    param = None
    if isinstance(first, str):
        steps = (f".{named(part)}" if isinstance(part, str) else f"[{part}]" for part in parts)
        param = named(first) + "".join(steps)
    value = shown(problem["input"])
    if problem["type"] == "of_field":
        name = problem["ctx"]["name"]
        param = f"{param}.{name}" if param else name
        message = param + problem["msg"]
    elif problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
    elif param is None:
        message = "the body must be a JSON object, sent as application/json"
    elif problem["type"] in ("extra_forbidden", "unsupported"):
        message = f"{param}={value} is not supported; leave it out"
    elif problem["type"] == "too_short":
        message = f"{param}={value} must not be empty"
    elif problem["type"] == "missing":
        message = f"{param} is missing"
    elif problem["type"] == "must":
        message = f"{param}={value} must be {problem['msg']}"
    elif problem["type"] in KINDS:
        message = f"{param}={value} must be {KINDS[problem['type']]}"
    else:
        # Pydantic begins with "Input should" or "List should".
        message = f"{param}={value} is out of range: it must {problem['msg'].partition(' should ')[2]}"
    return RequestError(400, message, param)


def sent(event: dict[str, Any]) -> str:
    """An event of a stream as it is sent; those of responses carry their names."""
    name = f"event: {event['type']}\n" if "type" in event else ""
    return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n"


class CompletionAnswer:
    """The answer of /v1/completions, with one choice a sample.

    Args:
        body: the request.
        samples: one a choice; they are read as they grow.
        prompt_tokens: the length of all prompts.
    """

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"
    end = "data: [DONE]\n\n"

    def __init__(self, body: ChoicesBody, samples: list[Sample], prompt_tokens: int) -> None:
        self.body, self.samples, self.prompt_tokens = body, samples, prompt_tokens
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            self._choice(index, self._content(sample.text), self._reason(index))
            for index, sample in enumerate(self.samples)
        ]
        return {**self.head, "object": self.whole_object, "choices": choices, "usage": self._usage()}

    def began(self) -> Iterator[dict[str, Any]]:
        """The events before all text."""
        yield from ()

    def came(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        """The events when text of a sample has come."""
        yield self._event([self._choice(index, self._piece(text), None)])

    def ended(self, index: int) -> Iterator[dict[str, Any]]:
        """The events when a sample has ended."""
        yield self._event([self._choice(index, self._piece(""), self._reason(index))])

    def finished(self) -> Iterator[dict[str, Any]]:
        """The events after the last sample."""
        if self.body.stream_options.include_usage:
            yield {**self._event([]), "usage": self._usage()}

    def failed(self, error: RequestError) -> Iterator[dict[str, Any]]:
        """The events when sampling failed."""
        yield error.told()

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return {**self.head, "object": self.event_object, "choices": choices, **usage}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _choice(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": None, "finish_reason": reason}

    def _reason(self, index: int) -> str:
        return "length" if self.samples[index].ended == "length" else "stop"

    def _usage(self) -> dict[str, int]:
        new = sum(sample.new_tokens for sample in self.samples)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


class ChatAnswer(CompletionAnswer):
    """The answer of /v1/chat/completions."""

    prefix, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def began(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.samples)):
            yield self._event([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class ResponseAnswer:
    """The answer of /v1/responses: one message. Args are those of `CompletionAnswer`, and how it is sampled."""

    end = ""

    def __init__(self, body: ResponseBody, samples: list[Sample], prompt_tokens: int, options: SamplingOptions) -> None:
        self.body, (self.sample,), self.prompt_tokens, self.options = body, samples, prompt_tokens, options
        name = uuid.uuid4().hex
        self.head = {"id": f"resp_{name}", "object": "response", "created_at": int(time.time())}
        self.place = {"item_id": f"msg_{name}", "output_index": 0, "content_index": 0}
        self.sequence_number = -1

    def whole(self) -> dict[str, Any]:
        status = "incomplete" if self.sample.ended == "length" else "completed"
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._response(status),
            "incomplete_details": reason,
            "output": [self._message(status, [self._part(self.sample.text)])],
            "usage": self._usage(),
        }

    def began(self) -> Iterator[dict[str, Any]]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **self.place, part=self._part(""))

    def came(self, index: int, text: str) -> Iterator[dict[str, Any]]:
        yield self._event("response.output_text.delta", **self.place, delta=text, logprobs=[])

    def ended(self, index: int) -> Iterator[dict[str, Any]]:
        whole = self.whole()
        (message,) = whole["output"]
        yield self._event("response.output_text.done", **self.place, text=self.sample.text, logprobs=[])
        yield self._event("response.content_part.done", **self.place, part=message["content"][0])
        yield self._event("response.output_item.done", output_index=0, item=message)
        yield self._event(f"response.{whole['status']}", response=whole)

    def finished(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def failed(self, error: RequestError) -> Iterator[dict[str, Any]]:
        reason = {"code": "server_error", "message": error.message}
        yield self._event("response.failed", response={**self._response("failed"), "error": reason})

    def _event(self, kind: str, **content: Any) -> dict[str, Any]:
        self.sequence_number += 1
        return {"type": kind, "sequence_number": self.sequence_number, **content}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.place["item_id"],
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _response(self, status: str) -> dict[str, Any]:
        body = self.body
        return {
            **self.head,
            "status": status,
            "model": body.model,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": self.options.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": self.options.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.sample.new_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + self.sample.new_tokens,
        }
