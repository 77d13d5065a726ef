"""Makes a pretrained dense model skip: measures which blocks to route, fits their routers, and tunes the result.

The start is the dense model exactly: chosen tokens meet a block with a factor of one ("straight_through"), and the
capacity begins at 1. It is then lowered, step by step, to where it is meant to be. The first token of a sequence always
enters, since pretrained heads rest on it.

A router starts as a linear fit to the size of what its block adds to a token: those to which it would add least skip.

Shapes: B batch, T tokens, N tokens of a batch, L blocks, D hidden size.
"""

import copy
import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from peft import LoraConfig, LoraModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from mixture_of_depths.calibration import calibrate, halves, spread
from mixture_of_depths.checkpoint import latest_checkpoint, read_run, write_aside
from mixture_of_depths.configuration import MoDConfig, capacity_tokens
from mixture_of_depths.data import Corpus, batches
from mixture_of_depths.evaluation import Evaluation, evaluate
from mixture_of_depths.flops import forward_flops_per_token
from mixture_of_depths.modeling import DecoderLayer, MoDCausalLMOutput, MoDForCausalLM
from mixture_of_depths.options import RetrofitOptions, TrainOptions
from mixture_of_depths.provenance import provenance
from mixture_of_depths.routing import Router
from mixture_of_depths.training import MoDTrainer, Tuning, check_folder, check_options, check_unchanged, horizon, train

# A router's weights decay towards zero by this share of its inputs' mean square.
RIDGE = 0.01
# The capacity falls in this many steps: each is a graph of its own to a compiler.
LEVELS = 8
# Held-out blocks on which the result is compared with the dense model, at most.
COMPARED_BLOCKS = 256
# Graphs that the compiler may keep of a block: one of every level, and of each what it must check anew.
GRAPHS = 64


@dataclass(frozen=True)
class BlockImportance:
    """By how much the loss rises when one block alone is skipped, in nats per token.

    Attributes:
        bypassed: when all tokens skip it.
        lower_ranked: when the capacity's share of the tokens, chosen by the fitted router, enters it.
    """

    bypassed: float
    lower_ranked: float


def routed_config(dense: MoDConfig, **changes: Any) -> MoDConfig:
    """The configuration of `routed_from`'s model."""
    return dense.changed(router_activation="straight_through", router_norm=True, first_token_enters=True, **changes)


def routed_from(dense: MoDForCausalLM, **changes: Any) -> MoDForCausalLM:
    """A copy of a model without routed blocks that has some; `changes` are fields of its configuration.

    Chosen tokens meet a block unchanged, so that at a capacity of 1 the model computes what the dense one does.
    """
    model = MoDForCausalLM(routed_config(dense.config, **changes))
    nn.Module.to(model, dense.device, dense.dtype)
    found = model.load_state_dict(dense.state_dict(), strict=False)
    assert not found.unexpected_keys and all(".router." in name for name in found.missing_keys)
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model


@contextmanager
def _capacity(router: Router, fraction: float) -> Iterator[None]:
    before, router.capacity = router.capacity, fraction
    try:
        yield
    finally:
        router.capacity = before


@torch.no_grad()
def fit_routers(dense: MoDForCausalLM, blocks: datasets.Dataset, end_of_text: int, bf16: bool = False) -> Tensor:
    """Routers for every block, fitted by least squares to the norm of the block's delta; of shape [L, D].

    Scaled so that a router's output has a deviation of 1 on the tokens given. First tokens, which enter anyway, do not
    count.

    Args:
        dense: a model without routed blocks.
        blocks: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.
    """
    config, device = dense.config, dense.device
    layers, size = list(dense.model.layers), config.hidden_size
    moments_LDD = torch.zeros(len(layers), size + 1, size + 1, device=device)
    products_LD = torch.zeros(len(layers), size + 1, device=device)
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output[0] - args[0])))
        for layer in layers
    ]
    try:
        for batch in batches(blocks, range(len(blocks)), end_of_text, 1, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                dense(**batch, use_cache=False)
            chooses_BT = batch["position_ids"] != 0
            for layer_idx, (hidden_BTD, delta_BTD) in enumerate(seen):
                hidden_ND = F.rms_norm(hidden_BTD[chooses_BT].float(), (size,), eps=config.rms_norm_eps)
                hidden_ND = F.pad(hidden_ND, (0, 1), value=1.0)
                moments_LDD[layer_idx] += hidden_ND.T @ hidden_ND
                products_LD[layer_idx] += hidden_ND.T @ delta_BTD[chooses_BT].float().norm(dim=-1)
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    # The intercept, last, is not held back.
    ridge_LD = RIDGE * moments_LDD.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).repeat(1, size + 1)
    ridge_LD[:, -1] = 0
    weights_LD = torch.linalg.solve(moments_LDD + torch.diag_embed(ridge_LD), products_LD)[:, :-1]
    count = moments_LDD[:, -1:, -1]
    means_LD = moments_LDD[:, -1, :-1] / count
    outer_LDD = moments_LDD[:, :-1, :-1] / count[..., None] - means_LD[:, :, None] * means_LD[:, None, :]
    variance_L = (weights_LD[:, None] @ outer_LDD @ weights_LD[..., None]).flatten()
    return weights_LD / variance_L.clamp(min=1e-12).sqrt()[:, None]


def routers_of(model: MoDForCausalLM) -> dict[int, Router]:
    """The routers of a model by the index of their block."""
    layers = cast(list[DecoderLayer], list(model.model.layers))
    return {layer_idx: layer.router for layer_idx, layer in enumerate(layers) if layer.router is not None}


@torch.no_grad()
def measure_importance(
    dense: MoDForCausalLM,
    weights_LD: Tensor | None,
    capacity: float,
    blocks: datasets.Dataset,
    end_of_text: int,
    bf16: bool = False,
    console: Console | None = None,
) -> list[BlockImportance]:
    """By how much the loss rises when a block is skipped, for every block of a model.

    Args:
        dense: a model without routed blocks.
        weights_LD (torch.Tensor | None): the fitted routers, of shape [blocks, D]; None for random ones.
        capacity: fraction of the tokens that enters.
        blocks: data set with the column `input_ids`.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.
        console: where progress is shown.
    """
    count = dense.config.num_hidden_layers
    kind = "random" if weights_LD is None else "learned"
    model = routed_from(dense, routed_layers=list(range(count)), capacity=1.0, router_type=kind).eval()
    routers = routers_of(model)
    set_routers(model, weights_LD)
    given = list(batches(blocks, range(len(blocks)), end_of_text, 1, dense.device))

    def loss() -> float:
        total = 0.0
        for batch in given:
            with torch.autocast(dense.device.type, torch.bfloat16, enabled=bf16):
                total += model(**batch, use_cache=False, routing="top_k").lm_loss.item()
        return total / len(given)

    before, every, found = loss(), model.model.layers, []
    for layer_idx in track(range(count), "measuring blocks", console=console):
        model.model.layers = nn.ModuleList([layer for i, layer in enumerate(every) if i != layer_idx])
        bypassed = loss() - before
        model.model.layers = every
        with _capacity(routers[layer_idx], capacity):
            found.append(BlockImportance(bypassed, loss() - before))
    return found


def set_routers(model: MoDForCausalLM, weights_LD: Tensor | None) -> None:
    """Gives every learned router of a model its block's row of `weights_LD`, of shape [blocks, D]."""
    for layer_idx, router in routers_of(model).items():
        if not router.is_random:
            assert weights_LD is not None
            router.proj.weight.data.copy_(weights_LD[layer_idx : layer_idx + 1])


def choose_blocks(
    importance: list[BlockImportance], dense: MoDConfig, options: RetrofitOptions, sequence_length: int
) -> list[int]:
    """The blocks to route: those that cost least, as many as it takes to come down to the share of the FLOPs.

    Raises:
        ValueError: when routing all blocks would not be enough.
    """
    check_share(dense, options, sequence_length)
    order = sorted(range(len(importance)), key=lambda layer_idx: importance[layer_idx].lower_ranked)
    chosen: list[int] = []
    while not chosen or flops_share(dense, sorted(chosen), options, sequence_length) > options.flops_share:
        chosen.append(order[len(chosen)])
    return sorted(chosen)


def full_capacity(dense: MoDConfig, routed_layers: list[int], options: RetrofitOptions, sequence_length: int) -> float:
    """The largest capacity of these blocks, the options' at least, that keeps to the share of the FLOPs at a length."""

    def is_too_much(entering: int) -> bool:
        filled = replace(options, capacity=entering / sequence_length)
        return flops_share(dense, routed_layers, filled, sequence_length) > options.flops_share

    counts = range(capacity_tokens(options.capacity, sequence_length) + 1, sequence_length)
    more = bisect_left(counts, True, key=is_too_much)
    return counts[more - 1] / sequence_length if more else options.capacity


def check_share(dense: MoDConfig, options: RetrofitOptions, sequence_length: int) -> None:
    """Raises ValueError when routing all blocks would not come down to the share of the FLOPs."""
    least = flops_share(dense, list(range(dense.num_hidden_layers)), options, sequence_length)
    if least > options.flops_share:
        raise ValueError(
            f"flops_share={options.flops_share} cannot be reached with capacity={options.capacity}: with all blocks "
            f"routed the share is {least:.3f}; raise it, or lower the capacity"
        )


def flops_share(dense: MoDConfig, routed_layers: list[int], options: RetrofitOptions, sequence_length: int) -> float:
    """FLOPs per token of a forward pass with some blocks routed, over those of the dense model."""
    config = routed_config(dense, **_changes(options, routed_layers))
    return forward_flops_per_token(config, sequence_length) / forward_flops_per_token(dense, sequence_length)


def _changes(options: RetrofitOptions, routed_layers: list[int]) -> dict[str, Any]:
    return {
        "routed_layers": routed_layers,
        "capacity": options.capacity,
        "router_type": options.router_type,
        "causal_router": options.causal_router,
    }


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
        labels = inputs["labels"]
        loss, returned = super().compute_loss(model, inputs, True, num_items_in_batch)
        output = cast(MoDCausalLMOutput, returned)
        with torch.no_grad():
            given = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.args.bf16):
                wanted = self.teacher(**given, use_cache=False).logits
        assert output.logits is not None and output.lm_loss is not None
        kept = labels[:, 1:] != -100
        divergence = F.kl_div(
            output.logits[:, :-1][kept].float().log_softmax(dim=-1),
            wanted[:, :-1][kept].float().log_softmax(dim=-1),
            reduction="sum",
            log_target=True,
        )
        divergence = divergence / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
        loss = loss + self.share * (divergence - output.lm_loss)
        return (loss, output) if return_outputs else loss


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
        raise ValueError(f"out={folder} holds no retrofit to resume; name the folder of one, or leave out resume")
    try:
        before = [BlockImportance(**found) for found in facts["importance"]], facts["chosen"], capacity
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

    Of every second held-out block, up to `calibration.MAX_BLOCKS` calibrate the causal routers; on the others the model
    is compared with the dense one.

    Args:
        dense: the model; it is not changed.
        source: where it comes from, for the records.
        corpus: text to tune and evaluate on, in the model's own tokens.
        options: what to route.
        training: how to tune; its length as `max_steps` or `max_tokens`.
        folder: where the run lives; see `training.train`, and `retrofit.json` with this function's result.
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
    if len(corpus.validation) < 2:
        raise ValueError("data holds out fewer than 2 blocks; give more text, or raise validation_fraction")
    # Nothing is measured for what will be refused.
    length = len(corpus.train[0]["input_ids"])
    dense.config.check_length(length)
    entering = capacity_tokens(options.capacity, length)
    if entering < 2:
        raise ValueError(
            f"capacity={options.capacity} of sequence_length={length} is one token, which the first one is; raise one "
            f"of them until their product is at least 2"
        )
    if options.part == "lora" and dense.config.has_experts:
        raise ValueError(
            f"part=lora cannot adapt num_experts={dense.config.num_experts}; give part=all or part=routers"
        )
    horizon(training, dense.config, length)
    check_options(training, corpus)
    importance: list[BlockImportance] = []
    chosen = list(options.routed_layers or [])
    if chosen:
        routed_config(dense.config, **_changes(options, chosen))
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
            weights_LD = fit_routers(dense, spread(corpus.train, options.fit_blocks), end, bf16)
        if not chosen:
            measured = spread(corpus.train, options.measure_blocks)
            importance = measure_importance(dense, weights_LD, options.capacity, measured, end, bf16, console)
            chosen = choose_blocks(importance, dense.config, options, length)
            capacity = full_capacity(dense.config, chosen, options, length)
    placed = replace(options, capacity=capacity)
    console.print(f"routing blocks {chosen} at a capacity of {capacity:.3f}")
    # Predictors and adapters start at random, whatever was measured before.
    set_seed(training.seed)
    model = routed_from(dense, **_changes(placed, chosen))
    if weights_LD is not None:
        set_routers(model, weights_LD)

    adapters = None
    if options.part == "lora":
        adapters = with_adapters(model, options.lora_rank)
    elif options.part == "routers":
        model.requires_grad_(False)
    for router in routers_of(model).values():
        router.requires_grad_()
    calibration, others = halves(corpus.validation)

    schedule = CapacitySchedule(model, options.lowering_fraction)

    def finish(tuned: MoDForCausalLM) -> MoDForCausalLM:
        schedule.lower(1.0)
        if adapters is not None:
            tuned = cast(MoDForCausalLM, adapters.merge_and_unload())
        calibrate(tuned, calibration, end)
        return tuned

    tuning = Tuning(
        model,
        {"source": source, **asdict(options), "importance": [asdict(found) for found in importance], "chosen": chosen},
        partial(DistillationTrainer, teacher=dense, share=options.distillation) if options.distillation else MoDTrainer,
        (schedule,),
        finish,
    )
    with torch._dynamo.config.patch(recompile_limit=GRAPHS) if training.compile else nullcontext():
        model, trained = train(model.config, corpus, training, folder, resume, console, tuning)
    share = flops_share(dense.config, chosen, placed, length)
    size = corpus.facts.validation_bytes_per_token
    result = RetrofitResult(
        finished=trained.finished,
        routed_layers=chosen,
        capacity=capacity,
        importance=importance,
        flops_share=share,
        tuning_minutes=trained.train_seconds / 60,
        dense=evaluate(dense, others, end, size, COMPARED_BLOCKS, bf16=bf16) if trained.finished else None,
        retrofitted=evaluate(model, others, end, size, COMPARED_BLOCKS, bf16=bf16) if trained.finished else None,
    )
    if trained.finished:
        write_aside(folder / "retrofit.json", json.dumps({**asdict(result), **provenance()}, indent=2))
    return model, result
