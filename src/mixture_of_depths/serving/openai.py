"""transformers' OpenAI-compatible server with one model of this package, which the fast step samples.

Requests are answered one after another, in the order they came, on one thread; a client of a streamed answer that hangs
up frees it.
"""

import socket
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, BaseHandler, GenerateManager, GenerationState

from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stops import StopStrings
from mixture_of_depths.sampling.stream import check_prompts, stream

# The library's other routes load models by name, or are for models that hear or decide.
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
# Fields of a request that would change the answer, with the value that asks for nothing.
REFUSED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "top_logprobs": 0,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "audio": None,
    "functions": [],
    "previous_response_id": None,
}
# What a generation configuration may say beside the fields of `SamplingOptions`.
KNOWN = ("max_length", "do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "stop_strings", "use_cache")


def sampling_options(config: GenerationConfig, seed: int = 0) -> SamplingOptions:
    """The settings of a `generate()` as those of the fast sampler.

    Raises:
        ValueError: for a setting that it does not have, or that is out of its range.
    """
    # What is written there by default is off, or tells where the configuration comes from.
    settings = {name: value for name, value in config.to_diff_dict().items() if not (value is None or value is False)}
    settings = {name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"}
    fields = {name: value for name, value in settings.items() if name in SamplingOptions.__dataclass_fields__}
    for name in sorted(set(settings) - set(fields) - set(KNOWN)):
        raise ValueError(f"{name}={settings[name]} is not supported; leave it out")
    if not config.do_sample:
        fields["temperature"] = 0.0
    strings = settings.get("stop_strings", ())
    fields["stop"] = (strings,) if isinstance(strings, str) else tuple(strings)
    return SamplingOptions(**{"temperature": 1.0, "top_k": 0, **fields, "seed": seed})


class Sampler:
    """A model whose `generate()` is the fast sampler, for one request.

    The server seeds the global generator when a request has a seed; by its turn another request may have seeded or
    used it, so the request's seed is drawn from it here, when it arrives.
    """

    def __init__(self, model: MoDForCausalLM, compiled: bool) -> None:
        self.model = model
        self.compiled = compiled
        self.seed = int(torch.randint(2**62, (1,)))

    def generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerFast,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        **unused: Any,
    ) -> Tensor:
        """Goes on from one prompt of shape [1, T]; returns it with the new tokens, of shape [1, T + N]."""
        options = sampling_options(generation_config, self.seed)
        stops = StopStrings(options.stop)
        decoder, backend = (
            DecodeStream(ids=input_ids[0].tolist(), skip_special_tokens=True),
            tokenizer.backend_tokenizer,
        )
        tokens_1T = input_ids
        if streamer is not None:
            streamer.put(input_ids[0])
        for token_B in stream(self.model, input_ids, attention_mask, options, compiled=self.compiled):
            tokens_1T = torch.cat([tokens_1T, token_B[:, None]], dim=1)
            if streamer is not None:
                streamer.put(token_B)
            stops.let_through(decoder.step(backend, int(token_B[0])) or "")
            if stops.has_stopped:
                break
        if streamer is not None:
            streamer.end()
        return tokens_1T


class FastManager(GenerateManager):
    """The server's generation thread, sampling with `Sampler`; what the model cannot do is refused before."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.compiled = compiled

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        _check(model, inputs, gen_config)
        sampler: Any = Sampler(model, self.compiled)
        return super().generate_streaming(sampler, processor, inputs, gen_config, *args, **kw)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kw: Any
    ) -> Any:
        _check(model, inputs, gen_config)
        sampler: Any = Sampler(model, self.compiled)
        return await super().generate_non_streaming(sampler, processor, inputs, gen_config, *args, **kw)


def _check(model: MoDForCausalLM, inputs: Any, config: GenerationConfig) -> None:
    """Refuses a prompt that leaves no room, and shortens what is asked for to the room there is.

    Raises:
        ValueError: naming the setting or the prompt's length.
    """
    longest, length = model.config.max_position_embeddings, inputs["input_ids"].shape[1]
    if length >= longest:
        raise ValueError(f"the prompt has {length} tokens; the model takes at most {longest - 1}")
    room = longest - length
    config.max_new_tokens = room if config.max_new_tokens is None else min(config.max_new_tokens, room)
    options = sampling_options(config)
    check_prompts(model, inputs["input_ids"], inputs["attention_mask"], options.max_new_tokens)


class OneManager(GenerationState):
    """One generation thread for the one model there is."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.manager = FastManager(compiled)

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        return self.manager


class OneModel(ModelManager):
    """The one model there is, under its name."""

    def __init__(self, model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.pair: Any = (model, tokenizer)
        self.force_model = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.pair


def _check_body(body: dict[str, Any]) -> None:
    """Raises ValueError for what would change the answer and which the library would leave out without a word."""
    for name, neutral in REFUSED.items():
        if body.get(name) is not None and body[name] != neutral:
            raise ValueError(f"{name}={body[name]} is not supported; leave it out")
    for message in body.get("messages") or []:
        for part in message["content"] if isinstance(message.get("content"), list) else []:
            if part["type"] != "text":
                raise ValueError(f"messages: the model reads text alone, not {part['type']}")


class _Checked(BaseHandler):
    """Answers a request that cannot be understood with status 400 and the reason."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        handle: Any = super().handle_request  # pyright: ignore[reportAttributeAccessIssue]
        try:
            _check_body(body)
            return await handle(body, request_id)
        except (ValueError, TypeError, KeyError, AttributeError, TemplateError) as error:
            raise HTTPException(400, f"the request cannot be answered: {type(error).__name__}: {error}") from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        config = super()._build_generation_config(body, *args, **kwargs)
        if body.get("temperature"):
            # The library leaves a model that is greedy by default greedy.
            config.do_sample = True
        return config


class _Chat(_Checked, ChatCompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        if "chat_template" in (body.get("chat_template_kwargs") or {}):
            # One with loops would hold up all others.
            raise HTTPException(400, "chat_template_kwargs: chat_template is the model's own; leave it out")
        return await super().handle_request(body, request_id)


class _Completion(_Checked, CompletionHandler):
    pass


class _Response(_Checked, ResponseHandler):
    pass


async def _refusal(_request: Request, error: Exception) -> JSONResponse:
    """The reason in OpenAI's form, of which its clients show the message, and in FastAPI's."""
    assert isinstance(error, HTTPException)
    told = {"message": error.detail, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": told, "detail": error.detail}, error.status_code, error.headers)


def application(
    model: MoDForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, compiled: bool = False
) -> FastAPI:
    """The server: chat completions, completions, responses, models and health.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; chat needs a chat template.
        name: what requests call the model.
        compiled: whether to compile the sampling step.
    """
    models, state = OneModel(model, tokenizer, name), OneManager(compiled)
    app = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completion(models, state),
        response_handler=_Response(models, state),
        transcription_handler=TranscriptionHandler(models, state),
        systemone_handler=SystemOneHandler(models, state),
        generation_state=state,
    )
    app.add_exception_handler(HTTPException, _refusal)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    return app


def serve(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    host: str,
    port: int,
    compiled: bool = False,
) -> None:
    """Serves a model until it is told to stop; see `application`.

    Raises:
        ValueError: when the address cannot be listened on, or the model's own settings of sampling are not supported.
    """
    try:
        sampling_options(model.generation_config)
    except ValueError as error:
        raise ValueError(f"checkpoint={name}: its generation_config.json cannot be followed: {error}") from error
    try:
        # Before anything is compiled.
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"port={port} of host={host} cannot be listened on; name one that is free") from error
    if compiled:
        prompt = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        for _ in stream(model, prompt, options=SamplingOptions(max_new_tokens=4, temperature=0), compiled=True):
            pass
    uvicorn.run(application(model, tokenizer, name, compiled), host=host, port=port, log_level="info")
