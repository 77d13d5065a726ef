"""Loads a trained model, and prints its text as it is sampled by the fast step.

python examples/stream_text.py runs/small "def add(first, second):"
"""

import argparse

from mixture_of_depths import MoDForCausalLM, SamplingOptions, begin, load_tokenizer, stream_texts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("prompt")
arguments = parser.parse_args()


model, tokenizer = MoDForCausalLM.from_pretrained(arguments.folder).eval(), load_tokenizer(arguments.folder)
options = SamplingOptions(max_new_tokens=100, temperature=0.8, seed=1)

print(arguments.prompt, end="")
for _, text in stream_texts(model, tokenizer, begin(tokenizer, [arguments.prompt]), options, compiled=True):
    print(text, end="", flush=True)
print()
