"""Makes a pretrained dense model skip: measures which blocks to route, fits their routers, and tunes the result.

The start is the dense model exactly: chosen tokens meet a block with a factor of one ("straight_through"), and the
capacity begins at 1. It is then lowered, step by step, to where it is meant to be. The first token of a sequence always
enters, since pretrained heads rest on it.

A router starts as a linear fit to the size of what its block adds to a token: those to which it would add least skip.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from mixture_of_depths.compiler import require_compiler
from mixture_of_depths.evaluation.loss import Evaluation, evaluate
from mixture_of_depths.files import write_aside
from mixture_of_depths.model.configuration import MoDConfig, capacity_tokens
from mixture_of_depths.model.modeling import MoDCausalLMOutput, MoDForCausalLM
from mixture_of_depths.options import RetrofitOptions, TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.choose import check_share, choose_blocks, flops_share, full_capacity, routed_fields
from mixture_of_depths.retrofitting.measure import (
    BlockImportance,
    fit_routers,
    measure_importance,
    routed_config,
    routed_from,
    routers_of,
    set_routers,
)
from mixture_of_depths.text.batches import spread
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.checkpoint import latest_checkpoint
from mixture_of_depths.training.folder import check_folder, check_unchanged, read_run
from mixture_of_depths.training.horizon import horizon
from mixture_of_depths.training.run import Tuning, split_held_out, train
from mixture_of_depths.training.settings import check_options
from mixture_of_depths.training.trainer import MoDTrainer

# The capacity falls in this many steps: each is a graph of its own to a compiler.
LEVELS = 8
# Held-out sequences on which the result is compared with the dense model, at most.
COMPARED_SEQUENCES = 256
# Graphs that the compiler may keep of a block: one of every level, and of each what it must check anew.
GRAPHS = 64


class CapacitySchedule(TrainerCallback):
    """Lowers the capacity of all routed blocks from 1 to their own over the first part of a run, in `LEVELS` steps."""

    def __init__(self, model: MoDForCausalLM, lowering_fraction: float) -> None:
        self.targets = [(router, router.capacity) for router in routers_of(model).values()]
        self.lowering_fraction = lowering_fraction

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        steps = self.lowering_fraction * state.max_steps
        level = 1.0 if state.global_step >= steps else int(LEVELS * state.global_step / steps) / LEVELS
        self.lower(level)

    def lower(self, level: float) -> None:
        """Sets the capacities between 1, at level 0, and their own, at level 1."""
        for router, target in self.targets:
            router.capacity = 1 - (1 - target) * level


class DistillationTrainer(MoDTrainer):
    """Part of the loss is the divergence of the model's predictions from those of the dense one."""

    def __init__(self, *args: Any, teacher: MoDForCausalLM, share: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = nn.Module.to(teacher, self.args.device)
        self.share = share

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        def distilled(**arguments: Any) -> MoDCausalLMOutput:
            output = model(**arguments)
            divergence = self._divergence(output, inputs, num_items_in_batch)
            output.loss = output.loss + self.share * (divergence - output.lm_loss)
            return output

        # The library scales what the model returns by the number of processes, over which it then takes the mean.
        with_logits = {**inputs, "skip_logits": False}
        return super().compute_loss(cast(nn.Module, distilled), with_logits, return_outputs, num_items_in_batch)

    def _divergence(
        self, output: MoDCausalLMOutput, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """The divergence from the dense model's predictions, averaged as the loss of the text is."""
        labels = inputs["labels"]
        with torch.no_grad():
            teacher_inputs = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.args.bf16):
                wanted = self.teacher(**teacher_inputs, use_cache=False).logits
        assert output.logits is not None
        kept = labels[:, 1:] != -100
        divergence = F.kl_div(
            output.logits[:, :-1][kept].float().log_softmax(dim=-1),
            wanted[:, :-1][kept].float().log_softmax(dim=-1),
            reduction="sum",
            log_target=True,
        )
        return divergence / (kept.sum() if num_items_in_batch is None else num_items_in_batch)


def with_adapters(model: MoDForCausalLM, rank: int) -> LoraModel:
    """Puts low-rank adapters on all projections, in place; everything but them and the routers is frozen."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(names)})"
    return LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), "default")


@dataclass(frozen=True)
class RetrofitResult:
    """What a retrofit found and made.

    Attributes:
        finished: False when it was stopped; it can be resumed.
        routed_layers: the blocks that are routed.
        capacity: fraction of the tokens that enters one.
        importance: what skipping each block of the dense model costs; empty when the blocks were given.
        flops_share: FLOPs per token over the dense model's.
        tuning_minutes: time spent in steps.
        dense: the dense model on the held-out text that the causal routers were not calibrated on; None when not
            finished.
        retrofitted: the result on the same text; None when not finished.
    """

    finished: bool
    routed_layers: list[int]
    capacity: float
    importance: list[BlockImportance]
    flops_share: float
    tuning_minutes: float
    dense: Evaluation | None
    retrofitted: Evaluation | None


def _measured_before(
    folder: Path, source: str, options: RetrofitOptions
) -> tuple[list[BlockImportance], list[int], float]:
    """What the run in a folder measured, the blocks it routes, and their capacity.

    Raises:
        ValueError: when the folder holds no retrofit, or one with other options.
    """
    run = read_run(folder)
    facts, capacity = run.get("tuning", {}), run.get("model", {}).get("capacity", MoDConfig().capacity)
    if "importance" not in facts:
        raise ValueError(
            f"out={folder} holds no retrofit to resume; name the folder of one, or leave out resume=True (--resume)"
        )
    try:
        before = [BlockImportance(**block) for block in facts["importance"]], facts["chosen"], capacity
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'run.json'} is damaged: it does not describe a retrofit") from error
    for name, value in json.loads(json.dumps({"source": source, **asdict(options)})).items():
        check_unchanged(folder, name, facts.get(name), value)
    return before


def retrofit(
    dense: MoDForCausalLM,
    source: str,
    corpus: Corpus,
    options: RetrofitOptions,
    training: TrainOptions,
    folder: Path,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[MoDForCausalLM, RetrofitResult]:
    """Routes blocks of a pretrained model, tunes it, and leaves it with its tokenizer and records in `folder`.

    Unless `training.calibrate` is off, every second held-out sequence calibrates the causal routers, up to
    `evaluation.calibration.MAX_SEQUENCES` of them; on up to `COMPARED_SEQUENCES` of the others the model is compared
    with the dense one.

    Args:
        dense: the model; it is not changed. All is computed on its device.
        source: where it comes from, for the records.
        corpus: text to tune and evaluate on, in the model's own tokens.
        options: what to route.
        training: how to tune; its length as `max_steps` or `max_tokens`.
        folder: where the run lives; see `train`, and `retrofit.json` with this function's result.
        resume: whether to go on with the run in the folder.
        console: where progress is shown.

    Raises:
        ValueError: for options that contradict one another or the model, or a folder that does not fit.
    """
    console = console or Console()
    end, bf16 = corpus.end_of_text, training.precision == "bf16"
    if dense.config.routed_layers:
        raise ValueError(f"routed_layers={dense.config.routed_layers} of the source: it must be a dense model")
    if training.max_flops is not None:
        raise ValueError(
            f"max_flops={training.max_flops:g} cannot be kept while the capacity falls; give max_steps or max_tokens"
        )
    lengths = [name for name in ("max_steps", "max_tokens") if getattr(training, name) is not None]
    if len(lengths) != 1:
        raise ValueError(f"give exactly one of max_steps and max_tokens; given: {', '.join(lengths) or 'none'}")
    if training.calibrate and len(corpus.validation) < 2:
        raise ValueError(
            "data holds out fewer than 2 sequences, and calibrating needs one of them; give more text, or raise "
            "validation_fraction"
        )
    # Nothing is measured for what will be refused.
    length = len(corpus.train[0]["input_ids"])
    dense.config.check_length(length)
    entering = capacity_tokens(options.capacity, length)
    if entering < 2:
        raise ValueError(
            f"capacity={options.capacity} of sequence_length={length} is one token, which the first one is; raise one "
            f"of them until their product is at least 2"
        )
    if options.tune == "lora" and dense.config.has_experts:
        raise ValueError(
            f"tune=lora cannot adapt num_experts={dense.config.num_experts}; give tune=all or tune=routers"
        )
    horizon(training, dense.config, length)
    check_options(training, corpus)
    if training.compile:
        require_compiler("compile", dense.device)
    importance: list[BlockImportance] = []
    chosen = list(options.routed_layers or [])
    if chosen:
        routed_config(dense.config, **routed_fields(options, chosen))
    else:
        check_share(dense.config, options, length)
    check_folder(folder, resume)
    capacity = options.capacity
    if resume:
        importance, chosen, capacity = _measured_before(folder, source, options)
    weights_LD = None
    if not (resume and latest_checkpoint(folder)):
        if options.router_type == "learned":
            console.print("fitting routers")
            weights_LD = fit_routers(dense, spread(corpus.train, options.fit_sequences), end, bf16)
        if not chosen:
            measured = spread(corpus.train, options.measure_sequences)
            importance = measure_importance(dense, weights_LD, options.capacity, measured, end, bf16, console)
            chosen = choose_blocks(importance, dense.config, options, length)
            capacity = full_capacity(dense.config, chosen, options, length)
    placed = replace(options, capacity=capacity)
    console.print(f"routing blocks {chosen} at a capacity of {capacity:.3f}")
    # Predictors and adapters start at random, whatever was measured before.
    set_seed(training.seed)
    model = routed_from(dense, **routed_fields(placed, chosen))
    if weights_LD is not None:
        set_routers(model, weights_LD)

    adapters = None
    if options.tune == "lora":
        adapters = with_adapters(model, options.lora_rank)
    elif options.tune == "routers":
        model.requires_grad_(False)
    for router in routers_of(model).values():
        router.requires_grad_()
    schedule = CapacitySchedule(model, options.lowering_fraction)

    def finish(tuned: MoDForCausalLM) -> MoDForCausalLM:
        schedule.lower(1.0)
        if adapters is not None:
            tuned = cast(MoDForCausalLM, adapters.merge_and_unload())
        return tuned

    tuning = Tuning(
        model,
        {"source": source, **asdict(options), "importance": [asdict(block) for block in importance], "chosen": chosen},
        partial(DistillationTrainer, teacher=dense, share=options.distillation) if options.distillation else MoDTrainer,
        (schedule,),
        finish,
    )
    # A part of the module only once it is loaded.
    patched = torch.compiler.config.patch(recompile_limit=GRAPHS)  # pyright: ignore[reportAttributeAccessIssue]
    with patched if training.compile else nullcontext():
        model, trained = train(model.config, corpus, training, folder, resume, console, tuning, dense.device)
    share = flops_share(dense.config, chosen, placed, length)
    _, others = split_held_out(corpus, training)
    size = corpus.facts.validation_bytes_per_token
    result = RetrofitResult(
        finished=trained.finished,
        routed_layers=chosen,
        capacity=capacity,
        importance=importance,
        flops_share=share,
        tuning_minutes=trained.train_seconds / 60,
        dense=evaluate(dense, others, end, size, COMPARED_SEQUENCES, bf16=bf16) if trained.finished else None,
        retrofitted=evaluate(model, others, end, size, COMPARED_SEQUENCES, bf16=bf16) if trained.finished else None,
    )
    if trained.finished:
        write_aside(folder / "retrofit.json", json.dumps({**asdict(result), **provenance(dense.device)}, indent=2))
    return model, result
