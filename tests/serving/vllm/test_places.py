"""Places of the tokens that enter, against a list for each request."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from mixture_of_depths.serving.vllm.places import Step

PAGE = 4


def step_of(tables: list[list[int]], lengths: list[int], seen: list[int], num_entered: torch.Tensor) -> Step:
    """A step in which requests, of `seen` tokens before, get `lengths` more."""
    start = torch.tensor([0, *lengths]).cumsum(0).int()
    width = max(map(len, tables))
    common = CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor([a + b for a, b in zip(lengths, seen, strict=True)]).int(),
        num_reqs=len(lengths),
        num_actual_tokens=int(start[-1]),
        max_query_len=max(lengths),
        max_seq_len=max(a + b for a, b in zip(lengths, seen, strict=True)),
        block_table_tensor=torch.tensor([[*pages, *[0] * (width - len(pages))] for pages in tables]).int(),
        slot_mapping=torch.zeros(int(start[-1]), dtype=torch.int64),
    )
    return Step(common, lambda common: common, PAGE, {"block": num_entered})


@given(data=st.data())
def test_tokens_take_the_next_places_of_their_request_in_the_order_of_the_sequence(data: Any) -> None:
    count = data.draw(st.integers(1, 4))
    tables = [[1 + request + count * page for page in range(6)] for request in range(count)]
    num_entered, entered_before = torch.zeros(100, dtype=torch.int64), [0] * count
    seen = [0] * count
    for _ in range(data.draw(st.integers(1, 4))):
        lengths = [data.draw(st.integers(1, 5)) for _ in range(count)]
        enters = [[data.draw(st.booleans()) for _ in range(length)] for length in lengths]
        flat = torch.tensor([one for row in enters for one in row])
        if not flat.any():
            continue
        step = step_of(tables, lengths, seen, num_entered)
        metadata, slots = step.side_by_side("block", flat.nonzero().flatten())
        expected_slots, expected_lengths = [], []
        for request, row in enumerate(enters):
            for _ in range(sum(row)):
                place = entered_before[request]
                expected_slots.append(tables[request][place // PAGE] * PAGE + place % PAGE)
                entered_before[request] += 1
            if any(row):
                expected_lengths.append(entered_before[request])
        assert slots.tolist() == expected_slots
        assert metadata.seq_lens.tolist() == expected_lengths
        assert metadata.query_start_loc.diff().tolist() == [sum(row) for row in enters if any(row)]
        assert metadata.block_table_tensor[:, 0].tolist() == [
            t[0] for t, row in zip(tables, enters, strict=True) if any(row)
        ]
        seen = [a + b for a, b in zip(seen, lengths, strict=True)]


def test_a_token_that_asks_sees_the_tokens_up_to_itself() -> None:
    step = step_of([[1, 2], [3, 4]], [3, 2], [2, 0], torch.zeros(10, dtype=torch.int64))
    metadata = step.one_by_one(torch.tensor([2, 4, 1]), torch.tensor([0, 2, 4]))
    assert metadata.seq_lens.tolist() == [3, 5, 2]
    assert metadata.block_table_tensor.tolist() == [[1, 2], [1, 2], [3, 4]]
    assert metadata.query_start_loc.tolist() == [0, 1, 2, 3]
