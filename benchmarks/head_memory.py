"""Peak memory and time of the loss over a large vocabulary, with the logits of all tokens in memory and without.

    python benchmarks/head_memory.py                      # V 49,152, 4 x 512 tokens, as SmolLM2's
    python benchmarks/head_memory.py --precision bf16     # autocast

A model of two dense blocks, d 576: forward and backward pass, the forward pass alone, and both passes where half of the
loss is the divergence from another such model; each side in processes of its own, in turns. Prints one JSON line:
`logits` as transformers computes the loss, `skip_logits` as training, evaluation and tuning here do; `peak_mib` is what
the step takes beyond what stood there before it, `step_ms` the median of the steps; `memory_ratio` and `time_ratio` are
skip_logits over logits.
"""

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.model.loss import distilled_loss
from mixture_of_depths.provenance import provenance

BATCH, LENGTH, VOCABULARY = 4, 512, 49_152


def distilled(model: MoDForCausalLM, teacher: MoDForCausalLM, input_ids: Tensor, skip_logits: bool) -> Tensor:
    """Half cross-entropy, half divergence from the teacher."""
    with torch.no_grad():
        teacher_BTD = teacher.model(input_ids, use_cache=False).last_hidden_state
    if skip_logits:
        loss = partial(distilled_loss, teacher_BTD=teacher_BTD, teacher_head_VD=teacher.lm_head.weight, share=0.5)
        return model(input_ids, labels=input_ids, skip_logits=True, use_cache=False, loss_from_hidden=loss).loss
    output = model(input_ids, labels=input_ids, use_cache=False)
    with torch.no_grad():
        wanted = teacher.lm_head(teacher_BTD)[:, :-1].float().log_softmax(-1)
    log_p = output.logits[:, :-1].float().log_softmax(-1)
    divergence = F.kl_div(log_p, wanted, reduction="sum", log_target=True) / input_ids[:, 1:].numel()
    return 0.5 * output.loss + 0.5 * divergence


def measure(skip_logits: bool, kind: str, bf16: bool, threads: int) -> tuple[float, list[float]]:
    """The MiB a step adds to the peak of this process, and the milliseconds of each of a few steps."""
    torch.set_num_threads(threads)
    config = MoDConfig(vocab_size=VOCABULARY, hidden_size=576, num_attention_heads=9, num_hidden_layers=2)
    training = kind != "evaluation"
    model = MoDForCausalLM(config.changed(routed_layers=[])).train(training)
    teacher = MoDForCausalLM(model.config) if kind == "distillation" else None
    input_ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if training else None
    before, milliseconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(3):
        start = time.perf_counter()
        precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
        with torch.set_grad_enabled(training), precision:
            if teacher is not None:
                loss = distilled(model, teacher, input_ids, skip_logits)
            else:
                loss = model(input_ids, labels=input_ids, skip_logits=skip_logits, use_cache=False).loss
        if training:
            loss.backward()
        milliseconds.append((time.perf_counter() - start) * 1e3)
        del loss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    result: dict[str, object] = {"benchmark": "head_memory", "precision": arguments.precision}
    for name in ("training", "evaluation", "distillation"):
        seen: dict[bool, list[tuple[float, list[float]]]] = {False: [], True: []}
        for _ in range(arguments.repeats):
            for skip_logits, measured in seen.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    job = (skip_logits, name, arguments.precision == "bf16", arguments.threads)
                    measured.append(pool.submit(measure, *job).result())
        peaks = {skip: median(peak for peak, _ in measured) for skip, measured in seen.items()}
        times = {skip: median(ms for _, steps in measured for ms in steps) for skip, measured in seen.items()}
        result[name] = {
            "logits": {"peak_mib": round(peaks[False]), "step_ms": round(times[False])},
            "skip_logits": {"peak_mib": round(peaks[True]), "step_ms": round(times[True])},
            "memory_ratio": round(peaks[True] / peaks[False], 3),
            "time_ratio": round(times[True] / times[False], 3),
        }
    print(json.dumps({**result, **provenance()}))


if __name__ == "__main__":
    main()
