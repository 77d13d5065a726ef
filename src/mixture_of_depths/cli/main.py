"""The command `mod`. Heavy imports happen inside the commands, so that `mod --help` answers at once."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import tyro
from tyro.extras import SubcommandApp

from mixture_of_depths import __version__
from mixture_of_depths.cli import isoflop
from mixture_of_depths.cli.common import leave_stopped
from mixture_of_depths.cli.evaluation import calibrate, evaluate
from mixture_of_depths.cli.inspect import inspect
from mixture_of_depths.cli.sampling import answer, bench, generate
from mixture_of_depths.cli.serving import playground, serve
from mixture_of_depths.cli.training import demo, prepare, retrofit, train

# How PyTorch says so, on an accelerator and on the CPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def commands() -> SubcommandApp:
    """All commands, those of studies as a group of their own."""
    study = SubcommandApp()
    for command in (isoflop.plan, isoflop.run, isoflop.measure, isoflop.fit, isoflop.plot):
        study.command(command)
    app = SubcommandApp()
    for command in (prepare, train, evaluate, calibrate, retrofit, answer, generate, bench, inspect, playground, serve):
        app.command(command)
    app.command(study, name="isoflop", help="Plan, run, measure, fit and plot an isoFLOP study.")
    app.command(demo)
    return app


def _stop(number: int, frame: FrameType | None) -> None:
    """What Ctrl-C does: it ends the process at once in the midst of an import, and else raises KeyboardInterrupt.

    Libraries catch whatever their imports raise, and go on without what they take for not installed.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave_stopped()
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def _ctrl_c_heeded_in_imports() -> Iterator[None]:
    # What is started in the background does not heed Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def in_one_line(error: Exception) -> str:
    """What an error says; those of libraries may have several lines."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


@_ctrl_c_heeded_in_imports()
def main() -> None:
    """Runs the command line; what a user can mend ends with status 2 and one line, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(__version__)
        return
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments[:1] != ["train"]:
            raise ValueError(
                "only mod train shares its work among several processes; start this command without torchrun"
            )
        try:
            commands().cli(
                prog="mod",
                description="Mixture-of-Depths transformers. `mod --version` prints the version.",
                args=arguments,
                config=(tyro.conf.OmitArgPrefixes,),
            )
        finally:
            # At the interpreter's end it would be too late to see that the reader has left.
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        said = in_one_line(error)
        print(f"error: not enough memory; lower the sizes of model, batch or text: {said}", file=sys.stderr)
        raise SystemExit(2) from None
