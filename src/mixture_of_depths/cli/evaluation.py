"""The commands that judge a model on text: evaluate and calibrate."""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mixture_of_depths.cli.common import (
    Checkpoint,
    Device,
    load_checkpoint,
    load_model,
    quiet_libraries,
    read_config,
    require_extra,
    saved_dtype,
    tell_skipped,
)
from mixture_of_depths.options import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mixture_of_depths.evaluation.text import Judged

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
    """Print how well a model predicts a text: loss, perplexity and bits per byte, as JSON.

    Each figure is given for both ways of routing: top-k, as in training, and causal, as in sampling. The text is what
    training held out, or all of --data. With --tasks the model is judged on tasks of lm-evaluation-harness instead,
    under causal routing; this needs the extra "eval".

    Args:
        checkpoint: Folder of a trained model; or folder, GGUF file or hub name of a dense one that can be retrofitted.
        data: Text to evaluate on: files, folders, globs, hub:NAME or "builtin".
        text_column: Field or column that holds the text in .jsonl, .parquet and hub data; by default "text".
        sequence_length: Tokens per sequence; by default as in training.
        max_sequences: Use this many sequences of each source, evenly spaced, instead of all.
        precision: Precision of the matrix products: fp32, or bf16.
        tasks: Tasks or groups of lm-evaluation-harness.
        task_files: Folder of further tasks, as the harness' YAML.
        limit: Use this many examples of a task instead of all.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    from rich.console import Console

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.evaluation.loss import evaluate as run
    from mixture_of_depths.evaluation.loss import mean_of
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
    model, tokenizer = load_model(checkpoint, place)
    bf16 = precision == "bf16"
    if tasks:
        from mixture_of_depths.evaluation.harness import evaluate_tasks

        results = evaluate_tasks(model, tokenizer, tasks, task_files, limit, bf16=bf16)
        print(json.dumps({"tasks": results, **provenance(place)}, indent=2))
        return
    text = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(text.sequence_length)
    console = Console(stderr=True)
    each = [
        run(
            model,
            source.validation,
            end_of_text(tokenizer),
            source.bytes_per_token,
            max_sequences,
            bf16=bf16,
            console=console,
        )
        for source in text.sources
    ]
    evaluation = mean_of(each, text.sources)
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
        "sequence_length": text.sequence_length,
        "precision": precision,
        "parameters": model_parameters(model.config),
        "forward_flops_per_token": forward_flops_per_token(model.config, text.sequence_length),
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
    """Set a model's routers so that, in sampling, as many tokens enter each routed block as its capacity says.

    In sampling each token decides by itself, so that more or fewer may enter than was meant. This shifts the decision
    until the share is right on a text, and that of experts with a capacity, too. The text is what training held out, or
    --data: give the kind of text that the model will meet. Every second sequence of it calibrates, up to 128 of them.
    On the others the model is evaluated before and after, and printed as JSON. A model that was trained with the
    auxiliary loss has nothing that could be shifted; it decides by a threshold from then on.

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
    from mixture_of_depths.evaluation.loss import Evaluation, evaluate, mean_of
    from mixture_of_depths.evaluation.text import without_calibrating
    from mixture_of_depths.files import check_place
    from mixture_of_depths.text.batches import halves
    from mixture_of_depths.text.tokenizer import end_of_text, save_tokenizer

    quiet_libraries()
    place = chosen_device(device)
    check_place(out, "out")
    if out.exists():
        raise ValueError(f"out={out} exists; name another folder")
    model, tokenizer = load_checkpoint(checkpoint, place)
    if not model.config.causal_routers and model.config.expert_capacity is None:
        raise ValueError(f"checkpoint={checkpoint} has no learned router and no experts' capacity to calibrate")
    text = _text_for(checkpoint, tokenizer, data, text_column, sequence_length)
    model.config.check_length(text.sequence_length)
    if len(text.sequences) < 2:
        raise ValueError(
            f"sequence_length={text.sequence_length} leaves fewer than 2 sequences of the text; give more text as data"
        )
    end = end_of_text(tokenizer)
    chosen, others = halves(text.sequences)[0], without_calibrating(text.sources)
    bf16 = precision == "bf16"

    def evaluated() -> Evaluation:
        each = [evaluate(model, source.validation, end, source.bytes_per_token, bf16=bf16) for source in others]
        return mean_of(each, others)

    before = evaluated()
    if model.config.causal_router == "auxiliary_loss":
        model.config.causal_router = "threshold"
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        run(model, chosen, end)
    after = evaluated()
    # Calibrating changes routers alone, which are in float32: all else goes back to what it was saved in.
    torch.nn.Module.to(model, saved_dtype(read_config(checkpoint)))
    out.mkdir(parents=True)
    if (checkpoint / "run.json").exists():
        # Without its mode: the new file's is the umask's.
        shutil.copyfile(checkpoint / "run.json", out / "run.json")
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    print(json.dumps({"before": before.as_dict(), "after": after.as_dict()}, indent=2))


def _text_for(
    checkpoint: Path,
    tokenizer: "PreTrainedTokenizerBase",
    data: tuple[str, ...],
    text_column: str | None,
    sequence_length: int | None,
) -> "Judged":
    """The text to judge a model on, by the description of its training; says what was left out of it."""
    from mixture_of_depths.evaluation.text import text_to_judge
    from mixture_of_depths.training.folder import read_run

    described = read_run(checkpoint)["text"] if (checkpoint / "run.json").exists() else None
    text = text_to_judge(checkpoint, described, tokenizer, data, text_column, sequence_length)
    tell_skipped(text.skipped)
    return text
