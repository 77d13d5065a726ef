"""The loss of the next token, with and without the logits in memory."""

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import dispatch_model
from models import tiny
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.model import loss as loss_module
from mixture_of_depths.model.loss import chunked_loss, distilled_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_newest", [True, False])
def test_a_loss_without_logits_is_the_loss_of_the_logits(
    dtype: torch.dtype, is_newest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # False in torch before 2.13, and so for both there.
    newest = is_newest and loss_module.HAS_LINEAR_CROSS_ENTROPY
    monkeypatch.setattr(loss_module, "HAS_LINEAR_CROSS_ENTROPY", newest)
    model = tiny(vocab_size=997).train()
    torch.nn.Module.to(model, dtype)
    input_ids, mask = padded_rows(400)
    labels = input_ids.masked_fill(mask == 0, -100)
    fields: dict[str, Any] = {"attention_mask": mask, "labels": labels}
    results = []
    for skip in (True, False):
        for count in (None, 700, torch.tensor(700)):
            model.zero_grad()
            output = model(input_ids, num_items_in_batch=count, skip_logits=skip, **fields)
            output.loss.backward()
            assert (output.logits is None) == skip
            assert output.lm_loss.dtype == torch.promote_types(dtype, torch.float32)
            results.append((output.loss.item(), [weight.grad.clone() for weight in model.parameters()]))
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for (loss, grads), (expected, expected_grads) in zip(results[:3], results[3:], strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
        for a, b in zip(grads, expected_grads, strict=True):
            assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("tokens", [512, 16384])
def test_in_bf16_the_parts_sum_their_gradients_of_the_head_in_float32(autocast: bool, tokens: int) -> None:
    hidden, target = torch.randn(1, tokens, 16), torch.randint(0, 50, (1, tokens))
    head = torch.randn(50, 16)
    if not autocast:
        hidden, head = hidden.bfloat16(), head.bfloat16()
    errors = {}
    exact = head.double().requires_grad_()
    logits = F.linear(hidden[0].double(), exact)
    F.cross_entropy(logits, target[0]).backward()
    for name in ("parts", "at once"):
        weight = head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if name == "parts":
                loss = chunked_loss(hidden, weight, target, None)
            else:
                loss = F.cross_entropy(F.linear(hidden[0], weight).float(), target[0])
        loss.backward()
        errors[name] = ((weight.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
    # Under autocast the logits of both are those of bf16.
    assert 0.001 < errors["at once"] < 0.01
    assert errors["parts"] < 1.3 * errors["at once"]


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, False, 1e-12),
        (torch.float64, True, 1e-12),
        (torch.float32, False, 1e-5),
        (torch.float32, True, 2e-2),
        (torch.bfloat16, False, 2e-2),
    ],
)
@pytest.mark.parametrize("is_head_tuned", [True, False])
@pytest.mark.parametrize("count", [None, 900])
def test_a_distilled_loss_in_parts_is_that_of_the_logits(
    dtype: torch.dtype, autocast: bool, tolerance: float, is_head_tuned: bool, count: int | None
) -> None:
    # The teacher is wider, and no part is full.
    hidden, teacher = torch.randn(3, 211, 16, dtype=dtype), torch.randn(3, 211, 24, dtype=dtype)
    head, teacher_head = torch.randn(50, 16, dtype=dtype) / 4, torch.randn(50, 24, dtype=dtype) / 5
    target = torch.randint(0, 50, (3, 211)).masked_fill(torch.rand(3, 211) < 0.3, -100)
    leaves = [tensor.double().clone().requires_grad_() for tensor in (hidden, head)]
    log_p = F.linear(*leaves).log_softmax(-1)
    log_q = F.linear(teacher.double(), teacher_head.double()).log_softmax(-1)
    surprise = F.cross_entropy(log_p.flatten(0, 1), target.flatten(), reduction="sum")
    divergence = F.kl_div(log_p, log_q, log_target=True, reduction="none")[target != -100].sum()
    (expected := (0.7 * surprise + 0.3 * divergence) / (count or (target != -100).sum())).backward()

    hidden.requires_grad_()
    head.requires_grad_(is_head_tuned)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = distilled_loss(hidden, head, target, count, teacher, teacher_head, 0.3)
    # As another loss beside it would weigh it.
    (loss * 2).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for given, exact in zip((hidden, head), leaves, strict=True):
        assert (given.grad is None) == (not given.requires_grad)
        if given.requires_grad:
            assert given.grad.dtype == given.dtype
            assert (given.grad / 2 - exact.grad).norm() <= tolerance * exact.grad.norm()


def test_a_loss_from_hidden_states_is_refused_where_logits_are_taken() -> None:
    adapted = get_peft_model(tiny().float(), LoraConfig(r=2, target_modules=["lm_head"])).train()
    input_ids = torch.randint(0, 31, (2, 12))
    for model, skip_logits in ((adapted, True), (tiny(), False)):
        with pytest.raises(ValueError, match="loss_from_hidden needs skip_logits=True, and a head without adapters"):
            model(input_ids=input_ids, labels=input_ids, skip_logits=skip_logits, loss_from_hidden=chunked_loss)


def test_a_distilled_loss_with_nothing_to_predict_is_none_and_has_gradients_of_0() -> None:
    hidden, head = torch.randn(1, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = distilled_loss(hidden, head, torch.full((1, 5), -100), None, hidden.detach(), head.detach(), 0.5)
    loss.backward()
    assert loss.isnan()
    assert not hidden.grad.any()
    assert not head.grad.any()


def test_a_loss_function_of_ones_own_serves_whatever_the_model_is_in() -> None:
    model, input_ids = tiny().eval(), torch.randint(0, 31, (2, 12))
    model.loss_function = lambda logits, shift_labels, **others: logits.sum() * (shift_labels == -100).sum()
    for dtype in (torch.float64, torch.float32):
        output = model.to(dtype)(input_ids, labels=input_ids)
        torch.testing.assert_close(output.lm_loss, 2 * output.logits.sum())


def test_float64_stays_so_under_autocast() -> None:
    hidden, head, target = (
        torch.randn(1, 400, 16).double(),
        torch.randn(50, 16).double(),
        torch.randint(0, 50, (1, 400)),
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(hidden, head, target, None)
    assert loss.item() == pytest.approx(F.cross_entropy(F.linear(hidden, head)[0], target[0]).item(), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip_logits", [True, False])
def test_a_batch_with_nothing_to_predict_has_no_loss_and_gradients_of_0(dtype: torch.dtype, skip_logits: bool) -> None:
    model = tiny().to(dtype).train()
    input_ids = torch.randint(0, 31, (2, 12))
    loss = model(input_ids, labels=torch.full_like(input_ids, -100), skip_logits=skip_logits).lm_loss
    loss.backward()
    assert loss.isnan()
    assert all(weight.grad is None or (weight.grad == 0).all() for weight in model.parameters())


def padded_rows(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of tokens, the second padded on the right, and their mask."""
    input_ids = torch.randint(0, 31, (2, length))
    mask = torch.ones_like(input_ids)
    mask[1, length // 3 :] = 0
    return input_ids, mask


def test_a_head_under_an_adapter_gives_its_own_loss_without_logits() -> None:
    model = get_peft_model(tiny().float(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()
    input_ids = torch.randint(0, 31, (2, 12))
    with_logits = model(input_ids=input_ids, labels=input_ids).loss.item()
    assert model(input_ids=input_ids, labels=input_ids, skip_logits=True).loss.item() == pytest.approx(with_logits)
    with model.disable_adapter():
        assert model(input_ids=input_ids, labels=input_ids).loss.item() != pytest.approx(with_logits)


@pytest.mark.parametrize("change", ["bias", "hook", "hook before", "hook on gradients"])
def test_a_head_that_does_more_than_its_weight_gives_its_own_loss_without_logits(change: str) -> None:
    model = tiny().train()
    seen = []
    match change:
        case "bias":
            model.lm_head.bias = nn.Parameter(torch.randn(31, dtype=torch.float64))
        case "hook":
            model.lm_head.register_forward_hook(lambda head, args, logits: 2 * logits)
        case "hook before":
            model.lm_head.register_forward_pre_hook(lambda head, args: (2 * args[0],))
        case _:
            model.lm_head.register_full_backward_hook(lambda *args: seen.append(True))
    input_ids = torch.randint(0, 31, (2, 12))
    expected = model(input_ids, labels=input_ids).loss.item()
    loss = model(input_ids, labels=input_ids, skip_logits=True).loss
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert bool(seen) == (change == "hook on gradients")


def test_the_first_token_after_padding_is_not_predicted_from_padding() -> None:
    model = tiny(routed_layers=[]).eval()
    row = torch.randint(0, 31, (1, 8))
    expected = model(row, labels=row).loss.item()
    input_ids = torch.cat([torch.zeros(1, 4, dtype=torch.int64), row], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    labels = input_ids.masked_fill(mask == 0, -100)
    assert model(input_ids, attention_mask=mask, labels=labels).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_labels_that_are_shifted_already_are_taken_as_they_are(skip_logits: bool) -> None:
    model = tiny().eval()
    input_ids = torch.randint(0, 31, (2, 9))
    shifted = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    expected = model(input_ids, labels=input_ids).loss.item()
    given = model(input_ids, labels=input_ids, shift_labels=shifted, skip_logits=skip_logits).loss.item()
    assert given == pytest.approx(expected)


def test_a_head_that_is_offloaded_gives_its_own_loss_without_logits(tmp_path: Path) -> None:
    model = tiny().float().eval()
    input_ids = torch.randint(0, 31, (2, 12))
    expected = model(input_ids, labels=input_ids).loss.item()
    dispatched = dispatch_model(model, {"model": "cpu", "lm_head": "disk"}, offload_dir=tmp_path, main_device="cpu")
    output = dispatched(input_ids, labels=input_ids, skip_logits=True)
    assert output.loss.item() == pytest.approx(expected)
    assert output.logits is None


def test_the_librarys_label_smoothing_shifts_the_labels(tmp_path: Path) -> None:
    model = tiny(routed_layers=[], attention_bias=True).float()
    input_ids = torch.randint(0, 31, (2, 12))
    batch = {"input_ids": input_ids, "labels": input_ids}
    expected = model.train()(**batch).loss.item()
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, use_cpu=True, report_to=[])
    loss = Trainer(model, arguments).compute_loss(model, dict(batch))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def padded_dataset() -> datasets.Dataset:
    """Two rows, of which the second predicts few tokens."""
    input_ids, mask = padded_rows(24)
    labels = input_ids.masked_fill(mask == 0, -100)
    fields = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return datasets.Dataset.from_dict({name: values.tolist() for name, values in fields.items()})


def trained_a_step(
    model: MoDForCausalLM, rows: datasets.Dataset, parts: int, folder: Path
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the weights after a step of the library's trainer with both rows, given in parts."""
    trained = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2 // parts,
        gradient_accumulation_steps=parts,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=1e9,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    loss = Trainer(trained, arguments, train_dataset=rows).train().training_loss
    return loss, trained.state_dict()


def test_the_librarys_trainer_weighs_unequal_parts_of_a_batch_by_what_they_predict(tmp_path: Path) -> None:
    rows, model = padded_dataset(), tiny(routed_layers=[])
    loss, weights = trained_a_step(model, rows, 1, tmp_path / "1")
    of_parts, weights_of_parts = trained_a_step(model, rows, 2, tmp_path / "2")
    assert of_parts == pytest.approx(loss, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_of_parts[name], weight, rtol=1e-9, atol=1e-9)
        assert not torch.equal(weight, model.state_dict()[name])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_librarys_trainer_learns_the_same_of_rows_padded_on_the_left_without_the_label_of_their_first_token(
    tmp_path: Path, parts: int
) -> None:
    model, on_the_right = tiny(), padded_dataset()
    on_the_left = on_the_right.map(padded_on_the_left)
    loss, weights = trained_a_step(model, on_the_right, parts, tmp_path / "right")
    # It counts the label of the second row's first token, beside those of the 23 and the 7 predictions.
    loss_counted, _ = trained_a_step(model, on_the_left, parts, tmp_path / "counted")
    assert loss_counted == pytest.approx(loss * 30 / 31, rel=1e-6)
    on_the_left = on_the_left.map(without_first_label)
    loss_on_the_left, weights_on_the_left = trained_a_step(model, on_the_left, parts, tmp_path / "left")
    assert loss_on_the_left == pytest.approx(loss, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_on_the_left[name], weight, rtol=1e-9, atol=1e-9)


def padded_on_the_left(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row that was padded on the right."""
    length = sum(row["attention_mask"])
    return {name: values[length:] + values[:length] for name, values in row.items()}


def without_first_label(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row padded on the left, whose first token has the label of padding."""
    first = row["attention_mask"].index(1)
    return {**row, "labels": [*row["labels"][:first], -100, *row["labels"][first + 1 :]]}


@pytest.mark.parametrize("changes", [{}, {"num_experts": 4, "expert_capacity": 0.7}])
@pytest.mark.parametrize("training_routing", ["top_k", "causal"])
def test_the_librarys_trainer_predicts_logits_and_judges_them(
    tmp_path: Path, training_routing: str, changes: dict[str, Any]
) -> None:
    model = tiny(training_routing=training_routing, **changes).float()
    seen: list[Any] = []

    def judge(predicted: Any) -> dict[str, float]:
        seen.append(predicted)
        return {"tokens": float((predicted.label_ids != -100).sum())}

    arguments = TrainingArguments(str(tmp_path), use_cache=True, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer, rows = Trainer(model, arguments, compute_metrics=judge), padded_dataset()
    assert trainer.evaluate(rows)["eval_tokens"] == 24 + 8
    seen.append(trainer.predict(rows))
    batch = {name: torch.tensor(rows[name]) for name in ("input_ids", "attention_mask")}
    expected = model.eval()(**batch).logits.detach().numpy()
    for predicted in seen:
        assert predicted.predictions.shape == (2, 24, 31)
        assert predicted.predictions == pytest.approx(expected, abs=1e-5)
