"""A server that speaks OpenAI's protocol, with one model of this package, which the fast step samples.

Requests are answered one after another, in the order they came, on one thread; a client that hangs up frees it.
"""

import asyncio
import logging
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import Body as SentBody
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.stream import compile_step
from mixture_of_depths.sampling.texts import Sample, begin, step_texts
from mixture_of_depths.serving.address import is_loopback, listen
from mixture_of_depths.serving.answers import (
    ChatAnswer,
    CompletionAnswer,
    RequestError,
    ResponseAnswer,
    misread,
    sent,
)
from mixture_of_depths.serving.defaults import default_options
from mixture_of_depths.serving.requests import (
    MOST_SAMPLES,
    Body,
    ChatBody,
    CompletionBody,
    ResponseBody,
    named,
    shown,
)
from mixture_of_depths.serving.template import chat_tokens

Kind = TypeVar("Kind", bound=Body)
Result = TypeVar("Result")
Answer = CompletionAnswer | ResponseAnswer
# The library parses it alone: what it checks holds up the event loop.
JSON = Annotated[Any, SentBody()]
# Room for the prompts of any model: 100,000 tokens take less than a fifth, as text or as numbers.
MOST_BODY_BYTES = 4 * 2**20
# How long clients that neither send nor read on are waited for when the server stops.
GRACE_SECONDS = 3
# How long requests that are cancelled then have to answer.
ANSWERING_SECONDS = 1
# The log of uvicorn, beside its own lines.
LOG = logging.getLogger("uvicorn.error")


def _stopping() -> RequestError:
    return RequestError(503, "the server is stopping; ask again when it is back")


@dataclass
class Task:
    """Samples of one request, and how each of them is drawn."""

    samples: list[Sample]
    options: list[SamplingOptions]


class Sampler:
    """Samples for one request at a time; the others wait for their turn.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        compiled: whether to compile the sampling step.
        stopping: whether the server has been told to stop, after which all requests are refused.
    """

    def __init__(
        self,
        model: MoDForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        compiled: bool,
        stopping: Callable[[], bool],
    ) -> None:
        self.model, self.tokenizer, self.compiled, self.stopping = model, tokenizer, compiled, stopping
        assert model.generation_config is not None
        self.defaults = default_options(model.generation_config)
        self.turn, self.reading = asyncio.Lock(), asyncio.Lock()
        # The last step of a client that has left may still run when the next client has its turn.
        self.thread = ThreadPoolExecutor(1)
        # Long prompts take seconds to check and to read, in which all other requests are answered.
        self.reader = ThreadPoolExecutor(1)

    async def read(self, request: Request, reading: Callable[[], Result]) -> Result:
        """What reading a request returns, which is done off the event loop, one after another.

        Args:
            request: by which the client is heard.
            reading: checks the request, and makes its prompts tokens.

        Raises:
            RequestError: when the server stops, or the client has hung up before its turn came.
        """
        # uvicorn stops listening to who sends much, and listens again when it is asked.
        await request.is_disconnected()
        async with self.reading:
            self._check_going_on()
            if await request.is_disconnected():
                raise RequestError(499, "the client has hung up")
            return await asyncio.get_running_loop().run_in_executor(self.reader, reading)

    def _check_going_on(self) -> None:
        if self.stopping():
            raise _stopping()

    def task(self, body: Body, field: str, prompts: Sequence[list[int]], n: int = 1) -> Task:
        """What a request asks for: `n` samples after every prompt, each with the next seed.

        Args:
            body: the request.
            field: what its prompts are called there.
            prompts: their tokens.
            n: how many samples.

        Raises:
            RequestError: for a prompt that leaves no room, or with a token that the model does not know.
        """
        longest, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        fields = {**self.defaults, **body.options()}
        seed = secrets.randbits(63) if body.seed is None else body.seed
        task = Task([], [])
        for tokens in prompts:
            if len(tokens) >= longest:
                message = f"the prompt has {len(tokens)} tokens; the model takes at most {longest - 1}"
                raise RequestError(400, message, field, "context_length_exceeded")
            for token in tokens:
                if not 0 <= token < vocabulary:
                    message = f"{field} holds {shown(token)}, which is outside the vocabulary of {vocabulary} tokens"
                    raise RequestError(400, message, field)
            if not tokens:
                raise RequestError(400, f"{field} is empty; give at least one token", field)
            room = longest - len(tokens)
            new_tokens = min(fields.get("max_new_tokens", room), room)
            for _ in range(n):
                settings = {**fields, "max_new_tokens": new_tokens, "seed": (seed + len(task.samples)) % 2**63}
                task.samples.append(Sample("", "", list(tokens)))
                task.options.append(SamplingOptions(**settings))
        return task

    async def sample(self, task: Task, request: Request, tell: Callable[[tuple[int, str | None]], None]) -> None:
        """Samples when its turn has come, and ends at the next token when the client has hung up.

        Args:
            task: what is asked for; its samples grow.
            request: by which the client is heard.
            tell: is told the index of a sample and its next text, and None when it has ended.

        Raises:
            FloatingPointError: when the model's logits are not finite.
            RequestError: when the server stops.
        """
        loop = asyncio.get_running_loop()
        async with self.turn:
            for index, (sample, options) in enumerate(zip(task.samples, task.options, strict=True)):
                steps = step_texts(self.model, self.tokenizer, [sample], options, compiled=self.compiled)
                while True:
                    self._check_going_on()
                    if await request.is_disconnected():
                        return
                    texts = await loop.run_in_executor(self.thread, next, steps, None)
                    if texts is None:
                        break
                    for _, text in texts:
                        tell((index, text))
                tell((index, None))


async def _events(sampler: Sampler, task: Task, answer: Answer, request: Request) -> AsyncIterator[str]:
    """The events of a streamed answer; sampling does not wait for a client that reads slowly."""
    told: asyncio.Queue[tuple[int, str | None] | None] = asyncio.Queue()
    sampling = asyncio.create_task(sampler.sample(task, request, told.put_nowait))
    sampling.add_done_callback(lambda _: told.put_nowait(None))
    try:
        for event in answer.began():
            yield sent(event)
        while (piece := await told.get()) is not None:
            index, text = piece
            for event in answer.ended(index) if text is None else answer.came(index, text):
                yield sent(event)
        try:
            await sampling
        except Exception as error:
            # It is too late for another status.
            refused = error if isinstance(error, RequestError) else RequestError(500, f"the model failed: {error}")
            if refused is not error:
                LOG.exception("sampling failed")
            for event in answer.failed(refused):
                yield sent(event)
            return
        for event in answer.finished():
            yield sent(event)
        yield answer.end
    finally:
        sampling.cancel()


async def _answered(sampler: Sampler, task: Task, answer: Answer, request: Request) -> Response:
    if answer.body.stream:
        return StreamingResponse(_events(sampler, task, answer, request), media_type="text/event-stream")
    await sampler.sample(task, request, lambda _: None)
    return JSONResponse(answer.whole())


def _checked(kind: type[Kind], content: Any) -> Kind:
    """The body of a request, from its JSON.

    Raises:
        RequestError: when it is none.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise misread(error.errors(include_url=False)) from error


def _tokenised(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """The tokens of prompts, which may be tokens already.

    Raises:
        RequestError: for a prompt that is empty.
    """
    try:
        return [begin(tokenizer, [one])[0].tokens if isinstance(one, str) else one for one in prompts]
    except ValueError as error:
        raise RequestError(400, str(error), "prompt") from error


class _Size:
    """Refuses a body that is too long while it comes in."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> ASGIMessage:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BODY_BYTES:
                # FastAPI lets no other kind of error out of its reading.
                raise HTTPException(413, f"the body has more than {MOST_BODY_BYTES} bytes; send less")
            return message

        await self.app(scope, counted, send)


class _Keys:
    """Asks for one of the keys before anything under /v1 is read."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            # All are compared, and each to its end, so that the time tells nothing.
            right = [secrets.compare_digest(key.strip(), one) for one in self.keys]
            if scheme.lower() != b"bearer" or not any(right):
                told = RequestError(401, "Authorization: Bearer KEY is missing or wrong", code="invalid_api_key").told()
                await JSONResponse(told, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Stop:
    """Ends the requests that are cancelled when the server stops, of which the library would log tracebacks.

    Such as those whose bodies are still coming in.
    """

    def __init__(self, app: ASGIApp, stopping: Callable[[], bool]) -> None:
        self.app, self.stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_answered = False

        async def heard(message: ASGIMessage) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            await self.app(scope, receive, heard)
        except asyncio.CancelledError:
            if not self.stopping():
                raise
            if not is_answered:
                refused = _stopping()
                await JSONResponse(refused.told(), refused.status)(scope, receive, send)


class _Server(uvicorn.Server):
    """Says where it listens, and has the requests that it cancels answer before it lets the process end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # The library says so only of sockets that it has opened itself.
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        LOG.info("Uvicorn running on http://%s:%d (Press CTRL+C to quit)", host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # What it has cancelled has not run since, and the signal that comes next may end the process at once.
        # After a second Ctrl-C nothing is cancelled yet.
        if tasks := set(self.server_state.tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=ANSWERING_SECONDS)


def _why_unreadable(cause: BaseException | None) -> str:
    """What keeps a body from being parsed beside the grammar of JSON."""
    if isinstance(cause, ValueError) and not isinstance(cause, UnicodeError):
        # The only other reason why Python's reader raises one.
        return f"a number in the body has more than {sys.get_int_max_str_digits()} digits; send fewer"
    return "the body cannot be read: it must be a JSON object in UTF-8, not nested deeply"


def _refusal(request: Request, error: Exception) -> JSONResponse:
    """What went wrong, in OpenAI's form."""
    headers = None
    if isinstance(error, RequestError):
        refused = error
    elif isinstance(error, RequestValidationError):
        refused = RequestError(400, "the body must be a JSON object, sent as application/json")
    elif isinstance(error, HTTPException):
        # The library says no more of these than the names of their statuses.
        place = f"{named(request.method)} {named(request.url.path)}"
        messages = {
            400: _why_unreadable(error.__cause__),
            404: f"{place} does not exist",
            405: f"{place} does not exist; the path takes {(error.headers or {}).get('Allow')}",
        }
        message = messages.get(error.status_code, str(error.detail))
        refused, headers = RequestError(error.status_code, message), error.headers
    else:
        refused = RequestError(500, f"the model failed: {error}")
    return JSONResponse(refused.told(), refused.status, headers)


def application(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    compiled: bool = False,
    api_keys: Sequence[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The server: chat completions, completions, responses, models and health.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer; chat and responses need a chat template.
        name: what requests call the model; if it is a path, in any spelling of it.
        compiled: whether to compile the sampling step.
        api_keys: keys of which a client must bring one; none lets everybody in.
        stopping: whether the server has been told to stop; it is asked before every token.

    Raises:
        ValueError: when the model's own settings of sampling are not supported.
    """
    sampler = Sampler(model, tokenizer, compiled, stopping)
    # The library's pages would show bodies and answers as it knows them.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    for kind in (RequestValidationError, HTTPException, RequestError, Exception):
        app.add_exception_handler(kind, _refusal)
    app.add_middleware(_Size)
    if api_keys:
        app.add_middleware(_Keys, keys=api_keys)
    app.add_middleware(_Stop, stopping=stopping)
    described = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "local"}

    def check_model(asked: str) -> None:
        # Clients write the folder in their own way, and take "./" out of an address.
        if Path(asked) != Path(name):
            raise RequestError(
                404, f"the model {shown(asked)} does not exist; it is {name!r}", "model", "model_not_found"
            )

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{asked:path}")
    def one_model(asked: str) -> dict[str, Any]:
        if not asked:
            raise HTTPException(404)
        check_model(asked)
        return described

    @app.post("/v1/completions")
    async def completions(content: JSON, request: Request) -> Response:
        def read() -> tuple[CompletionBody, Task]:
            body = _checked(CompletionBody, content)
            check_model(body.model)
            if (samples := len(body.prompt) * body.n) > MOST_SAMPLES:
                message = f"prompt and n ask for {samples} samples; ask for at most {MOST_SAMPLES} at once"
                raise RequestError(400, message, "prompt")
            return body, sampler.task(body, "prompt", _tokenised(tokenizer, body.prompt), body.n)

        body, task = await sampler.read(request, read)
        # Nothing is sampled yet; each prompt stands there n times.
        prompt_tokens = sum(len(sample.tokens) for sample in task.samples) // body.n
        return await _answered(sampler, task, CompletionAnswer(body, task.samples, prompt_tokens), request)

    @app.post("/v1/chat/completions")
    async def chat(content: JSON, request: Request) -> Response:
        def read() -> tuple[ChatBody, Task]:
            body = _checked(ChatBody, content)
            check_model(body.model)
            tokens = chat_tokens(
                tokenizer, body.messages, "messages", "chat_template_kwargs", settings=body.chat_template_kwargs
            )
            return body, sampler.task(body, "messages", [tokens], body.n)

        body, task = await sampler.read(request, read)
        return await _answered(sampler, task, ChatAnswer(body, task.samples, len(task.samples[0].tokens)), request)

    @app.post("/v1/responses")
    async def responses(content: JSON, request: Request) -> Response:
        def read() -> tuple[ResponseBody, Task]:
            body = _checked(ResponseBody, content)
            check_model(body.model)
            tokens = chat_tokens(tokenizer, body.input, "input", "instructions", instructions=body.instructions)
            return body, sampler.task(body, "input", [tokens])

        body, task = await sampler.read(request, read)
        answer = ResponseAnswer(body, task.samples, len(task.samples[0].tokens), task.options[0])
        return await _answered(sampler, task, answer, request)

    return app


def serve(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    host: str,
    port: int,
    compiled: bool = False,
    api_keys: Sequence[str] = (),
) -> None:
    """Serves a model until it is told to stop; see `application`.

    Raises:
        KeyboardInterrupt: when it is told so by Ctrl-C.
        ValueError: when the address cannot be listened on, or the model's own settings of sampling are not supported.
    """
    try:
        app = application(model, tokenizer, name, compiled, api_keys, lambda: server.should_exit)
    except ValueError as error:
        raise ValueError(f"checkpoint={name}: its generation_config.json cannot be followed: {error}") from error
    # Before anything is compiled, and for good: compiling takes long enough for another to take the port.
    sockets = listen(host, port)
    try:
        if not api_keys and not is_loopback(host):
            print(
                f"warning: whoever reaches host={host} can use the model; --api-key or MOD_API_KEY asks them for a key",
                file=sys.stderr,
            )
        if compiled:
            compile_step(model)
        server = _Server(uvicorn.Config(app, host, port, lifespan="off", timeout_graceful_shutdown=GRACE_SECONDS))
        # `uvicorn.run` would end on Ctrl-C as if nothing had been stopped.
        server.run(sockets)
    finally:
        for opened in sockets:
            opened.close()
