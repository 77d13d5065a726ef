"""Writes two sides of serving.py with random weights: every other block routed at 12.5 %, and the dense twin.

    python benchmarks/serving_sides.py TOKENIZER runs/B        # runs/B/mod and runs/B/dense, of shape B

TOKENIZER is a folder that has one. Thresholds are calibrated on random tokens, so that the benchmark has to draw tokens
at random, too (`--temperature 2`).
"""

import argparse
from pathlib import Path

from sampling_sides import SHAPES, build, calibrate
from transformers import AutoTokenizer

from mixture_of_depths import to_llama

PROMPT, NEW, POSITIONS = 128, 128, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=list(SHAPES), default="B")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.tokenizer))
    sides = build(arguments.shape, len(tokenizer), POSITIONS)
    calibrate(sides["mod"], PROMPT, NEW, rows=8)
    for name, model in {"mod": sides["mod"], "dense": to_llama(sides["dense"])}.items():
        model.save_pretrained(arguments.out / name)
        tokenizer.save_pretrained(str(arguments.out / name))


if __name__ == "__main__":
    main()
