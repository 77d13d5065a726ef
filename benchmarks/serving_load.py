"""32 clients at once for five minutes, of which one is killed every second: what the server answers.

    python benchmarks/serving_load.py                  # writes results/reliability/serving.json
    python benchmarks/serving_load.py --engine vllm    # in an environment with vLLM; writes serving-vllm.json there
    python benchmarks/serving_load.py --engine vllm --dense    # writes serving-vllm-dense.json there

`mod serve` serves a tiny model; the clients are processes of `serving_client.py`. A client that is killed, with SIGKILL
at a random moment, is replaced by another at once. Every answer is compared with what the server said to the same
request when it was the only one, before the clients came; after they are gone the server is asked all of them again.

A streamed answer leaves out a character that is cut off at its end, and one that is not streamed shows its bytes as
U+FFFD: texts are compared without those. `wrong_answers` counts texts and statuses that differ, `unanswered` requests
that got no answer, other than those whose client was killed. Memory is the resident one of the server and of the
processes it has started, at every kill;
`rss_growth_mb` is that of `memory.py`. `--dense` routes no block: what still grows is not the routing's.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
from memory import growth_mb, tiny_model
from serving_client import REQUESTS, ask

from mixture_of_depths import train_tokenizer
from mixture_of_depths.provenance import provenance

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "reliability"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start_server(folder: Path, port: int, engine: str, dense: bool) -> subprocess.Popen[bytes]:
    """Serves a tiny model from `folder`; returns when it answers."""
    # vLLM has no narrower heads on a CPU.
    fields = {"head_dim": 32} if engine == "vllm" else {}
    model = tiny_model(128, **fields, **({"routed_layers": []} if dense else {}))
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 20], 300)
    tokenizer.save_pretrained(str(folder))
    model.save_pretrained(folder)
    command = [sys.executable, "-m", "mixture_of_depths", "serve", str(folder), "--port", str(port), "--engine", engine]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "server.txt").open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    while ask(port, str(folder), 0, False)["status"] != 200:
        assert server.poll() is None, (folder / "server.txt").read_text()
        time.sleep(0.2)
    return server


def said(line: dict[str, Any]) -> tuple[int, str]:
    """The status and the text of an answer, without a character that is cut off at its end."""
    return line["status"], line["text"].rstrip("\ufffd")


def answers(folder: Path, port: int) -> dict[int, tuple[int, str]]:
    """What the server says to every request, one after another."""
    return {number: said(ask(port, str(folder), number, False)) for number in range(-1, REQUESTS)}


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a client; the last one may be cut off."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def resident_mb(pid: int) -> float:
    """The resident memory of a process and of those it has started."""
    server = psutil.Process(pid)
    return sum(process.memory_info().rss for process in [server, *server.children(recursive=True)]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--dense", action="store_true", help="serve a model without routed blocks")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name = "serving" + ("-vllm" if arguments.engine == "vllm" else "") + ("-dense" if arguments.dense else "")
    arguments.out = arguments.out or RESULTS / f"{name}.json"
    # As an exception, so that the server and the clients end with the benchmark.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place), free_port()
        server = start_server(folder, port, arguments.engine, arguments.dense)
        clients: list[subprocess.Popen[bytes]] = []
        started = 0

        def start_client() -> subprocess.Popen[bytes]:
            nonlocal started
            started += 1
            command = [sys.executable, str(HERE / "serving_client.py"), str(port), str(folder), str(started)]
            with (folder / f"client{started}.jsonl").open("wb") as output:
                return subprocess.Popen(command, stdout=output)

        try:
            alone = answers(folder, port)
            clients += [start_client() for _ in range(arguments.clients)]
            memory, kills, began = [], 0, time.monotonic()
            while time.monotonic() - began < arguments.seconds and server.poll() is None:
                time.sleep(2 * draw.random())
                victim = draw.randrange(len(clients))
                assert clients[victim].poll() is None, "a client ended by itself"
                clients[victim].kill()
                clients[victim].wait()
                kills += 1
                clients[victim] = start_client()
                memory.append(resident_mb(server.pid))
            for client in clients:
                client.kill()
                client.wait()
            served = server.poll() is None and answers(folder, port) == alone
        finally:
            for process in [*clients, server]:
                process.terminate()
                process.wait()
        received = [line for number in range(1, started + 1) for line in lines(folder / f"client{number}.jsonl")]
        tracebacks = (folder / "server.txt").read_text().count("Traceback")
    seconds = sorted(line["seconds"] for line in received if line["number"] >= 0)
    record = {
        "benchmark": "serving_load",
        "engine": arguments.engine,
        "dense": arguments.dense,
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "clients_killed": kills,
        "answers": len(received),
        "wrong_answers": sum(said(line) != alone[line["number"]] for line in received if line["status"]),
        "unanswered": sum(line["status"] == 0 for line in received),
        "tracebacks": tracebacks,
        "serves_afterwards": served,
        "median_seconds": round(median(seconds), 3),
        "seconds_of_99_percent": round(quantiles(seconds, n=100)[-1], 3),
        "rss_growth_mb": round(growth_mb(memory), 2),
        "rss_mb": [round(value, 2) for value in memory],
        **provenance(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record) + "\n")
    print(json.dumps({name: value for name, value in record.items() if name != "rss_mb"}))


if __name__ == "__main__":
    main()
