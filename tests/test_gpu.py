"""What only a GPU can show: every command runs on it, and computes there what the CPU computes.

Skipped without one. `DEVICE` may be set to "cpu" to run what is here once without a GPU.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import TINY, data, run
from models import greedy, make_checkpoint, write_numbers
from runs import QUIET, config_for, dense_for
from studies import study_file

from mixture_of_depths import Corpus, MoDConfig, MoDForCausalLM, SamplingOptions, TrainOptions, stream, train
from mixture_of_depths.cli.common import load_to_sample
from mixture_of_depths.device import accelerator_name

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


@every_kind
def test_a_training_step_does_not_wait_between_blocks(kind: str) -> None:
    model, input_ids = torch.nn.Module.to(model_of(kind), DEVICE).train(), tokens().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # The first step makes what later ones find. In float32 experts' products go one by one.
    for is_first in (True, False):
        with without_waiting() if not is_first else torch.enable_grad():
            with torch.autocast(DEVICE.type, torch.bfloat16):
                model(input_ids, labels=input_ids, skip_logits=True).loss.backward()
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
