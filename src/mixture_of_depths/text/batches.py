"""Sequences of tokens: packed from a row of them, spread, halved, and stacked into batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import torch
from torch import Tensor

from mixture_of_depths.text.packing import Sequences

# The column that tells conversations from texts, where there are any.
IS_CONVERSATION = "is_conversation"


def pack(tokens: np.ndarray, sequence_length: int, name: str) -> datasets.Dataset:
    """Cuts a row of tokens into sequences; the rest that does not fill a sequence is dropped.

    Raises:
        ValueError: when the row is shorter than one sequence.
    """
    count = len(tokens) // sequence_length
    if count == 0:
        raise ValueError(
            f"sequence_length={sequence_length} is longer than the {name} text, which has {len(tokens)} tokens; give "
            "more text or a shorter sequence_length"
        )
    sequences = tokens[: count * sequence_length].reshape(count, sequence_length)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=sequence_length)})
    return datasets.Dataset.from_dict({"input_ids": sequences}, features=features)


def document_positions(input_ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Positions that start again at 0 after every end of text; of shape [B, T]."""
    slots_T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    is_start_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = input_ids_BT[:, :-1] == end_of_text
    return slots_T - (is_start_BT * slots_T).cummax(dim=1).values


@dataclass(frozen=True)
class Collator:
    """Stacks sequences into a batch; positions, a sequence's own if it has any, tell where documents begin."""

    end_of_text: int

    def __call__(self, sequences: list[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids = torch.tensor(np.array([sequence["input_ids"] for sequence in sequences]), dtype=torch.int64)
        position_ids = document_positions(input_ids, self.end_of_text)
        for row, sequence in enumerate(sequences):
            if "position_ids" in sequence:
                position_ids[row] = torch.tensor(sequence["position_ids"])
        return {"input_ids": input_ids, "labels": input_ids.clone(), "position_ids": position_ids}


def batches(
    sequences: Sequences, chosen: Sequence[int], end_of_text: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The sequences `chosen`, stacked `batch_size` at a time, on a device."""
    collate = Collator(end_of_text)
    for start in range(0, len(chosen), batch_size):
        rows = list(sequences.select(chosen[start : start + batch_size]))
        yield {name: value.to(device) for name, value in collate(cast(list[dict[str, Any]], rows)).items()}


def spread(sequences: Sequences, count: int) -> Sequences:
    """`count` sequences spread evenly, or all where there are fewer."""
    return sequences.select(
        [len(sequences) * i // count for i in range(count)] if count < len(sequences) else range(len(sequences))
    )


def halves(sequences: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Every second sequence, to calibrate on, and the others, on which to see what came of it."""
    return sequences.select(range(0, len(sequences), 2)), sequences.select(range(1, len(sequences), 2))


def with_positions(sequences: datasets.Dataset, positions_ST: np.ndarray, is_conversation: bool) -> datasets.Dataset:
    """Sequences that say themselves where their tokens stand, and of which kind of text they are.

    Args:
        sequences: from `pack`.
        positions_ST (numpy.ndarray): one position a token; of shape [sequences, T].
        is_conversation: whether they are cut from conversations.
    """
    columns = {
        "input_ids": np.array(sequences["input_ids"]),
        "position_ids": positions_ST,
        IS_CONVERSATION: [is_conversation] * len(sequences),
    }
    length = positions_ST.shape[1]
    tokens = datasets.List(datasets.Value("int32"), length=length)
    features = {"input_ids": tokens, "position_ids": tokens, IS_CONVERSATION: datasets.Value("bool")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def as_text(sequences: datasets.Dataset, end_of_text: int) -> datasets.Dataset:
    """Sequences that stand beside those of conversations: marked as text, unless they say themselves what they are."""
    if IS_CONVERSATION in sequences.column_names:
        return sequences
    input_ids = torch.tensor(np.array(sequences["input_ids"]))
    return with_positions(sequences, document_positions(input_ids, end_of_text).numpy(), False)


def kinds(sequences: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The sequences by their kind of text, "text" and "conversations", those of which there are none left out."""
    if IS_CONVERSATION not in sequences.column_names:
        return {"text": sequences}
    is_conversation = np.array(sequences[IS_CONVERSATION])
    chosen = {"text": np.flatnonzero(~is_conversation), "conversations": np.flatnonzero(is_conversation)}
    return {name: sequences.select(indices) for name, indices in chosen.items() if len(indices)}
