"""Shows which tokens of a text went through how many blocks of a trained model.

python examples/see_routing.py runs/small my_file.py
"""

import argparse
from pathlib import Path

from mixture_of_depths import MoDForCausalLM, load_tokenizer, trace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("file", type=Path)
arguments = parser.parse_args()


model, tokenizer = MoDForCausalLM.from_pretrained(arguments.folder).eval(), load_tokenizer(arguments.folder)
traced = trace(model, tokenizer, arguments.file.read_text())

for piece, blocks, loss in zip(traced.pieces, traced.blocks_used, traced.loss, strict=True):
    print(f"{piece!r:24} {'#' * blocks:{model.config.num_hidden_layers}} {blocks} blocks, loss {loss:.2f}")
print(f"{traced.saved:.0%} of the compute of a dense model saved")
