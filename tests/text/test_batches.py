"""Sequences become batches whose positions know where documents end."""

import torch

from mixture_of_depths.text.batches import Collator, document_positions


def test_positions_start_again_after_every_end_of_text() -> None:
    tokens = torch.tensor([[5, 9, 5, 5, 9, 9], [5, 5, 5, 5, 5, 9]])
    assert document_positions(tokens, 9).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_a_batch_holds_tokens_labels_and_positions() -> None:
    batch = Collator(9)([{"input_ids": [1, 9, 2]}, {"input_ids": [3, 4, 5]}])
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 9, 2], [3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
