"""What only a study's models tell: how fast they sample and train, and what top-k routing gains by looking ahead."""

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths.device import wait_for
from mixture_of_depths.files import read_json
from mixture_of_depths.isoflop.fit import Records, comparisons, measured_on, models_of
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.model.routing import Routing
from mixture_of_depths.options import Precision, SamplingOptions, TrainOptions
from mixture_of_depths.sampling.bench import decode_seconds, in_precision
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.training.muon import Muon, muon_groups
from mixture_of_depths.training.run import compile_blocks
from mixture_of_depths.training.settings import BETAS

# And what the names of figures end in.
PRECISIONS: dict[Precision, str] = {"fp32": "", "bf16": "_bf16"}


@torch.no_grad()
def gain_from_later_tokens(
    model: MoDForCausalLM,
    sequences: datasets.Dataset,
    end_of_text: int,
    routing: Routing = "top_k",
    stride: int = 16,
    max_sequences: int = 64,
) -> float:
    """By which share a model's loss rises when the text that follows is taken from elsewhere.

    Every sequence is cut at each multiple of `stride`, and from the cut on replaced by another sequence's tokens.
    Compared is the loss of the `stride` predictions before the cut, whose own inputs stay. Only routing that looks
    ahead can tell the two apart: under causal routing the result is 0.

    Args:
        model: the model, in evaluation mode.
        sequences: data set with the column `input_ids`, of at least two sequences.
        end_of_text: the token after which a new document begins.
        routing: "top_k" or "causal".
        stride: tokens between cuts, at least 1 and less than the sequences' length.
        max_sequences: how many sequences to use.
    """
    own = cut = 0.0
    # An even number: no batch is then a single sequence, which would be its own replacement.
    count = min(max_sequences, len(sequences)) // 2 * 2
    for batch in batches(sequences, range(count), end_of_text, 16, model.device):
        input_BT, position_BT = batch["input_ids"], batch["position_ids"]
        length = input_BT.shape[1]
        loss_BT = _losses(model, input_BT, position_BT, input_BT, routing)
        for end in range(stride, length, stride):
            mixed_BT, mixed_position_BT = (
                torch.cat([whole[:, :end], whole.roll(1, dims=0)[:, end:]], dim=1) for whole in (input_BT, position_BT)
            )
            own += loss_BT[:, end - stride : end].double().sum().item()
            mixed_loss_BT = _losses(model, mixed_BT, mixed_position_BT, input_BT, routing)
            cut += mixed_loss_BT[:, end - stride : end].double().sum().item()
    return cut / own - 1


def _losses(
    model: MoDForCausalLM, input_BT: Tensor, position_BT: Tensor, target_BT: Tensor, routing: Routing
) -> Tensor:
    """The loss of predicting each token of `target_BT` but the first, of shape [B, T - 1]."""
    output = model(input_ids=input_BT, position_ids=position_BT, use_cache=False, routing=routing)
    return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), target_BT[:, 1:], reduction="none")


def tokens_per_second(
    models: dict[str, MoDForCausalLM], prompts: list[Tensor], new_tokens: int
) -> dict[str, dict[str, float]]:
    """Sampling speed of several models, which take turns: by precision the median over the prompts, the first left out.

    Args:
        models: in evaluation mode; each is sampled with in float32 and in bfloat16.
        prompts: token indices, each of shape [1, T].
        new_tokens: tokens to sample after each prompt.
    """
    ready: dict[tuple[Precision, str], MoDForCausalLM] = {
        (precision, name): in_precision(models[name], precision) for precision in PRECISIONS for name in models
    }
    seconds: dict[tuple[Precision, str], list[float]] = {side: [] for side in ready}
    for number, prompt in enumerate(prompts):
        options = SamplingOptions(max_new_tokens=new_tokens, temperature=1.0, top_k=0, seed=number)
        for side in sorted(ready, reverse=bool(number % 2)):
            seconds[side].append(decode_seconds(ready[side], prompt, options))
    return {precision: {name: 1 / median(seconds[precision, name][1:]) for name in models} for precision in PRECISIONS}


def seconds_per_step(
    models: dict[str, MoDForCausalLM], batch: dict[str, Tensor], options: TrainOptions, repeats: int = 15
) -> dict[str, float]:
    """Time of a training step of several models, which take turns: for each the median, the first ones left out.

    A step is forward and backward pass, clipping and the optimiser's step. The models are trained by it.

    Args:
        models: the models, on one device.
        batch: what the model is called with, on that device.
        options: optimiser, its rate and decay, precision and compilation.
        repeats: number of turns.
    """
    optimizers = {name: _optimizer(model, options) for name, model in models.items()}
    for model in models.values():
        model.train()
        if options.compile:
            compile_blocks(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    device = batch["input_ids"].device
    for number in range(repeats + 3):
        for name in sorted(models, reverse=bool(number % 2)):
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                loss = models[name](**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[name].parameters(), options.max_grad_norm)
            optimizers[name].step()
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[3:]) for name, values in seconds.items()}


def _optimizer(model: MoDForCausalLM, options: TrainOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), options.learning_rate, BETAS, fused=True)
    return Muon(muon_groups(model, options.weight_decay), options.learning_rate, BETAS)


def measure(
    records: Records,
    baseline: str,
    mod: str,
    corpus: Corpus,
    out: Path,
    measured: dict[str, dict[str, Any]],
    device: torch.device,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Per budget: sampling speed at equal loss, training time, and the best model's gain from later tokens.

    Training times are those of all steps of both best models, and of one step. Prompts are the first halves of held-out
    sequences; as long again is sampled, by the model that is at least as good as the best baseline with the fewest
    FLOPs, and by that baseline. Budgets that are in `measured` with the models compared now are left out.
    All is computed on `device`.

    Raises:
        ValueError: when a model is not in the folder `out` any more.
    """
    half = corpus.options.sequence_length // 2
    first = range(min(8, len(corpus.validation)))
    held_out = batches(corpus.validation, first, corpus.end_of_text, 1, device)
    prompts = [batch["input_ids"][:, :half].contiguous() for batch in held_out]
    for budget, compared in comparisons(records, baseline, mod).items():
        if measured_on(compared, measured.get(budget, {})):
            continue
        best = _load(out, compared.mod, device)
        row: dict[str, Any] = {
            "models": models_of(compared),
            "gain_from_later_tokens": gain_from_later_tokens(
                best, corpus.validation, corpus.end_of_text, stride=max(1, half // 8)
            ),
            "sampling_speedup": None,
            "sampling_speedup_bf16": None,
        }
        options = TrainOptions(**read_json(out / "runs" / compared.mod["name"] / "run.json")["train"])
        torch.compiler.reset()
        trained = {"mod": best, "baseline": _load(out, compared.baseline, device)}
        seconds = seconds_per_step(trained, _batch(corpus, options.batch_size, device), options)
        steps = {"mod": compared.mod["steps"], "baseline": compared.baseline["steps"]}
        whole = {side: seconds[side] * steps[side] for side in steps}
        row |= {"seconds_per_step": seconds, "train_wall_ratio": whole["mod"] / whole["baseline"]}
        if compared.equal is not None:
            torch.compiler.reset()
            sides = {"mod": _load(out, compared.equal, device), "baseline": _load(out, compared.baseline, device)}
            speeds = tokens_per_second(sides, prompts, half)
            for precision, suffix in PRECISIONS.items():
                speed = speeds[precision]
                row[f"tokens_per_second{suffix}"] = speed
                row[f"sampling_speedup{suffix}"] = speed["mod"] / speed["baseline"]
        yield budget, row


def _batch(corpus: Corpus, batch_size: int, device: torch.device) -> dict[str, Tensor]:
    """The first batch of the training text."""
    return next(batches(corpus.train, range(batch_size), corpus.end_of_text, batch_size, device))


def _load(out: Path, record: dict[str, Any], device: torch.device) -> MoDForCausalLM:
    folder = out / "runs" / record["name"]
    if not (folder / "model.safetensors").exists():
        raise ValueError(f"out={out} holds no trained model of {record['name']}, which is needed to measure")
    model = MoDForCausalLM.from_pretrained(folder).eval()
    nn.Module.to(model, device)
    return model
