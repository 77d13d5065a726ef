"""The commands that judge a model on text: evaluate and calibrate."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_depths.cli.common import Checkpoint, Device, load_checkpoint, quiet_libraries, require_extra
from mixture_of_depths.options import DataOptions, Precision

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from mixture_of_depths.text.corpus import Corpus

# In nats per token; with a larger one, a perplexity is no number.
MAX_LOSS = 700


def evaluate(
    checkpoint: Checkpoint,
    data: tuple[str, ...] = (),
    text_column: str | None = None,
    sequence_length: int | None = None,
    max_sequences: int | None = None,
    precision: Precision = "fp32",
    tasks: tuple[str, ...] = (),
    task_files: Path | None = None,
    limit: int | None = None,
    device: Device = "auto",
) -> None:
    """Loss, perplexity and bits per byte of a model under top-k and every causal routing, as JSON; or figures of tasks.

    Without --data on the text that its training held out; with it on all of the text given. With --tasks, on those of
    lm-evaluation-harness instead, under causal routing; this needs the extra "eval".

    Args:
        checkpoint: Folder of a trained model.
        data: Text to evaluate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data; by default "text".
        sequence_length: Tokens per sequence; by default as in training.
        max_sequences: Use this many sequences, evenly spaced, instead of all.
        precision: Precision of the matrix products: fp32, or bf16.
        tasks: Tasks or groups of lm-evaluation-harness.
        task_files: Folder of further tasks, as the harness' YAML.
        limit: Use this many examples of a task instead of all.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from rich.console import Console

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.evaluation.loss import evaluate as run
    from mixture_of_depths.model.flops import forward_flops_per_token, model_parameters
    from mixture_of_depths.provenance import provenance
    from mixture_of_depths.text.tokenizer import end_of_text

    quiet_libraries()
    place = chosen_device(device)
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"max_sequences={max_sequences} must be at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if tasks and data:
        raise ValueError(f"data={' '.join(data)} and tasks={' '.join(tasks)} exclude one another; give one of them")
    needing = {"task_files": task_files, "limit": limit}
    excluded = {"text_column": text_column, "sequence_length": sequence_length, "max_sequences": max_sequences}
    for name, value in (excluded if tasks else needing).items():
        if value is not None:
            wanted = "needs data or held-out text, not tasks" if tasks else "needs tasks"
            raise ValueError(f"{name}={value} {wanted}; leave it out")
    if task_files is not None and not task_files.is_dir():
        raise ValueError(f"task_files={task_files} is no folder; name one that holds the tasks' YAML files")
    if tasks:
        require_extra("eval", "lm_eval")
    model, tokenizer = load_checkpoint(checkpoint, place)
    bf16 = precision == "bf16"
    if tasks:
        from mixture_of_depths.evaluation.harness import evaluate_tasks

        results = evaluate_tasks(model, tokenizer, tasks, task_files, limit, bf16=bf16)
        print(json.dumps({"tasks": results, **provenance(place)}, indent=2))
        return
    sequences, bytes_per_token, length = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(length)
    console = Console(stderr=True)
    evaluation = run(
        model, sequences, end_of_text(tokenizer), bytes_per_token, max_sequences, bf16=bf16, console=console
    )
    for name, loss in (("top-k", evaluation.loss_top_k), ("causal", evaluation.loss_causal)):
        if not loss < MAX_LOSS:
            raise ValueError(
                f"checkpoint={checkpoint}: its {name} loss is {loss} nats per token; its weights are damaged"
            )
    record = {
        "text": list(data) or "held out in training",
        **evaluation.as_dict(),
        "perplexity_top_k": math.exp(evaluation.loss_top_k),
        "perplexity_causal": math.exp(evaluation.loss_causal),
        "sequence_length": length,
        "precision": precision,
        "parameters": model_parameters(model.config),
        "forward_flops_per_token": forward_flops_per_token(model.config, length),
        **provenance(place),
    }
    print(json.dumps(record, indent=2))


def calibrate(
    checkpoint: Checkpoint,
    out: Path,
    data: tuple[str, ...] = (),
    text_column: str | None = None,
    sequence_length: int | None = None,
    precision: Precision = "fp32",
    device: Device = "auto",
) -> None:
    """Shift the causal routers so that the capacity of each block, and of experts, is what enters on held-out text.

    With --data on that text: more or fewer tokens of another kind of text may enter. Every second sequence calibrates,
    up to 128 of them; on the others the model is evaluated, before and after, as JSON. A model that was trained with
    the auxiliary loss has no constant of its own to shift, and from then on decides by its threshold.

    Args:
        checkpoint: Folder of a trained model.
        out: Folder for the calibrated model.
        data: Text to calibrate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data; by default "text".
        sequence_length: Tokens per sequence; by default as in training.
        precision: Precision of the matrix products: fp32, or bf16.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    import torch

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.evaluation.calibration import calibrate as run
    from mixture_of_depths.evaluation.loss import evaluate as evaluation
    from mixture_of_depths.text.batches import halves
    from mixture_of_depths.text.tokenizer import end_of_text

    quiet_libraries()
    place = chosen_device(device)
    if out.exists():
        raise ValueError(f"out={out} exists; name another folder")
    model, tokenizer = load_checkpoint(checkpoint, place)
    if not model.config.causal_routers and model.config.expert_capacity is None:
        raise ValueError(f"checkpoint={checkpoint} has no learned router and no experts' capacity to calibrate")
    sequences, size, length = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(length)
    if len(sequences) < 2:
        raise ValueError(f"sequence_length={length} leaves fewer than 2 sequences of the text; give more text as data")
    end = end_of_text(tokenizer)
    chosen, others = halves(sequences)
    bf16 = precision == "bf16"
    before = evaluation(model, others, end, size, bf16=bf16)
    if model.config.causal_router == "auxiliary_loss":
        model.config.causal_router = "threshold"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        run(model, chosen, end)
    after = evaluation(model, others, end, size, bf16=bf16)
    out.mkdir(parents=True)
    if (checkpoint / "run.json").exists():
        # Without its mode: the new file's is the umask's.
        shutil.copyfile(checkpoint / "run.json", out / "run.json")
    model.save_pretrained(out)
    tokenizer.save_pretrained(str(out))
    print(json.dumps({"before": before.as_dict(), "after": after.as_dict()}, indent=2))


def _text_for(
    checkpoint: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: tuple[str, ...],
    text_column: str | None,
    sequence_length: int | None,
) -> tuple["datasets.Dataset", float, int]:
    """Sequences of the text given, or of what a model's training held out; their bytes per token, and their length.

    Raises:
        ValueError: when there is no such text, or its length is out of range.
    """
    from mixture_of_depths.text.batches import pack
    from mixture_of_depths.text.documents import Skipped, read_documents
    from mixture_of_depths.text.tokenizer import tokenize
    from mixture_of_depths.training.folder import read_run

    trained = checkpoint / "run.json"
    if not trained.exists() and not (data and sequence_length):
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training; give data and sequence_length")
    text = read_run(checkpoint)["text"] if trained.exists() else {}
    if sequence_length is not None and sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} must be at least 2")
    if text_column is not None and not data:
        raise ValueError(f"text_column={text_column} needs data; the held-out text is already read")
    if data:
        length = sequence_length or text["options"]["sequence_length"]
        skipped = Skipped()
        column = "text" if text_column is None else text_column
        documents = list(read_documents(DataOptions(data=data, text_column=column), skipped))
        if not documents:
            raise ValueError(f"data={' '.join(data)} holds no text (skipped: {skipped})")
        tokens = tokenize(documents, tokenizer)
        sequences = pack(tokens, length, "given")
        bytes_per_token = sum(len(document.encode("utf-8")) for document in documents) / len(tokens)
    else:
        corpus = _held_out(checkpoint)
        skipped = corpus.facts.skipped
        length = corpus.options.sequence_length
        sequences, bytes_per_token = corpus.validation, corpus.facts.validation_bytes_per_token
        if sequence_length not in (None, length):
            raise ValueError(f"sequence_length={sequence_length} needs data; the held-out text is cut to {length}")
    if skipped != Skipped():
        print(f"skipped: {skipped}", file=sys.stderr)
    return sequences, bytes_per_token, length


def _held_out(checkpoint: Path) -> "Corpus":
    """The text that a model's training held out: from the cache, or prepared again where it is not whole there.

    Raises:
        ValueError: when it is in neither place.
    """
    from pydantic import TypeAdapter, ValidationError

    from mixture_of_depths.files import is_whole
    from mixture_of_depths.text.corpus import load_prepared, prepare
    from mixture_of_depths.text.tokenizer import load_tokenizer
    from mixture_of_depths.training.folder import read_run

    trained = checkpoint / "run.json"
    if not trained.exists():
        raise ValueError(f"checkpoint={checkpoint} holds no run.json of its training, which tells what it held out")
    text = read_run(checkpoint)["text"]
    try:
        options = TypeAdapter(DataOptions).validate_python(text["options"])
    except ValidationError as error:
        raise ValueError(f"{trained} is damaged: the text's options: {error.errors()[0]['msg']}") from error
    entry = options.cache_dir / str(text["key"])
    if is_whole(entry):
        return load_prepared(options, entry.name)
    absent = f"the text that the training held out is not whole in the cache, as {entry},"
    # The model's own copy: the one it was trained with may have moved.
    tokenizer = load_tokenizer(str(checkpoint)) if options.tokenizer else None
    try:
        corpus = prepare(options, tokenizer)
    except ValueError as error:
        raise ValueError(f"{absent} and cannot be prepared again; give other data: {error}") from error
    if corpus.key != text["key"]:
        raise ValueError(
            f"{absent} and data={' '.join(options.data)} has changed since the training; bring one of them back, or "
            "give other data"
        )
    return corpus
