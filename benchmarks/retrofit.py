"""What a pretrained model loses and gains when it is made to skip: one side of the comparison a call.

    python benchmarks/retrofit.py SmolLM2-135M-Instruct.Q4_1.gguf ours --share 0.8 --seed 0 --minutes 30 \\
        --tune wikitext2_valid.txt --conversations chats.jsonl --test wikitext=wikitext2_test.txt \\
        --max-steps 200 --out results/retrofit --runs runs/retrofit

Sides, at a share of the dense model's FLOPs per token (`--share`), all with the same tuning: `ours`, what
`mod retrofit` makes by default; `random`, the same blocks and capacities with random routing; `former`, the
fewest blocks at one capacity, whole blocks skipped, without maps, routers fitted to the norm of what a block
adds; `dropped`, the blocks taken out that cost least to take out; `linear`, those replaced by their maps, which
are tuned, that cost least to replace. `tuned` is the dense model with that tuning, to which ratios are, and
`dense` the model as it came. All are tuned on the files of `--tune`, the built-in corpus' training part, and
`--conversations`, answers of the dense model itself. Files and corpus give as many characters each as these have;
`--distillation` is the share of the loss that is the divergence from the dense model's predictions.
`--max-steps 0` tests a side as it starts. Conversations are made by

    python benchmarks/retrofit_questions.py > questions.jsonl
    mod answer SmolLM2-135M-Instruct.Q4_1.gguf --data questions.jsonl --max-new-tokens 180 --out chats.jsonl

A side is a line in `--out`/pilot.jsonl once it is done, with all settings and numbers for the contents of what is
read: loss and perplexity on the files of `--test`, on the built-in corpus' held-out part (`code`) and on held-out
conversations; `answers_right`, of the questions of retrofit_questions.py; FLOPs and bytes of a decoded token over the
dense model's. Before each kind of text the thresholds are set on tuning text of its kind. `as_left` has the same
figures with those that tuning left, which were set on half of what is held out of all kinds, half of the held-out
conversations among it. A call stops after `--minutes` with what it has, and the same call goes on. What sides are
chosen by is measured once, and kept in `--runs`.

    python benchmarks/retrofit.py SOURCE decode ...      speeds of all sides in `--runs`, in turns, in decoding.jsonl;
                                                         it, too, goes on where it stopped
    python benchmarks/retrofit.py SOURCE summary ...     of the lines with these settings, summary.json

Decoding is measured in bf16, with one row and with 8; with `--vllm PYTHON`, the interpreter of an environment with
vLLM, that with the dense model, too, in the same turns.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, cast

import torch
from retrofit_sides import METHOD, MIXED, SIDES, KeptTeacher, Sides, Texts, count_right, map_rank, tested, texts_of
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from mixture_of_depths import (
    MoDConfig,
    MoDForCausalLM,
    RetrofitOptions,
    SamplingOptions,
    TrainOptions,
    Tuning,
    calibrate,
    load_dense,
    to_llama,
    train,
)
from mixture_of_depths.files import read_json, read_records, write_aside
from mixture_of_depths.provenance import provenance
from mixture_of_depths.retrofitting.choose import check_share, decode_share, flops_share
from mixture_of_depths.retrofitting.measure import routers_of
from mixture_of_depths.retrofitting.tune import CapacitySchedule, DistillationTrainer
from mixture_of_depths.sampling.bench import decode_seconds, in_precision
from mixture_of_depths.text.batches import batches, spread
from mixture_of_depths.text.tokenizer import checked
from mixture_of_depths.training.trainer import MoDTrainer

WINDOW = 1024
# Turns of every side after each prompt.
TURNS = 4
# What a record of decoding is of.
TURN = ("side", "map_rank", "rows", "prompt", "turn")
ROWS = (1, 8)
# What makes a line another one, with the contents of what is read: files may have moved.
SETTINGS = (
    "max_steps",
    "batch_size",
    "sequence_length",
    "learning_rate",
    "distillation",
    "lowering_fraction",
    "precision",
    "windows",
    "fit_sequences",
)


def tuned(
    model: MoDForCausalLM, teacher: KeptTeacher, texts: Texts, arguments: argparse.Namespace, folder: Path
) -> tuple[MoDForCausalLM, float]:
    """The tuned model, and the minutes of tuning, all of the teacher's counted; a call whose time is over ends."""
    training = TrainOptions(
        max_steps=arguments.max_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        precision=arguments.precision,
        eval_every=arguments.max_steps,
        eval_sequences=4,
        save_every=max(1, min(50, arguments.max_steps // 4)),
        seed=arguments.seed,
    )
    is_routed = any(router.is_random or router.proj.weight.requires_grad for router in routers_of(model).values())
    schedule = CapacitySchedule(model, arguments.lowering_fraction) if is_routed else None

    def finish(tuned: MoDForCausalLM) -> MoDForCausalLM:
        if schedule is not None:
            schedule.lower(1.0)
        return tuned

    share, saved = arguments.distillation, SavedSeconds(teacher, folder / "saved_seconds.json")
    tuning = Tuning(
        model,
        {
            "side": arguments.side,
            "distillation": share,
            "lowering_fraction": arguments.lowering_fraction,
            "method": METHOD,
        },
        partial(DistillationTrainer, teacher=cast(MoDForCausalLM, teacher), share=share) if share else MoDTrainer,
        cast(tuple[TrainerCallback, ...], (saved, schedule) if schedule is not None else (saved,)),
        finish,
    )
    resume = (folder / "run.json").exists()
    model, result = train(
        model.config, texts.corpus, training, folder, resume, Console(stderr=True), tuning, teacher.dense.device
    )
    if not result.finished:
        raise SystemExit(130)
    return model, (result.train_seconds + saved.seconds()) / 60


class SavedSeconds(TrainerCallback):
    """Keeps the teacher's saved seconds with every checkpoint, so that those of a call that is killed count, too."""

    def __init__(self, teacher: KeptTeacher, path: Path) -> None:
        self.teacher, self.path = teacher, path
        self.before: float = read_json(path) if path.exists() else 0.0

    def seconds(self) -> float:
        """Of the calls before, too."""
        return self.before + self.teacher.saved_seconds

    def on_save(self, *_: object, **__: object) -> None:
        write_aside(self.path, json.dumps(self.seconds()))


def test_file(text: str) -> tuple[str, Path]:
    """NAME=FILE of the command line.

    Raises:
        argparse.ArgumentTypeError: for anything else, or a file that is not there.
    """
    name, equals, file = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=FILE; write wikitext={text}")
    return name, existing(file)


def existing(file: str) -> Path:
    """A file of the command line; raises argparse.ArgumentTypeError where there is none."""
    if not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{file} is no file")
    return Path(file)


def share_of_flops(text: str) -> float:
    """A share of the command line; raises argparse.ArgumentTypeError for one that is not between 0 and 1."""
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def contents(path: Path) -> str:
    """A number for what is in a file, or in the weights of a folder; the path itself where it is neither."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            return str(path)
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("side", choices=[*SIDES, "decode", "summary"])
    parser.add_argument("--share", type=share_of_flops, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--tune", type=existing, nargs="+", required=True)
    parser.add_argument("--conversations", type=existing)
    parser.add_argument("--test", type=test_file, nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--lowering-fraction", type=float, default=RetrofitOptions.lowering_fraction)
    parser.add_argument("--bypass-rank", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--fit-sequences", type=int, default=RetrofitOptions.fit_sequences)
    parser.add_argument("--vllm", metavar="PYTHON")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except ValueError as error:
        parser.error(str(error))


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for."""
    if arguments.minutes is not None:
        timer = threading.Timer(60 * arguments.minutes, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
    for folder in (arguments.out, arguments.runs):
        folder.mkdir(parents=True, exist_ok=True)

    settings = {name: getattr(arguments, name) for name in SETTINGS}
    tests = dict(arguments.test)
    inputs = {
        "source": contents(Path(arguments.source)),
        "tune": [contents(file) for file in arguments.tune],
        "conversations": None if arguments.conversations is None else contents(arguments.conversations),
        "test": {name: contents(file) for name, file in tests.items()},
    }
    shared = {"method": METHOD, "mixed": MIXED, "settings": settings, "inputs": inputs}
    records = arguments.out / "pilot.jsonl"
    dense, loaded = load_dense(arguments.source)
    options = RetrofitOptions(bypass_rank=arguments.bypass_rank, fit_sequences=arguments.fit_sequences)
    if arguments.side == "summary":
        lines = [line for line in read_records(records) if {name: line.get(name) for name in shared} == shared]
        print(json.dumps(summarise(lines, shared, arguments.out), indent=2))
        return
    share = None if arguments.side in ("dense", "tuned") else arguments.share
    own = {"side": arguments.side, "share": share, "seed": arguments.seed, **shared}
    own["map_rank"] = map_rank(arguments.side, dense.config, options)
    for record in read_records(records):
        if {name: record.get(name) for name in own} == own:
            print(json.dumps(record))
            return
    tokenizer = checked(loaded, arguments.source)
    if share is not None:
        check_share(dense.config, replace(options, flops_share=share), arguments.sequence_length)
    texts = texts_of(
        [str(file) for file in arguments.tune],
        None if arguments.conversations is None else str(arguments.conversations),
        {name: str(file) for name, file in tests.items()},
        tokenizer,
        arguments.sequence_length,
        WINDOW,
        arguments.windows,
        arguments.runs,
    )
    if arguments.side == "decode":
        decoding(dense, texts, arguments)
        return
    sides = Sides(dense, arguments.source, texts, arguments.runs, options, arguments.precision == "bf16")
    # Predictors and random routing, whatever was measured before.
    torch.manual_seed(arguments.seed)
    model, chosen = sides.start(arguments.side, arguments.share)
    minutes, origin = 0.0, provenance(dense.device)
    if arguments.max_steps and arguments.side != "dense":
        name = "-".join(str(part) for part in (arguments.side, share, arguments.seed) if part is not None)
        kept = arguments.runs / "teacher" / f"{inputs['source']}-{arguments.precision}"
        model, minutes = tuned(model, KeptTeacher(dense, kept), texts, arguments, arguments.runs / name)
    model.eval()
    # Replaced blocks have routers, whose thresholds say nothing.
    decides = bool(model.config.causal_routers) and arguments.side != "linear"
    # Before the thresholds are set anew.
    test = partial(tested, model, texts, tokenizer, arguments.precision == "bf16")
    as_left = test(calibrates=False) if minutes and decides else None
    record = {
        **own,
        **chosen,
        **test(calibrates=True),
        "as_left": as_left,
        "flops_ratio": flops_share(model.config, dense.config, arguments.sequence_length),
        "decode_ratio": decode_share(model.config, dense.config, arguments.sequence_length),
        "tuning_minutes": minutes,
        **origin,
    }
    with records.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


def decoding(dense: MoDForCausalLM, texts: Texts, arguments: argparse.Namespace) -> None:
    """Seconds of a step of every side of the first seed, in turns: bf16, 128 tokens after prompts of 128.

    Turns of a side are seconds apart, once all are compiled: the machine's speed drifts by more than what is compared.
    Prompts are of the first text, and routers calibrated on its kind. A turn in which every side has a record is not
    measured again.
    """
    folders = {
        folder.name.removesuffix("-0"): folder
        for folder in sorted(arguments.runs.glob("*-0"))
        # Tuning changes nothing of how much the dense model computes.
        if folder.name != "tuned-0" and (folder / "model.safetensors").exists()
    }
    ranks: dict[str, int | None] = {"dense": None}
    ranks |= {side: MoDConfig.from_pretrained(folder).bypass_rank or None for side, folder in folders.items()}
    ranks |= {"vllm": None} if arguments.vllm else {}
    text, end = next(iter(texts.windows)), texts.corpus.end_of_text
    prompted = batches(texts.windows[text], range(min(4, len(texts.windows[text]))), end, 1, dense.device)
    prompts = [batch["input_ids"][:, :128].contiguous() for batch in prompted]
    path = arguments.out / "decoding.jsonl"
    missing = missing_turns(read_records(path), ranks, len(prompts))
    if not missing:
        return
    sides = {"dense": in_precision(dense, "bf16")}
    for side, folder in folders.items():
        model = MoDForCausalLM.from_pretrained(folder)
        if model.config.causal_routers:
            calibrate(model, spread(texts.kinds[text], 32), end)
        sides[side] = in_precision(model, "bf16")
    vllm = Vllm(arguments.vllm, dense, arguments.runs) if arguments.vllm else None

    def step_seconds(side: str, prompt: torch.Tensor, rows: int, options: SamplingOptions) -> float:
        if side == "vllm":
            assert vllm is not None
            return vllm.seconds(prompt, rows)
        return decode_seconds(sides[side], prompt.repeat(rows, 1), options)

    warm: set[int] = set()
    for rows, number, turn in missing:
        # vLLM's threads stay awake for a while: it comes last.
        in_turn = [*sorted(sides, reverse=bool(turn % 2)), *(["vllm"] if vllm else [])]
        if rows not in warm:
            for side in in_turn:
                step_seconds(side, prompts[0], rows, SamplingOptions(max_new_tokens=8))
            warm.add(rows)
        options = SamplingOptions(max_new_tokens=128, temperature=1.0, top_k=0, seed=8 * (TURNS * number + turn))
        for side in in_turn:
            seconds = step_seconds(side, prompts[number], rows, options)
            key = dict(zip(TURN, (side, ranks[side], rows, number, turn), strict=True))
            with path.open("a") as file:
                file.write(json.dumps({**key, "seconds": seconds, **provenance(dense.device)}) + "\n")


def missing_turns(
    records: list[dict[str, Any]], ranks: dict[str, int | None], prompts: int
) -> list[tuple[int, int, int]]:
    """Rows, prompt and turn of what is to be measured: where one side lacks a record, all sides are measured again."""
    done = {tuple(record[name] for name in TURN) for record in records}
    return [
        (rows, number, turn)
        for rows in ROWS
        for number in range(prompts)
        for turn in range(TURNS)
        if any((side, rank, rows, number, turn) not in done for side, rank in ranks.items())
    ]


VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, skip_tokenizer_init=True, gpu_memory_utilization=0.25)
def seconds(tokens, rows, count):
    settings = SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    model.generate([{"prompt_token_ids": tokens}] * rows, settings, use_tqdm=False)
    return time.perf_counter() - start
for line in sys.stdin:
    tokens, rows = json.loads(line)
    print("\\nseconds a step:", (seconds(tokens, rows, 128) - seconds(tokens, rows, 1)) / 127, flush=True)
"""


class Vllm:
    """vLLM with the dense model, in a process that stays: a start takes minutes, and turns must be seconds apart."""

    def __init__(self, python: str, dense: MoDForCausalLM, runs: Path) -> None:
        folder, self.log = runs / "llama", runs / "vllm.log"
        if not folder.exists():
            llama = to_llama(dense)
            nn.Module.to(llama, torch.bfloat16)
            llama.save_pretrained(folder)
        with self.log.open("w") as log:
            command = [python, "-c", VLLM, str(folder)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )

    def seconds(self, prompt: torch.Tensor, rows: int) -> float:
        """Seconds of a step; ValueError where the process has ended."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        with suppress(BrokenPipeError):
            stdin.write(json.dumps([prompt[0].tolist(), rows]) + "\n")
        # It stands between what the library logs.
        for line in stdout:
            if line.startswith("seconds a step:"):
                return float(line.split(":")[1])
        raise ValueError(f"vLLM has ended: {self.log} says why")


def summarise(lines: list[dict[str, Any]], shared: dict[str, Any], out: Path) -> dict[str, Any]:
    """Writes and returns summary.json: of each side the means over the seeds of its lines, whose settings are these."""
    by_side: dict[tuple[str, float | None, int | None], dict[int, dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        by_side.setdefault((line["side"], line["share"], line["map_rank"]), {})[line["seed"]] = line
    # Of a turn that was measured again the last.
    newest = {tuple(turn[name] for name in TURN): turn["seconds"] for turn in read_records(out / "decoding.jsonl")}
    seconds: dict[tuple[str, int | None, int], list[float]] = {}
    for (side, rank, rows, *_), took in newest.items():
        seconds.setdefault((side, rank, rows), []).append(took)

    def decode_speedup(side: str, rank: int | None) -> dict[int, float]:
        """By rows, how many times as fast as the dense model, of the medians of all turns."""
        return {
            rows: median(seconds["dense", None, rows]) / median(seconds[side, rank, rows])
            for rows in ROWS
            if (side, rank, rows) in seconds and ("dense", None, rows) in seconds
        }

    def means(figures: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
        return {text: mean(one[name][text] for one in figures) for text in figures[0][name]}

    def compared(
        same: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]
    ) -> tuple[list[int], dict[str, float] | None]:
        """The seeds that another side has, too, and the mean ratio of perplexities over them."""
        in_common = [seed for seed in same if seed in others]
        texts = next(iter(same.values()))["perplexity"]
        if not in_common:
            return [], None
        return in_common, {
            text: mean(same[seed]["perplexity"][text] / others[seed]["perplexity"][text] for seed in in_common)
            for text in texts
        }

    sides = {}
    for (side, share, rank), by_seed in by_side.items():
        same = list(by_seed.values())
        one = same[-1]
        # Tuning changes nothing of how much the dense model computes.
        timed_as = "dense" if side == "tuned" else side_name(side, share, None)
        seeds_in_common, ratios = {}, {}
        for other in by_side:
            is_rival = other[0] in ("dropped", "linear") and other[1] == share and other != (side, share, rank)
            if other[0] == "tuned" or is_rival:
                seeds_in_common[side_name(*other)], ratios[side_name(*other)] = compared(by_seed, by_side[other])
        as_left = {seed: line["as_left"] for seed, line in by_seed.items() if line.get("as_left") is not None}
        sides[side_name(side, share, rank)] = {
            "seeds": list(by_seed),
            "perplexity": means(same, "perplexity"),
            "perplexity_by_seed": {text: [line["perplexity"][text] for line in same] for text in one["perplexity"]},
            "ratio_to_tuned_dense": ratios.get("tuned"),
            # By name, of those at the same share.
            "ratio_to_others": {name: ratio for name, ratio in ratios.items() if name != "tuned"},
            "seeds_in_common": seeds_in_common,
            "loss": means(same, "loss"),
            "conversation_loss": None
            if one["conversation_loss"] is None
            else mean(line["conversation_loss"] for line in same),
            # By the rules of today, whatever they were when a line was written.
            "answers_right": mean(count_right(line["answers"]) for line in same),
            # With the thresholds that tuning left.
            "as_left": {
                "seeds": list(as_left),
                **{name: means(list(as_left.values()), name) for name in ("loss", "entering")},
                "answers_right": mean(count_right(left["answers"]) for left in as_left.values()),
            }
            if as_left
            else None,
            "flops_ratio": one["flops_ratio"],
            "decode_ratio": one["decode_ratio"],
            "decode_speedup": decode_speedup(timed_as, rank),
            # By seed, with the cores that it had.
            "tuning_minutes": [line["tuning_minutes"] for line in same],
            "tuning_threads": [line["machine"]["threads"] for line in same],
        }
    # vLLM runs the dense model, so its ratio is to ours of the same model.
    summary = {"sides": sides, "vllm_decode_speedup": decode_speedup("vllm", None), **shared, **provenance()}
    write_aside(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def side_name(side: str, share: float | None, rank: int | None) -> str:
    """What a side is called in the summary."""
    parts = [side, *([] if share is None else [str(share)]), *([] if rank is None else [f"rank-{rank}"])]
    return "-".join(parts)


if __name__ == "__main__":
    main()
