"""A device of its own that computes on the CPU, and refuses what a GPU would: tensors of the CPU among its own.

A program, run by `test_following.py` in a process of its own, since what it tells PyTorch of a new device holds for the
whole process. It runs the package's code with a model on that device, and prints a JSON object: `cases`, of each the
error or null, and the places in the package where the host waited for the device; and `loaded`, the modules of the
package that were loaded where waking a GPU is an error; and `kernels`, those for CUDA devices, loaded until the end.
"""

import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import pretended_gpus
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

# Loading the package must not wake a GPU that is there: this fails where it does.
with pretended_gpus(1):
    from models import TOKENIZER, some_sequences, tiny, varlen_under_mask

    import mixture_of_depths
    import mixture_of_depths.cli.main
    import mixture_of_depths.demo
    import mixture_of_depths.retrofitting.tune
    from mixture_of_depths import (
        MoDForCausalLM,
        SamplingOptions,
        calibrate,
        evaluate,
        quantize,
        sample_texts,
        stream,
        trace_tokens,
    )
    from mixture_of_depths.isoflop.measure import gain_from_later_tokens
    from mixture_of_depths.model import modeling, packed
    from mixture_of_depths.retrofitting.fit import fit_blocks
    from mixture_of_depths.retrofitting.measure import measure_importance, routed_from
    from mixture_of_depths.text.batches import document_positions
LOADED = [name for name in sys.modules if name.startswith("mixture_of_depths.")]

PACKAGE = Path(mixture_of_depths.__file__).parent
ATEN = torch.ops.aten
# What may take a tensor from one device to another.
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
# What has the host wait, wherever it does not also copy to the host: sizes and values that the data decide.
WAITING = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default, ATEN.equal.default}


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", backend_module=Module())
DEVICE = torch.device("pretended:0")


class Pretended(Tensor):
    """A tensor of the CPU that says it is on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), **layout, device=DEVICE)
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device")


class Device(TorchDispatchMode):
    """Has operators of tensors on the device computed on the CPU.

    Attributes:
        waits: how often the host waited, by the place in the package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        asked = kwargs.get("device")
        if not ours and (asked is None or asked.type != DEVICE.type):
            return func(*args, **kwargs)
        others = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim() > 0]
        if ours and others and func not in COPIES:
            raise AssertionError(f"{func} mixes tensors of the device with some of the CPU")
        is_copied = func is ATEN.copy_.default and not isinstance(args[0], Pretended)
        leaves = is_copied or (asked is not None and asked.type == "cpu")
        if ours and (leaves or func in WAITING or self._is_masked(func, args)):
            self.waits[_place()] += 1
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        of_inner = {id(tensor.inner): tensor for tensor in ours}
        args, kwargs = tree_map_only(Pretended, lambda tensor: tensor.inner, (args, kwargs))
        returned = func(*args, **kwargs)
        if leaves:
            return returned
        # What was changed in place is the tensor that it was.
        return tree_map_only(
            Tensor, lambda made: of_inner[id(made)] if id(made) in of_inner else Pretended(made), returned
        )

    @staticmethod
    def _is_masked(func: Any, args: Any) -> bool:
        if func not in (ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default):
            return False
        return any(index is not None and index.dtype == torch.bool for index in args[1])


def _place() -> str:
    """The innermost line of the package that is at work."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(PACKAGE)):
            return f"{Path(frame.filename).relative_to(PACKAGE)}:{frame.name}"
    return "elsewhere"


def model_on_device(**changes: Any) -> MoDForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_hidden_layers": 4, "capacity": 0.5, "max_position_embeddings": 64}
    return torch.nn.Module.to(tiny(**{**fields, **changes}).float(), DEVICE)


def tokens(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(1, 31, (rows, length)).to(DEVICE)


def step(**changes: Any) -> None:
    """A training step over packed documents, and one over padded rows."""
    model = model_on_device(**changes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    for layout in ({"position_ids": document_positions(input_ids, 5)}, {"attention_mask": mask}):
        model(input_ids=input_ids, labels=input_ids, skip_logits=True, **layout).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fused_step() -> None:
    """A training step whose packed documents go through the kernel, which the device does not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "runs_fused", lambda *_: True)
        patch.setattr(packed, "varlen_attn", varlen_under_mask)
        step(routed_parts=["block", "block_keep_keys"])


def sample(options: SamplingOptions, quantized: bool = False, **changes: Any) -> None:
    model = model_on_device(**changes).eval()
    if quantized:
        quantize(model)
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[0, :3] = 0
    assert model.generation_config is not None
    model.generation_config.eos_token_id = 7
    assert all(token.device.type == "cpu" for token in stream(model, input_ids, mask, options))


def prefill(**changes: Any) -> None:
    """The pass over the prompts that fills the cache."""
    model = model_on_device(num_hidden_layers=4, routed_layers=[1, 3], **changes).eval()
    model.model.layers[3].router.predictor.down_proj.bias.data.fill_(1e6)
    with torch.no_grad():
        model(tokens(3), use_cache=True, routing="causal", logits_to_keep=1)


def sample_two() -> None:
    """Two tokens a row, of which the second is a pass of its own over blocks that all rows enter."""
    model = model_on_device(num_hidden_layers=4, routed_layers=[1, 3]).eval()
    for layer_idx in (1, 3):
        model.model.layers[layer_idx].router.predictor.down_proj.bias.data.fill_(1e6)
    options = SamplingOptions(max_new_tokens=2, temperature=0)
    assert len(list(stream(model, tokens(3), options=options))) == 2


def generate() -> None:
    model: Any = model_on_device().eval()
    assert model.generate(tokens(1), max_new_tokens=4, do_sample=False, pad_token_id=0).device == DEVICE


def judge(**changes: Any) -> None:
    model = model_on_device(**changes)
    sequences = some_sequences(4, 8)
    calibrate(model, sequences, 5)
    evaluate(model, sequences, 5, 1.0)
    gain_from_later_tokens(model.eval(), sequences, 5, stride=4)


def retrofit() -> None:
    dense = model_on_device(routed_layers=[])
    sequences = some_sequences(4, 8)
    fit = fit_blocks(dense, sequences, 5, 2)
    assert fit.router_LD.device == DEVICE
    kind = {"routed_parts": "block_keep_keys", "bypass_rank": 2}
    assert len(list(measure_importance(dense, fit, kind, sequences, 5))) == dense.config.num_hidden_layers
    assert routed_from(dense, routed_layers=[1], capacity=0.5).device == DEVICE


def texts() -> None:
    model = model_on_device(vocab_size=len(TOKENIZER)).eval()
    (sampled,) = sample_texts(model, TOKENIZER, ["the quick"], SamplingOptions(max_new_tokens=3, stop=("fox",)))
    trace_tokens(model, TOKENIZER, sampled.tokens)


def mix() -> None:
    """What must fail, or nothing here shows anything."""
    torch.zeros(8) + tokens()


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "num_noop_experts": 1, "expert_capacity": 1.0}
DRAWN = SamplingOptions(max_new_tokens=4, repetition_penalty=1.2, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01)
CASES: dict[str, Callable[[], None]] = {
    "training step": step,
    "training step, random routing": lambda: step(router_type="random"),
    "training step, threshold and first token": lambda: step(causal_router="threshold", first_token_enters=True),
    "training step, experts": lambda: step(**EXPERTS),
    "training step, fused documents": fused_step,
    "stream, greedy": lambda: sample(SamplingOptions(max_new_tokens=4, temperature=0)),
    "stream, drawn": lambda: sample(DRAWN),
    "stream, experts": lambda: sample(DRAWN, **EXPERTS),
    "stream, int8": lambda: sample(DRAWN, quantized=True),
    "prefill": prefill,
    "prefill, experts": lambda: prefill(**EXPERTS),
    "stream, two tokens": sample_two,
    "generate()": generate,
    "calibrate, evaluate": judge,
    "calibrate, evaluate, experts": lambda: judge(**EXPERTS),
    "retrofit": retrofit,
    "sample_texts, trace": texts,
    "a mixture": mix,
}


def on_device(make: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.tensor`, which asks no mode when it takes what it made to a device."""

    def made(values: Any, *, device: Any = None, **changes: Any) -> Tensor:
        tensor = make(values, **changes)
        return tensor if device is None else tensor.to(device)

    return made


def main() -> None:
    make_generator: Any = torch.Generator
    torch.tensor = on_device(torch.tensor)
    # Of the device it has the numbers of the CPU; which one was asked for does not get lost.
    torch.Generator = lambda device: make_generator("cpu" if torch.device(device) == DEVICE else "meta")  # type: ignore
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        error = None
        with Device() as device:
            try:
                case()
            except Exception:
                error = traceback.format_exc()
        results[name] = {"error": error, "waits": dict(device.waits)}
    kernels = [name for name in sys.modules if name.startswith("mixture_of_depths.sampling.kernels")]
    print(json.dumps({"cases": results, "loaded": LOADED, "kernels": kernels}))


if __name__ == "__main__":
    main()
