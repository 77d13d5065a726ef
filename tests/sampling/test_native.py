"""Products of the fast step on a CPU: right values in every shape, and the fastest way by measurement."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import model_with
from torch import nn

from mixture_of_depths import MoDForCausalLM, SamplingOptions
from mixture_of_depths.compiler import load_native
from mixture_of_depths.sampling import native, stream
from mixture_of_depths.sampling.native import (
    FASTEST,
    READY,
    WAYS,
    cache_file,
    choose_fastest,
    measured,
    read_speeds,
    ways_for,
)
from mixture_of_depths.sampling.quantization import quantize
from mixture_of_depths.sampling.step import attend, matvec, matvecs, product_shapes

TYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(autouse=True)
def _nothing_measured(nothing_chosen: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "compiler_cache", lambda: tmp_path)
    monkeypatch.setattr(native, "SPEEDS", {})
    native.require_native()
    READY[:] = [True]


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(TYPES),
    rows=st.integers(1, 21),
    inputs=st.integers(1, 150),
    outputs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@example(dtype=torch.int8, rows=1, inputs=256, outputs=[1], threads=3, seed=0)
@example(dtype=torch.bfloat16, rows=16, inputs=64, outputs=[33, 8, 9], threads=2, seed=0)
def test_own_products_are_those_of_float64(
    dtype: torch.dtype, rows: int, inputs: int, outputs: list[int], threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weights = [(torch.randn(count, inputs) * 40).to(dtype) for count in outputs]
    x = torch.randn(rows, inputs)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = native.native(weights, x)
    finally:
        torch.set_num_threads(before)
    for weight, product in zip(weights, products, strict=True):
        scale = x.double().abs() @ weight.double().abs().t()
        assert product.dtype == torch.float32
        # Of as many float32 sums, each rounded.
        assert bool(((product - x.double() @ weight.double().t()).abs() <= scale * 2**-23 * (inputs + 2)).all())


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.sampled_from([1, 4, 16, 24, 66, 100]),
    slots=st.integers(0, 70),
    seed=st.integers(0, 1000),
)
def test_own_attention_is_that_of_the_step(
    dtype: torch.dtype, batch: int, heads: int, groups: int, width: int, slots: int, seed: int
) -> None:
    torch.manual_seed(seed)
    keys, values = torch.randn(2, batch, heads, slots + 1, width).to(dtype)
    # Padding before, and room behind, which may hold anything.
    first, last = torch.randint(0, slots + 1, (2, batch)).sort(dim=0).values
    place = torch.arange(slots + 1)
    used = (place >= first[:, None]) & (place < last[:, None])
    row = torch.randperm(batch)[: seed % batch] if seed % batch else torch.arange(batch)
    new = torch.randn(len(row), heads, groups, width), *torch.randn(2, len(row), heads, width)
    READY.clear()
    expected = attend(*new, (keys, values, used), row)
    READY.append(True)
    unread = (stored.masked_fill(~used[:, None, :, None], float("nan")) for stored in (keys, values))
    attended = attend(*new, (*unread, used), row)
    # A share that lies between two numbers of bf16 may be rounded to either.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(attended, expected, rtol=tolerance, atol=tolerance)


def test_attention_to_some_rows_is_that_of_all_to_these_rows() -> None:
    stored = torch.randn(4, 2, 9, 8), torch.randn(4, 2, 9, 8), torch.rand(4, 9) > 0.3
    query, (key, value), row = torch.randn(4, 2, 3, 8), torch.randn(2, 4, 2, 8), torch.tensor([3, 1])
    READY.clear()
    whole = attend(query, key, value, stored, torch.arange(4))
    torch.testing.assert_close(attend(query[row], key[row], value[row], stored, row), whole[row])
    READY.append(True)
    torch.testing.assert_close(attend(query[row], key[row], value[row], stored, row), whole[row])


def test_what_own_products_cannot_read_is_refused() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for weights, inputs in (
        ([weight.double()], x),
        ([weight], x.double()),
        ([weight.t()], torch.zeros(2, 4)),
        ([weight], x.t().contiguous().t()),
        ([weight, weight.bfloat16()], x),
        ([weight], torch.zeros(2, 9)),
    ):
        with pytest.raises(RuntimeError, match="must be"):
            native.native(weights, inputs)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_every_way_gives_the_same_product(dtype: torch.dtype, rows: int) -> None:
    weight = torch.randint(-127, 128, (24, 48)).to(dtype)
    # Exact in bf16, as what the step multiplies is where weights are narrow.
    x = torch.randn(rows, 48).bfloat16().float()
    for way in WAYS.values():
        torch.testing.assert_close(way([weight], x)[0], x @ weight.float().t(), rtol=2**-7, atol=1)


def test_ways_are_measured_once_and_kept_for_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STEADY", float("inf"))
    monkeypatch.setattr(native, "times_interrupted", lambda: 0)
    shapes = [(1, torch.float32, 24, 48), (3, torch.int8, 24, 48)]
    speeds = measured(shapes)
    assert {shape: list(ways) for shape, ways in speeds.items()} == {shape: ways_for(shape) for shape in shapes}
    assert all(speed > 0 for ways in speeds.values() for speed in ways.values())
    assert measured(shapes) == speeds
    native.SPEEDS.clear()
    assert measured(shapes) == speeds
    native.SPEEDS.clear()
    text = cache_file().read_text()
    cache_file().write_text(text.replace('"native": ', '"native": 1'))
    assert measured(shapes)[shapes[0]]["native"] != speeds[shapes[0]]["native"]


def test_the_way_with_the_highest_speed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(rows, torch.float32, 24, 48) for rows in (1, 4)]
    speeds = {
        1: {"native": 3.0, "linear": 2.0, "transposed": 1.0},
        4: {"native": 3.0, "linear": 2.0, "transposed": 9.0},
    }
    monkeypatch.setattr(native, "measure", lambda shape: (speeds[shape[0]], True))
    choose_fastest(shapes)
    assert [FASTEST[shape] for shape in shapes] == ["native", "transposed"]


def test_what_was_measured_beside_other_work_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, speeds = [(rows, torch.float32, 24, 48) for rows in (1, 4)], {"native": 3.0, "linear": 2.0}
    monkeypatch.setattr(native, "measure", lambda shape: (speeds, shape[0] == 1))
    # What other work disturbed says nothing against our own.
    assert measured(shapes) == {shapes[0]: speeds, shapes[1]: {"native": 3.0}}
    assert list(json.loads(cache_file().read_text())) == ["1 torch.float32 24 48"]


def test_what_was_kept_stays_beside_what_is_measured_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "measure", lambda shape: ({"native": float(shape[0])}, True))
    for rows in (1, 2):
        measured([(rows, torch.float32, 24, 48)])
    assert [len(speeds) for speeds in read_speeds(cache_file()).values()] == [1, 1]


def test_measurements_are_of_one_processor_number_of_threads_and_release(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cache_file().name}
    for holder, name, value in (
        (native, "processor", lambda: "another"),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, value)
            names.add(cache_file().name)
    assert len(names) == 4


def test_a_process_that_is_often_interrupted_measures_nothing_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "STEADY", float("inf"))
    for each, is_steady in ((0, True), (1000, False)):
        seen = iter([0, each])
        monkeypatch.setattr(native, "times_interrupted", lambda seen=seen: next(seen))
        assert native.measure((1, torch.float32, 24, 48))[1] is is_steady


def test_a_default_precision_does_not_change_what_is_measured() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert native.measure((1, torch.float32, 24, 48))[0]["native"] > 0
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("slower", "is_fastest"), [(1.0, True), (0.95, True), (0.5, False)])
def test_products_in_cpp_are_taken_unless_the_librarys_are_clearly_faster(
    slower: float, is_fastest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "measure", lambda shape: ({"native": 10 * slower, "linear": 10.0}, True))
    weights = [torch.zeros(4, 8), torch.zeros(8, 4)]
    assert native.is_native_fastest(weights, 2) is is_fastest
    # Of a type that only the library multiplies.
    assert not native.is_native_fastest([*weights, torch.zeros(4, 8).half()], 2)


def test_what_was_chosen_in_an_earlier_process_loads_what_is_in_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "measure", lambda shape: ({"native": 3.0, "linear": 2.0}, True))
    shapes, loaded = [(1, torch.float32, 24, 48)], []
    choose_fastest(shapes)
    FASTEST.clear()
    native.SPEEDS.clear()
    monkeypatch.setattr(native, "require_native", lambda: loaded.append(True))
    choose_fastest(shapes)
    assert loaded == [True]


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"the C\+\+ compiler .* failed; set CXX"):
        load_native("this is no C++")


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"1": 3}', '{"1": {}}', '{"1": {"amx": 3.0}}', '{"1": {"native": null}}']
)
def test_measurements_of_a_damaged_file_are_refused_by_its_name(text: str) -> None:
    cache_file().parent.mkdir(parents=True, exist_ok=True)
    cache_file().write_text(text)
    with pytest.raises(ValueError, match=cache_file().name):
        measured([(1, torch.float32, 24, 48)])


def test_layers_read_together_give_what_each_gives_alone() -> None:
    layers, x = [nn.Linear(48, 24, bias=True), nn.Linear(48, 12, bias=False)], torch.randn(3, 48)
    alone = [matvec(layer, x, torch.bfloat16) for layer in layers]
    FASTEST.update({(3, torch.float32, size, 48): "native" for size in (12, 24)})
    for together, expected in zip(matvecs(layers, x, torch.bfloat16), alone, strict=True):
        torch.testing.assert_close(together, expected, rtol=2**-7, atol=1e-6)


def test_shapes_of_a_step_are_those_of_every_product_and_number_of_rows() -> None:
    model = model_with(bypass_rank=4)
    shapes = product_shapes(model, 6)
    hidden, inside = model.config.hidden_size, model.config.intermediate_size
    assert {rows for rows, *_ in shapes} == {1, 4, 6}
    assert {(inside, hidden), (hidden, inside), (model.config.vocab_size, hidden), (4, hidden)} <= {
        shape[2:] for shape in shapes
    }
    quantize(model)
    assert {shape[1] for shape in product_shapes(model, 1)} == {torch.int8}


@pytest.mark.slow
@pytest.mark.parametrize("way", list(WAYS))
def test_compiled_tokens_are_those_of_the_model_in_every_way(
    way: str, monkeypatch: pytest.MonkeyPatch, compiled_step: None
) -> None:
    model: MoDForCausalLM = model_with().eval()
    monkeypatch.setattr(stream, "choose_fastest", lambda shapes: FASTEST.update(dict.fromkeys(shapes, way)))
    torch.compiler.reset()
    prompts = torch.randint(0, model.config.vocab_size, (2, 9))
    options = SamplingOptions(max_new_tokens=12, temperature=0)
    compiled, plain = (
        torch.stack(list(stream.stream(model, prompts, options=options, compiled=is_compiled)))
        for is_compiled in (True, False)
    )
    assert compiled.tolist() == plain.tolist()
