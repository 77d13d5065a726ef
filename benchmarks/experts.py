"""Time of a training step with experts: 8 of them, one a token, against the dense model and Mixtral's MLP.

    python benchmarks/experts.py                       # both precisions
    python benchmarks/experts.py --precision fp32 --repeats 11

d 512, 8 blocks, 8 heads, S 512, B 8, SwiGLU 1408, vocabulary 4,096. A token meets one expert of the dense MLP's width,
so that both models have the same active FLOPs but for the expert router's. A step is forward and backward pass and
fused AdamW, which updates all experts. All sides are timed in turns in one process per precision. Prints one JSON line.

Per precision: `moe_over_dense` is the ratio of the times of a step; `moe_over_dense_without_optimizer` that of forward
and backward pass alone; `mlp_over_mixtral` the ratio of forward and backward pass of one block's experts alone, on all
of the batch's tokens and with the same weights, to those of transformers' Mixtral MLP in its default implementation.
Each side counts with the better of eager and compiled; times are medians, in milliseconds.
"""

import argparse
import json
import os
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from train_step import SHAPE, in_fresh_process, seconds
from transformers import MixtralConfig, MixtralForCausalLM

from mixture_of_depths import MoDConfig, MoDForCausalLM, training_flops_per_token
from mixture_of_depths.model.experts import ExpertMLP
from mixture_of_depths.provenance import provenance
from mixture_of_depths.training.run import compile_blocks

BATCH, LENGTH, EXPERTS = 8, 512, 8


def config_of(side: str) -> MoDConfig:
    """The configuration of "dense" or "moe"."""
    return MoDConfig(**SHAPE, routed_layers=[], num_experts=EXPERTS if side == "moe" else 1)


def make_step(side: str, bf16: bool, compiled: bool) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward pass of a model, and the optimiser's step after it."""
    torch.manual_seed(0)
    model = MoDForCausalLM(config_of(side)).train()
    if compiled:
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    input_ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH))

    def passes() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()

    return passes, optimizer.step


def make_mlps(bf16: bool, compiled: bool) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of the experts of one block: ours and Mixtral's, with the same weights."""
    torch.manual_seed(0)
    ours = ExpertMLP(config_of("moe")).train()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    shape = {name: SHAPE[name] for name in names}
    whole = MixtralForCausalLM(
        MixtralConfig(
            **shape,
            num_hidden_layers=1,
            num_key_value_heads=SHAPE["num_attention_heads"],
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
        )
    )
    theirs: Any = whole.train().model.layers[0].mlp
    ours.router.proj.weight.data.copy_(theirs.gate.weight)
    ours.gate_up_proj.weight.data.copy_(theirs.experts.gate_up_proj)
    ours.down_proj.weight.data.copy_(theirs.experts.down_proj)
    hidden = torch.randn(BATCH, LENGTH, SHAPE["hidden_size"])
    grad = torch.randn_like(hidden)

    def timed(module: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            module.zero_grad(set_to_none=True)
            inputs = hidden.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = run(inputs)
            out.backward(grad.to(out.dtype))

        return step

    our_run: Any = torch.compile(ours, dynamic=False) if compiled else ours
    their_run: Any = torch.compile(theirs, dynamic=False) if compiled else theirs
    return {
        "ours": timed(ours, lambda inputs: our_run(inputs, None, "top_k")[0]),
        "mixtral": timed(theirs, their_run),
    }


def measure(bf16: bool, repeats: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    kinds = (False, True)
    steps = {(side, compiled): make_step(side, bf16, compiled) for side in ("dense", "moe") for compiled in kinds}
    mlps = {(side, compiled): run for compiled in kinds for side, run in make_mlps(bf16, compiled).items()}
    times: dict[tuple[str, str, bool], list[float]] = {}
    for turn in range(repeats + 2):
        for (side, compiled), (passes, update) in steps.items():
            for part, spent in (("passes", seconds(passes)), ("optimizer", seconds(update))):
                if turn >= 2:
                    times.setdefault((side, part, compiled), []).append(spent)
        for (side, compiled), run in mlps.items():
            spent = seconds(run)
            if turn >= 2:
                times.setdefault((side, "mlp", compiled), []).append(spent)

    def ms(side: str, *parts: str) -> float:
        """The better of eager and compiled, over the parts' sum."""
        medians = []
        for compiled in kinds:
            series = zip(*(times[side, part, compiled] for part in parts), strict=True)
            medians.append(median(sum(turn) for turn in series) * 1e3)
        return min(medians)

    record = {
        **{f"{side}_ms": ms(side, "passes", "optimizer") for side in ("dense", "moe")},
        **{f"{side}_without_optimizer_ms": ms(side, "passes") for side in ("dense", "moe")},
        **{f"mlp_{side}_ms": ms(side, "mlp") for side in ("ours", "mixtral")},
        **{
            f"mlp_{side}_{'compiled' if compiled else 'eager'}_ms": median(times[side, "mlp", compiled]) * 1e3
            for side in ("ours", "mixtral")
            for compiled in kinds
        },
    }
    record = {name: round(value, 1) for name, value in record.items()}
    flops = {side: training_flops_per_token(config_of(side), LENGTH) for side in ("dense", "moe")}
    return {
        **record,
        "moe_over_dense": round(record["moe_ms"] / record["dense_ms"], 3),
        "moe_over_dense_without_optimizer": round(
            record["moe_without_optimizer_ms"] / record["dense_without_optimizer_ms"], 3
        ),
        "mlp_over_mixtral": round(record["mlp_ours_ms"] / record["mlp_mixtral_ms"], 3),
        "flop_ratio": round(flops["moe"] / flops["dense"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "experts", "repeats": arguments.repeats}
    for precision in arguments.precision:
        record[precision] = in_fresh_process(measure, precision == "bf16", arguments.repeats, arguments.threads)
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
