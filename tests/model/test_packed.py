"""Attention of packed documents through the kernel for sequences of different lengths, against that under a mask."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PARTS, check_gradients, distinct_tokens, tiny, varlen_under_mask, with_parts
from torch import Tensor

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.model import modeling, packed
from mixture_of_depths.model.packed import Packing, documents_of, packed_positions, runs_fused
from mixture_of_depths.model.routing import Selection


def varlen_by_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
) -> Tensor:
    """What `varlen_attn` computes, one document after another; what it leaves out is no number."""
    assert window_size == (-1, 0)
    attended = torch.full_like(query, torch.nan)
    for document in range(len(cu_seq_q) - 1):
        queries = slice(int(cu_seq_q[document]), int(cu_seq_q[document + 1]))
        keys = slice(int(cu_seq_k[document]), int(cu_seq_k[document + 1]))
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        assert num_queries <= max_q
        assert num_keys <= max_k
        for i in range(num_queries):
            # The last query stands at the last key.
            seen = slice(keys.start, keys.start + num_keys - num_queries + i + 1)
            scores = torch.einsum("hd,shd->hs", query[queries.start + i], key[seen]) / query.shape[-1] ** 0.5
            attended[queries.start + i] = torch.einsum("hs,shd->hd", scores.softmax(dim=-1), value[seen])
    return attended


@contextmanager
def kernel(attention: Any = varlen_by_documents) -> Iterator[list[tuple[int, int]]]:
    """Packed documents go through the kernel, for which `attention` stands in; yields tokens and documents of each."""
    calls: list[tuple[int, int]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append((query.shape[0], len(starts) - 1))
        return attention(query, key, value, starts, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "runs_fused", lambda *_: True)
        patch.setattr(packed, "varlen_attn", counted)
        yield calls


def positions_of(batch: int, length: int, chance: float, generator: torch.Generator) -> Tensor:
    """Positions that start again with the given chance; also several times in a row, as of padding."""
    is_start = torch.rand(batch, length, generator=generator) < chance
    slots = torch.arange(length)
    return slots - (is_start * slots).cummax(dim=1).values


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    length=st.integers(2, 12),
    chance=st.sampled_from([0.1, 0.4, 0.9]),
    routing=st.sampled_from(["top_k", "causal"]),
    causal_router=st.sampled_from(["predictor", "auxiliary_loss"]),
    is_training=st.booleans(),
    parts=st.sampled_from(PARTS),
    bypass_rank=st.sampled_from([0, 4]),
    capacity=st.sampled_from([0.125, 0.5, 1.0]),
    extras=st.booleans(),
)
def test_outputs_and_gradients_are_those_under_a_mask(
    seed: int,
    batch: int,
    length: int,
    chance: float,
    routing: Any,
    causal_router: str,
    is_training: bool,
    parts: Any,
    bypass_rank: int,
    capacity: float,
    extras: bool,
) -> None:
    torch.manual_seed(seed)
    model = with_parts(
        parts,
        bypass_rank,
        capacity=[capacity, 0.5],
        causal_router=causal_router,
        first_token_enters=extras,
        query_key_norm=extras,
    ).train(is_training)
    input_ids = distinct_tokens(batch, length)
    position_ids = positions_of(batch, length, chance, torch.Generator().manual_seed(seed))
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "labels": input_ids}
    expected = model(**inputs, use_cache=False, routing=routing)
    with kernel() as calls:
        output = model(**inputs, use_cache=False, routing=routing)
    has_several = bool((position_ids.diff() != 1).any())
    # The dense block at least.
    assert bool(calls) == has_several
    assert (output.logits - expected.logits).abs().max() < 1e-9
    weights = torch.randn_like(expected.logits)
    check_gradients(model, (output.logits * weights).sum(), (expected.logits * weights).sum())


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("parts", PARTS)
def test_rows_of_which_different_numbers_of_tokens_enter_are_those_under_a_mask(parts: Any, is_training: bool) -> None:
    """One row of which none enter, one of which few, and one of which all do."""
    torch.manual_seed(0)
    model = with_parts(parts, 4).train(is_training)
    entered = torch.zeros(3, 9, dtype=torch.bool)
    entered[1, [2, 4, 5]], entered[2] = True, True
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.predictor.forward = lambda *_: torch.where(entered, 1.0, -1.0).double()
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3, 4, 0], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    inputs: dict[str, Any] = {"input_ids": distinct_tokens(3, 9), "position_ids": position_ids, "routing": "causal"}
    expected = model(**inputs, output_routing=True)
    with kernel():
        output = model(**inputs)
    assert torch.equal(expected.routing[0].entered, entered)
    assert (output.logits - expected.logits).abs().max() < 1e-9
    weights = torch.randn_like(expected.logits)
    check_gradients(model, (output.logits * weights).sum(), (expected.logits * weights).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_counts_as_a_document_reaches_nothing(side: str) -> None:
    model = tiny().eval()
    input_ids = torch.randint(0, 31, (1, 12))
    if side == "left":
        position_ids, real = torch.tensor([[0, 0, 0, *range(4), *range(5)]]), slice(3, None)
    else:
        position_ids, real = torch.tensor([[*range(4), *range(5), 0, 0, 0]]), slice(None, 9)
    alone = model(input_ids[:, real], position_ids=position_ids[:, real], routing="causal").logits
    with kernel():
        padded = model(input_ids, position_ids=position_ids, routing="causal").logits
    assert padded.isfinite().all()
    assert (padded[:, real] - alone).abs().max() < 1e-9


@pytest.mark.parametrize("rows", [None, [1, 2]])
def test_entries_that_only_fill_the_rectangle_come_last_in_the_last_document_of_their_row(rows: Any) -> None:
    """Three rows of six tokens; of the first no token enters."""
    packing = Packing(torch.tensor([0, 6, 9, 12, 16, 18], dtype=torch.int32), 6)
    index = torch.tensor([[0, 1, 2], [2, 0, 1], [0, 3, 4]])
    valid = torch.tensor([[False] * 3, [True, False, False], [True] * 3])
    if rows is None:
        chosen = packing.of(Selection(index, valid), 6)
        assert chosen.starts.tolist() == [0, 3, 4, 6, 8, 9]
    else:
        chosen = packing.of(Selection(index[rows], valid[rows], torch.tensor(rows)), 6)
        assert chosen.starts.tolist() == [0, 0, 1, 3, 5, 6]
    assert chosen.starts.dtype == torch.int32
    assert chosen.longest == 3


@pytest.mark.parametrize("parts", PARTS)
def test_every_attention_but_that_of_chosen_queries_to_all_keys_goes_through_the_kernel(parts: Any) -> None:
    model = with_parts(parts, 0, capacity=[0.5, 0.25]).train()
    position_ids = torch.tensor([[*range(3), *range(5)], [*range(8)]])
    with kernel() as calls:
        model(torch.randint(0, 31, (2, 8)), position_ids=position_ids)
    expected = []
    for layer_idx, chosen in ((0, 8), (1, 16), (2, 4)):
        part = model.config.routed_part(layer_idx)
        if part != "block_keep_keys":
            expected.append((chosen if part == "block" else 16, 3))
    assert calls == expected


def test_positions_that_all_rows_share_tell_the_documents_of_each() -> None:
    position_ids = torch.tensor([[0, 1, 0, 1, 2]])
    documents, packing = documents_of(position_ids, 2)
    assert documents is not None
    assert documents.tolist() == [[1, 1, 2, 2, 2]]
    assert packing is not None
    assert packing.starts.tolist() == [0, 2, 5, 7, 10]
    assert packing.longest == 3
    assert documents_of(torch.arange(5)[None], 2) == (None, None)
    model, input_ids = tiny().train(), torch.randint(0, 31, (2, 5))
    expected = model(input_ids, position_ids=position_ids).logits
    with kernel():
        assert (model(input_ids, position_ids=position_ids).logits - expected).abs().max() < 1e-9


def test_lengths_that_other_kernels_are_told_give_positions_and_must_fill_the_row() -> None:
    lengths = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    assert packed_positions(lengths, 8).tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    model = tiny().train()
    for wrong, told in (
        ([0, 3, 7], "from 0 to 7 "),
        ([0, 3, 9], "from 0 to 9 "),
        ([2, 8], "from 2 to 8 "),
        ([1, 4, 9], "from 1 to 9 "),
        ([0], "from 0 to 0 "),
        ([0, 5, 3, 8], "from 0 to 8, and falls between, "),
        ([0, 12, 8], "from 0 to 8, and falls between, "),
    ):
        with pytest.raises(ValueError, match=f"cu_seq_lens_q goes {told}where the row has 8 tokens"):
            model(torch.randint(0, 31, (1, 8)), cu_seq_lens_q=torch.tensor(wrong))


def test_a_compiled_block_serves_every_number_of_documents_with_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = with_parts(["block", "block_keep_keys"], 4, capacity=[0.5, 0.25]).train()
    plain, input_ids = copy.deepcopy(model), torch.randint(0, 31, (2, 12))
    several = [positions_of(2, 12, chance, torch.Generator().manual_seed(0)) for chance in (0.2, 0.4, 0.6, 0.9)]
    assert len({int((position_ids == 0).sum()) for position_ids in several}) == 4
    expected = [plain(input_ids, position_ids=position_ids, labels=input_ids).loss for position_ids in several]
    torch.stack(expected).sum().backward()

    graphs = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module

    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(modeling, "runs_fused", lambda *_: True)
    monkeypatch.setattr(packed, "varlen_attn", varlen_under_mask)
    losses = [model(input_ids, position_ids=position_ids, labels=input_ids).loss for position_ids in several]
    torch.stack(losses).sum().backward()
    # One of each block.
    assert len(graphs) == 3
    assert (torch.stack(losses) - torch.stack(expected)).abs().max() < 1e-9
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert (ours.grad - theirs.grad).abs().max() < 1e-9


FUSED: dict[str, Any] = {"num_tokens": 10_000_000, "device": "cuda", "dtype": torch.bfloat16, "head_dim": 64}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What PyTorch says of the GPU and of itself."""
    told = SimpleNamespace(capability=(8, 0), is_built=True, is_enabled=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: told.capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: told.is_built)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: told.is_enabled)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return told


def fits(number: int = 5, **changes: Any) -> bool:
    asked = {**FUSED, **changes}
    packing, device = Packing(torch.zeros(number + 1, dtype=torch.int32), 8), torch.device(asked["device"])
    return runs_fused(packing, asked["num_tokens"], device, asked["dtype"], asked["head_dim"])


def test_the_kernel_serves_half_precision_on_a_gpu_that_has_it(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fits()
    assert fits(dtype=torch.float16)
    several: tuple[dict[str, Any], ...] = (
        {"device": "cpu"},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"head_dim": 60},
        {"head_dim": 256},
        {"number": 70_000},
    )
    for changes in several:
        assert not fits(**changes), changes
    gpu.is_enabled = False
    assert not fits()
    gpu.is_enabled, gpu.capability = True, (7, 5)
    assert not fits()
    gpu.capability, gpu.is_built = (9, 0), False
    assert not fits()
    gpu.is_built = True
    assert fits()
    # PyTorch for GPUs of AMD.
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not fits()


@pytest.mark.usefixtures("gpu")
def test_the_kernel_is_not_given_documents_so_short_that_they_take_more_memory_than_their_tokens() -> None:
    assert fits(64, num_tokens=1024)
    assert not fits(65, num_tokens=1024)
    assert fits(65_535, num_tokens=65_535 * 16)
    # A batch whose rows are mostly padding of position 0.
    position_BT = torch.cat([torch.arange(300), torch.zeros(724)]).long().expand(2, -1)
    _, packing = documents_of(position_BT, 2)
    assert packing is not None
    assert packing.starts.shape[0] - 1 == 2 * 725
    assert not fits(packing.starts.shape[0] - 1, num_tokens=2048)


@pytest.mark.usefixtures("gpu")
def test_under_autocast_its_type_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    assert fits(dtype=torch.float32)
    assert not fits(dtype=torch.float64)


def test_states_reach_the_kernel_in_the_type_of_the_values() -> None:
    types = []

    def seen(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        types.append((query.dtype, key.dtype, value.dtype))
        return varlen_under_mask(query, key, value, *rest, **options)

    model: MoDForCausalLM = torch.nn.Module.to(tiny(), torch.float32).train()
    with kernel(seen), torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(0, 31, (1, 6)), position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]]))
    assert set(types) == {(torch.bfloat16,) * 3}
