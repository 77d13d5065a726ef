"""The commands that sample: generate, bench and answer."""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from mixture_of_depths.cli.common import (
    Checkpoint,
    Device,
    Source,
    Unchecked,
    load_checkpoint,
    load_to_sample,
    quiet_libraries,
    tell_skipped,
)
from mixture_of_depths.options import Precision, SamplingOptions


@dataclass(frozen=True)
class Sampling(Unchecked, SamplingOptions):
    """How tokens are drawn, as the parser makes it."""


def generate(
    checkpoint: Checkpoint,
    prompt: str | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    batch_size: int = 16,
    sampling: Sampling = Sampling(),
    precision: Precision = "fp32",
    stream: bool = False,
    show_depth: bool = False,
    compile: bool = False,
    device: Device = "auto",
) -> None:
    """Sample from a model, after one prompt or after every prompt of a file.

    Args:
        checkpoint: Folder of a trained model.
        prompt: Text to go on from; names of special tokens, such as a chat template's, stand for them.
        prompts: File of prompts: a .jsonl with the field "prompt", or text with one prompt a line. Prints JSON lines.
        out: File to write the JSON lines to, instead of printing them.
        batch_size: Prompts of the file that are sampled together.
        sampling: How tokens are drawn.
        precision: Precision of the matrix products: fp32, or bf16.
        stream: Print text as it is sampled.
        show_depth: Colour every token by the number of blocks it used.
        compile: Sample by the fast step, many times faster; it needs a C++ compiler, or Triton on a GPU, and compiles
            for some seconds the first time.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    import torch

    from mixture_of_depths.compiler import missing_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.inspect.depth import coloured
    from mixture_of_depths.sampling.stream import check_prompts
    from mixture_of_depths.sampling.texts import begin, sample_texts, stream_texts

    options = SamplingOptions(**vars(sampling))
    quiet_libraries()
    place = chosen_device(device)
    if (prompt is None) == (prompts is None):
        raise ValueError("give exactly one of prompt and prompts (--prompt, --prompts)")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if out is not None and (prompts is None or out.exists()):
        raise ValueError(f"out={out} {'needs prompts' if prompts is None else 'exists; name another file'}")
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"out={out} cannot be written: there is no folder {out.parent}; make it first")
    if prompts is not None and (stream or show_depth):
        raise ValueError("stream and show_depth need prompt; prompts of a file give JSON lines")
    texts = [prompt] if prompt is not None else _read_prompts(prompts)
    model, tokenizer = load_to_sample(checkpoint, precision, place)
    samples = begin(tokenizer, texts)
    for sample in samples:
        # All of them before the first is written.
        tokens = torch.tensor([sample.tokens])
        check_prompts(model, tokens, torch.ones_like(tokens), options.max_new_tokens)
    missing = missing_compiler(place) if compile else None
    compiled = compile and missing is None
    if compiled:
        print("compiling the sampling step; later runs find it on the disk", file=sys.stderr, flush=True)
    elif compile:
        print(f"sampling without compilation, which needs {missing}", file=sys.stderr, flush=True)
    if prompts is not None:
        with out.open("x") if out is not None else nullcontext(sys.stdout) as file:
            for start in range(0, len(texts), batch_size):
                seeds = range(options.seed + start, options.seed + min(start + batch_size, len(texts)))
                done = sample_texts(model, tokenizer, texts[start : start + batch_size], options, seeds, compiled)
                for sample in done:
                    record = {"prompt": sample.prompt, "text": sample.text, "ended": sample.ended}
                    print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        return
    if stream:
        print(texts[0], end="", flush=True)
    for _, text in stream_texts(model, tokenizer, samples, options, compiled=compiled):
        if stream:
            print(text, end="", flush=True)
    if stream:
        print()
    elif not show_depth:
        print(texts[0] + samples[0].text)
    if show_depth:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(coloured(model, tokenizer, samples[0].tokens))


def bench(
    checkpoint: Checkpoint,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch_sizes: tuple[int, ...] = (1,),
    device: Device = "auto",
) -> None:
    """Print how fast a model samples on this machine, and what it holds in memory, as JSON.

    Args:
        checkpoint: Folder of a trained model.
        prompt_tokens: Length of the prompt, which is made of random tokens.
        new_tokens: Tokens to sample.
        batch_sizes: Numbers of prompts sampled together.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.provenance import provenance
    from mixture_of_depths.sampling.bench import bench as run

    quiet_libraries()
    place = chosen_device(device)
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 5)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if min(batch_sizes, default=0) < 1:
        raise ValueError(f"batch_sizes={' '.join(map(str, batch_sizes))} must be one or more whole numbers from 1 on")
    require_compiler("measuring the compiled step", place)
    model, _ = load_checkpoint(checkpoint, place)
    longest = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > longest:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the model's "
            f"max_position_embeddings={longest}; lower one of them"
        )
    print(json.dumps({**run(model, prompt_tokens, new_tokens, batch_sizes), **provenance(place)}, indent=2))


def _read_prompts(path: "Path | None") -> list[str]:
    """The prompts in a file.

    Raises:
        ValueError: when it holds none, or a line of a .jsonl has no text "prompt".
    """
    assert path is not None
    if path.is_dir() or not path.exists():
        raise ValueError(f"prompts={path} is not a file; name one with a prompt a line")
    try:
        # Not splitlines: a line of JSON may hold other separators.
        numbered = list(enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1))
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is not UTF-8: {error}") from error
    lines = [(number, line.removesuffix("\r")) for number, line in numbered if line.strip()]
    if not lines:
        raise ValueError(f"prompts={path} holds no prompt; give one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    texts = []
    for number, line in lines:
        try:
            text = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f'prompts={path}, line {number}: needs an object with the field "prompt"') from error
        if not isinstance(text, str):
            raise ValueError(f'prompts={path}, line {number}: "prompt" must be a text')
        if not text:
            raise ValueError(f'prompts={path}, line {number}: "prompt" is empty; give at least one character')
        texts.append(text)
    return texts


def answer(
    source: Source,
    data: tuple[str, ...],
    out: Path,
    batch_size: int = 16,
    sampling: Sampling = Sampling(),
    precision: Precision = "fp32",
    compile: bool = False,
    device: Device = "auto",
) -> None:
    """Let a model answer questions, as data to tune a retrofit on: so it stays a model that answers.

    Every message of the user's that has no answer gets the model's own. Called again in the same way, it goes on with
    the file.

    Args:
        source: Folder, GGUF file or hub name of a model with a chat template.
        data: Conversations: .jsonl of "messages".
        out: The answered ones, of the same form; "cut" counts the answers that broke off at --max-new-tokens.
        batch_size: Conversations that are answered together.
        sampling: How tokens are drawn.
        precision: Precision of the matrix products: fp32, or bf16.
        compile: Sample by the fast step, many times faster; it needs a C++ compiler, or Triton on a GPU, and compiles
            for some seconds the first time.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    import torch

    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.model.convert import load_dense
    from mixture_of_depths.options import DataOptions
    from mixture_of_depths.provenance import model_digest
    from mixture_of_depths.sampling.answers import answered, check_askable, keep_answers, kept_answers, only_answers
    from mixture_of_depths.text.conversations import Conversation
    from mixture_of_depths.text.documents import Skipped, read_all

    options = SamplingOptions(**vars(sampling))
    quiet_libraries()
    place = chosen_device(device)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not out.parent.is_dir():
        raise ValueError(f"out={out} cannot be written: there is no folder {out.parent}; make it first")
    skipped = Skipped()
    documents = list(read_all(DataOptions(data=data), skipped))
    asked = [document.messages for document in documents if isinstance(document, Conversation)]
    if not asked:
        raise ValueError(f'data={" ".join(data)} holds no conversation; give .jsonl with "messages"')
    tell_skipped(skipped)
    if texts := len(documents) - len(asked):
        print(f"left out for want of messages: {texts}", file=sys.stderr)
    settings = {"precision": precision, **asdict(options)}
    with only_answers(out):
        # Before a model is loaded for nothing.
        kept_answers(out, asked, settings)
        model, tokenizer = load_dense(source)
        # The template decides, too, what the model is asked.
        settings["source_digest"] = model_digest(model, str(tokenizer.chat_template))
        done = kept_answers(out, asked, settings)
        if len(done) == len(asked):
            print(f"all {len(asked)} are answered in {out}", file=sys.stderr)
            return
        if compile:
            require_compiler("compile", place)
        torch.nn.Module.to(model, place, torch.bfloat16 if precision == "bf16" else torch.float32)
        check_askable(model, tokenizer, asked[len(done) :], options)
        for start in range(len(done), len(asked), batch_size):
            rows = asked[start : start + batch_size]
            seeds = range(options.seed + start, options.seed + start + len(rows))
            done += answered(model, tokenizer, rows, options, seeds, compile)
            keep_answers(out, done, {"source": source, **settings})
            print(f"{len(done)} of {len(asked)} answered", file=sys.stderr, flush=True)
    if without := sum(one.messages == messages for one, messages in zip(done, asked, strict=True)):
        print(f"{without} ask nothing, and stand in {out} as they were", file=sys.stderr)
    if cut := sum(one.cut for one in done):
        limit = f"max_new_tokens={options.max_new_tokens}"
        print(f'{cut} answers broke off at {limit}, as "cut" says in their records; raise it', file=sys.stderr)
