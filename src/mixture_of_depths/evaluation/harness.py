"""Tasks of lm-evaluation-harness, with a live model of this package."""

from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from mixture_of_depths.model.modeling import MoDForCausalLM


def evaluate_tasks(
    model: MoDForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[str, ...],
    task_files: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    bf16: bool = False,
) -> dict[str, Any]:
    """The harness' figures for each task, under causal routing; groups of tasks are there as a whole, too.

    Args:
        model: the model, in evaluation mode.
        tokenizer: its tokenizer.
        tasks: names of tasks or groups of the harness, or of those in `task_files`.
        task_files: folder of further tasks, as the harness' own YAML.
        limit: number of examples per task; None for all.
        batch_size: requests computed together.
        bf16: whether to compute under bf16 autocast.

    Raises:
        ValueError: for a task that is not known, or whose files are damaged.
    """
    manager = TaskManager(include_path=None if task_files is None else str(task_files))
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise ValueError(f"tasks={name} is unknown; give one of lm-evaluation-harness, or its folder as task_files")
    # Outside training each token decides from its own past, whatever the harness pads a batch with on the right.
    # Their decorators hide the arguments of both.
    wrap: Any = HFLM
    run: Any = simple_evaluate
    precision = "bfloat16" if bf16 else None
    harness_model = wrap(
        model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=precision
    )
    settings = {"limit": limit, "log_samples": False, "bootstrap_iters": 1000}
    try:
        results = run(harness_model, tasks=list(tasks), task_manager=manager, **settings)
    except Exception as error:
        # A task's YAML, templates, functions and data each fail in the way of the library that reads them.
        raise ValueError(f"tasks={' '.join(tasks)} cannot be run: {error}") from error
    return results["results"]
