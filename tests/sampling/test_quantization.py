"""Weights of 8 bits."""

import pytest
import torch
from models import tiny, traced, with_parts
from torch import nn

from mixture_of_depths.model.experts import GroupedLinear
from mixture_of_depths.options import SamplingOptions
from mixture_of_depths.sampling.native import READY, grouped_native, require_native
from mixture_of_depths.sampling.quantization import Int8GroupedLinear, Int8Linear, quantize
from mixture_of_depths.sampling.step import matvec
from mixture_of_depths.sampling.stream import stream


def test_a_rounded_weight_is_off_by_half_a_step_at_most() -> None:
    linear = nn.Linear(40, 24)
    rounded = Int8Linear(linear)
    step = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    error = rounded.weight.float() * rounded.scale[:, None] - linear.weight.detach()
    assert bool((error.abs() <= step / 2 * 1.001).all())


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("outputs", [48, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_the_decode_step_s_product_is_that_of_the_rounded_weights(rows: int, outputs: int, bias: bool) -> None:
    rounded = Int8Linear(nn.Linear(64, outputs, bias=bias))
    x = torch.randn(rows, 64)
    # Many rows go through a product in bfloat16.
    tolerance = 1e-5 if rows <= 4 else 2e-2
    of_step = traced(matvec)(rounded, x, torch.float32)
    torch.testing.assert_close(of_step, rounded(x), atol=tolerance, rtol=tolerance)


def test_quantize_leaves_routers_norms_and_the_embedding() -> None:
    model = tiny(routed_layers=[1], tie_word_embeddings=True).float().eval()
    embedding = model.model.embed_tokens.weight.clone()
    router = model.model.layers[1].router.proj.weight.clone()
    quantize(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.model.layers[1].router.proj.weight, router)
    assert isinstance(model.lm_head, Int8Linear)
    assert not any(isinstance(module, nn.Linear) for module in model.model.layers[0].modules())


def test_a_quantised_bypass_samples_as_its_own_full_forward_says() -> None:
    model = with_parts(["block_keep_keys", "mlp"], 4, causal_router="threshold").float().eval()
    quantize(model)
    assert isinstance(model.model.layers[0].bypass.up, Int8Linear)
    prompt = torch.randint(0, 31, (2, 7))
    tokens = torch.stack(list(stream(model, prompt, options=SamplingOptions(max_new_tokens=30, temperature=0))), dim=1)
    logits = model(torch.cat([prompt, tokens], dim=1), use_cache=False).logits
    assert torch.equal(logits[:, prompt.shape[1] - 1 : -1].argmax(dim=-1), tokens)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 3}, {"num_experts": 2, "num_noop_experts": 1}])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_quantised_model_samples_as_its_own_full_forward_says(experts: dict[str, int], batch: int) -> None:
    model = tiny(routed_layers=[1], **experts).float().eval()
    quantize(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, Int8GroupedLinear if experts else Int8Linear)
    prompt = torch.randint(0, 31, (batch, 7))
    tokens = torch.stack(list(stream(model, prompt, options=SamplingOptions(max_new_tokens=30, temperature=0))), dim=1)
    logits = model(torch.cat([prompt, tokens], dim=1), use_cache=False).logits
    assert torch.equal(logits[:, prompt.shape[1] - 1 : -1].argmax(dim=-1), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_with_rounded_weights_are_rounded_only_once(dtype: torch.dtype) -> None:
    layer, x = Int8Linear(nn.Linear(40, 24)), torch.randn(5, 40, dtype=dtype)
    exact = x.double() @ (layer.weight.double() * layer.scale.double()[:, None]).t() + layer.bias.double()
    assert layer(x).dtype == dtype
    # Half of the last bit that the type has, and of float32 what some sums lose.
    assert bool(((layer(x) - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-5).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_of_experts_are_multiplied_as_they_are(dtype: torch.dtype, nothing_chosen: None) -> None:
    experts = GroupedLinear(4, 40, 24)
    nn.init.normal_(experts.weight)
    layer = Int8GroupedLinear(experts)
    rows = torch.randn(9, 40).to(dtype)
    # One expert without rows, and rows that no expert takes.
    ends = torch.tensor([1, 1, 6, 8])
    wide = layer(rows, ends)
    require_native()
    READY[:] = [True]
    torch.testing.assert_close(layer(rows, ends), wide, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4)
    assert not bool(layer(rows, ends)[8:].any())
    compiled = traced(layer.forward)
    assert torch.equal(compiled(rows, ends), layer(rows, ends))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_an_expert_without_rows_is_not_read(dtype: torch.dtype) -> None:
    require_native()
    weight, x = (torch.randn(3, 17, 70) * 40).to(dtype), torch.randn(7, 70)
    ends = torch.tensor([5, 5, 6])
    exact = torch.cat([x[:5].double() @ weight[0].double().t(), x[5:6].double() @ weight[2].double().t()])
    if dtype != torch.int8:
        weight[1] = torch.nan
    products = grouped_native(weight, x, ends)
    torch.testing.assert_close(products[:6].double(), exact, rtol=1e-4, atol=1e-2)
    assert not bool(products[6:].any())
