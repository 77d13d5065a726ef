"""The commands that answer others: serve and playground."""

from pathlib import Path
from typing import Annotated

import tyro

from mixture_of_depths.cli.common import Checkpoint, load_to_sample, quiet_libraries, require_extra
from mixture_of_depths.options import Precision


def playground(
    checkpoint: Checkpoint,
    baseline: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    precision: Precision = "fp32",
    compile: bool = False,
) -> None:
    """Open a page to sample from a model, its tokens coloured by the blocks they used. Needs the extra "playground".

    Args:
        checkpoint: Folder of a model.
        baseline: Folder of a model to sample from beside it.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        precision: Precision of the matrix products: fp32, or bf16.
        compile: Compile the sampling steps before the page opens: many times faster afterwards.
    """
    _check_before_loading(port, compile, "playground", "gradio")
    models = {str(path): load_to_sample(path, precision) for path in (checkpoint, baseline) if path is not None}
    from mixture_of_depths.serving.playground import page
    from mixture_of_depths.serving.playground import serve as run

    run(page(models, compile), host, port)


def serve(
    checkpoint: Checkpoint,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Precision = "fp32",
    compile: bool = False,
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
) -> None:
    """Answer OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models and /health.

    The model is called by the name of its folder, as given here. Needs the extra "serve".

    Args:
        checkpoint: Folder of a model.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        precision: Precision of the matrix products: fp32, or bf16.
        compile: Compile the sampling step before the first request: many times faster afterwards.
        api_key: Key that clients must send, as "Authorization: Bearer KEY"; several keys by giving it several times. By
            default nobody is asked for one.
    """
    for number, key in enumerate(api_key, 1):
        # Headers hold nothing else that clients could agree on. The key itself is not shown.
        if not key or key != key.strip() or not (key.isascii() and key.isprintable()):
            message = "must be printable ASCII, at least one character, with no space at its start or end"
            raise ValueError(f"api_key, the one given as number {number}, cannot be sent as a header: it {message}")
    _check_before_loading(port, compile, "serve", "fastapi", "uvicorn")
    model, tokenizer = load_to_sample(checkpoint, precision)
    from mixture_of_depths.serving.openai import serve as run

    run(model, tokenizer, str(checkpoint), host, port, compile, api_key)


def _check_before_loading(port: int, compile: bool, extra: str, *modules: str) -> None:
    """Refuses, before a model is loaded, a port out of range, a missing module of an extra, and a missing compiler."""
    from mixture_of_depths.compiler import can_compile

    quiet_libraries()
    if not 0 < port < 65536:
        raise ValueError(f"port={port} must lie between 1 and 65535")
    require_extra(extra, *modules)
    if compile and not can_compile():
        raise ValueError("compile needs a C++ compiler; install one, such as g++")
