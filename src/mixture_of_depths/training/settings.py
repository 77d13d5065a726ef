"""What a run's options say to the libraries: the model's configuration and the trainer's arguments, checked."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import PreTrainedTokenizerBase
from transformers import TrainingArguments as HFTrainingArguments

from mixture_of_depths.distributed import LONGEST_WAIT, processes
from mixture_of_depths.fields import validate_fields
from mixture_of_depths.model.configuration import MoDConfig
from mixture_of_depths.model.flops import model_parameters
from mixture_of_depths.options import ModelOptions, TrainOptions
from mixture_of_depths.text.corpus import Corpus
from mixture_of_depths.text.tokenizer import end_of_text, entries
from mixture_of_depths.training.horizon import Horizon

# Of AdamW.
BETAS = (0.9, 0.95)


def model_config(options: ModelOptions, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int) -> MoDConfig:
    """The configuration that the options describe, for a tokenizer and sequences of `sequence_length` tokens.

    Without a tokenizer it has the vocabulary that `MoDConfig` has by itself: whatever else is wrong shows already.
    """
    explicit = [name for name in ("routed_layers", "route_every", "route_from") if getattr(options, name) is not None]
    unrouted = "routed=False (--no-routed)"
    if (not options.routed and explicit) or ("routed_layers" in explicit and len(explicit) > 1):
        names = " and ".join(explicit if options.routed else [*explicit, unrouted])
        raise ValueError(
            f"{names} contradict one another; give {unrouted}, or routed_layers, or route_every and route_from"
        )
    if not options.routed:
        fields: dict[str, Any] = {"routed_layers": []}
    elif options.routed_layers is not None:
        fields = {"routed_layers": list(options.routed_layers)}
    else:
        fields = {"route_every": options.route_every, "route_from": options.route_from}
    if tokenizer is not None:
        fields |= {"vocab_size": entries(tokenizer), "eos_token_id": end_of_text(tokenizer)}
        fields["pad_token_id"] = cast(int | None, tokenizer.pad_token_id)
    return MoDConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        query_key_norm=options.query_key_norm,
        rope_parameters={"rope_type": "default", "rope_theta": options.rope_theta},
        tie_word_embeddings=options.tie_word_embeddings,
        initializer_range=options.initializer_range,
        max_position_embeddings=max(2048, sequence_length),
        capacity=options.capacity[0] if len(options.capacity) == 1 else list(options.capacity),
        routed_parts=options.routed_parts[0] if len(options.routed_parts) == 1 else list(options.routed_parts),
        bypass_rank=options.bypass_rank,
        router_type=options.router_type,
        router_activation=options.router_activation,
        causal_router=options.causal_router,
        training_routing=options.training_routing,
        predictor_hidden_size=options.predictor_hidden_size,
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        expert_routing=options.expert_routing,
        expert_capacity=options.expert_capacity,
        num_noop_experts=options.num_noop_experts,
        noop_share=options.noop_share,
        load_balance_loss_weight=options.load_balance_loss_weight,
        expert_z_loss_weight=options.expert_z_loss_weight,
        **fields,
    )


def check_memory(config: MoDConfig, device: torch.device) -> None:
    """Raises ValueError for a model whose weights alone are more than the device's memory, before it is tried."""
    needed, place, there = 4 * model_parameters(config), "machine", psutil.virtual_memory().total
    # Apple's GPUs share the machine's.
    if device.type == "cuda":
        sharing = processes().num_processes if parse_flag_from_env("ACCELERATE_USE_FSDP") else 1
        place = "GPU" if sharing == 1 else f"{sharing} GPUs"
        there = sharing * torch.cuda.mem_get_info(device)[1]
    if needed > there:
        raise ValueError(
            f"hidden_size={config.hidden_size} and num_hidden_layers={config.num_hidden_layers}: the weights alone "
            f"take {needed / 1e9:.3g} GB, and the memory of the {place} is {there / 1e9:.3g}; lower them"
        )


def check_options(options: TrainOptions, corpus: Corpus) -> None:
    """Raises ValueError for an option that is out of its range, or a batch larger than the text."""
    validate_fields(options)
    if options.batch_size % processes().num_processes:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of the {processes().num_processes} processes, which "
            "share it; change one of them"
        )
    if options.batch_size // processes().num_processes % options.gradient_accumulation_steps:
        shared = f" over {processes().num_processes} processes" if processes().num_processes > 1 else ""
        raise ValueError(
            f"gradient_accumulation_steps={options.gradient_accumulation_steps} must divide batch_size="
            f"{options.batch_size}{shared}"
        )
    if options.optimizer == "muon" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("optimizer=muon needs whole matrices, and FSDP cuts them; give optimizer=adamw")
    if len(corpus.train) < options.batch_size:
        raise ValueError(
            f"batch_size={options.batch_size} is more than the {len(corpus.train)} sequences of training text; "
            "lower it, shorten sequence_length or give more text"
        )


@dataclass
class DeviceArguments(HFTrainingArguments):
    """The library's arguments, on a device that is chosen; by itself it takes all the GPUs that a process sees.

    Where a launcher started the process, it has the GPU of its number.
    """

    chosen_device: str = "cpu"
    """Device of the run, by its name."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        if processes().distributed_type != DistributedType.NO:
            return super()._setup_devices
        device = torch.device(self.chosen_device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)
        # What it was for a run before.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed_state = PartialState(cpu=device.type == "cpu")
        self.distributed_state.device = device
        self._n_gpu = int(device.type != "cpu")
        return device


def trainer_arguments(
    options: TrainOptions, config: MoDConfig, length: Horizon, folder: Path, device: torch.device
) -> HFTrainingArguments:
    """The library's own arguments for a run on a device."""
    part = math.ceil(length.steps / 5)
    return DeviceArguments(
        chosen_device=str(device),
        output_dir=str(folder),
        max_steps=length.steps,
        per_device_train_batch_size=options.batch_size
        // processes().num_processes
        // options.gradient_accumulation_steps,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        dataloader_drop_last=True,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=round(options.warmup_fraction * length.steps),
        weight_decay=options.weight_decay,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=options.max_grad_norm,
        bf16=options.precision == "bf16",
        use_cpu=device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_every or part,
        save_steps=options.save_every or part,
        save_total_limit=2,
        seed=options.seed,
        # The library adds the epoch to it: orders of seeds that are neighbours would be each other's, an epoch later.
        data_seed=options.order_seed * 1_000_003 % 2**32,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        # Every weight gets its gradient in every step, and thresholds follow each process' own rows.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        # Else the library sets the model's own to false, and saves it so.
        use_cache=config.use_cache,
        ddp_timeout=int(LONGEST_WAIT.total_seconds()),
    )
