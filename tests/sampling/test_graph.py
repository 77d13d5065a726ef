"""The step on a GPU, its kernels run by Triton's interpreter: it does what the eager step does, token by token."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gpus import interpreted
from models import greedy, left_padded
from steps import CASES, TWO, logits_of_both, model_of, spoil_routed_parts

from mixture_of_depths import MoDForCausalLM, quantize
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling import stream as stream_module
from mixture_of_depths.sampling.stream import is_graph, stream

pytestmark = interpreted


def graph_step(*arguments: Any) -> Any:
    from mixture_of_depths.sampling.graph import GraphStep

    return GraphStep(*arguments)


@pytest.mark.parametrize(("batch", "changes"), CASES)
def test_logits_and_decisions_are_those_of_the_eager_step(batch: int, changes: dict[str, Any]) -> None:
    model = model_of(**changes)
    of_step, of_eager, entered = logits_of_both(
        graph_step, model, batch, 6, 2 if batch < 18 else 1, {1: 1} if batch > 1 else None
    )
    torch.testing.assert_close(of_step, of_eager, atol=2e-5, rtol=1e-5)
    assert bool(entered[:, model.config.routed_layers].any())


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_every_kind_of_rope_turns_as_in_the_eager_step(rope_type: str) -> None:
    numbers: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    if rope_type == "llama3":
        numbers |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {"rope_type": rope_type, **numbers}
    model = model_of("block", 0, num_hidden_layers=2, routed_layers=[1], rope_parameters=parameters)
    of_step, of_eager, _ = logits_of_both(graph_step, model, 1, 6, 1)
    torch.testing.assert_close(of_step, of_eager, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "batch"), [(torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 2)])
def test_in_half_precision_decisions_are_equal_and_logits_within_a_few_roundings(
    dtype: torch.dtype, batch: int
) -> None:
    model = torch.nn.Module.to(model_of(initializer_range=0.3), dtype)
    of_step, of_eager, _ = logits_of_both(graph_step, model, batch, 6, batch)
    # A rounding of the largest number is 1/256 of it in bf16, and four blocks round some ten times each.
    rounding = torch.finfo(dtype).eps / 2
    assert (of_step - of_eager).abs().max() <= 16 * rounding * of_eager.abs().max()
    assert (of_step - of_eager).abs().mean() <= 8 * rounding * of_eager.abs().mean()


def test_a_routed_block_has_room_for_all_tokens_that_may_enter() -> None:
    model = model_of("block", 0, num_hidden_layers=1, routed_layers=[0])
    model.model.layers[0].router.threshold.fill_(-1e9)
    step = graph_step(model, torch.randint(0, 31, (1, 63)), torch.ones(1, 63, dtype=torch.int64), 3)
    assert step.layers[0].keys.shape[2] >= 63 + 3
    assert step.layers[0].values.shape == step.layers[0].keys.shape


def test_attention_over_many_slots_is_read_in_parts() -> None:
    model = model_of("block", 0, num_hidden_layers=2, routed_layers=[1], initializer_range=0.3)
    step = graph_step(model, torch.randint(0, 31, (1, 200)), torch.ones(1, 200, dtype=torch.int64), 8)
    from mixture_of_depths.sampling.graph import parts_of

    assert parts_of(step.layers[0].keys.shape[2], 1, 2) == 4
    of_step, of_eager, _ = logits_of_both(graph_step, model, 1, 200, 1)
    torch.testing.assert_close(of_step, of_eager, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_that_no_row_enters_is_not_read(batch: int) -> None:
    model = model_of(bypass_rank=0)
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.threshold.fill_(1e9)
    input_ids, mask = left_padded(batch, 5)
    step = graph_step(model, input_ids, mask, 4)
    spoil_routed_parts(model)
    keys = step.layers[0].keys.clone(), step.layers[0].values.clone()
    for _ in range(2):
        assert bool(step(torch.randint(0, 31, (batch,)), None).isfinite().all())
        assert step.entered().tolist() == [[False] * batch, [True] * batch, [False] * batch, [False] * batch]
    assert torch.equal(step.layers[0].keys, keys[0])
    assert torch.equal(step.layers[0].values, keys[1])
    # It is read as soon as one does.
    model.model.layers[0].router.threshold.fill_(-1e9)
    assert not bool(step(torch.randint(0, 31, (batch,)), None).isfinite().any())


def test_the_stream_by_it_gives_the_tokens_of_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "is_graph", lambda model: True)
    model, (input_ids, mask), seen = model_of(), left_padded(2, 6), []
    options = SamplingOptions(max_new_tokens=3, temperature=0)
    tokens = torch.stack(list(stream(model, input_ids, mask, options, compiled=True, watch=seen.append)), dim=1)
    assert torch.equal(tokens, greedy(model, input_ids, mask, 3))
    whole = model(
        torch.cat([input_ids, tokens], dim=1),
        torch.cat([mask, torch.ones_like(tokens)], dim=1),
        use_cache=False,
        output_routing=True,
    )
    for layer in (0, 2, 3):
        entered = torch.stack([entered_LB[layer] for entered_LB in seen], dim=1)
        assert torch.equal(entered, whole.routing[layer].entered[:, 6:-1])


def test_experts_weights_of_8_bits_and_the_cpu_take_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, experts, rounded, double = model_of(), model_of(num_experts=3), model_of(), model_of().double()
    quantize(rounded)
    assert not is_graph(plain)
    monkeypatch.setattr(MoDForCausalLM, "device", torch.device("cuda"))
    assert [is_graph(model) for model in (plain, experts, rounded, double)] == [True, False, False, False]


@pytest.mark.parametrize("changes", [{}, {"causal_router": "predictor"}, {"router_type": "random"}])
def test_a_step_and_its_buffers_go_with_whoever_holds_it(changes: dict[str, Any]) -> None:
    input_ids, mask = left_padded(1, 4)
    model = model_of(**TWO, parts=["block", "mlp"], **changes)
    gc.disable()
    try:
        step = graph_step(model, input_ids, mask, 2)
        step(torch.tensor([1]), None)
        alive = weakref.ref(step), weakref.ref(step.layers[0].keys)
        del step
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_recordings_lie_on_their_model_s_device_and_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixture_of_depths.sampling.graph import recorded

    made: list[str] = []

    @contextmanager
    def recording(graph: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        made.append(f"begin {graph} on {stream}, {capture_error_mode}")
        time.sleep(0.05)
        yield
        made.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", recording)
    devices = [torch.device("cuda", number) for number in range(2)]
    threads = [threading.Thread(target=recorded, args=(lambda: made.append("run"), device)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun = [f"begin graph on a stream of {device}, thread_local" for device in devices]
    assert made in ([begun[0], "run", "end", begun[1], "run", "end"], [begun[1], "run", "end", begun[0], "run", "end"])


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu_and_fits_it() -> None:
    program = Path(__file__).parents[1] / "compiled_kernels.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parent), *sys.path])}
    environment.pop("TRITON_INTERPRET")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    kernels = {"router", "decide", "place", "attention", "combine", "linear", "gate", "add"}
    assert {name.removesuffix("_kernel") for name in shared} == kernels
    # What a program has at least on any GPU that Triton compiles for.
    assert max(shared.values()) <= 64 * 1024
