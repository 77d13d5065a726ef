"""The commands that train, and that prepare text for it: prepare, train, retrofit and demo."""

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from mixture_of_depths.cli.common import Device, Source, Texts, Unchecked, quiet_libraries
from mixture_of_depths.options import DataOptions, ModelOptions, RetrofitOptions, TrainOptions


@dataclass(frozen=True)
class Routing(Unchecked, RetrofitOptions):
    """How a dense model is made to skip, as the parser makes it."""


@dataclass(frozen=True)
class TuningText(DataOptions):
    """A pretrained model comes with its own tokenizer: the options that choose another are left out."""

    tokenizer: tyro.conf.Suppress[str | None] = None
    vocab_size: tyro.conf.Suppress[int | None] = None


@dataclass(frozen=True)
class Tuning(TrainOptions):
    """FLOPs change while the capacity falls: the option of a length in them is left out."""

    max_flops: tyro.conf.Suppress[float | None] = None


def prepare(
    data: Texts,
    out: Path,
    text_column: str = "text",
    split: str = "train",
    max_characters: int | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    validation_fraction: float = 0.04,
    processes: int | None = None,
) -> None:
    """Prepare text of any size for mod train: tokens in files that are mapped into memory. Killed, it goes on.

    Args:
        data: Text: files, folders or globs of .txt, .md, .py, .jsonl, .json.gz and .parquet (also .gz and .zst), .bin
            of tokens, hub:NAME or "builtin".
        out: Folder for the prepared text, to be given to mod train as --data.
        text_column: Field or column that holds the text of records; dots lead into others, as in meta.text.
        split: Split of a hub data set.
        max_characters: Stop reading after this many characters; one process then does it all.
        tokenizer: Folder of a tokenizer to use; by default a byte-level BPE is trained on a sample of the text.
        vocab_size: Entries of the tokenizer that is trained; by default 4096.
        validation_fraction: Share of the documents that is held out; which ones is decided by their content.
        processes: How many processes work on it; by default one a core.
    """
    from rich.console import Console

    from mixture_of_depths.text.preparation import prepare_shards

    quiet_libraries()
    text = DataOptions(
        data=data,
        text_column=text_column,
        split=split,
        max_characters=max_characters,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
    )
    print(prepare_shards(text, out, processes=processes, console=Console(stderr=True)))


def train(
    out: Path,
    data: DataOptions = DataOptions(),
    model: ModelOptions = ModelOptions(),
    training: TrainOptions = TrainOptions(),
    resume: bool = False,
    device: Device = "auto",
) -> None:
    """Train a Mixture-of-Depths model, or with --no-routed its baseline.

    Args:
        out: Folder for the model, its checkpoints, metrics.jsonl, TensorBoard records, curve.png and report.html.
        data: Text and tokens.
        model: The model.
        training: The run.
        resume: Go on with the run in the folder from its newest checkpoint.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from rich.console import Console

    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.distributed import from_main, is_main, leave, meet
    from mixture_of_depths.inspect.report import held_out_report
    from mixture_of_depths.text.corpus import load_prepared, prepare_cache
    from mixture_of_depths.training.folder import check_ready
    from mixture_of_depths.training.horizon import given_length, horizon
    from mixture_of_depths.training.run import train as run
    from mixture_of_depths.training.settings import model_config

    quiet_libraries()
    place = chosen_device(device)
    if training.compile:
        # Before the text is prepared, which may take long.
        require_compiler("compile", place)
    meet(place)
    from_main(lambda: check_ready(out, resume))
    # What is wrong whatever the text is, before it is read, which may take long.
    model_config(model, None, data.sequence_length)
    given_length(training)
    console = Console(quiet=not is_main())
    corpus = load_prepared(data, *from_main(lambda: prepare_cache(data, console=console)))
    console.print(str(corpus.facts))
    config = model_config(model, corpus.tokenizer, data.sequence_length)
    length = horizon(training, config, data.sequence_length)
    console.print(f"{length.steps:,} steps, {length.tokens:,} tokens, {length.flops:.3g} training FLOPs")
    trained, result = run(config, corpus, training, out, resume=resume, console=console, device=place)
    if result.finished:
        held_out_report(trained, corpus, out / "report.html")
    leave()
    if not result.finished:
        console.print(f"stopped at step {result.steps} of {length.steps}; go on with the same command and --resume")
        raise SystemExit(130)
    console.print_json(data=asdict(result))


def retrofit(
    source: Source,
    out: Path,
    data: TuningText = TuningText(sequence_length=512),
    routing: Routing = Routing(),
    training: Tuning = Tuning(batch_size=4, learning_rate=2e-4, precision="bf16"),
    resume: bool = False,
    device: Device = "auto",
) -> None:
    """Make a pretrained Llama-family model skip: measure which blocks to route, tune, and compare with the dense model.

    Half of the held-out sequences calibrate the causal routers, up to 128; the comparison is made on the other half.

    Args:
        source: Folder, GGUF file or hub name of a Llama, Mistral, Qwen2, Qwen3 or SmolLM model.
        out: Folder for the model, its checkpoints, metrics.jsonl and retrofit.json.
        data: Text to tune on, cut with the model's own tokenizer.
        routing: What is routed, and which parts are tuned.
        training: The tuning.
        resume: Go on with the run in the folder from its newest checkpoint.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from rich.console import Console
    from torch import nn

    from mixture_of_depths.compiler import require_compiler
    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.model.convert import load_dense
    from mixture_of_depths.retrofitting.tune import check_length, check_retrofit_ready
    from mixture_of_depths.retrofitting.tune import retrofit as run
    from mixture_of_depths.text.corpus import prepare
    from mixture_of_depths.text.tokenizer import check_vocabulary, checked

    options, tuning = RetrofitOptions(**vars(routing)), TrainOptions(**vars(training))
    quiet_libraries()
    place = chosen_device(device)
    if training.compile:
        require_compiler("compile", place)
    check_retrofit_ready(out, resume)
    check_length(tuning)
    console = Console()
    dense, tokenizer = load_dense(source)
    check_vocabulary(tokenizer, dense.config.vocab_size, f"source={source}")
    corpus = prepare(DataOptions(**{**vars(data), "tokenizer": source}), checked(tokenizer, source))
    console.print(str(corpus.facts))
    nn.Module.to(dense, place)
    _, result = run(dense, source, corpus, options, tuning, out, resume, console)
    if not result.finished:
        console.print("stopped; go on with the same command and --resume")
        raise SystemExit(130)
    console.print_json(data=asdict(result))


def demo(
    out: Path = Path("demo"),
    max_flops: float = 6e12,
    data: DataOptions = DataOptions(),
    seed: int = 0,
    resume: bool = False,
    device: Device = "auto",
) -> None:
    """Compare a baseline and a Mixture-of-Depths model, trained with the same FLOPs: loss, FLOPs per token, speed.

    Args:
        out: Folder for both runs, curves.png and demo.json.
        max_flops: Training FLOPs of each run.
        data: Text and tokens.
        seed: Seed of both runs.
        resume: Go on with a demo that was stopped.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from mixture_of_depths.demo import run
    from mixture_of_depths.device import chosen_device

    quiet_libraries()
    run(out, max_flops, data, seed, resume, chosen_device(device))
