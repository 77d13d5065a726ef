"""What commands share: kinds of arguments, loading a checkpoint, and what must be there."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import tyro

from mixture_of_depths.options import Precision

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from mixture_of_depths.model.configuration import MoDConfig
    from mixture_of_depths.model.modeling import MoDForCausalLM
    from mixture_of_depths.text.documents import Skipped

Checkpoint = Annotated[Path, tyro.conf.Positional]
Study = Annotated[Path, tyro.conf.Positional]
Source = Annotated[str, tyro.conf.Positional]
Texts = Annotated[tuple[str, ...], tyro.conf.Positional]
Device = Annotated[str, tyro.conf.arg(metavar="auto|cpu|cuda[:N]|mps")]


def require_extra(extra: str, *modules: str) -> None:
    """Refuses with the name of the extra that brings a missing module."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise ValueError(f'{module} is not installed; run: pip install "mixture-of-depths[{extra}]"')


def leave_stopped() -> NoReturn:
    """Ends the process at once as Ctrl-C does, with no wait for its threads."""
    os.write(2, b"stopped\n")
    os._exit(130)


def quiet_libraries() -> None:
    """Stops the libraries' own progress bars, which would tear ours apart."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def check_folder(checkpoint: Path) -> None:
    """Raises ValueError where there is no folder of a model."""
    if not checkpoint.exists():
        raise ValueError(f"checkpoint={checkpoint} does not exist; name the folder of a trained model")
    if not checkpoint.is_dir():
        raise ValueError(f"checkpoint={checkpoint} is a file; name the folder of a trained model")
    if not (checkpoint / "config.json").is_file():
        raise ValueError(f"checkpoint={checkpoint} holds no config.json; name the folder of a trained model")


def read_config(checkpoint: Path) -> "MoDConfig":
    """The configuration of the model in a folder.

    Raises:
        ValueError: when there is none, or it is damaged or that of another kind of model.
    """
    from transformers import AutoConfig

    from mixture_of_depths.model.configuration import MoDConfig

    check_folder(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:
        # What libraries raise about a damaged file has no common kind.
        raise ValueError(f"checkpoint={checkpoint} cannot be read; copy it anew, or give another: {error}") from error
    if not isinstance(config, MoDConfig):
        raise ValueError(
            f"checkpoint={checkpoint} is a {config.model_type} model, not mixture_of_depths; make one of it with "
            "mod retrofit"
        )
    return config


def tell_skipped(skipped: "Skipped") -> None:
    """Says on standard error what of a text was read and not used, if anything was."""
    from mixture_of_depths.text.documents import Skipped

    if skipped != Skipped():
        print(f"skipped: {skipped}", file=sys.stderr)


def saved_dtype(config: "MoDConfig") -> "torch.dtype":
    """What a model's weights are saved in, by its configuration: float32 where that does not say."""
    import torch

    # The library makes a type of the name in the file.
    return cast(torch.dtype, config.dtype or torch.float32)


def load_checkpoint(checkpoint: Path, device: "torch.device") -> "tuple[MoDForCausalLM, PreTrainedTokenizerBase]":
    """The model in a folder, on a device, and its tokenizer; the weights in float32, also where saved in less.

    Raises:
        ValueError: when there is none, or its weights are damaged or do not fit its configuration.
    """
    import torch
    from torch import nn

    from mixture_of_depths.model.modeling import MoDForCausalLM
    from mixture_of_depths.text.tokenizer import check_vocabulary, load_tokenizer

    config = read_config(checkpoint)
    dtype = torch.promote_types(saved_dtype(config), torch.float32)
    try:
        # The library annotates the model alone; asked for it, it returns what it found beside the model.
        loaded: Any = MoDForCausalLM.from_pretrained(
            checkpoint, output_loading_info=True, use_safetensors=True, dtype=dtype
        )
        model, loading_info = loaded
    except Exception as error:
        # What libraries raise about a damaged file has no common kind; the tokenizers' reader raises Exception itself.
        raise ValueError(f"checkpoint={checkpoint} cannot be read; copy it anew, or give another: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading_info[kind]:
            names = ", ".join(sorted(map(str, loading_info[kind]))[:3])
            raise ValueError(f"checkpoint={checkpoint} does not fit its config.json: {kind}: {names}")
    tokenizer = load_tokenizer(str(checkpoint))
    check_vocabulary(tokenizer, config.vocab_size, f"checkpoint={checkpoint}")
    nn.Module.to(model, device)
    return model.eval(), tokenizer


class Unchecked:
    """Options as the parser makes them: unchecked, for it would draw a box around what is wrong with them."""

    def __post_init__(self) -> None:
        """Leaves the check to the command."""


def load_model(checkpoint: Path, device: "torch.device") -> "tuple[MoDForCausalLM, PreTrainedTokenizerBase]":
    """As `load_checkpoint`, and also a dense model of another kind: a folder, a GGUF file or a name of the hub."""
    from torch import nn

    from mixture_of_depths.model.convert import is_hub_name, load_dense
    from mixture_of_depths.text.tokenizer import check_vocabulary, checked

    config, source = checkpoint / "config.json", str(checkpoint)
    described = config.read_text(errors="replace") if config.is_file() else ""
    is_other = '"model_type"' in described and "mixture_of_depths" not in described
    is_elsewhere = not checkpoint.exists() and is_hub_name(source)
    if not (checkpoint.exists() or is_elsewhere):
        raise ValueError(
            f"checkpoint={source} is no folder or file, and no name of the hub either, OWNER/NAME; name the folder of "
            "a model, a GGUF file or a model of the hub"
        )
    if not (is_other or is_elsewhere or checkpoint.suffix == ".gguf"):
        return load_checkpoint(checkpoint, device)
    model, tokenizer = load_dense(source)
    check_vocabulary(tokenizer, model.config.vocab_size, f"checkpoint={source}")
    nn.Module.to(model, device)
    return model.eval(), checked(tokenizer, source)


def load_to_sample(
    checkpoint: Path, precision: Precision, device: "torch.device"
) -> "tuple[MoDForCausalLM, PreTrainedTokenizerBase]":
    """As `load_checkpoint`, with the weights in the precision of the products, in which each step reads them."""
    import torch

    model, tokenizer = load_checkpoint(checkpoint, device)
    if precision == "bf16":
        torch.nn.Module.to(model, torch.bfloat16)
    return model, tokenizer
