"""The decode step keeps and computes only what enters."""

from typing import Any

import pytest
import torch
from models import left_padded, tiny, traced, with_parts
from torch.nn import functional as F

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.sampling import step
from mixture_of_depths.sampling.native import FASTEST, READY, require_native
from mixture_of_depths.sampling.step import (
    GROWTH,
    apply_mlp,
    attend,
    decode_step,
    entering_first,
    grow,
    matvec,
    matvecs,
    normalised,
    prefill,
    product_shapes,
    row_counts,
)

pytestmark = pytest.mark.usefixtures("nothing_chosen")


def test_a_routed_block_has_room_for_what_entered_and_grows() -> None:
    model = tiny(routed_layers=[0]).float().eval()
    input_ids = torch.randint(0, 31, (1, 40))
    model.model.layers[0].router.predictor.down_proj.bias.data.fill_(-1e6)
    _, state = prefill(model, input_ids, torch.ones_like(input_ids), room=200)
    assert [layer.keys.shape[2] for layer in state.layers] == [GROWTH, 4 * GROWTH, 4 * GROWTH]
    state.layers[0].length_B.fill_(GROWTH)
    grow(state)
    assert state.layers[0].keys.shape[2] == 2 * GROWTH


@torch.no_grad()
def test_only_rows_that_enter_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(routed_layers=[1], causal_router="threshold").float().eval()
    sizes: list[int] = []
    block = step.decode_block

    def counted(layer: Any, x: torch.Tensor, *operands: torch.Tensor) -> Any:
        if layer.router is not None:
            sizes.append(x.shape[0])
        return block(layer, x, *operands)

    monkeypatch.setattr(step, "decode_block", counted)
    input_ids = torch.randint(0, 31, (6, 5))
    logits = model(input_ids, use_cache=False, routing="causal", output_routing=True).routing[1].causal_logits
    model.model.layers[1].router.threshold.add_(logits.quantile(0.8))
    _, state = prefill(model, input_ids, torch.ones_like(input_ids), room=40)
    for _ in range(39):
        grow(state)
        decode_step(model, torch.randint(0, 31, (6,)), torch.ones(6, dtype=torch.bool), state)
    assert row_counts(6) == [1, 4, 6]
    assert {1, 4} <= set(sizes) <= {1, 4, 6}
    # Steps in which no row enters run nothing.
    assert len(sizes) < 39


@torch.no_grad()
def test_the_step_as_a_compiled_one_has_it_gives_the_logits_of_the_model_whatever_is_routed() -> None:
    model = with_parts(["block_keep_keys", "mlp"], 4, causal_router="threshold").float().eval()
    input_ids, mask = left_padded(2, 8)
    _, state = prefill(model, input_ids[:, :5], mask[:, :5], room=3)
    grow(state)
    step_of = traced(step.decode_step)
    whole = model(input_ids, attention_mask=mask, use_cache=False, output_routing=True)
    for place in range(5, 8):
        logits_BV = step_of(model, input_ids[:, place], torch.ones(2, dtype=torch.bool), state)
        torch.testing.assert_close(logits_BV, whole.logits[:, place], atol=1e-4, rtol=1e-4)
        for layer_idx in (0, 2):
            assert torch.equal(state.layers[layer_idx].entered_B, whole.routing[layer_idx].entered[:, place])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_in_bf16_every_operation_of_the_step_rounds_as_the_models_own_pass_does(is_compiled: bool, own: bool) -> None:
    of = traced if is_compiled else lambda function: function
    model = MoDForCausalLM(MoDConfig(hidden_size=64, num_hidden_layers=1, initializer_range=0.15, routed_layers=[]))
    layer, bf16 = model.bfloat16().model.layers[0], torch.bfloat16
    if own:
        require_native()
        READY[:] = [True]
        FASTEST.update(dict.fromkeys(product_shapes(model, 1), "native"))
    hidden_TD = torch.randn(64, 64, dtype=bf16)
    normed_TD = layer.input_layernorm(hidden_TD)
    assert torch.equal(normed_TD.float(), of(normalised)(layer.input_layernorm, hidden_TD.float()))
    for whole_TD, of_one, part in (
        (layer.self_attn.q_proj(normed_TD), of(matvec), layer.self_attn.q_proj),
        (layer.mlp(normed_TD), of(apply_mlp), layer.mlp),
    ):
        of_rows_TD = torch.cat([of_one(part, row[None].float(), bf16) for row in normed_TD])
        # The two may sum up in different orders, as they do in PyTorch 2.11, which seldom reaches the last bit of bf16.
        assert (of_rows_TD == whole_TD.float()).float().mean() > 0.999
    query, keys, values = (torch.randn(1, 4, 32, 16, dtype=bf16) for _ in range(3))
    attended = F.scaled_dot_product_attention(query, keys, values, is_causal=True)[0, :, -1].flatten()
    last = [tensor[:, :, -1].float() for tensor in (query, keys, values)]
    stored = keys[:, :, :-1].contiguous(), values[:, :, :-1].contiguous(), torch.ones(1, 31, dtype=torch.bool)
    of_step = of(attend)(last[0][:, :, None], last[1], last[2], stored, torch.zeros(1, dtype=torch.int64))
    # Here they always do.
    assert (of_step.bfloat16()[0] == attended).float().mean() > 0.9


def test_what_is_fastest_on_the_cpu_is_not_taken_on_another_device() -> None:
    layer = torch.nn.Linear(8, 6, device="meta")
    # Nothing of it runs on another device, and it is not there at all.
    FASTEST[(2, torch.float32, 6, 8)] = "absent"
    (output_BO,) = matvecs([layer], torch.empty(2, 8, device="meta"), torch.float32)
    assert output_BO.shape == (2, 6)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_rows_that_enter_come_first_each_once(batch: int) -> None:
    for entered_B in (torch.rand(batch) < 0.3, torch.zeros(batch, dtype=torch.bool), torch.ones(batch).bool()):
        assert torch.equal(entering_first(entered_B), entered_B.int().argsort(descending=True, stable=True))
