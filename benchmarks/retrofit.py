"""What a pretrained model loses and gains when it is made to skip: retrofit, whole blocks dropped, random routing.

    python benchmarks/retrofit.py SmolLM2-135M-Instruct.Q4_1.gguf --tune wikitext2_valid.txt \\
        --test wikitext=wikitext2_test.txt --max-steps 400 --out results/retrofit

At each share of the dense model's FLOPs per token (`--shares`): `retrofit`, the blocks that measuring finds cheapest
routed with learned routers, at the capacity that uses the share in full; `random`, the same blocks with random routing;
`dropped`, the blocks taken out that cost least to take out; all with the same tuning, and `tuned`, the dense model with
that tuning, too. They are tuned on the files of `--tune` and as many characters of the built-in corpus' training part,
and tested on the files of `--test` and the built-in corpus' held-out part (`code`): windows of 1,024 tokens, causal
routing, bf16 autocast. Before each text the thresholds are calibrated on 128 sequences of the tuning text of its kind,
as `mod calibrate --data` does.

Every side is a folder in `--out`/runs and a line in `--out`/records.jsonl once it is done; run again, the script goes
on where it stopped. `--out`/summary.json has per side `perplexity` and `perplexity_ratio` (to the dense model as it
came) per text, `flops_ratio` (that of the capacity), `entering` (the share of a text's tokens that does enter a routed
block), `as_left` (perplexity and entering before that calibration), `tuning_minutes`, and, with `--decode`,
`tokens_per_s` and `decode_speedup`: bf16, batch 1, prompts from the first test text, all sides in turns and, with
`--vllm PYTHON`, the interpreter of an environment with vLLM, that with the dense model, too.
"""

import argparse
import json
import subprocess
from dataclasses import asdict, replace
from functools import partial
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any

import datasets
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerFast

from mixture_of_depths import (
    Corpus,
    DataOptions,
    MoDConfig,
    MoDForCausalLM,
    RetrofitOptions,
    SamplingOptions,
    TrainOptions,
    Tuning,
    calibrate,
    evaluate,
    forward_flops_per_token,
    load_dense,
    pack,
    prepare,
    read_documents,
    retrofit,
    to_llama,
    tokenize,
    train,
)
from mixture_of_depths.files import read_json, read_records, write_aside
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.choose import choose_blocks, full_capacity
from mixture_of_depths.retrofitting.measure import BlockImportance, fit_routers, measure_importance
from mixture_of_depths.retrofitting.tune import DistillationTrainer
from mixture_of_depths.sampling.bench import decode_seconds, in_precision
from mixture_of_depths.text.batches import batches, spread
from mixture_of_depths.text.documents import Skipped, split_documents
from mixture_of_depths.text.tokenizer import checked, end_of_text
from mixture_of_depths.training.trainer import MoDTrainer

WINDOW = 1024
# Turns of every side after each prompt.
TURNS = 4
# What may differ between calls with one `--out`; files may have moved.
FREE = ("source", "tune", "test", "out", "shares", "sides", "decode", "vllm")


def without(dense: MoDForCausalLM, dropped: list[int]) -> MoDForCausalLM:
    """The model with some of its blocks taken out."""
    kept = [i for i in range(dense.config.num_hidden_layers) if i not in dropped]
    model = MoDForCausalLM(dense.config.changed(num_hidden_layers=len(kept)))
    weights = {name: weight for name, weight in dense.state_dict().items() if not name.startswith("model.layers.")}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        for name, weight in dense.state_dict().items():
            if name.startswith(prefix):
                weights[f"model.layers.{new}.{name.removeprefix(prefix)}"] = weight
    model.load_state_dict(weights)
    model.generation_config = dense.generation_config
    return model


def measured(
    dense: MoDForCausalLM, corpus: Corpus, options: RetrofitOptions, bf16: bool, out: Path
) -> list[BlockImportance]:
    """What skipping each block costs: measured once and kept in `--out`/importance.json."""
    path = out / "importance.json"
    if not path.exists():
        end, sequences = corpus.end_of_text, spread(corpus.train, options.measure_sequences)
        weights_LD = fit_routers(dense, spread(corpus.train, options.fit_sequences), end, bf16)
        importance = measure_importance(dense, weights_LD, options.capacity, sequences, end, bf16, Console(stderr=True))
        write_aside(path, json.dumps([asdict(block) for block in importance]))
    return [BlockImportance(**block) for block in read_json(path)]


def cheapest(importance: list[BlockImportance], dense: MoDConfig, share: float, length: int) -> list[int]:
    """The blocks to drop: those that cost least to bypass, as many as the share of the FLOPs asks for."""
    order = sorted(range(len(importance)), key=lambda i: importance[i].bypassed)
    for count in range(1, len(order)):
        fewer = dense.changed(num_hidden_layers=dense.num_hidden_layers - count)
        if forward_flops_per_token(fewer, length) / forward_flops_per_token(dense, length) <= share:
            return sorted(order[:count])
    raise ValueError(f"shares={share} is less than the embedding and the head alone")


def tuning_texts(files: list[str]) -> tuple[list[str], list[str]]:
    """The given files, and as many characters of the built-in corpus' training part."""
    from_files = list(read_documents(DataOptions(data=tuple(files)), Skipped()))
    every, _, _ = split_documents(list(read_documents(DataOptions(), Skipped())), DataOptions().validation_fraction)
    characters, code = sum(map(len, from_files)), []
    for text in every:
        if characters <= 0:
            break
        code.append(text)
        characters -= len(text)
    return from_files, code


def tuning_corpus(texts: list[str], out: Path, tokenizer: PreTrainedTokenizerFast, length: int) -> Corpus:
    """All the texts, prepared as `mod retrofit` does."""
    path = out / "tuning.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = DataOptions(data=(str(path),), sequence_length=length, tokenizer="of the source")
    return prepare(options, tokenizer)


def test_windows(files: dict[str, str], tokenizer: PreTrainedTokenizerFast, count: int) -> dict[str, datasets.Dataset]:
    """Evenly spread windows of each text, `count` at most."""
    documents = {name: list(read_documents(DataOptions(data=(path,)), Skipped())) for name, path in files.items()}
    _, held_out, _ = split_documents(list(read_documents(DataOptions(), Skipped())), DataOptions().validation_fraction)
    documents["code"] = held_out
    windows = {}
    for name, texts in documents.items():
        windows[name] = spread(pack(tokenize(texts, tokenizer), WINDOW, name), count)
    return windows


def tested(
    model: MoDForCausalLM, windows: dict[str, datasets.Dataset], kinds: dict[str, datasets.Dataset], end: int
) -> dict[str, Any]:
    """By text, the perplexity under causal routing and, of learned routers, the share of tokens that enters a block.

    As the model came, `as_left`, and with its routers calibrated on the text of that kind, in place.
    """

    def results() -> dict[str, dict[str, float]]:
        return {"perplexity": {}, "entering": {}}

    def test(name: str, into: dict[str, dict[str, float]]) -> None:
        evaluation = evaluate(model, windows[name], end, 1.0, batch_size=2, bf16=True, all_causal_routers=False)
        into["perplexity"][name] = exp(evaluation.loss_causal)
        for causal in evaluation.causal_routers.values():
            into["entering"][name] = mean(causal.share_entering.values())

    as_left, calibrated = results(), results()
    for name in windows:
        test(name, as_left)
    if not model.config.causal_routers:
        return as_left
    for name in windows:
        calibrate(model, kinds[name], end)
        test(name, calibrated)
    return {**calibrated, "as_left": as_left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--tune", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.8, 0.65])
    parser.add_argument("--sides", nargs="+", default=["retrofit", "dropped", "random"])
    parser.add_argument("--capacity", type=float, default=0.125)
    parser.add_argument("--max-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--distillation", type=float, default=0.0)
    parser.add_argument("--lowering-fraction", type=float, default=RetrofitOptions.lowering_fraction)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--vllm", metavar="PYTHON")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)

    dense, loaded = load_dense(arguments.source)
    tokenizer, length = checked(loaded, arguments.source), arguments.sequence_length
    from_files, code = tuning_texts(arguments.tune)
    corpus = tuning_corpus([*from_files, *code], arguments.out, tokenizer, length)
    end = end_of_text(tokenizer)
    windows = test_windows(dict(text.split("=", 1) for text in arguments.test), tokenizer, arguments.windows)
    of_files, of_code = (pack(tokenize(texts, tokenizer), length, "tuning") for texts in (from_files, code))
    kinds = {name: of_code if name == "code" else of_files for name in windows}
    training = TrainOptions(
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        precision=arguments.precision,
        eval_sequences=16,
        save_every=50,
    )
    chosen_once = {name: value for name, value in vars(arguments).items() if name not in FREE}
    settings = arguments.out / "settings.json"
    if not settings.exists():
        write_aside(settings, json.dumps(chosen_once, indent=2))
    elif (before := read_json(settings)) != chosen_once:
        differing = ", ".join(name for name, value in chosen_once.items() if before.get(name) != value)
        parser.error(f"out={arguments.out} holds sides of other settings ({differing}); name another folder")
    records = arguments.out / "records.jsonl"
    done = {record["side"]: record for record in read_records(records)}

    def keep(side: str, model: MoDForCausalLM, minutes: float, **facts: Any) -> None:
        ratio = forward_flops_per_token(model.config, WINDOW) / forward_flops_per_token(dense.config, WINDOW)
        record = {
            "side": side,
            **tested(model.eval(), windows, kinds, end),
            "flops_ratio": ratio,
            "tuning_minutes": minutes,
            **facts,
            **provenance(),
        }
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done[side] = record
        console.print(f"{side}: {record['perplexity']}")

    def folder_of(side: str) -> tuple[Path, bool]:
        folder = arguments.out / "runs" / side
        return folder, (folder / "run.json").exists()

    def tune(side: str, model: MoDForCausalLM, **facts: Any) -> None:
        folder, resume = folder_of(side)
        trainer = partial(DistillationTrainer, teacher=dense, share=arguments.distillation)
        tuning = Tuning(model, {"side": side}, trainer if arguments.distillation else MoDTrainer)
        tuned, result = train(model.config, corpus, training, folder, resume, console, tuning)
        if not result.finished:
            raise SystemExit(130)
        keep(side, tuned, result.train_seconds / 60, **facts)

    bf16 = training.precision == "bf16"
    importance = measured(dense, corpus, RetrofitOptions(capacity=arguments.capacity), bf16, arguments.out)
    if "dense" not in done:
        keep("dense", dense, 0.0)
    for share in arguments.shares:
        options = RetrofitOptions(
            flops_share=share,
            capacity=arguments.capacity,
            distillation=arguments.distillation,
            lowering_fraction=arguments.lowering_fraction,
        )
        for kind in ("retrofit", "random"):
            side = f"{kind}-{share:g}"
            if kind not in arguments.sides or side in done:
                continue
            blocks = choose_blocks(importance, dense.config, options, length)
            chosen = replace(
                options,
                # The share has done its work: it chose them.
                flops_share=RetrofitOptions.flops_share,
                routed_layers=tuple(blocks),
                capacity=full_capacity(dense.config, blocks, options, length),
                router_type="random" if kind == "random" else "learned",
            )
            folder, resume = folder_of(side)
            model, result = retrofit(dense, arguments.source, corpus, chosen, training, folder, resume, console)
            if not result.finished:
                raise SystemExit(130)
            assert result.retrofitted is not None
            keep(
                side,
                model,
                result.tuning_minutes,
                blocks=result.routed_layers,
                capacity=result.capacity,
                held_out=result.retrofitted.as_dict(),
            )
        side = f"dropped-{share:g}"
        if "dropped" in arguments.sides and side not in done:
            blocks = cheapest(importance, dense.config, share, length)
            tune(side, without(dense, blocks), blocks=blocks)
    if "tuned" in arguments.sides and "tuned" not in done:
        tune("tuned", without(dense, []))

    speeds = decoding(dense, done, arguments, windows, kinds, end) if arguments.decode else {}
    print(json.dumps(summarise(done, speeds, arguments.out), indent=2))


def decoding(
    dense: MoDForCausalLM,
    done: dict[str, Any],
    arguments: argparse.Namespace,
    windows: dict[str, datasets.Dataset],
    kinds: dict[str, datasets.Dataset],
    end_of_text: int,
) -> dict[str, float]:
    """Tokens per second of what was retrofitted or dropped, in turns: bf16, batch 1, 128 tokens after prompts of 128.

    Turns of a side are seconds apart, once all are compiled: the machine's speed drifts by more than what is compared.
    Every turn is a line in `--out`/decoding.jsonl. Prompts are of the first text, and routers calibrated on its kind.
    """
    text = next(iter(windows))
    sides = {"dense": in_precision(dense, "bf16")}
    for side in done:
        folder = arguments.out / "runs" / side
        if (folder / "model.safetensors").exists() and side.startswith(("retrofit", "dropped")):
            model = MoDForCausalLM.from_pretrained(folder)
            calibrate(model, kinds[text], end_of_text)
            sides[side] = in_precision(model, "bf16")
    first = range(min(4, len(windows[text])))
    prompted = batches(windows[text], first, end_of_text, 1, dense.device)
    prompts = [batch["input_ids"][:, :128].contiguous() for batch in prompted]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    vllm: list[float] = []

    def keep(side: str, step_seconds: float) -> float:
        with (arguments.out / "decoding.jsonl").open("a") as file:
            file.write(json.dumps({"side": side, "prompt": number, "seconds": step_seconds, **provenance()}) + "\n")
        return step_seconds

    for model in sides.values():
        assert model.generation_config is not None
        model.generation_config.eos_token_id = None
        decode_seconds(model, prompts[0], SamplingOptions(max_new_tokens=8))
    for number, prompt in enumerate(prompts):
        for turn in range(TURNS):
            options = SamplingOptions(max_new_tokens=128, temperature=1.0, top_k=0, seed=TURNS * number + turn)
            for side in sorted(sides, reverse=bool(turn % 2)):
                seconds[side].append(keep(side, decode_seconds(sides[side], prompt, options)))
        if arguments.vllm:
            vllm.append(keep("vllm", vllm_seconds(arguments.vllm, dense, prompt, arguments.out)))
    speeds = {side: 1 / median(times) for side, times in seconds.items()}
    return speeds | ({"vllm": 1 / median(vllm)} if vllm else {})


VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = LLM(folder, dtype="bfloat16", max_model_len=512, skip_tokenizer_init=True, gpu_memory_utilization=0.25)
def seconds(count):
    settings = SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    model.generate([{"prompt_token_ids": tokens}], settings)
    return time.perf_counter() - start
seconds(8)
print("\\nseconds a step:", (seconds(128) - seconds(1)) / 127)
"""


def vllm_seconds(python: str, dense: MoDForCausalLM, prompt: torch.Tensor, out: Path) -> float:
    """Seconds of a step of vLLM with the dense model, in a process of its own."""
    folder = out / "runs" / "llama"
    if not folder.exists():
        llama = to_llama(dense)
        nn.Module.to(llama, torch.bfloat16)
        llama.save_pretrained(folder)
    command = [python, "-c", VLLM, str(folder), json.dumps(prompt[0].tolist())]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # It stands between what the library logs.
    (timing,) = (line for line in run.stdout.splitlines() if line.startswith("seconds a step:"))
    return float(timing.split(":")[1])


def summarise(done: dict[str, Any], speeds: dict[str, float], out: Path) -> dict[str, Any]:
    """Writes and returns summary.json; decoding figures of an earlier call are kept."""
    path = out / "summary.json"
    earlier = read_json(path).get("tokens_per_s", {}) if path.exists() else {}
    speeds = speeds or earlier
    dense = done["dense"]["perplexity"]
    sides = {
        side: {
            "perplexity": record["perplexity"],
            "perplexity_ratio": {name: value / dense[name] for name, value in record["perplexity"].items()},
            "flops_ratio": record["flops_ratio"],
            "entering": record["entering"],
            "as_left": record.get("as_left"),
            "tuning_minutes": record["tuning_minutes"],
            "blocks": record.get("blocks"),
            "capacity": record.get("capacity"),
            "decode_speedup": speeds[side] / speeds["dense"] if side in speeds else None,
        }
        for side, record in done.items()
    }
    summary = {"sides": sides, "tokens_per_s": speeds, **provenance()}
    path.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
