"""How long the fast step makes wait for its first token: compiled for the first time, and in a later process.

    python benchmarks/first_token.py                    # 30 blocks, 135M parameters, in bf16

A model of random weights in the shape of SmolLM2-135M, every other block routed. Each time is from the start of a
process of its own, the import of the libraries and the making of the model included, to the first and the second token.
`first` has an empty cache on the disk, `later` what the first one left there; of the later ones it is the median.
Prints one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
}


def one(began: float, blocks: int) -> None:
    """What each process does; prints the seconds since it began."""
    import torch

    from mixture_of_depths import MoDConfig, MoDForCausalLM, SamplingOptions, stream

    imported = time.time() - began
    with torch.device("meta"):
        model = MoDForCausalLM(MoDConfig(**SHAPE, num_hidden_layers=blocks, causal_router="threshold"))
    # Drawing the weights takes longer than reading them from a file would.
    torch.nn.Module.to(model.to_empty(device="cpu"), torch.bfloat16)
    model.eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(0.01)
    made = time.time() - began
    tokens = stream(
        model, torch.ones(1, 30, dtype=torch.int64), options=SamplingOptions(max_new_tokens=2), compiled=True
    )
    at = [time.time() - began for _ in tokens]
    print(json.dumps({"imported": imported, "made": made, "first_token": at[0], "second_token": at[1]}))


def seconds(blocks: int, cache: str) -> dict[str, float]:
    words = [sys.executable, __file__, "--blocks", str(blocks), "--began", str(time.time())]
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.began is not None:
        return one(arguments.began, arguments.blocks)
    from mixture_of_depths.provenance import provenance

    with tempfile.TemporaryDirectory() as cache:
        first = seconds(arguments.blocks, cache)
        later = [seconds(arguments.blocks, cache) for _ in range(arguments.repeats)]
    record = {
        "first": {name: round(value, 1) for name, value in first.items()},
        "later": {name: round(median(each[name] for each in later), 1) for name in first},
    }
    print(json.dumps({"benchmark": "first_token", "blocks": arguments.blocks, **record, **provenance()}))


if __name__ == "__main__":
    main()
