"""The bodies of OpenAI's requests: what they ask of the sampler.

A field is honoured, or left out because it asks for nothing or does not touch the answer; any other is refused by name.
"""

import json
import reprlib
from typing import Annotated, Any, ClassVar, Literal, LiteralString

from annotated_types import Ge, Le, Len, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError
from transformers import GenerationConfig

from mixture_of_depths.options import SamplingOptions

# What does not touch the answer: who asks, how it is billed and cached, a guess that would hasten it, and how tools, of
# which there are none, would be called.
IGNORED = frozenset(
    (
        "user",
        "safety_identifier",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
        "max_tool_calls",
    )
)
# The values of fields that are not honoured with which they ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
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
}
# Bounds of what one body may cost to check, to render and at every token; the docs state them.
MOST_SAMPLES = 2048
MOST_MESSAGES = 4096
MOST_FIELDS = 100
MOST_LEVELS = 100
MOST_STOPS = 64
MOST_STOP_CHARACTERS = 1000
# What a generation configuration may say beside the fields of `SamplingOptions`.
KNOWN = ("max_length", "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "stop_strings", "use_cache")


def default_options(config: GenerationConfig) -> dict[str, Any]:
    """The fields of `SamplingOptions` for a request that says nothing: OpenAI's defaults under the model's own.

    Raises:
        ValueError: for a setting that the sampler does not have, or that is out of its range.
    """
    # What is written there by default is off, or tells where the configuration comes from.
    settings = {name: value for name, value in config.to_diff_dict().items() if not (value is None or value is False)}
    settings = {name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"}
    options = {name: value for name, value in settings.items() if name in SamplingOptions.__dataclass_fields__}
    for name in sorted(set(settings) - set(options) - set(KNOWN)):
        raise ValueError(f"{name}={settings[name]} is not supported; leave it out")
    if config.do_sample is False:
        options["temperature"] = 0.0
    strings = settings.get("stop_strings", ())
    options["stop"] = (strings,) if isinstance(strings, str) else tuple(strings)
    options = {"temperature": 1.0, "top_k": 0, **options}
    SamplingOptions(**options)
    return options


def _of_field(name: str, message: LiteralString, **values: Any) -> PydanticCustomError:
    """What is wrong with a field of an object, where the object is checked as a whole; its name comes before it."""
    return PydanticCustomError("of_field", message, {"name": name, **values})


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
    strings = [value] if isinstance(value, str) else value
    if isinstance(strings, list):
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
    raise ValueError(f"prompt={reprlib.repr(value)} {message}")


def _is_tokens(value: Any) -> bool:
    # In Python True is an int, too.
    return isinstance(value, list) and all(type(part) is int for part in value)


def _as_parts(value: Any) -> Any:
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise PydanticCustomError("must", "a text or a list of parts")
    return parts


def _as_messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _not_too_many(messages: Any) -> Any:
    if isinstance(messages, list):
        contents = (message.get("content") for message in messages if isinstance(message, dict))
        count = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
        if count > MOST_MESSAGES:
            raise ValueError(f"there are {count} messages and parts of them; send at most {MOST_MESSAGES}")
    return messages


def _asks_for_nothing(name: str, value: Any) -> bool:
    # In Python 0 is False, but a number of log probabilities is not the wish for none.
    same = (
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
    return name in IGNORED or any(same)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream holds beside the answer; obfuscation is padding against those who watch the network."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str

    @field_validator("type")
    @classmethod
    def _is_text(cls, kind: str) -> str:
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f"the model reads text alone, not {kind}")
        return kind


class Message(_Strict):
    """A turn of a conversation: a chat's message, or an item of a response that is handed back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_as_parts)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        left_out = ["annotations", *(["type", "id", "status", "phase"] if message.get("type") == "message" else [])]
        kept = (name for name in message if name not in left_out)
        # An empty content is one all the same.
        said = {name: message[name] for name in kept if name == "content" or message[name] not in (None, [])}
        # Before the content, which calls of tools stand in for; and the type, which tells what all the others are.
        unknown = [name for name in said if name not in cls.model_fields]
        if unknown:
            name = "type" if "type" in unknown else unknown[0]
            raise _of_field(name, "={value} is not supported; leave it out", value=reprlib.repr(said[name]))
        return said

    def for_template(self) -> dict[str, str]:
        """The message as chat templates read it."""
        # Templates do not know OpenAI's newer name.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        return message if self.name is None else {**message, "name": self.name}


class Body(_Strict):
    """What all requests have in common; names and defaults are OpenAI's, and vLLM's where OpenAI has none."""

    # What the endpoint calls the most new tokens.
    limits: ClassVar[tuple[str, ...]]

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    stop: Annotated[list[str], BeforeValidator(_as_stops)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MOST_FIELDS:
            raise ValueError(f"the body has {len(body)} fields; send at most {MOST_FIELDS}")
        for name, value in body.items():
            if _is_deeper(value, MOST_LEVELS):
                raise _of_field(name, " is nested in more than {levels} levels; send fewer", levels=MOST_LEVELS)
            if name in cls.model_fields and isinstance(value, dict) and len(value) > MOST_FIELDS:
                sizes = {"fields": len(value), "most": MOST_FIELDS}
                raise _of_field(name, " has {fields} fields; send at most {most}", **sizes)
            try:
                json.dumps({name: value}, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                # Half a surrogate pair: JSON can spell it, and no text holds it.
                name = name.encode(errors="replace").decode()
                message = " holds half a character (half of a surrogate pair); send whole ones"
                raise _of_field(name, message) from error
        body = {name: value for name, value in body.items() if value is not None}
        for name, value in body.items():
            if isinstance(value, dict):
                body[name] = {key: part for key, part in value.items() if part is not None}
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            if body.get(choice) == "none":
                body.pop(tools, None)
        kept = (name for name in body if name in cls.model_fields or not _asks_for_nothing(name, body[name]))
        return {name: body[name] for name in kept}

    @field_validator("stream_options")
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
        "stop",
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
            raise ValueError(str(error).replace(option, name)) from error
        return value

    def options(self) -> dict[str, Any]:
        """The fields of `SamplingOptions` that the request names, but for the seed."""
        named = ("stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        options = {name: getattr(self, name) for name in named} | {
            "max_new_tokens": next((getattr(self, name) for name in self.limits if getattr(self, name)), None)
        }
        return {name: value for name, value in options.items() if value is not None}


class CompletionBody(Body):
    """Of /v1/completions."""

    limits = ("max_tokens",)

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_as_prompts)]
    n: Annotated[int, Ge(1), Le(128)] = 1
    max_tokens: int = 16


class ChatBody(Body):
    """Of /v1/chat/completions."""

    limits = ("max_completion_tokens", "max_tokens")

    messages: Annotated[list[Message], FailFast(), BeforeValidator(_not_too_many), Len(1)]
    n: Annotated[int, Ge(1), Le(128)] = 1
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] = {}

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
    # What the answer tells again.
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    tool_choice: Literal["none", "auto"] = "auto"
