"""Makes a pretrained model skip until a token costs 80 % of its FLOPs, and tunes it to do so.

The source is a folder, a GGUF file or a name of the hub. SmolLM2-135M-Instruct takes an hour and 4.6 GB on one core.

python examples/retrofit.py HuggingFaceTB/SmolLM2-135M-Instruct my-texts.jsonl runs/retrofit
"""

import argparse
from pathlib import Path

from rich.console import Console

from mixture_of_depths import DataOptions, RetrofitOptions, TrainOptions, load_dense, prepare, retrofit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("source")
parser.add_argument("text")
parser.add_argument("out", type=Path)
arguments = parser.parse_args()


dense, tokenizer = load_dense(arguments.source)
corpus = prepare(DataOptions(data=(arguments.text,), sequence_length=512, tokenizer=arguments.source), tokenizer)
routing = RetrofitOptions(flops_share=0.8, distillation=0.5)
tuning = TrainOptions(max_steps=240, batch_size=1, learning_rate=2e-4)
_, result = retrofit(dense, arguments.source, corpus, routing, tuning, arguments.out, console=Console())
assert result.dense is not None
assert result.retrofitted is not None
print(f"held-out loss: dense {result.dense.loss_causal:.3f}, made to skip {result.retrofitted.loss_causal:.3f}")
