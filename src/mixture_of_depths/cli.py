"""The command `mod`. Heavy imports happen inside the commands, so that `mod --help` answers at once."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mixture_of_depths.options import DataOptions, ModelOptions, TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mixture_of_depths.modeling import MoDForCausalLM

Flat = tyro.conf.OmitArgPrefixes
Checkpoint = Annotated[Path, tyro.conf.Positional]


def train(
    out: Path,
    data: DataOptions = DataOptions(),
    model: ModelOptions = ModelOptions(),
    training: TrainOptions = TrainOptions(),
    resume: bool = False,
) -> None:
    """Train a Mixture-of-Depths model, or with --no-routed its baseline.

    Args:
        out: Folder for the model, its checkpoints, metrics.jsonl, TensorBoard records and curve.png.
        data: Text and tokens.
        model: The model.
        training: The run.
        resume: Go on with the run in the folder from its newest checkpoint.
    """
    from rich.console import Console

    from mixture_of_depths.data import prepare
    from mixture_of_depths.training import horizon, model_config
    from mixture_of_depths.training import train as run

    _quiet()
    console = Console()
    corpus = prepare(data)
    facts = corpus.facts
    console.print(
        f"{facts.train_documents} documents, {facts.train_tokens:,} tokens to train on; held out "
        f"{facts.validation_documents} ({facts.split}), {facts.validation_tokens:,} tokens; skipped: {facts.skipped}"
    )
    config = model_config(model, corpus.tokenizer, data.sequence_length)
    length = horizon(training, config, data.sequence_length)
    console.print(f"{length.steps:,} steps, {length.tokens:,} tokens, {length.flops:.3g} training FLOPs")
    _, result = run(config, corpus, training, out, resume=resume, console=console)
    if not result.finished:
        console.print(f"stopped at step {result.steps} of {length.steps}; go on with the same command and --resume")
        raise SystemExit(130)
    console.print_json(data=asdict(result))


def evaluate(
    checkpoint: Checkpoint,
    data: tuple[str, ...] = (),
    text_column: str = "text",
    sequence_length: int | None = None,
    max_blocks: int | None = None,
) -> None:
    """Loss and bits per byte of a model under top-k and every causal routing, as JSON.

    Without --data on the text that its training held out; with it on all of the text given.

    Args:
        checkpoint: Folder of a trained model.
        data: Text to evaluate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data.
        sequence_length: Tokens per block; by default as in training.
        max_blocks: Use this many blocks, evenly spaced, instead of all.
    """
    from mixture_of_depths.checkpoint import read_json
    from mixture_of_depths.data import Skipped, end_of_text, pack, prepare, read_documents, tokenize
    from mixture_of_depths.evaluation import evaluate as run
    from mixture_of_depths.flops import forward_flops_per_token, model_parameters
    from mixture_of_depths.provenance import provenance

    _quiet()
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks} must be at least 1")
    model, tokenizer = _load(checkpoint)
    trained = checkpoint / "run.json"
    if not trained.exists() and not (data and sequence_length):
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training; give data and sequence_length")
    text = read_json(trained)["text"] if trained.exists() else {}
    if data:
        length = sequence_length or text["options"]["sequence_length"]
        documents = list(read_documents(DataOptions(data=data, text_column=text_column), Skipped()))
        if not documents:
            raise ValueError(f"data={' '.join(data)} holds no text")
        tokens = tokenize(documents, tokenizer)
        blocks = pack(tokens, length, "given")
        bytes_per_token = sum(len(document.encode("utf-8")) for document in documents) / len(tokens)
    else:
        options = text["options"]
        kept = DataOptions(**{**options, "data": tuple(options["data"]), "cache_dir": Path(options["cache_dir"])})
        corpus = prepare(kept)
        if corpus.key != text["key"]:
            raise ValueError(f"data={' '.join(kept.data)} has changed since the training; give data to evaluate on")
        length = kept.sequence_length
        blocks, bytes_per_token = corpus.validation, corpus.facts.validation_bytes_per_token
        if sequence_length not in (None, length):
            raise ValueError(f"sequence_length={sequence_length} needs data; the held-out text is cut to {length}")
    found = run(model, blocks, end_of_text(tokenizer), bytes_per_token, max_blocks=max_blocks)
    record = {
        "text": list(data) or "held out in training",
        **found.as_dict(),
        "sequence_length": length,
        "parameters": model_parameters(model.config),
        "forward_flops_per_token": forward_flops_per_token(model.config, length),
        **provenance(),
    }
    print(json.dumps(record, indent=2))


def generate(
    checkpoint: Checkpoint,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    show_depth: bool = False,
) -> None:
    """Sample from a model.

    Args:
        checkpoint: Folder of a trained model.
        prompt: Text to go on from.
        max_new_tokens: Tokens to sample.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Sample from this many likeliest tokens; 0 for all.
        top_p: Sample from the likeliest tokens that hold this much probability.
        seed: Seed of the sampling.
        show_depth: Colour every token by the number of blocks it used.
    """
    from rich.console import Console

    from mixture_of_depths.sampling import coloured, sample

    _quiet()
    model, tokenizer = _load(checkpoint)
    tokens = sample(model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    console = Console(highlight=False, soft_wrap=True)
    if show_depth:
        console.print(coloured(model, tokenizer, tokens))
    else:
        print(tokenizer.decode(tokens, skip_special_tokens=True))


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
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from mixture_of_depths.data import load_tokenizer
    from mixture_of_depths.modeling import MoDForCausalLM

    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"checkpoint={checkpoint} holds no config.json; name the folder of a trained model")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        if config.model_type != "mixture_of_depths":
            raise ValueError(f"it is a {config.model_type} model, not mixture_of_depths")
        # The library annotates the model alone; asked for it, it returns what it found beside the model.
        loaded: Any = MoDForCausalLM.from_pretrained(checkpoint, output_loading_info=True, use_safetensors=True)
        model, found = loaded
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"checkpoint={checkpoint} cannot be read: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            names = ", ".join(sorted(map(str, found[kind]))[:3])
            raise ValueError(f"checkpoint={checkpoint} does not fit its config.json: {kind}: {names}")
    return model.eval(), load_tokenizer(str(checkpoint))


def main() -> None:
    """Runs the command line; what a user can mend ends with status 2 and one line, never a traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    commands = {"train": train, "evaluate": evaluate, "generate": generate, "demo": demo}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="mod", description="Mixture-of-Depths transformers.", config=(Flat,)
        )
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
