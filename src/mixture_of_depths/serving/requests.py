"""The bodies of OpenAI's requests: what they ask of the sampler.

A field is honoured, or left out because it asks for nothing or does not touch the answer; any other is refused by name.
"""

import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal, LiteralString

from annotated_types import Ge, Le, Len, Lt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mixture_of_depths.options import SamplingOptions

# The values of fields that are not honoured with which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "background": (False,),
    "include": ([],),
    "reasoning": ({}, {"effort": "none"}),
    "text": (
        {},
        {"verbosity": "medium"},
        {"format": {"type": "text"}},
        {"format": {"type": "text"}, "verbosity": "medium"},
    ),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    # Of vLLM.
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}
# Fields whose null parts say something; in all others a part that is null asks for nothing.
WITH_NULLS = ("chat_template_kwargs", "metadata")
# Fields of a message that say nothing with these values: of older clients, and of answers that are handed back.
SAYING_NOTHING = {"type": "text", "refusal": "", "reasoning": "", "reasoning_content": ""}
# What an item of a response carries, and a chat's message does not.
OF_AN_ITEM = ("id", "status", "phase")
# Bounds of what one body may cost to check, to render and at every token; the docs state them.
MOST_SAMPLES = 2048
MOST_MESSAGES = 4096
MOST_FIELDS = 100
MOST_LEVELS = 100
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 1000
# Characters of a name or a value that a message shows, and of what a chat template says is wrong.
MOST_SHOWN = 80
MOST_REASON = 500


def shown(value: Any, most: int = MOST_SHOWN) -> str:
    """What a request brings, for a message: as Python writes it, in one line, and cut to `most` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = most
    text = short.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def named(name: str) -> str:
    """A name that a request brings, for a message: as it is where it is short and reads as one word."""
    is_word = name.isprintable() and name.split() == [name]
    return name if is_word and len(name) <= MOST_SHOWN else shown(name)


def _of_field(name: str, message: LiteralString, **values: Any) -> PydanticCustomError:
    """What is wrong with a field of an object, where the object is checked as a whole; its name comes before it."""
    return PydanticCustomError("of_field", message, {"name": named(name), **values})


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more levels, counted without recursion."""
    layer = [value]
    for _ in range(levels + 1):
        nested = (part for part in layer if isinstance(part, list | dict))
        layer = [inner for part in nested for inner in (part.values() if isinstance(part, dict) else part)]
        if not layer:
            return False
    return True


def _as_stops(value: Any) -> Any:
    """One stop string becomes a list of one."""
    if value == "":
        raise PydanticCustomError("must", "at least one character long")
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise PydanticCustomError("must", "a text or a list of texts")
    characters = sum(len(string) for string in strings if isinstance(string, str))
    if len(strings) > MOST_STOPS or characters > MOST_STOP_CHARACTERS:
        size = f"{len(strings)} strings of {characters} characters in all"
        raise ValueError(f"stop has {size}; give at most {MOST_STOPS} of at most {MOST_STOP_CHARACTERS} in all")
    return strings


def _as_prompts(value: Any) -> Any:
    """One prompt, as text or as tokens, becomes a list of one."""
    if value == []:
        raise ValueError("prompt=[] is empty; give at least one token")
    prompts = [value] if isinstance(value, str) or _is_tokens(value) else value
    if isinstance(prompts, list) and len(prompts) > MOST_SAMPLES:
        raise ValueError(f"prompt holds {len(prompts)} prompts; send at most {MOST_SAMPLES} at once")
    are_texts = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if are_texts or (isinstance(prompts, list) and all(map(_is_tokens, prompts))):
        return prompts
    message = "must be a text, a list of texts, a list of tokens, which are whole numbers, or a list of such lists"
    raise ValueError(f"prompt={shown(value)} {message}")


def _is_tokens(value: Any) -> bool:
    # In Python True is an int, too.
    return isinstance(value, list) and all(type(part) is int for part in value)


def _as_parts(value: Any) -> Any:
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise PydanticCustomError("must", "a text or a list of parts")
    return parts


def _as_messages(value: Any) -> Any:
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise PydanticCustomError("must", "a text or a list of messages")
    return messages


def _not_too_many(messages: Any) -> Any:
    if isinstance(messages, list):
        contents = (message.get("content") for message in messages if isinstance(message, dict))
        count = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
        if count > MOST_MESSAGES:
            raise ValueError(f"there are {count} messages and parts of them; send at most {MOST_MESSAGES}")
    return messages


def _asks_for_nothing(name: str, value: Any) -> bool:
    # In Python 0, 0.0 and False are equal, but a number of log probabilities is not the wish for none.
    return any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL.get(name, ()))


def _only(neutral: Any) -> AfterValidator:
    """Refuses all values of a field's type but the one that asks for nothing."""

    def check(value: Any) -> Any:
        if value != neutral:
            raise PydanticCustomError("unsupported", "")
        return value

    return AfterValidator(check)


def _check_json(name: str, value: Any) -> None:
    """Refuses a field that is nested too deeply, or holds what JSON does not: half a character, or not a number."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise _half(name) from error
    if _is_deeper(value, MOST_LEVELS):
        raise _of_field(name, " is nested in more than {levels} levels; send fewer", levels=MOST_LEVELS)
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise _half(name) from error
    except ValueError as error:
        raise _of_field(name, " holds a number that is not finite; send finite ones") from error


def _half(name: str) -> PydanticCustomError:
    # JSON can spell half a surrogate pair, and no text holds it.
    return _of_field(name, " holds half a character (half of a surrogate pair); send whole ones")


Objects = Annotated[list[dict[str, Any]], FailFast()]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream holds beside the answer."""

    # Padding against those who watch the network, who would believe themselves safe from them.
    include_obfuscation: Annotated[bool, _only(False)] = False


class ChunkOptions(StreamOptions):
    """What a stream of chunks holds beside the answer; other streams always tell how many tokens it took."""

    include_usage: bool = False
    # Of vLLM.
    continuous_usage_stats: Annotated[bool, _only(False)] = False


class Part(_Strict):
    """A part of a message."""

    # Not forbidden at once: another kind of part is refused by its type, whatever else it holds.
    model_config = ConfigDict(extra="allow")

    type: str
    text: str
    # What answers that are handed back carry, and where a cache may end.
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None

    @field_validator("type")
    @classmethod
    def _is_text(cls, kind: str) -> str:
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"the model reads text alone, not {named(kind)}")
        return kind

    @model_validator(mode="after")
    def _nothing_else(self) -> "Part":
        for name, value in (self.model_extra or {}).items():
            if value not in (None, []):
                raise _of_field(name, "={value} is not supported; leave it out", value=shown(value))
        return self


class Message(_Strict):
    """A turn of a conversation: a chat's message, or an item of a response that is handed back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_as_parts)]
    name: str | None = None
    # Of what is handed back; templates do not read it.
    annotations: list[Any] = []
    type: Literal["message"] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        # An empty content is one all the same.
        said = {
            name: value
            for name, value in message.items()
            if name == "content" or value not in (None, [], SAYING_NOTHING.get(name))
        }
        known = set(cls.model_fields).difference(() if said.get("type") == "message" else ("type", *OF_AN_ITEM))
        # Before the content, which calls of tools stand in for; and the type, which tells what all the others are.
        unknown = [name for name in said if name not in known]
        if unknown:
            name = "type" if "type" in unknown else unknown[0]
            raise _of_field(name, "={value} is not supported; leave it out", value=shown(said[name]))
        return said

    def for_template(self) -> dict[str, Any]:
        """The message as `render` takes it."""
        # Templates do not know OpenAI's newer name.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": [{"type": "text", "text": part.text} for part in self.content]}
        return message if self.name is None else {**message, "name": self.name}


class Body(_Strict):
    """What all requests have in common; names and defaults are OpenAI's, and vLLM's where OpenAI has none."""

    # What the endpoint calls the most new tokens.
    limits: ClassVar[tuple[str, ...]]

    model: str
    stream: bool = False
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    stop: Annotated[list[Annotated[str, Len(1)]], BeforeValidator(_as_stops)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    # What does not touch the answer: who asks, how it is billed and cached, a guess that would hasten it, and how tools
    # would be called, which are none or must not be. The answers of /v1/responses tell some of it again.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] = {}
    store: bool = False
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] = {}
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    tools: Objects = []
    function_call: Literal["none", "auto"] = "auto"
    functions: Objects = []

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MOST_FIELDS:
            raise ValueError(f"the body has {len(body)} fields; send at most {MOST_FIELDS}")
        for name, value in body.items():
            _check_json(name, value)
            if name in cls.model_fields and isinstance(value, dict) and len(value) > MOST_FIELDS:
                sizes = {"fields": len(value), "most": MOST_FIELDS}
                raise _of_field(name, " has {fields} fields; send at most {most}", **sizes)
        body = {name: value for name, value in body.items() if value is not None}
        for name, value in body.items():
            if isinstance(value, dict) and name not in WITH_NULLS:
                body[name] = {key: part for key, part in value.items() if part is not None}
        kept = (name for name in body if name in cls.model_fields or not _asks_for_nothing(name, body[name]))
        return {name: body[name] for name in kept}

    @field_validator("tools", "functions")
    @classmethod
    def _not_to_be_called(cls, tools: list[dict[str, Any]], info: ValidationInfo) -> list[dict[str, Any]]:
        choice = "tool_choice" if info.field_name == "tools" else "function_call"
        if tools and info.data.get(choice) != "none":
            raise PydanticCustomError("unsupported", "")
        return tools

    @field_validator("stream_options", check_fields=False)
    @classmethod
    def _only_of_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("stream_options is only allowed when stream is true")
        return options

    @field_validator("top_k")
    @classmethod
    def _all_tokens(cls, top_k: int | None) -> int | None:
        return 0 if top_k == -1 else top_k

    @field_validator(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        check_fields=False,
    )
    @classmethod
    def _in_the_sampler_s_range(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        option = "max_new_tokens" if name in cls.limits else name
        try:
            SamplingOptions(**{option: value})
        except ValueError as error:
            told = str(error).replace(repr(value), shown(value))
            raise ValueError(told.replace(option, name)) from error
        return value

    def options(self) -> dict[str, Any]:
        """The fields of `SamplingOptions` that the request names, but for the seed."""
        named = ("stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: getattr(self, name) for name in named} | {
            "max_new_tokens": next((getattr(self, name) for name in self.limits if getattr(self, name)), None)
        }
        return {name: value for name, value in options.items() if value is not None}


class ChoicesBody(Body):
    """Of an endpoint whose answers are choices, and which streams them in chunks."""

    stream_options: ChunkOptions = ChunkOptions()
    n: Annotated[int, Ge(1), Le(128)] = 1
    best_of: int | None = None

    @field_validator("best_of")
    @classmethod
    def _all_are_told(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n")
        if best_of is not None and n is not None and best_of != n:
            fault = f"must be at least n={n}" if best_of < n else f"is not supported; leave it out, or give n={n}"
            raise ValueError(f"best_of={shown(best_of)} {fault}")
        return best_of


class CompletionBody(ChoicesBody):
    """Of /v1/completions."""

    limits = ("max_tokens",)

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_as_prompts)]
    max_tokens: int = 16
    # Here it is a number, and not the truth that it is in a chat.
    logprobs: Annotated[int, _only(None)] | None = None
    # Of vLLM: whether the token that texts begin with comes before the prompt.
    add_special_tokens: Annotated[bool, _only(True)] = True


class ChatBody(ChoicesBody):
    """Of /v1/chat/completions."""

    limits = ("max_completion_tokens", "max_tokens")

    messages: Annotated[list[Message], FailFast(), BeforeValidator(_not_too_many), Len(1)]
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] = {}
    # Of vLLM: whether that token comes before what the chat template gives.
    add_special_tokens: Annotated[bool, _only(False)] = False

    @field_validator("max_tokens")
    @classmethod
    def _only_one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_completion_tokens") is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same; leave out max_tokens")
        return value


class ResponseBody(Body):
    """Of /v1/responses."""

    limits = ("max_output_tokens",)

    input: Annotated[list[Message], FailFast(), BeforeValidator(_not_too_many), BeforeValidator(_as_messages), Len(1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream_options: StreamOptions = StreamOptions()
