"""Trains a small Mixture-of-Depths model on the Python standard library's own source, in a minute on 2 cores.

python examples/train.py runs/small
"""

import argparse
from pathlib import Path

from rich.console import Console

from mixture_of_depths import DataOptions, ModelOptions, TrainOptions, model_config, prepare, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
arguments = parser.parse_args()


corpus = prepare(DataOptions(max_characters=4_000_000))
shape = ModelOptions(hidden_size=128, num_hidden_layers=6, capacity=(0.125,), route_every=2)
config = model_config(shape, corpus.tokenizer, sequence_length=256)
_, result = train(config, corpus, TrainOptions(max_flops=1e12), arguments.out, console=Console())
assert result.evaluation is not None
print(f"held-out loss: {result.evaluation.loss_causal:.3f} nats per token, where each token decides by itself")
