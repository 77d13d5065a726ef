"""Muon against PyTorch's, and which weights it is given."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import QUIET, config_for
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_depths import Corpus, MoDForCausalLM, TrainOptions, train
from mixture_of_depths.training.horizon import horizon
from mixture_of_depths.training.muon import RMS, Muon, muon_flops, muon_groups, orthogonal

SHAPES = [(24, 24), (24, 40), (40, 24)]


def test_steps_are_those_of_pytorch_up_to_its_rounding_to_bf16() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    muon = Muon([{"params": ours, "weight_decay": 0.1, "is_orthogonal": True, "stacked": 1}], 1e-2, (0.9, 0.95))
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        muon.step()
        reference.step()
    for start, weight, other in zip(starts, ours, theirs, strict=True):
        assert (weight - other).norm() < 0.02 * (weight - start).norm()


@pytest.mark.parametrize("shape", [*SHAPES, (3, 24, 40), (3, 40, 24)])
def test_a_matrix_keeps_its_directions_and_has_singular_values_near_to_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.mT @ orthogonal(matrix) @ right.mT
    singular = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(singular)).abs().max() < 1e-9
    assert singular.max() < 1.25
    assert singular.median() > 0.65


def test_the_matrices_of_blocks_take_orthogonal_steps_and_all_others_those_of_adamw(corpus: Corpus) -> None:
    model = MoDForCausalLM(config_for(corpus, num_experts=2, bypass_rank=4))
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = muon_groups(model, 0.3)
    blocks, pairs, others, constant = ({names[id(weight)] for weight in group["params"]} for group in groups)
    assert blocks | pairs | others | constant == set(names.values())
    assert pairs == {name for name in names.values() if "gate_up" in name}
    assert others == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("router" in name or "norm" in name for name in constant)
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3, 0.3, 0.0]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = Muon(groups, 0.1, (0.9, 0.95))
    for group in groups:
        group["weight_decay"] = 0.0
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        step = (weight - before[name]).square().mean().sqrt().item() / 0.1
        # The first step of AdamW is 1 in all places.
        assert step == pytest.approx(RMS if name in blocks | pairs else 1.0, rel=0.2), name


def test_the_flops_of_a_step_are_those_that_a_counter_sees(corpus: Corpus) -> None:
    config = config_for(corpus, num_experts=2, bypass_rank=4)
    with FlopCounterMode(display=False) as counter:
        for group in muon_groups(MoDForCausalLM(config), 0.0):
            for weight in group["params"] if group["is_orthogonal"] else ():
                orthogonal(weight.unflatten(-2, (group["stacked"], -1)))
    assert muon_flops(config) == counter.get_total_flops()
    options = TrainOptions(max_steps=3, batch_size=4)
    muon, adamw = (horizon(replace(options, optimizer=name), config, 16).flops for name in ("muon", "adamw"))
    assert muon == adamw + 3 * muon_flops(config)


def test_matrices_stacked_in_one_weight_take_the_steps_of_each_alone() -> None:
    starts = torch.randn(2, 3, 8, 6)
    stacked = torch.nn.Parameter(starts.flatten(1, 2))
    alone = [torch.nn.Parameter(start.clone()) for start in starts.flatten(0, 1)]
    pair = Muon([{"params": [stacked], "weight_decay": 0.1, "is_orthogonal": True, "stacked": 3}], 0.1, (0.9, 0.95))
    single = Muon([{"params": alone, "weight_decay": 0.1, "is_orthogonal": True, "stacked": 1}], 0.1, (0.9, 0.95))
    for _ in range(3):
        stacked.grad = torch.randn_like(stacked)
        for weight, grad in zip(alone, stacked.grad.unflatten(1, (3, -1)).flatten(0, 1), strict=True):
            weight.grad = grad.clone()
        pair.step()
        single.step()
    torch.testing.assert_close(stacked, torch.stack(list(alone)).view(2, 24, 6))


def test_an_expert_without_a_gradient_takes_no_step() -> None:
    experts = torch.nn.Parameter(torch.randn(2, 8, 6))
    muon = Muon([{"params": [experts], "weight_decay": 0.0, "is_orthogonal": True, "stacked": 1}], 0.1, (0.9, 0.95))
    experts.grad = torch.randn_like(experts)
    muon.step()
    before = experts.detach().clone()
    experts.grad[1] = 0
    muon.step()
    assert not torch.equal(experts[0], before[0])
    assert torch.equal(experts[1], before[1])


def test_a_run_learns_with_it_and_fsdp_is_refused(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions(max_steps=12, batch_size=4, learning_rate=1e-2, calibrate=False)
    losses = []
    for optimizer in ("adamw", "muon"):
        _, result = train(
            config_for(corpus), corpus, replace(options, optimizer=optimizer), tmp_path / optimizer, console=QUIET
        )
        assert result.evaluation is not None
        losses.append(result.evaluation.loss_causal)
    assert losses[1] != losses[0]
    assert max(losses) < 5.5
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="optimizer=muon needs whole matrices"):
        train(config_for(corpus), corpus, replace(options, optimizer="muon"), tmp_path / "fsdp", console=QUIET)
