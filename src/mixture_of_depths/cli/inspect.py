"""The command that shows where the compute goes: inspect."""

import sys
from pathlib import Path
from typing import Literal

from mixture_of_depths.cli.common import Checkpoint, Device, load_checkpoint, quiet_libraries
from mixture_of_depths.options import Precision


def inspect(
    checkpoint: Checkpoint,
    out: Path,
    text: str | None = None,
    file: Path | None = None,
    routing: Literal["causal", "top_k"] = "causal",
    precision: Precision = "fp32",
    figures: Path | None = None,
    trace: Path | None = None,
    device: Device = "auto",
) -> None:
    """Show where a model spends its compute on a text: a page with the text coloured by it, and figures.

    Args:
        checkpoint: Folder of a model.
        out: HTML page to write; it needs no network.
        text: Text to look at.
        file: File of text to look at, UTF-8.
        routing: What decides who enters: each token by itself, as in sampling, or top-k, as in training.
        precision: Precision of the matrix products: fp32, or bf16.
        figures: Folder to write the figures to, as PNG and SVG.
        trace: File to write the numbers to, .json or .parquet.
        device: What computes: auto takes a CUDA GPU where there is one, and else the CPU.
    """
    import torch

    from mixture_of_depths.device import chosen_device
    from mixture_of_depths.files import check_place, make_folder
    from mixture_of_depths.inspect.figures import drawn, save
    from mixture_of_depths.inspect.report import report
    from mixture_of_depths.inspect.trace import trace as run
    from mixture_of_depths.inspect.trace import under_top_k

    quiet_libraries()
    place = chosen_device(device)
    if (text is None) == (file is None):
        raise ValueError("give exactly one of text and file (--text, --file)")
    if trace is not None and trace.suffix not in (".json", ".parquet"):
        raise ValueError(f"trace={trace} must end in .json or .parquet")
    written = {name: path for name, path in (("out", out), ("trace", trace)) if path is not None}
    for name, path in written.items():
        if file is not None and file.resolve() == path.resolve():
            raise ValueError(f"file={file} would be written over; name another file for {name}")
        if path.is_dir():
            raise ValueError(f"{name}={path} is a folder; name a file in it")
        check_place(path.parent, name)
    if file is not None:
        if not file.exists():
            raise ValueError(f"file={file} does not exist; name a file of text")
        if file.is_dir():
            raise ValueError(f"file={file} is a folder; name a file of text in it")
        try:
            # As training reads it: with its own ends of lines, without a mark of the encoding.
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"file={file} is not UTF-8: {error}") from error
    assert text is not None
    model, tokenizer = load_checkpoint(checkpoint, place)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        traced = run(model, tokenizer, text, routing)
        top_k = under_top_k(model, tokenizer, traced)
    for name, path in written.items():
        make_folder(path.parent, name)
    images = drawn(traced, top_k)
    page = report(traced, images, f"{checkpoint.name}: where the compute goes")
    out.write_text(page, encoding="utf-8")
    print(out)
    if trace is not None:
        (traced.write_json if trace.suffix == ".json" else traced.write_parquet)(trace)
        print(trace)
    if figures is not None and not images:
        print(f"no figures in {figures}: the model has no routed blocks", file=sys.stderr)
    elif figures is not None:
        print(*save(images, figures), sep="\n")
