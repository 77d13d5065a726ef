"""The library's trainer with both routings in evaluation, FLOPs counted, and exact resumption."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object, parse_flag_from_env
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixture_of_depths.distributed import average_, failing_together, is_main
from mixture_of_depths.evaluation.loss import Evaluation, evaluate, mean_of
from mixture_of_depths.evaluation.text import held_out_of
from mixture_of_depths.files import read_json, seal, sync_folder
from mixture_of_depths.model.flops import training_flops_per_token
from mixture_of_depths.model.modeling import MoDForCausalLM
from mixture_of_depths.options import TrainOptions
from mixture_of_depths.text.batches import Collator
from mixture_of_depths.text.corpus import Corpus, Source
from mixture_of_depths.text.order import Order
from mixture_of_depths.text.tokenizer import save_tokenizer
from mixture_of_depths.training.checkpoint import (
    ASIDE,
    SCHEDULE,
    drop_checkpoints,
    is_sharded,
    load_generators,
    load_optimizer,
    load_weights,
    save_generators,
    save_optimizer,
)
from mixture_of_depths.training.muon import Muon, decays, muon_groups


class DivergenceError(ValueError):
    """A loss or a gradient is no number."""


class NumberedCollator(Collator):
    """Stacks sequences into a batch that names them, as `sequence`."""

    def __call__(self, sequences: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            **super().__call__(sequences),
            "sequence": torch.tensor([sequence["sequence"] for sequence in sequences]),
        }


class MoDTrainer(Trainer):
    """The library's trainer, with its own evaluation, FLOP count, decay, thresholds and form of checkpoints.

    How several processes share the work is accelerate's: DDP, or FSDP2 when its configuration says so.

    Raises:
        ValueError: when that asks for the first version of FSDP, or for its loading from process 0.
    """

    def __init__(self, corpus: Corpus, options: TrainOptions, **kwargs: Any) -> None:
        self.corpus = corpus
        self.run_options = options
        # Where a checkpoint is being written, before it is renamed.
        self._aside: str | None = None
        # Which sequences of the training text the step under way is made on; looked at only where it went wrong.
        self._sequences: list[Tensor] = []
        super().__init__(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Has accelerate set itself up, with FSDP on CPUs, too, where it would quietly use DDP."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            plugin = FullyShardedDataParallelPlugin()
            if self.args.bf16:
                plugin.set_mixed_precision("bf16")
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
            self.is_fsdp_enabled = True
        if not self.is_fsdp_enabled:
            return
        if not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version=1 is not supported; set it to 2, in the file or as FSDP_VERSION=2")
        if cast(FullyShardedDataParallelPlugin, state.fsdp_plugin).cpu_ram_efficient_loading:
            # accelerate takes every entry of the state for a sharded weight, and thresholds are buffers.
            raise ValueError("fsdp_cpu_ram_efficient_loading=true is not supported; set it to false")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's loss, unless the inputs say otherwise without the logits of the whole vocabulary in memory."""
        return super().compute_loss(model, {"skip_logits": True, **inputs}, return_outputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """The order of the run itself, where the text brings one; else the library's."""
        order = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(order) if isinstance(order, Order) else super()._get_train_sampler(train_dataset)

    def average_thresholds(self) -> None:
        """Makes the routers' thresholds those of the whole batches.

        In training each process' thresholds follow its own share of every batch. They are running averages of means
        over rows: their mean is what one process would have, where experts' are concerned up to rows of which an expert
        took nothing. Only training by the threshold reads them, and averages them after every pass.
        """
        model = cast(nn.Module, self.model)
        average_([buffer for name, buffer in model.named_buffers() if name.endswith("router.threshold")])

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and backward pass."""
        loss = super().training_step(*args, **kwargs)
        assert isinstance(self.model, MoDForCausalLM)
        if self.model.config.training_routing == "threshold":
            self.average_thresholds()
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The parts of the next step's batch, whose sequences are noted."""
        parts, count = super().get_batch_samples(*args, **kwargs)
        self._sequences = [part.pop("sequence") for part in parts]
        return parts, count

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates under top-k and causal routing; returns and logs the figures."""
        assert isinstance(self.model, MoDForCausalLM)
        self.average_thresholds()
        evaluation, each = evaluate_held_out(
            self.model,
            held_out_of(self.corpus),
            self.corpus,
            self.run_options,
            self.run_options.eval_sequences,
            every_router=False,
        )
        metrics = {
            "eval_loss": evaluation.loss_causal,
            "eval_loss_top_k": evaluation.loss_top_k,
            "eval_loss_causal": evaluation.loss_causal,
            "eval_bits_per_byte": evaluation.bits_per_byte,
        }
        # A single text has no further names.
        for source, of_source in zip(self.corpus.sources, each, strict=False):
            metrics[f"eval_loss_causal/{source.name}"] = of_source.loss_causal
            metrics[f"eval_loss_top_k/{source.name}"] = of_source.loss_top_k
        for causal in evaluation.causal_routers.values():
            metrics["eval_causal_accuracy"] = causal.accuracy
            metrics |= {f"eval_share_entering_{layer}": share for layer, share in causal.share_entering.items()}
        experts, num_experts = evaluation.experts.get("causal", {}), self.model.config.num_experts
        metrics |= {f"eval_expert_dropped_{layer}": seen.dropped for layer, seen in experts.items()}
        if self.model.config.num_noop_experts:
            metrics |= {f"eval_noop_share_{layer}": sum(seen.share[num_experts:]) for layer, seen in experts.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch, counted analytically, but for the optimiser's."""
        assert isinstance(self.model, MoDForCausalLM)
        tokens, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[1]
        return round(training_flops_per_token(self.model.config, length) * tokens)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The matrices of the language model; routers, predictors, norms and biases do not decay."""
        return [name for name, weight in model.named_parameters() if decays(name, weight)]

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The library's own AdamW, or `Muon`."""
        if self.run_options.optimizer == "adamw":
            return super().create_optimizer(model)
        of = cast(nn.Module, self.model if model is None else model)
        groups = muon_groups(of, self.args.weight_decay)
        self.optimizer = Muon(groups, self.args.learning_rate, (self.args.adam_beta1, self.args.adam_beta2))
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands the figures to the callbacks; one that cannot write them ends all processes.

        Raises:
            DivergenceError: for a loss or gradient that is no number, naming the step and the batch of all processes.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                sequences = gather_object(torch.cat(self._sequences).tolist())
                raise DivergenceError(
                    f"{name}={logs[name]} at step {self.state.global_step} is no number; its batch was sequences "
                    f"{', '.join(map(str, sequences))} of the training text, in epoch {self.state.epoch:.2f}. The "
                    "checkpoints up to here are kept. Lower learning_rate or max_grad_norm and start again in another "
                    "folder"
                )
        with failing_together():
            super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._aside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.average_thresholds()
        with failing_together():
            if is_main():
                shutil.rmtree(folder / ASIDE, ignore_errors=True)
                (folder / ASIDE / name).mkdir(parents=True)
        self._aside = str(folder / ASIDE)
        try:
            with failing_together():
                super()._save_checkpoint(model, trial)
            # Once every process has written its files.
            with failing_together():
                if is_main():
                    seal(folder / ASIDE / name)
        except SafetensorError as error:
            raise OSError(f"checkpoint in {folder} cannot be written: {error}") from error
        finally:
            self._aside = None
        with failing_together():
            if is_main():
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / ASIDE / name).rename(folder / name)
                sync_folder(folder)
                shutil.rmtree(folder / ASIDE)
                assert self.args.save_total_limit is not None
                drop_checkpoints(folder, self.state.global_step, self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves model and tokenizer; of a sharded model only what is not sharded."""
        folder = output_dir or self.args.output_dir
        assert isinstance(self.model, MoDForCausalLM) and folder is not None
        with failing_together():
            if is_main():
                save = self.model.config if is_sharded(self.model) else self.model
                save.save_pretrained(folder)
                save_tokenizer(self.corpus.tokenizer, Path(folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert isinstance(self.model, MoDForCausalLM)
        save_optimizer(cast(Optimizer, self.optimizer), self.model, Path(output_dir))
        if is_main():
            schedule = cast(LRScheduler, self.lr_scheduler)
            (Path(output_dir) / SCHEDULE).write_text(json.dumps(schedule.state_dict()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, MoDForCausalLM)
        load_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(cast(Optimizer, self.optimizer), Path(checkpoint))
        cast(LRScheduler, self.lr_scheduler).load_state_dict(read_json(Path(checkpoint) / SCHEDULE))

    def _save_rng_state(self, output_dir: str) -> None:
        save_generators(Path(output_dir), self.args.device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_generators(Path(checkpoint), self.args.device, self.run_options.seed, self.state.global_step)


def evaluate_held_out(
    model: MoDForCausalLM,
    sources: Sequence[Source],
    corpus: Corpus,
    options: TrainOptions,
    max_sequences: int | None = None,
    every_router: bool = True,
) -> tuple[Evaluation, list[Evaluation]]:
    """Evaluates on the text that sources hold out, in the run's precision: the mean by their shares, and each."""
    each = [
        evaluate(
            model,
            source.validation,
            corpus.end_of_text,
            source.bytes_per_token,
            max_sequences=max_sequences,
            bf16=options.precision == "bf16",
            all_causal_routers=every_router,
        )
        for source in sources
    ]
    return mean_of(each, sources), each
