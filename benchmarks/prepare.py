"""Text of any size: memory, speed, start and kills of `mod prepare`, and a training step that reads what it wrote.

    python benchmarks/prepare.py                            # 10 GB, written to --place and removed
    python benchmarks/prepare.py --mb 200 --kill-mb 50      # smaller

Documents of a seeded generator, some 3 kB each, in files of JSON lines of 256 MB. Prints one JSON line:

- `peak_gib`: the most memory that the command's processes have together (their proportional set sizes, looked at twice
  in 3 seconds: oftener, looking would take a tenth of the machine's time from the command).
- `mb_per_second`: text over the command's whole time; `encode_batch_mb_per_second`: what `tokenizers.encode_batch`
  alone reaches with as many threads as the command has processes, before and after it;
  `throughput_ratio`: the first over the
  second.
- `start_seconds`: from the options to the corpus over prepared text, in a fresh process that has imported the package.
- `step_ratio`: time of a training step that reads from the shards over that of one whose sequences are in memory, in
  turns; medians.
- `kills_total`, `kills_exact`: kills at random moments, in runs of up to four, of which each then ended with the same
  files, byte for byte.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer
from train_step import in_fresh_process

from mixture_of_depths import DataOptions, ModelOptions, MoDForCausalLM, model_config, prepare, train_tokenizer
from mixture_of_depths.provenance import provenance
from mixture_of_depths.text.batches import Collator
from mixture_of_depths.text.order import Order

WORDS, FILE_MB, LENGTH, BATCH = 50_000, 256, 1024, 4


def documents(seed: int) -> Iterator[str]:
    """Documents of made-up words, the n-th of which comes up as often as 1 / n."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(draw.choice(letters, size)) for size in np.random.default_rng(0).integers(2, 11, WORDS)])
    chances = 1 / np.arange(1, WORDS + 1)
    chances /= chances.sum()
    while True:
        row = words[draw.choice(WORDS, 1 << 19, p=chances)]
        place = 0
        while place < len(row):
            size = int(draw.lognormal(6, 0.8)) + 5
            yield " ".join(row[place : place + size]) + ".\n"
            place += size


def write_text(folder: Path, mb: int) -> int:
    """Writes so many MB of documents; returns how many bytes of text they have."""
    folder.mkdir(parents=True)
    size = 0
    for number in range((mb + FILE_MB - 1) // FILE_MB):
        left = min(FILE_MB, mb - number * FILE_MB) * 1_000_000
        with (folder / f"{number:04}.jsonl").open("w") as file:
            for text in documents(number):
                left -= file.write(json.dumps({"text": text}) + "\n")
                size += len(text)
                if left <= 0:
                    break
    return size


def command(text: Path, out: Path, tokenizer: Path, processes: int) -> list[str]:
    words = [sys.executable, "-m", "mixture_of_depths", "prepare", str(text), "--out", str(out)]
    return [*words, "--tokenizer", str(tokenizer), "--processes", str(processes)]


def run_watched(words: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the most GiB that it and its processes have together."""
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            peak = max(peak, memory_of(psutil.Process(process.pid)))
            time.sleep(1.5)
        seconds = time.perf_counter() - began
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode()
    return seconds, peak / 2**30


def memory_of(process: psutil.Process) -> int:
    total = 0
    try:
        everyone = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for one in everyone:
        try:
            total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def encode_batch_speed(tokenizer: str, mb: int, threads: int) -> float:
    """MB per second of the library alone."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    texts, size = [], 0
    for text in documents(0):
        texts.append(text)
        size += len(text)
        if size > mb * 1_000_000:
            break
    began = time.perf_counter()
    for start in range(0, len(texts), 1000):
        backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)
    return size / 1e6 / (time.perf_counter() - began)


def start_seconds(data: str, cache: str) -> float:
    began = time.perf_counter()
    prepare(DataOptions(data=(data,), sequence_length=LENGTH, cache_dir=Path(cache)))
    return time.perf_counter() - began


def step_times(data: str, cache: str, steps: int, threads: int) -> tuple[float, float]:
    """Milliseconds of a training step that reads from shards, and of one whose sequences are in memory."""
    torch.set_num_threads(threads)
    corpus = prepare(DataOptions(data=(data,), sequence_length=LENGTH, cache_dir=Path(cache)))
    shape = ModelOptions(hidden_size=256, num_hidden_layers=4)
    model = MoDForCausalLM(model_config(shape, corpus.tokenizer, LENGTH)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    order, collate = Order(corpus.train, None, 0, (steps + 2) * BATCH), Collator(corpus.end_of_text)
    # Others than those read from the disk, which would then be in its cache.
    in_memory = [corpus.train[number] for number in range(BATCH * 8)]
    taken: dict[bool, list[float]] = {False: [], True: []}
    for step in range(steps + 2):
        for from_shards in (True, False) if step % 2 else (False, True):
            began = time.perf_counter()
            rows = [
                order[step * BATCH + i] if from_shards else in_memory[(step * BATCH + i) % 32] for i in range(BATCH)
            ]
            model(**collate(rows), skip_logits=True, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken[from_shards].append((time.perf_counter() - began) * 1e3)
    return median(taken[True][2:]), median(taken[False][2:])


def digests(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def kills(place: Path, text: Path, tokenizer: Path, processes: int, wanted: int) -> tuple[int, int]:
    """How many times the command was killed, and how many of these were followed by the same files."""
    began = time.perf_counter()
    subprocess.run(command(text, place / "whole", tokenizer, processes), check=True, capture_output=True)
    seconds, whole, draw = time.perf_counter() - began, digests(place / "whole"), random.Random(0)
    total = exact = 0
    while total < wanted:
        here, out = 0, place / f"killed-{total}"
        for _ in range(min(4, wanted - total)):
            process = subprocess.Popen(
                command(text, out, tokenizer, processes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            here += process.wait() == -signal.SIGKILL
        ended = subprocess.run(command(text, out, tokenizer, processes), capture_output=True).returncode == 0
        total, exact = total + here, exact + here * (ended and digests(out) == whole)
        shutil.rmtree(out)
    return total, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=10_000)
    parser.add_argument("--kill-mb", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sample-mb", type=int, default=30, help="text for encode_batch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--place", type=Path, help="where the text is written; a temporary folder by default")
    arguments = parser.parse_args()
    processes = arguments.processes
    record: dict[str, Any] = {"benchmark": "prepare", "mb": arguments.mb, "processes": processes}
    if arguments.place is not None:
        arguments.place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.place) as name:
        place = Path(name)
        tokenizer, cache = place / "tokenizer", str(place / "cache")
        train_tokenizer(islice(documents(0), 10_000), arguments.vocabulary).save_pretrained(str(tokenizer))
        size = write_text(place / "text", arguments.mb)
        speed = (str(tokenizer), arguments.sample_mb, processes)
        alone = [in_fresh_process(encode_batch_speed, *speed)]
        seconds, record["peak_gib"] = run_watched(command(place / "text", place / "out", tokenizer, processes))
        alone.append(in_fresh_process(encode_batch_speed, *speed))
        record["mb_per_second"], record["encode_batch_mb_per_second"] = size / 1e6 / seconds, sum(alone) / 2
        record["throughput_ratio"] = record["mb_per_second"] / record["encode_batch_mb_per_second"]
        print(record, file=sys.stderr)
        shutil.rmtree(place / "text")
        out = str(place / "out")
        starts = [in_fresh_process(start_seconds, out, cache) for _ in range(3)]
        record["start_seconds"] = median(starts)
        shards, memory = in_fresh_process(step_times, out, cache, arguments.steps, processes)
        record |= {"step_ms_shards": shards, "step_ms_memory": memory, "step_ratio": shards / memory}
        print(record, file=sys.stderr)
        shutil.rmtree(place / "out")
        write_text(place / "kill-text", arguments.kill_mb)
        total, exact = kills(place, place / "kill-text", tokenizer, processes, arguments.kills)
        record |= {"kills_total": total, "kills_exact": exact}
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}
    print(json.dumps({**rounded, **provenance()}))


if __name__ == "__main__":
    main()
