"""The path of one kernel for all experts, which a GPU takes in bf16, run on the CPU."""

import pytest
import torch

from mixture_of_depths.model import experts
from mixture_of_depths.model.experts import grouped_mm


@pytest.mark.parametrize("sizes", [[8, 0, 5, 3], [0, 0, 16, 0], [4, 4, 4, 4]])
def test_one_kernel_gives_the_products_and_gradients_of_one_by_one(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_E = torch.tensor(sizes).cumsum(0)
    # Three rows stand behind the last end.
    rows_MI = torch.randn(sum(sizes) + 3, 16).bfloat16()
    weight_EOI = torch.randn(4, 24, 16).bfloat16()
    grad_MO = torch.randn(len(rows_MI), 24).bfloat16()

    def products_and_gradients() -> list[torch.Tensor]:
        rows, weight = rows_MI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
        out_MO = grouped_mm(rows, weight, ends_E)
        return [out_MO.detach(), *torch.autograd.grad(out_MO, (rows, weight), grad_MO)]

    one_by_one = products_and_gradients()
    asked: list[bool] = []
    monkeypatch.setattr(experts, "_has_kernel", lambda rows, weight: asked.append(True) or True)
    with_kernel = products_and_gradients()
    assert len(asked) == 3
    assert one_by_one[2].abs().max() > 1
    for ours, theirs in zip(with_kernel, one_by_one, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=0.07, rtol=0.02)
    assert with_kernel[0][sum(sizes) :].abs().max() == 0
