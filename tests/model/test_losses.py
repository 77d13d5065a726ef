"""The loss is the sum of its parts, each with its weight, whatever decides causally and whoever takes the tokens."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from models import tiny
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mixture_of_depths import MoDForCausalLM

WEIGHTS = {"predictor_loss_weight": 0.3, "auxiliary_loss_weight": 0.7}
EXPERTS = {"num_experts": 4, "load_balance_loss_weight": 0.11, "expert_z_loss_weight": 0.13}
CAPACITY = {"num_experts": 4, "expert_capacity": 0.7}


@pytest.mark.parametrize("experts", [{}, EXPERTS])
@pytest.mark.parametrize(("causal_router", "weight"), [("predictor", 0.3), ("auxiliary_loss", 0.7), ("threshold", 0.0)])
def test_the_loss_is_the_sum_of_its_weighted_parts(causal_router: str, weight: float, experts: dict[str, Any]) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids = torch.randint(0, 31, (3, 12))
    output = model(input_ids, labels=input_ids)
    assert (output.router_loss is None) == (causal_router == "threshold")
    total = output.lm_loss
    if output.router_loss is not None:
        assert output.router_loss > 0
        total = total + weight * output.router_loss
    if experts:
        assert output.balance_loss > 0
        assert output.expert_z_loss > 0
        total = total + 0.11 * output.balance_loss + 0.13 * output.expert_z_loss
    assert output.loss.item() == pytest.approx(total.item(), abs=1e-12)


ROUTERS = [("predictor", {}), ("auxiliary_loss", {}), ("threshold", EXPERTS), ("predictor", EXPERTS)]


def gradients(model: MoDForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of a loss by the weights' names; zeros where there is none."""
    names, weights = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def largest_difference(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return max((some[name] - others[name]).abs().max().item() for name in some)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
def test_gradients_do_not_depend_on_who_computes_the_loss(
    causal_router: str, experts: dict[str, Any], padding: str
) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids, mask, labels = padded(padding)
    own = gradients(model, model(input_ids, attention_mask=mask, labels=labels, skip_logits=True).loss)
    logits = model(input_ids, attention_mask=mask).logits
    of_logits = gradients(model, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    hidden = model.model(input_ids, attention_mask=mask).last_hidden_state
    theirs = F.linear(hidden[:, :-1], model.lm_head.weight)
    of_hidden = gradients(model, F.cross_entropy(theirs.flatten(0, 1), labels[:, 1:].flatten()))
    of_lm_loss = gradients(model, model(input_ids, attention_mask=mask, labels=labels, skip_logits=True).lm_loss)
    for other in (of_logits, of_hidden, of_lm_loss):
        assert largest_difference(own, other) < 1e-12
    without = {f"{name}_weight": 0.0 for name in ("predictor_loss", "auxiliary_loss")}
    if experts:
        without |= {"load_balance_loss_weight": 0.0, "expert_z_loss_weight": 0.0}
    for name, value in without.items():
        setattr(model.config, name, value)
    of_text = gradients(model, model(input_ids, attention_mask=mask, labels=labels).loss)
    own_part = {name for name in own if (own[name] - of_text[name]).abs().max() > 1e-6}
    wanted = {"predictor": "predictor", "auxiliary_loss": "router.proj", "threshold": "mlp.router.proj"}[causal_router]
    assert any(wanted in name for name in own_part)


def padded(padding: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 12, 7 and 3 tokens, with their mask and labels."""
    input_ids = torch.randint(0, 31, (3, 12))
    lengths = torch.tensor([12, 7, 3])[:, None]
    slots = torch.arange(12)
    mask = (slots >= 12 - lengths if padding == "left" else slots < lengths).long()
    # The first token of a row is predicted from nothing.
    is_predicted = (mask.cumsum(dim=1) > 1) & (mask == 1)
    return input_ids, mask, input_ids.masked_fill(~is_predicted, -100)


@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_both_kinds_of_checkpointing_give_the_gradients_of_none(
    causal_router: str, experts: dict[str, Any], use_reentrant: bool
) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids, mask, labels = padded("right")
    fields = {"attention_mask": mask, "labels": labels, "num_items_in_batch": 40}
    plain = gradients(model, model(input_ids, **fields).loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.zero_grad()
    # Reentrant checkpointing serves backward(), not grad().
    model(input_ids, **fields).loss.backward()
    checkpointed = {name: weight.grad for name, weight in model.named_parameters()}
    assert largest_difference(plain, checkpointed) == 0
    model.zero_grad()
    model(input_ids, attention_mask=mask).logits.sum().backward()
    model.gradient_checkpointing_disable()
    of_logits = gradients(model, model(input_ids, attention_mask=mask).logits.sum())
    assert largest_difference(of_logits, {name: weight.grad for name, weight in model.named_parameters()}) == 0


@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
def test_the_factor_of_the_loss_is_that_of_the_routers_losses(causal_router: str, experts: dict[str, Any]) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids = torch.randint(0, 31, (4, 12))
    once = gradients(model, model(input_ids, labels=input_ids, skip_logits=True).loss)
    fourfold = gradients(model, 4 * model(input_ids, labels=input_ids, skip_logits=True).loss)
    assert largest_difference({name: 4 * value for name, value in once.items()}, fourfold) < 1e-12


def test_the_parts_of_a_batch_add_up_to_its_gradient() -> None:
    model = tiny(causal_router="auxiliary_loss", **WEIGHTS).train()
    input_ids = torch.randint(0, 31, (4, 12))
    whole = gradients(model, model(input_ids, labels=input_ids, num_items_in_batch=44, skip_logits=True).loss)
    parts = [
        gradients(model, model(rows, labels=rows, num_items_in_batch=torch.tensor(44), skip_logits=True).loss)
        for rows in input_ids.split(2)
    ]
    assert largest_difference(whole, {name: parts[0][name] + parts[1][name] for name in whole}) < 1e-12


@pytest.mark.parametrize("routing", ["top_k", "causal"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("causal_router", "experts"), [*ROUTERS, ("threshold", {}), ("threshold", CAPACITY)])
def test_a_row_is_routed_alike_whatever_it_is_padded_to_and_batched_with(
    causal_router: str, experts: dict[str, Any], padding: str, routing: Any
) -> None:
    model = tiny(causal_router=causal_router, capacity=0.3, **WEIGHTS, **experts).eval()
    row = torch.randint(0, 31, (1, 10))
    fields: dict[str, Any] = {"routing": routing, "output_routing": True, "use_cache": False}
    alone = model(row, labels=row, **fields)
    alone_loss = model(row, labels=row, skip_logits=True, **fields).lm_loss
    for length in (11, 24, 60):
        others = torch.randint(0, 31, (3, length))
        mask = torch.ones_like(others)
        place = slice(length - 10, length) if padding == "left" else slice(0, 10)
        others[1, place] = row[0]
        mask[1] = 0
        mask[1, place] = 1
        mask[2, 5:] = 0
        labels = torch.full_like(others, -100)
        labels[1, place] = row[0]
        output = model(others, attention_mask=mask, labels=labels, **fields)
        loss = model(others, attention_mask=mask, labels=labels, skip_logits=True, **fields).lm_loss
        assert (output.logits[1, place] - alone.logits[0]).abs().max() < 1e-12
        assert loss.item() == pytest.approx(alone_loss.item(), abs=1e-12)
        for layer, of_alone in zip(output.routing, alone.routing, strict=True):
            if of_alone is not None:
                assert torch.equal(layer.entered[1, place], of_alone.entered[0])


@pytest.mark.parametrize("capacity", [0.125, 1.0])
def test_rows_too_short_for_a_choice_teach_nothing(capacity: float) -> None:
    model = tiny(causal_router="predictor", capacity=capacity, threshold_decay=0.5).train()
    router = model.model.layers[1].router
    rows = torch.randint(0, 31, (3, 9))
    mask = torch.ones_like(rows)
    mask[:, 1:] = 0
    output = model(rows, attention_mask=mask, labels=rows)
    # Where all tokens are meant to enter, those of short rows tell so, too.
    assert (output.router_loss == 0) == (capacity < 1)
    assert (router.threshold == 0).item() == (capacity < 1)
    before = router.threshold.clone()
    mixed = torch.cat([rows, rows[:1]])
    whole = torch.cat([mask, torch.ones_like(mask[:1])])
    if capacity < 1:
        alone = model(rows[:1], labels=rows[:1]).router_loss
        moved, router.threshold[:] = router.threshold.clone(), before
        together = model(mixed, attention_mask=whole, labels=mixed).router_loss
        assert together.item() == pytest.approx(alone.item(), abs=1e-12)
        assert router.threshold.item() == pytest.approx(moved.item(), abs=1e-12)


@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_of_a_loss_computed_outside_the_routers_take_part_once_a_step(use_reentrant: bool | None) -> None:
    model = tiny(causal_router="auxiliary_loss", **WEIGHTS).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    input_ids = torch.randint(0, 31, (4, 12))

    def of_logits() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids).logits.square().mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    passes = []
    for _ in range(4):
        with accelerator.accumulate(model):
            passes.append((accelerator.sync_gradients, of_logits()))
    assert [ends for ends, _ in passes] == [False, True, False, True]
    last = passes[1][1]
    model.config.auxiliary_loss_weight = 0.0
    without = of_logits()
    for ends, found in passes:
        assert largest_difference(found, last if ends else without) == 0
    assert largest_difference(last, without) > 1e-6
    accelerator.gradient_accumulation_steps = 1


def test_a_compiled_model_knows_the_last_part_of_a_step() -> None:
    model = tiny(causal_router="auxiliary_loss", num_hidden_layers=2, routed_layers=[1], **WEIGHTS).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    input_ids = torch.randint(0, 31, (4, 12))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    for _ in range(4):
        with accelerator.accumulate(model):
            of_compiled = gradients(model, compiled(input_ids).logits.square().mean())
            of_model = gradients(model, model(input_ids).logits.square().mean())
            assert largest_difference(of_compiled, of_model) < 1e-12
    accelerator.gradient_accumulation_steps = 1


@pytest.mark.parametrize("use_reentrant", [None, True, False])
@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
def test_a_loss_that_is_thrown_away_trains_no_router(
    causal_router: str, experts: dict[str, Any], use_reentrant: bool | None
) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    input_ids = torch.randint(0, 31, (4, 12))
    nothing = torch.full_like(input_ids, -100)
    for loss in (
        0 * model(input_ids, labels=input_ids).loss,
        0 * model(input_ids).logits.sum(),
        # A part of a batch without a label.
        model(input_ids, labels=nothing, num_items_in_batch=40).loss,
        model(input_ids, labels=nothing, num_items_in_batch=torch.tensor(40), skip_logits=True).loss,
    ):
        model.zero_grad()
        loss.backward()
        assert all(weight.grad is None or (weight.grad == 0).all() for weight in model.parameters())


@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
def test_outside_training_gradients_of_logits_are_those_of_the_text(
    causal_router: str, experts: dict[str, Any]
) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).eval()
    input_ids = torch.randint(0, 31, (4, 12))
    found = gradients(model, model(input_ids, routing="top_k").logits.square().sum())
    for name in ("predictor_loss", "auxiliary_loss", "load_balance_loss", "expert_z_loss"):
        setattr(model.config, f"{name}_weight", 0.0)
    assert largest_difference(found, gradients(model, model(input_ids, routing="top_k").logits.square().sum())) == 0


@pytest.mark.parametrize(("causal_router", "experts"), ROUTERS)
def test_hooks_may_change_what_a_block_returns_in_place(causal_router: str, experts: dict[str, Any]) -> None:
    model = tiny(causal_router=causal_router, **WEIGHTS, **experts).train()
    input_ids = torch.randint(0, 31, (4, 12))
    results = []
    for hook in (lambda _, args, output: output[0].mul_(1.5), lambda _, args, output: (1.5 * output[0], *output[1:])):
        hooks = [
            layer.register_forward_hook(lambda *args, hook=hook: into(hook(*args))) for layer in model.model.layers
        ]
        results.append(gradients(model, model(input_ids, labels=input_ids).loss))
        for each in hooks:
            each.remove()
    assert largest_difference(*results) < 1e-12


def into(returned: Any) -> Any:
    """What a hook gives in the place of a block's output: nothing where it changed that in place."""
    return returned if isinstance(returned, tuple) else None


@pytest.fixture
def alone() -> Any:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("experts", [{}, CAPACITY])
@pytest.mark.parametrize("capacity", [0.0, 0.3])
@pytest.mark.usefixtures("alone")
def test_under_causal_routing_every_weight_gets_a_gradient_as_processes_need(
    capacity: float, experts: dict[str, Any], use_reentrant: bool | None
) -> None:
    model = tiny(training_routing="causal", **experts).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if capacity == 0:
        for layer in model.model.layers:
            if layer.router is not None:
                torch.nn.init.constant_(layer.router.predictor.down_proj.bias, -1e9)
    input_ids = torch.randint(0, 31, (2, 12))
    processes = DistributedDataParallel(model)
    for _ in range(2):
        # A second pass ends with an error where the first left a weight out.
        output = processes(input_ids, labels=input_ids, output_routing=True)
        output.loss.backward()
    entered = sum(layer.entered.sum().item() for layer in output.routing if layer is not None)
    assert (entered == 0) == (capacity == 0)
    predictors = [weight for name, weight in model.named_parameters() if "predictor" in name]
    assert predictors
    assert all((weight.grad == 0).all() for weight in predictors)
    plain = gradients(model, 2 * model(input_ids, labels=input_ids).loss)
    assert largest_difference(plain, {name: weight.grad for name, weight in model.named_parameters()}) < 1e-9


@pytest.mark.parametrize("routed_layers", [[0, 1], [0, 1, 2]])
def test_tokens_that_are_equal_after_blocks_they_skipped_enter_whatever_the_length(routed_layers: list[int]) -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    kind = {"first_token_enters": True, "router_norm": True, "router_activation": "straight_through"}
    model = tiny(**shape, **kind, routed_layers=routed_layers, capacity=0.25).float().eval()
    fields: dict[str, Any] = {"routing": "top_k", "output_routing": True, "use_cache": False}
    for length in range(9, 60):
        # Few words, as texts have them most of the time.
        row = torch.empty(1, length).exponential_(0.5).long().clamp(max=63)
        alone = model(row, **fields).routing
        padding = length % 29 + 1
        wide = torch.cat([torch.zeros(1, padding, dtype=torch.int64), row], dim=1)
        mask = (torch.arange(padding + length) >= padding).long()[None]
        of_padded = model(wide, attention_mask=mask, **fields).routing
        skipped = torch.ones_like(row, dtype=torch.bool)
        for layer, other in zip(alone[:2], of_padded[:2], strict=True):
            entered, other_entered = layer.entered, other.entered[:, padding:]
            # Of those that entered a block before, attention leaves rounding that differs.
            assert torch.equal(entered & skipped, other_entered & skipped)
            skipped = skipped & ~entered


def test_of_equal_tokens_the_earlier_enter_whatever_the_length() -> None:
    model = tiny(routed_layers=[0], capacity=0.3, hidden_size=576, head_dim=4).float().eval()
    for length in (7, 13, 30, 61, 333):
        row = torch.full((1, length), 5)
        entered = model(row, routing="top_k", output_routing=True, use_cache=False).routing[0].entered[0]
        assert entered.tolist() == sorted(entered.tolist(), reverse=True)
        wide = torch.cat([row, torch.zeros(1, 40, dtype=torch.int64)], dim=1).expand(3, -1)
        mask = (torch.arange(length + 40) < length).long().expand(3, -1)
        output = model(wide, attention_mask=mask, routing="top_k", output_routing=True, use_cache=False)
        assert torch.equal(output.routing[0].entered[:, :length], entered.expand(3, -1))
