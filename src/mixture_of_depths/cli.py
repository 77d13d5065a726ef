"""The command `mod`. Heavy imports happen inside the commands, so that `mod --help` answers at once."""

import json
import math
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mixture_of_depths.options import DataOptions, ModelOptions, RetrofitOptions, SamplingOptions, TrainOptions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from mixture_of_depths.data import Corpus
    from mixture_of_depths.isoflop.plan import PlannedRun
    from mixture_of_depths.modeling import MoDForCausalLM

Flat = tyro.conf.OmitArgPrefixes
Checkpoint = Annotated[Path, tyro.conf.Positional]
Study = Annotated[Path, tyro.conf.Positional]
Source = Annotated[str, tyro.conf.Positional]
Texts = Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--text",))]
# In nats per token; with a larger one, a perplexity is no number.
MAX_LOSS = 700
# How PyTorch says so, on an accelerator and on the CPU.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def train(
    out: Path,
    data: DataOptions = DataOptions(),
    model: ModelOptions = ModelOptions(),
    training: TrainOptions = TrainOptions(),
    resume: bool = False,
) -> None:
    """Train a Mixture-of-Depths model, or with --no-routed its baseline.

    Args:
        out: Folder for the model, its checkpoints, metrics.jsonl, TensorBoard records, curve.png and report.html.
        data: Text and tokens.
        model: The model.
        training: The run.
        resume: Go on with the run in the folder from its newest checkpoint.
    """
    from rich.console import Console

    from mixture_of_depths.data import load_prepared, prepare_cache
    from mixture_of_depths.distributed import from_main, is_main, leave
    from mixture_of_depths.inspect.report import held_out_report
    from mixture_of_depths.training import horizon, model_config
    from mixture_of_depths.training import train as run

    _quiet()
    console = Console(quiet=not is_main())
    corpus = load_prepared(data, from_main(lambda: prepare_cache(data)))
    facts = corpus.facts
    console.print(
        f"{facts.train_documents} documents, {facts.train_tokens:,} tokens to train on; held out "
        f"{facts.validation_documents} ({facts.split}), {facts.validation_tokens:,} tokens; skipped: {facts.skipped}"
    )
    config = model_config(model, corpus.tokenizer, data.sequence_length)
    length = horizon(training, config, data.sequence_length)
    console.print(f"{length.steps:,} steps, {length.tokens:,} tokens, {length.flops:.3g} training FLOPs")
    trained, result = run(config, corpus, training, out, resume=resume, console=console)
    if result.finished:
        held_out_report(trained, corpus, out / "report.html")
    leave()
    if not result.finished:
        console.print(f"stopped at step {result.steps} of {length.steps}; go on with the same command and --resume")
        raise SystemExit(130)
    console.print_json(data=asdict(result))


def evaluate(
    checkpoint: Checkpoint,
    data: Texts = (),
    text_column: str = "text",
    sequence_length: int | None = None,
    max_blocks: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    tasks: tuple[str, ...] = (),
    task_files: Path | None = None,
    limit: int | None = None,
) -> None:
    """Loss, perplexity and bits per byte of a model under top-k and every causal routing, as JSON; or figures of tasks.

    Without --data on the text that its training held out; with it on all of the text given. With --tasks, on those of
    lm-evaluation-harness instead, under causal routing; this needs the extra "eval".

    Args:
        checkpoint: Folder of a trained model.
        data: Text to evaluate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data.
        sequence_length: Tokens per block; by default as in training.
        max_blocks: Use this many blocks, evenly spaced, instead of all.
        precision: Precision of the computation; the weights stay as they are.
        tasks: Tasks or groups of lm-evaluation-harness.
        task_files: Folder of further tasks, as the harness' YAML.
        limit: Use this many examples of a task instead of all.
    """
    from rich.console import Console

    from mixture_of_depths.evaluation import evaluate as run
    from mixture_of_depths.flops import forward_flops_per_token, model_parameters
    from mixture_of_depths.provenance import provenance
    from mixture_of_depths.tokenizer import end_of_text

    _quiet()
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks} must be at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if tasks and data:
        raise ValueError(f"data={' '.join(data)} and tasks={' '.join(tasks)} exclude one another; give one of them")
    needing = {"task_files": task_files, "limit": limit}
    excluded = {"sequence_length": sequence_length, "max_blocks": max_blocks}
    for name, value in (excluded if tasks else needing).items():
        if value is not None:
            wanted = "needs data or held-out text, not tasks" if tasks else "needs tasks"
            raise ValueError(f"{name}={value} {wanted}; leave it out")
    if task_files is not None and not task_files.is_dir():
        raise ValueError(f"task_files={task_files} is no folder; name one that holds the tasks' YAML files")
    if tasks:
        _needs("eval", "lm_eval")
    model, tokenizer = _load(checkpoint)
    bf16 = precision == "bf16"
    if tasks:
        from mixture_of_depths.harness import evaluate_tasks

        results = evaluate_tasks(model, tokenizer, tasks, task_files, limit, bf16=bf16)
        print(json.dumps({"tasks": results, **provenance()}, indent=2))
        return
    blocks, bytes_per_token, length = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(length)
    console = Console(stderr=True)
    found = run(model, blocks, end_of_text(tokenizer), bytes_per_token, max_blocks, bf16=bf16, console=console)
    for name, loss in (("top-k", found.loss_top_k), ("causal", found.loss_causal)):
        if not loss < MAX_LOSS:
            raise ValueError(
                f"checkpoint={checkpoint}: its {name} loss is {loss} nats per token; its weights are damaged"
            )
    record = {
        "text": list(data) or "held out in training",
        **found.as_dict(),
        "perplexity_top_k": math.exp(found.loss_top_k),
        "perplexity_causal": math.exp(found.loss_causal),
        "sequence_length": length,
        "precision": precision,
        "parameters": model_parameters(model.config),
        "forward_flops_per_token": forward_flops_per_token(model.config, length),
        **provenance(),
    }
    print(json.dumps(record, indent=2))


def generate(
    checkpoint: Checkpoint,
    prompt: str | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    batch_size: int = 16,
    sampling: SamplingOptions = SamplingOptions(),
    stream: bool = False,
    show_depth: bool = False,
    compile: bool = False,
) -> None:
    """Sample from a model, after one prompt or after every prompt of a file.

    Args:
        checkpoint: Folder of a trained model.
        prompt: Text to go on from; names of special tokens, such as a chat template's, stand for them.
        prompts: File of prompts: a .jsonl with the field "prompt", or text with one prompt a line. Prints JSON lines.
        out: File to write the JSON lines to, instead of printing them.
        batch_size: Prompts of the file that are sampled together.
        sampling: How tokens are drawn.
        stream: Print text as it is sampled.
        show_depth: Colour every token by the number of blocks it used.
        compile: Compile the sampling step: many times faster, after seconds a block the first time, one in later calls.
    """
    import torch

    from mixture_of_depths.generation import check_prompts
    from mixture_of_depths.sampling import begin, coloured, sample_texts, stream_texts

    _quiet()
    if (prompt is None) == (prompts is None):
        raise ValueError("give exactly one of prompt and prompts")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if out is not None and (prompts is None or out.exists()):
        raise ValueError(f"out={out} {'needs prompts' if prompts is None else 'exists; name another file'}")
    if prompts is not None and (stream or show_depth):
        raise ValueError("stream and show_depth need prompt; prompts of a file give JSON lines")
    texts = [prompt] if prompt is not None else _read_prompts(prompts)
    model, tokenizer = _load(checkpoint)
    samples = begin(tokenizer, texts)
    for sample in samples:
        # All of them before the first is written.
        tokens = torch.tensor([sample.tokens])
        check_prompts(model, tokens, torch.ones_like(tokens), sampling.max_new_tokens)
    compiled = compile and _can_compile()
    if compiled:
        print("compiling the sampling step; later runs find it on the disk", file=sys.stderr, flush=True)
    elif compile:
        print("no C++ compiler found: sampling without compilation", file=sys.stderr, flush=True)
    if prompts is not None:
        with out.open("x") if out is not None else nullcontext(sys.stdout) as file:
            for start in range(0, len(texts), batch_size):
                seeds = range(sampling.seed + start, sampling.seed + min(start + batch_size, len(texts)))
                done = sample_texts(model, tokenizer, texts[start : start + batch_size], sampling, seeds, compiled)
                for sample in done:
                    record = {"prompt": sample.prompt, "text": sample.text, "ended": sample.ended}
                    print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        return
    if stream:
        print(texts[0], end="", flush=True)
    for _, text in stream_texts(model, tokenizer, samples, sampling, compiled=compiled):
        if stream:
            print(text, end="", flush=True)
    if stream:
        print()
    elif not show_depth:
        print(texts[0] + samples[0].text)
    if show_depth:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(coloured(model, tokenizer, samples[0].tokens))


def calibrate(
    checkpoint: Checkpoint,
    out: Path,
    data: Texts = (),
    text_column: str = "text",
    sequence_length: int | None = None,
) -> None:
    """Shift the causal routers so that the capacity of each block, and of experts, is what enters on held-out text.

    With --data on that text: more or fewer tokens of another kind of text may enter. Every second block calibrates, up
    to 128 of them; on the others the model is evaluated, before and after, as JSON. A model that was trained with the
    auxiliary loss has no constant of its own to shift, and from then on decides by its threshold.

    Args:
        checkpoint: Folder of a trained model.
        out: Folder for the calibrated model.
        data: Text to calibrate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data.
        sequence_length: Tokens per block; by default as in training.
    """
    from mixture_of_depths.calibration import calibrate as run
    from mixture_of_depths.calibration import causal_routers, halves
    from mixture_of_depths.evaluation import evaluate as evaluation
    from mixture_of_depths.tokenizer import end_of_text

    _quiet()
    if out.exists():
        raise ValueError(f"out={out} exists; name another folder")
    model, tokenizer = _load(checkpoint)
    if not causal_routers(model.config) and model.config.expert_capacity is None:
        raise ValueError(f"checkpoint={checkpoint} has no learned router and no experts' capacity to calibrate")
    blocks, size, length = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(length)
    if len(blocks) < 2:
        raise ValueError(f"sequence_length={length} leaves fewer than 2 blocks of the text; give more text as data")
    end = end_of_text(tokenizer)
    chosen, others = halves(blocks)
    before = evaluation(model, others, end, size)
    run(model, chosen, end)
    if model.config.causal_router == "auxiliary_loss":
        model.config.causal_router = "threshold"
    after = evaluation(model, others, end, size)
    out.mkdir(parents=True)
    if (checkpoint / "run.json").exists():
        shutil.copy(checkpoint / "run.json", out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(str(out))
    print(json.dumps({"before": before.as_dict(), "after": after.as_dict()}, indent=2))


def retrofit(
    source: Source,
    out: Path,
    data: DataOptions = DataOptions(sequence_length=512),
    routing: RetrofitOptions = RetrofitOptions(),
    training: TrainOptions = TrainOptions(batch_size=4, learning_rate=1e-4, precision="bf16"),
    resume: bool = False,
) -> None:
    """Make a pretrained Llama-family model skip: measure which blocks to route, tune, and compare with the dense model.

    Half of the held-out blocks calibrate the causal routers, up to 128; the comparison is made on the other half.

    Args:
        source: Folder, GGUF file or hub name of a Llama, Mistral, Qwen2, Qwen3 or SmolLM model.
        out: Folder for the model, its checkpoints, metrics.jsonl and retrofit.json.
        data: Text to tune on, cut with the model's own tokenizer.
        routing: What is routed, and which parts are tuned.
        training: The tuning.
        resume: Go on with the run in the folder from its newest checkpoint.
    """
    from rich.console import Console

    from mixture_of_depths.convert import load_dense
    from mixture_of_depths.data import prepare
    from mixture_of_depths.retrofit import retrofit as run
    from mixture_of_depths.tokenizer import check_vocabulary, checked

    _quiet()
    console = Console()
    if data.tokenizer is not None:
        raise ValueError(f"tokenizer={data.tokenizer} cannot be chosen: a pretrained model comes with its own")
    dense, tokenizer = load_dense(source)
    check_vocabulary(tokenizer, dense.config.vocab_size, f"source={source}")
    corpus = prepare(replace(data, tokenizer=source), checked(tokenizer, source))
    _, result = run(dense, source, corpus, routing, training, out, resume, console)
    if not result.finished:
        console.print("stopped; go on with the same command and --resume")
        raise SystemExit(130)
    console.print_json(data=asdict(result))


def inspect(
    checkpoint: Checkpoint,
    out: Path,
    text: str | None = None,
    file: Path | None = None,
    routing: Literal["causal", "top_k"] = "causal",
    figures: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Show where a model spends its compute on a text: a page with the text coloured by it, and figures.

    Args:
        checkpoint: Folder of a model.
        out: HTML page to write; it needs no network.
        text: Text to look at.
        file: File of text to look at, UTF-8.
        routing: What decides who enters: each token by itself, as in sampling, or top-k, as in training.
        figures: Folder to write the figures to, as PNG and SVG.
        trace: File to write the numbers to, .json or .parquet.
    """
    from mixture_of_depths.inspect.figures import drawn, save
    from mixture_of_depths.inspect.report import report
    from mixture_of_depths.inspect.trace import trace as run
    from mixture_of_depths.inspect.trace import under_top_k

    _quiet()
    if (text is None) == (file is None):
        raise ValueError("give exactly one of text and file")
    if trace is not None and trace.suffix not in (".json", ".parquet"):
        raise ValueError(f"trace={trace} must end in .json or .parquet")
    written = [path for path in (out, trace) if path is not None]
    if file is not None and file.resolve() in [path.resolve() for path in written]:
        raise ValueError(f"file={file} would be written over; name another file for out and trace")
    if file is not None:
        try:
            # As training reads it: with its own ends of lines, without a mark of the encoding.
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"file={file} is not UTF-8: {error}") from error
    assert text is not None
    model, tokenizer = _load(checkpoint)
    found = run(model, tokenizer, text, routing)
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
    with drawn(found, under_top_k(model, tokenizer, found)) as images:
        page = report(found, images, f"{checkpoint.name}: where the compute goes")
        out.write_text(page, encoding="utf-8")
        print(out)
        if trace is not None:
            (found.write_json if trace.suffix == ".json" else found.write_parquet)(trace)
            print(trace)
        if figures is not None and not images:
            print(f"no figures in {figures}: the model has no routed blocks", file=sys.stderr)
        elif figures is not None:
            print(*save(images, figures), sep="\n")


def playground(
    checkpoint: Checkpoint,
    baseline: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    compile: bool = False,
) -> None:
    """Open a page to sample from a model, its tokens coloured by the blocks they used. Needs the extra "playground".

    Args:
        checkpoint: Folder of a model.
        baseline: Folder of a model to sample from beside it.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        compile: Compile the sampling steps before the page opens: many times faster afterwards.
    """
    _quiet()
    _check_port(port)
    _needs("playground", "gradio")
    if compile and not _can_compile():
        raise ValueError("compile needs a C++ compiler; install one, such as g++")
    models = {str(path): _load(path) for path in (checkpoint, baseline) if path is not None}
    from mixture_of_depths.playground import page
    from mixture_of_depths.playground import serve as run

    run(page(models, compile), host, port)


def serve(
    checkpoint: Checkpoint,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
) -> None:
    """Answer OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/responses, /v1/models and /health.

    The model is called by the name of its folder, as given here. Needs the extra "serve".

    Args:
        checkpoint: Folder of a model.
        host: Address to listen on; by default only this machine can ask.
        port: Port to listen on.
        precision: Precision of the weights and of the sampling.
        compile: Compile the sampling step before the first request: many times faster afterwards.
    """
    import torch

    _quiet()
    _check_port(port)
    _needs("serve", "fastapi", "uvicorn", "openai")
    if compile and not _can_compile():
        raise ValueError("compile needs a C++ compiler; install one, such as g++")
    model, tokenizer = _load(checkpoint)
    if precision == "bf16":
        torch.nn.Module.to(model, torch.bfloat16)
    from mixture_of_depths.serving import serve as run

    run(model, tokenizer, str(checkpoint), host, port, compile)


def bench(
    checkpoint: Checkpoint,
    prompt_tokens: int = 128,
    new_tokens: int = 128,
    batch_sizes: tuple[int, ...] = (1,),
) -> None:
    """Print how fast a model samples on this machine, and what it holds in memory, as JSON.

    Args:
        checkpoint: Folder of a trained model.
        prompt_tokens: Random tokens before.
        new_tokens: Tokens to sample.
        batch_sizes: Numbers of prompts sampled together.
    """
    from mixture_of_depths.bench import bench as run
    from mixture_of_depths.provenance import provenance

    _quiet()
    if prompt_tokens < 1 or new_tokens < 5 or min(batch_sizes, default=0) < 1:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and batch_sizes={batch_sizes} must be at least 1, "
            f"new_tokens={new_tokens} at least 5"
        )
    model, _ = _load(checkpoint)
    longest = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > longest:
        raise ValueError(
            f"prompt_tokens={prompt_tokens} and new_tokens={new_tokens} are more than the model's "
            f"max_position_embeddings={longest}; lower one of them"
        )
    if not _can_compile():
        raise ValueError("a C++ compiler is needed to measure the compiled step; install one, such as g++")
    print(json.dumps({**run(model, prompt_tokens, new_tokens, batch_sizes), **provenance()}, indent=2))


def _read_prompts(path: "Path | None") -> list[str]:
    """The prompts in a file.

    Raises:
        ValueError: when it holds none, or a line of a .jsonl has no text "prompt".
    """
    assert path is not None
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
        texts.append(text)
    return texts


def _can_compile() -> bool:
    """Whether there is what torch.compile needs."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def _text_for(
    checkpoint: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: tuple[str, ...],
    text_column: str,
    sequence_length: int | None,
) -> tuple["datasets.Dataset", float, int]:
    """Blocks of the text given, or of what a model's training held out; their bytes per token, and their length.

    Raises:
        ValueError: when there is no such text, or its length is out of range.
    """
    from mixture_of_depths.checkpoint import read_run
    from mixture_of_depths.data import Skipped, pack, read_documents
    from mixture_of_depths.tokenizer import tokenize

    trained = checkpoint / "run.json"
    if not trained.exists() and not (data and sequence_length):
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training; give data and sequence_length")
    text = read_run(checkpoint)["text"] if trained.exists() else {}
    if sequence_length is not None and sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2")
    if data:
        length = sequence_length or text["options"]["sequence_length"]
        documents = list(read_documents(DataOptions(data=data, text_column=text_column), Skipped()))
        if not documents:
            raise ValueError(f"data={' '.join(data)} holds no text")
        tokens = tokenize(documents, tokenizer)
        blocks = pack(tokens, length, "given")
        bytes_per_token = sum(len(document.encode("utf-8")) for document in documents) / len(tokens)
    else:
        corpus = _held_out(checkpoint)
        length = corpus.options.sequence_length
        blocks, bytes_per_token = corpus.validation, corpus.facts.validation_bytes_per_token
        if sequence_length not in (None, length):
            raise ValueError(f"sequence_length={sequence_length} needs data; the held-out text is cut to {length}")
    return blocks, bytes_per_token, length


def _held_out(checkpoint: Path) -> "Corpus":
    """The text that a model's training held out.

    Raises:
        ValueError: when it is not known any more.
    """
    from pydantic import TypeAdapter, ValidationError

    from mixture_of_depths.checkpoint import read_run
    from mixture_of_depths.data import prepare
    from mixture_of_depths.tokenizer import load_tokenizer

    trained = checkpoint / "run.json"
    if not trained.exists():
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training, which tells what it held out")
    text = read_run(checkpoint)["text"]
    try:
        options = TypeAdapter(DataOptions).validate_python(text["options"])
    except ValidationError as error:
        raise ValueError(f"{trained} is damaged: the text's options: {error.errors()[0]['msg']}") from error
    # The model's own copy: the one it was trained with may have moved.
    corpus = prepare(options, load_tokenizer(str(checkpoint)) if options.tokenizer else None)
    if corpus.key != text["key"]:
        raise ValueError(
            f"data={' '.join(options.data)} has changed since the training; bring it back, or give other data"
        )
    return corpus


def isoflop() -> None:
    """Plan, run, measure, fit and plot an isoFLOP study; `mod isoflop --help` tells how."""
    raise AssertionError("main gives its own commands to isoflop")


def isoflop_plan(study: Study) -> None:
    """Print every run of a study: parameters, steps, tokens, FLOPs per token of a forward pass and estimated time.

    Args:
        study: Study file, YAML.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from mixture_of_depths.isoflop.plan import flops_per_second

    planned, _ = _planned(study)
    speed = flops_per_second()
    table = Table(title=f"{len(planned)} runs", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for name in ("parameters", "steps", "tokens", "FLOPs/token", "minutes"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in planned:
        length, minutes = item.length, item.length.flops / speed / 60
        parameters, tokens = f"{item.parameters / 1e6:.3f} M", f"{length.tokens / 1e6:.1f} M"
        sizes = (parameters, f"{length.steps:,}", tokens, f"{item.flops_per_token:.3g}")
        table.add_row(item.run.name, *sizes, f"{minutes:.1f}")
    console = Console()
    console.print(table)
    total = sum(item.length.flops for item in planned)
    console.print(f"{total:.3g} training FLOPs, about {total / speed / 3600:.1f} hours on this machine")


def isoflop_run(study: Study, out: Path, ray: str | None = None, cpus: int = 2) -> None:
    """Carry out the runs of a study that have no record yet, and resume what broke.

    Args:
        study: Study file, YAML.
        out: Folder of the study: records.jsonl, and a folder for each run.
        ray: Address of a Ray cluster, or "auto"; by default the runs go one after another here.
        cpus: Cores of each run on a Ray cluster.
    """
    from rich.console import Console

    from mixture_of_depths.isoflop.run import run_here, run_on_ray

    planned, corpus = _planned(study)
    console = Console()
    if ray is None:
        finished = run_here(planned, corpus, out, console)
    else:
        finished = run_on_ray(planned, corpus, out, ray, cpus, console)
    if not finished:
        console.print("stopped; go on with the same command")
        raise SystemExit(130)


def isoflop_measure(study: Study, out: Path, mod: str = "mod") -> None:
    """Measure on a study's trained models what their records do not tell; writes measurements.json and prints it.

    That is, per budget, the sampling speed of the smallest model that is as good as the best baseline against that
    baseline's, the training times of both best models, and what top-k routing gains by looking ahead. A budget whose
    models are in measurements.json already is not measured again.

    Args:
        study: Study file, YAML.
        out: Folder of the study, with its runs.
        mod: The family that is compared with the baseline.
    """
    from mixture_of_depths.checkpoint import read_json, write_aside
    from mixture_of_depths.data import prepare
    from mixture_of_depths.isoflop.measure import measure
    from mixture_of_depths.isoflop.plan import load_study
    from mixture_of_depths.provenance import provenance

    _quiet()
    records, baseline = _records(study, out, mod)
    if not _can_compile():
        raise ValueError("a C++ compiler is needed to measure sampling; install one, such as g++")
    corpus = prepare(load_study(study).data)
    path = out / "measurements.json"
    measured = read_json(path) if path.exists() else {}
    for budget, row in measure(records, baseline, mod, corpus, out, measured):
        measured[budget] = {**row, **provenance()}
        write_aside(path, json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


def isoflop_fit(study: Study, out: Path, mod: str = "mod", stochastic: str = "stochastic-12") -> None:
    """Find every curve's optimum and compare the families; writes summary.json and prints it.

    Args:
        study: Study file, YAML.
        out: Folder of the study.
        mod: The family that is compared with the baseline.
        stochastic: The family of the stochastic control, if there is one.
    """
    from mixture_of_depths.checkpoint import read_json
    from mixture_of_depths.isoflop.fit import summarise
    from mixture_of_depths.provenance import provenance

    records, baseline = _records(study, out, mod)
    path = out / "measurements.json"
    measured = read_json(path) if path.exists() else {}
    found = summarise(records, baseline, mod, stochastic, measured)
    summary = json.dumps({**found, **provenance()}, indent=2, allow_nan=False)
    (out / "summary.json").write_text(summary + "\n")
    print(summary)


def isoflop_plot(study: Study, out: Path, mod: str = "mod") -> None:
    """Draw a study's figures from its records.

    Args:
        study: Study file, YAML.
        out: Folder of the study.
        mod: The family that is compared with the baseline.
    """
    from mixture_of_depths.isoflop.plan import capacities, load_study
    from mixture_of_depths.isoflop.plot import draw

    records, baseline = _records(study, out, mod)
    for path in draw(records, baseline, mod, capacities(load_study(study), mod), out):
        print(path)


def _planned(study: Path) -> "tuple[list[PlannedRun], Corpus]":
    from mixture_of_depths.data import prepare
    from mixture_of_depths.isoflop.plan import load_study, plan

    _quiet()
    loaded = load_study(study)
    corpus = prepare(loaded.data)
    return plan(loaded, corpus), corpus


def _records(study: Path, out: Path, mod: str) -> tuple[list[dict[str, Any]], str]:
    """The records of a study's runs, and the name of its baseline.

    Raises:
        ValueError: when there are none, or none of the family `mod`, or one differs from the study in size or rate.
    """
    from mixture_of_depths.isoflop.plan import load_study, runs
    from mixture_of_depths.isoflop.run import RECORDS
    from mixture_of_depths.training import read_records

    loaded = load_study(study)
    planned = {run.name: run for run in runs(loaded)}
    found = [record for record in read_records(out / RECORDS) if record["name"] in planned]
    if not found:
        raise ValueError(f"out={out} holds no record of this study; run it first")
    for record in found:
        run = planned[record["name"]]
        was = record["hidden_size"], record["learning_rate"]
        if was != (run.model.hidden_size, run.training.learning_rate):
            now = f"{run.model.hidden_size} and {run.training.learning_rate:g}"
            raise ValueError(
                f"out={out} holds a record of {run.name} of another study: its hidden_size and learning_rate were "
                f"{was[0]} and {was[1]:g}, and the study says {now}"
            )
    if missing := planned.keys() - {record["name"] for record in found}:
        print(f"{len(missing)} of {len(planned)} runs have no record yet, {min(missing)} first", file=sys.stderr)
    families = sorted({record["family"] for record in found if record["evaluation"] is not None})
    if mod not in families:
        raise ValueError(f"mod={mod} has no records; there are some of {', '.join(families)}")
    return found, loaded.baseline


def demo(
    out: Path = Path("demo"),
    max_flops: float = 1e13,
    data: DataOptions = DataOptions(),
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train a baseline and a Mixture-of-Depths model to the same training FLOPs, and compare them.

    Args:
        out: Folder for both runs, curves.png and demo.json.
        max_flops: Training FLOPs of each run.
        data: Text and tokens.
        seed: Seed of both runs.
        resume: Go on with a demo that was stopped.
    """
    from mixture_of_depths.demo import run

    _quiet()
    run(out, max_flops, data, seed, resume)


def _check_port(port: int) -> None:
    if not 0 < port < 65536:
        raise ValueError(f"port={port} must lie between 1 and 65535")


def _needs(extra: str, *modules: str) -> None:
    """Refuses with the name of the extra that brings a missing module."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise ValueError(f'{module} is not installed; run: pip install "mixture-of-depths[{extra}]"')


def _quiet() -> None:
    """Stops the libraries' own progress bars, which would tear ours apart."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _load(checkpoint: Path) -> "tuple[MoDForCausalLM, PreTrainedTokenizerBase]":
    """The model and the tokenizer in a folder.

    Raises:
        ValueError: when there is none, or its weights are damaged or do not fit its configuration.
    """
    from transformers import AutoConfig

    from mixture_of_depths.modeling import MoDForCausalLM
    from mixture_of_depths.tokenizer import check_vocabulary, load_tokenizer

    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"checkpoint={checkpoint} holds no config.json; name the folder of a trained model")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        if config.model_type != "mixture_of_depths":
            raise ValueError(f"it is a {config.model_type} model, not mixture_of_depths")
        # The library annotates the model alone; asked for it, it returns what it found beside the model.
        loaded: Any = MoDForCausalLM.from_pretrained(checkpoint, output_loading_info=True, use_safetensors=True)
        model, found = loaded
    except Exception as error:
        # What libraries raise about a damaged file has no common kind; the tokenizers' reader raises Exception itself.
        raise ValueError(f"checkpoint={checkpoint} cannot be read: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            names = ", ".join(sorted(map(str, found[kind]))[:3])
            raise ValueError(f"checkpoint={checkpoint} does not fit its config.json: {kind}: {names}")
    tokenizer = load_tokenizer(str(checkpoint))
    check_vocabulary(tokenizer, config.vocab_size, f"checkpoint={checkpoint}")
    return model.eval(), tokenizer


def main() -> None:
    """Runs the command line; what a user can mend ends with status 2 and one line, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    commands = {
        "train": train,
        "evaluate": evaluate,
        "calibrate": calibrate,
        "retrofit": retrofit,
        "generate": generate,
        "bench": bench,
        "inspect": inspect,
        "playground": playground,
        "serve": serve,
        "isoflop": isoflop,
        "demo": demo,
    }
    program, arguments = "mod", sys.argv[1:]
    if arguments[:1] == ["isoflop"]:
        commands = {
            "plan": isoflop_plan,
            "run": isoflop_run,
            "measure": isoflop_measure,
            "fit": isoflop_fit,
            "plot": isoflop_plot,
        }
        program, arguments = "mod isoflop", arguments[1:]
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments[:1] != ["train"]:
            raise ValueError(
                "only mod train shares its work among several processes; start this command without torchrun"
            )
        try:
            tyro.extras.subcommand_cli_from_dict(
                commands, prog=program, args=arguments, description="Mixture-of-Depths transformers.", config=(Flat,)
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
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        print(f"error: not enough memory; lower the sizes of model, batch or text: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
