"""What only a GPU can show: every command runs on it, and computes there what the CPU computes.

Skipped without one. `DEVICE` may be set to "cpu" to run what is here once without a GPU.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, data, run
from models import greedy, make_checkpoint, write_numbers
from runs import QUIET, config_for, dense_for
from studies import study_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from mixture_of_depths import Corpus, MoDConfig, MoDForCausalLM, SamplingOptions, TrainOptions, stream, train
from mixture_of_depths.cli.common import load_to_sample
from mixture_of_depths.device import accelerator_name
from mixture_of_depths.model import packed
from mixture_of_depths.sampling.step import decode_step, grow, prefill
from mixture_of_depths.sampling.stream import is_graph

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU")

# Sizes that the kernel of all experts takes in bf16.
SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "capacity": 0.25,
    "initializer_range": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {"routed_layers": []},
    "predictor": {},
    "threshold": {"causal_router": "threshold"},
    "random": {"router_type": "random"},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2},
    "no-ops": {"routed_layers": [], "num_experts": 4, "num_noop_experts": 1, "expert_capacity": 1.5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str) -> MoDForCausalLM:
    torch.manual_seed(0)
    return MoDForCausalLM(MoDConfig(**{**SMALL, **KINDS[kind]})).eval()


def tokens(rows: int = 2, length: int = 48) -> torch.Tensor:
    return torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def outputs(model: MoDForCausalLM, routing: Any) -> list[Any]:
    """Of the model on the CPU and on the device, in that order, over rows of which one is padded."""
    input_ids = tokens()
    mask = torch.ones_like(input_ids)
    mask[1, :5] = 0
    made = []
    for device in (torch.device("cpu"), DEVICE):
        torch.nn.Module.to(model, device)
        with torch.no_grad():
            made.append(
                model(input_ids.to(device), mask.to(device), routing=routing, use_cache=False, output_routing=True)
            )
    return made


def decisions(output: Any) -> torch.Tensor:
    entered = [layer.entered.cpu().flatten() for layer in output.routing if layer is not None]
    return torch.cat([torch.ones(1, dtype=torch.bool), *entered])


@pytest.mark.parametrize("routing", ["top_k", "causal"])
@every_kind
def test_in_float32_logits_are_those_of_the_cpu(kind: str, routing: str) -> None:
    there, here = outputs(model_of(kind), routing)
    assert torch.equal(decisions(here), decisions(there))
    torch.testing.assert_close(here.logits.cpu(), there.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("routing", ["top_k", "causal"])
@every_kind
def test_in_bf16_logits_and_decisions_are_nearly_those_of_the_cpu(kind: str, routing: str) -> None:
    model = model_of(kind)
    torch.nn.Module.to(model, torch.bfloat16)
    there, here = outputs(model, routing)
    assert (decisions(here) == decisions(there)).float().mean() > 0.95
    difference = (here.logits.cpu().float() - there.logits.float())[:, 5:]
    assert difference.square().mean().sqrt() < 0.2 * there.logits.float().std()


@every_kind
def test_every_way_to_sample_takes_the_same_likeliest_tokens(kind: str) -> None:
    model, input_ids = torch.nn.Module.to(model_of(kind), DEVICE), tokens(2, 12).to(DEVICE)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    wanted = greedy(model, input_ids, mask, 12).tolist()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    for compiled in (False, True):
        torch.compiler.reset()
        sampled = stream(model, input_ids, mask, SamplingOptions(max_new_tokens=12, temperature=0), compiled=compiled)
        assert torch.stack(list(sampled), dim=1).tolist() == wanted, f"compiled={compiled}"


@contextmanager
def without_waiting() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


# Blocks that skip other parts than all of them, with what else the step's kernels know.
GRAPHS: dict[str, dict[str, Any]] = {
    "baseline": {"routed_layers": []},
    "predictor": {"router_activation": "tanh", "query_key_norm": True, "attention_bias": True},
    "threshold": {"causal_router": "threshold", "router_norm": True, "tie_word_embeddings": True},
    "random": {"router_type": "random"},
    "parts": {"routed_layers": [0, 1, 3], "routed_parts": ["block", "block_keep_keys", "mlp"], "bypass_rank": 8},
}


def graph_step(model: MoDForCausalLM, rows: int, new: int) -> Any:
    """The step after prompts of which the last is padded."""
    pytest.importorskip("triton")
    from mixture_of_depths.sampling.graph import GraphStep

    input_ids = tokens(rows, 100).to(DEVICE)
    mask = torch.ones_like(input_ids)
    mask[-1, :7] = 0
    return GraphStep(model, input_ids, mask, new), prefill(model, input_ids, mask, new)[1]


def graph_model(kind: str, dtype: torch.dtype) -> MoDForCausalLM:
    torch.manual_seed(0)
    model = MoDForCausalLM(MoDConfig(**{**SMALL, **GRAPHS[kind]})).eval()
    for layer in model.model.layers:
        if layer.bypass is not None:
            torch.nn.init.normal_(layer.bypass.up.weight, std=0.1)
    for name, weight in model.named_parameters():
        # No two are alike, and none does nothing.
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return torch.nn.Module.to(model, DEVICE, dtype)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", GRAPHS)
def test_replays_of_the_graph_give_the_logits_of_the_eager_step(kind: str, dtype: torch.dtype, rows: int) -> None:
    model, new, same = graph_model(kind, dtype), 8, []
    step, state = graph_step(model, rows, new)
    is_alike_B = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    for number in range(new):
        token_B = torch.randint(1, 300, (rows,), device=DEVICE)
        active_B = torch.tensor([row != 1 or number < 5 for row in range(rows)], device=DEVICE)
        grow(state)
        with torch.no_grad():
            wanted_BV = decode_step(model, token_B, active_B, state)
        logits_BV = step(token_B, active_B)
        entered_LB = torch.stack([layer.entered_B for layer in state.layers])
        same.append((step.entered() == entered_LB).float().mean())
        if dtype == torch.float32:
            assert torch.equal(step.entered(), entered_LB)
            torch.testing.assert_close(logits_BV, wanted_BV, rtol=0, atol=1e-4)
        else:
            # A row that is decided otherwise once, where two roundings fall apart, goes on otherwise.
            is_alike_B &= (step.entered() == entered_LB).all(dim=0)
            difference_B = (logits_BV - wanted_BV).square().mean(dim=1).sqrt()
            assert bool((difference_B[is_alike_B] < 0.2 * wanted_BV.std()).all())
    assert torch.stack(same).mean() > 0.9
    assert DEVICE.type == "cpu" or step.graph is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_models_on_two_gpus_are_recorded_each_on_its_own() -> None:
    for number in range(2):
        device = torch.device("cuda", number)
        model, input_ids = torch.nn.Module.to(graph_model("predictor", torch.float32), device), tokens(2, 12).to(device)
        wanted = greedy(model, input_ids, torch.ones_like(input_ids), 12).tolist()
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        sampled = stream(model, input_ids, options=SamplingOptions(max_new_tokens=12, temperature=0), compiled=True)
        assert torch.stack(list(sampled), dim=1).tolist() == wanted


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_replay_does_not_wait(kind: str) -> None:
    step, _ = graph_step(graph_model(kind, torch.bfloat16), 3, 8)
    token_B = torch.ones(3, dtype=torch.int64, device=DEVICE)
    going_B = torch.tensor([True, False, True], device=DEVICE)
    # The first compiles, and the second is recorded.
    for _ in range(2):
        step(token_B, None)
    with without_waiting():
        for _ in range(3):
            step(token_B, going_B)
            step.entered()


def test_the_weights_of_a_block_that_no_row_enters_are_not_read() -> None:
    model = graph_model("threshold", torch.bfloat16)
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.threshold.fill_(1e9)
    step, _ = graph_step(model, 2, 8)
    for layer in model.model.layers:
        if layer.router is not None:
            for name, weight in layer.named_parameters():
                if "router" not in name:
                    weight.data.fill_(torch.nan)
    for _ in range(4):
        assert bool(step(torch.ones(2, dtype=torch.int64, device=DEVICE), None).isfinite().all())


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_stream_by_replays_gives_the_tokens_of_generate(kind: str) -> None:
    model, input_ids = graph_model(kind, torch.float32), tokens(2, 12).to(DEVICE)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    assert DEVICE.type == "cpu" or is_graph(model)
    wanted = greedy(model, input_ids, mask, 12).tolist()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    for _ in range(2):
        options = SamplingOptions(max_new_tokens=12, temperature=0)
        assert torch.stack(list(stream(model, input_ids, mask, options, compiled=True)), dim=1).tolist() == wanted


def only_where_experts_wait(kind: str) -> AbstractContextManager[Any]:
    """Asks for an error where PyTorch's grouped products ask the GPU where groups end, and else for none."""
    is_asked = DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE)[0] not in (9, 10)
    if kind in ("experts", "no-ops") and is_asked:
        return pytest.raises(RuntimeError, match="synchroniz")
    return nullcontext()


@every_kind
def test_a_training_step_does_not_wait_between_blocks(kind: str) -> None:
    model, input_ids = torch.nn.Module.to(model_of(kind), DEVICE).train(), tokens().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # The first step makes what later ones find. In float32 experts' products go one by one.
    for is_first in (True, False):
        with ExitStack() as watched:
            if not is_first:
                watched.enter_context(only_where_experts_wait(kind))
                watched.enter_context(without_waiting())
            with torch.autocast(DEVICE.type, torch.bfloat16):
                model(input_ids, labels=input_ids, skip_logits=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@every_kind
def test_a_top_k_evaluation_does_not_wait(kind: str) -> None:
    model, input_ids = torch.nn.Module.to(model_of(kind), DEVICE), tokens().to(DEVICE)
    for is_first in (True, False):
        with ExitStack() as watched, torch.no_grad():
            if not is_first:
                watched.enter_context(only_where_experts_wait(kind))
                watched.enter_context(without_waiting())
            with torch.autocast(DEVICE.type, torch.bfloat16):
                model(input_ids, labels=input_ids, skip_logits=True, routing="top_k", use_cache=False)


@pytest.mark.parametrize("kind", ["baseline", "threshold"])
def test_heads_that_share_keys_attend_by_a_fused_kernel_in_float32(kind: str) -> None:
    model, input_ids = torch.nn.Module.to(model_of(kind), DEVICE), tokens().to(DEVICE)
    # The CPU's fused kernel has another name.
    fused = SDPBackend.EFFICIENT_ATTENTION if DEVICE.type == "cuda" else SDPBackend.FLASH_ATTENTION
    with sdpa_kernel([fused]):
        model(input_ids, labels=input_ids, routing="top_k", use_cache=False).loss.backward()
        model(input_ids, routing="causal")


def packed_rows(chance: float, rows: int = 4, length: int = 256) -> dict[str, torch.Tensor]:
    """Rows of tokens, and positions that start again with the given chance."""
    is_start = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)) < chance
    slots = torch.arange(length)
    position_ids = slots - (is_start * slots).cummax(dim=1).values
    input_ids = tokens(rows, length)
    return {name: ids.to(DEVICE) for name, ids in (("input_ids", input_ids), ("position_ids", position_ids))}


@contextmanager
def counted_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yields the number of documents of each call of the kernel for sequences of different lengths."""
    calls: list[int] = []

    def counted(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Any, *rest: Any, **options: Any):
        calls.append(len(starts) - 1)
        return varlen_attn(query, key, value, starts, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(packed, "varlen_attn", counted)
        yield calls


@pytest.mark.parametrize("routing", ["top_k", "causal"])
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("parts", ["block", "block_keep_keys", "mlp"])
def test_packed_documents_are_as_near_to_float32_through_the_kernel_as_under_a_mask(
    parts: Any, is_autocast: bool, routing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1.5 times as far, in logits and in all gradients together."""
    torch.manual_seed(0)
    # Random routers decide alike in every precision.
    config = MoDConfig(**{**SMALL, "router_type": "random", "routed_parts": parts})
    model = torch.nn.Module.to(MoDForCausalLM(config), DEVICE).eval()
    batch = packed_rows(0.02)

    def computed(is_half: bool) -> tuple[torch.Tensor, torch.Tensor]:
        own = copy.deepcopy(model)
        if is_half and not is_autocast:
            torch.nn.Module.to(own, torch.bfloat16)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=is_half and is_autocast):
            logits = own(**batch, routing=routing, use_cache=False).logits.float()
        (logits.log_softmax(dim=-1)[..., 0].mean()).backward()
        gradients = [weight.grad.flatten().float() for weight in own.parameters() if weight.grad is not None]
        return logits.detach(), torch.cat(gradients)

    exact = computed(is_half=False)
    with counted_kernel(monkeypatch) as calls:
        fused = computed(is_half=True)
    assert bool(calls) == (DEVICE.type == "cuda")
    with counted_kernel(monkeypatch) as calls, sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        masked = computed(is_half=True)
    assert not calls
    for of_kernel, of_mask, wanted in zip(fused, masked, exact, strict=True):
        assert (of_kernel - wanted).norm() < 1.5 * (of_mask - wanted).norm()
        assert (of_mask - wanted).norm() < 0.1 * wanted.norm()


def test_compiled_blocks_take_every_number_of_packed_documents_in_the_graphs_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module.to(MoDForCausalLM(MoDConfig(**{**SMALL, "router_type": "random"})), DEVICE).eval()
    plain = copy.deepcopy(model)
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    for number, chance in enumerate((0.01, 0.02, 0.03, 0.05)):
        batch, losses = packed_rows(chance), []
        stance = "default" if number == 0 else "fail_on_recompile"
        for either in (plain, model):
            with torch.compiler.set_stance(stance), torch.autocast(DEVICE.type, torch.bfloat16):
                loss = either(**batch, labels=batch["input_ids"], routing="top_k", use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=0.01)
    norms = [torch.stack([weight.grad.norm() for weight in either.parameters()]) for either in (plain, model)]
    assert (norms[1] - norms[0]).norm() < 0.05 * norms[0].norm()


@pytest.mark.parametrize("parts", ["block", "block_keep_keys", "mlp"])
def test_a_training_step_over_packed_documents_does_not_wait_from_the_first_block_on(parts: Any) -> None:
    model = torch.nn.Module.to(MoDForCausalLM(MoDConfig(**{**SMALL, "routed_parts": parts})), DEVICE).train()
    batch = packed_rows(0.02)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for is_first in (True, False):
        with ExitStack() as stack:
            if not is_first:
                hook = model.model.layers[0].register_forward_pre_hook(
                    lambda *_: stack.enter_context(without_waiting())
                )
                stack.callback(hook.remove)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model(**batch, labels=batch["input_ids"], skip_logits=True).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def trained(corpus: Corpus, folder: Path, options: TrainOptions, device: Any = DEVICE, **changes: Any) -> Any:
    model, result = train(config_for(corpus), corpus, options, folder, console=QUIET, device=device, **changes)
    assert model.device.type == torch.device(device).type
    return result.evaluation


OPTIONS = TrainOptions(max_steps=50, batch_size=4, learning_rate=3e-3, eval_every=50, save_every=25)


def test_training_in_bf16_comes_to_the_loss_of_float32(corpus: Corpus, tmp_path: Path) -> None:
    single = trained(corpus, tmp_path / "fp32", OPTIONS)
    half = trained(corpus, tmp_path / "bf16", replace(OPTIONS, precision="bf16"))
    for name in ("loss_top_k", "loss_causal"):
        assert getattr(half, name) == pytest.approx(getattr(single, name), rel=0.02)


@pytest.mark.parametrize(("first", "then"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_run_goes_on_on_another_device(corpus: Corpus, tmp_path: Path, first: Any, then: Any) -> None:
    whole = trained(corpus, tmp_path / "run", OPTIONS, first)
    shutil.rmtree(tmp_path / "run" / "checkpoint-50")
    resumed = trained(corpus, tmp_path / "run", OPTIONS, then, resume=True)
    assert resumed.loss_top_k == pytest.approx(whole.loss_top_k, rel=1e-2)


def test_a_compiled_training_gives_the_losses_of_one_that_is_not(corpus: Corpus, tmp_path: Path) -> None:
    short = replace(OPTIONS, max_steps=4, eval_every=4, save_every=4)
    plain = trained(corpus, tmp_path / "plain", short)
    compiled = trained(corpus, tmp_path / "compiled", replace(short, compile=True))
    assert compiled.loss_top_k == pytest.approx(plain.loss_top_k, rel=1e-3)


def test_every_command_computes_on_the_device(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_numbers(tmp_path)
    model, dense, study = (str(tmp_path / name) for name in ("model", "dense", "study.yaml"))
    dense_for(corpus).save_pretrained(dense)
    corpus.tokenizer.save_pretrained(dense)
    study_file(tmp_path)
    make_checkpoint(tmp_path / "talks")
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "the quick"}]}) + "\n")
    questions = ["--data", str(chats), "--max-new-tokens", "4", "--out", str(tmp_path / "answered.jsonl")]
    text, short = data(tmp_path), ["--max-steps", "2", "--batch-size", "4"]
    retrofit = [*text[:2], *text[-2:], "--sequence-length", "16", "--capacity", "0.25", "--distillation", "0.5"]
    sizes = ["--prompt-tokens", "4", "--new-tokens", "5"]
    for words in (
        ["train", "--out", model, *text, *TINY, "--max-steps", "2"],
        ["evaluate", model],
        ["calibrate", model, "--out", str(tmp_path / "calibrated")],
        ["generate", model, "--prompt", "The router", "--max-new-tokens", "4", "--compile"],
        ["bench", model, *sizes],
        ["inspect", model, "--text", "The router lets few in", "--out", str(tmp_path / "page.html")],
        ["answer", str(tmp_path / "talks"), *questions],
        ["retrofit", dense, *retrofit, *short, "--flops-share", "0.9", "--out", str(tmp_path / "retrofitted")],
        ["demo", *text, "--max-flops", "1e10", "--out", str(tmp_path / "demo")],
        ["isoflop", "plan", study],
        ["isoflop", "run", study, "--out", str(tmp_path / "study")],
        ["isoflop", "measure", study, "--out", str(tmp_path / "study")],
    ):
        status, _, errors = run(monkeypatch, capsys, *words, "--device", str(DEVICE))
        assert status == 0, f"{words}: {errors}"
    for record in ("model/result.json", "model/run.json", "retrofitted/retrofit.json", "demo/demo.json"):
        machine = json.loads((tmp_path / record).read_text())["machine"]
        assert machine["accelerator"] == accelerator_name(DEVICE), record


def test_what_serves_loads_its_model_on_the_device(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    for precision in ("fp32", "bf16"):
        model, _ = load_to_sample(tmp_path, precision, DEVICE)
        assert {weight.device.type for weight in [*model.parameters(), *model.buffers()]} == {DEVICE.type}
