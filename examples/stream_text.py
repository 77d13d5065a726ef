"""Loads a trained model, and prints its text as it is sampled by the fast step.

python examples/stream_text.py runs/small "def add(first, second):"
"""

import sys

from mixture_of_depths import MoDForCausalLM, SamplingOptions, begin, load_tokenizer, stream_texts

folder, prompt = sys.argv[1:]
model, tokenizer = MoDForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
options = SamplingOptions(max_new_tokens=100, temperature=0.8, seed=1)

print(prompt, end="")
for _, text in stream_texts(model, tokenizer, begin(tokenizer, [prompt]), options, compiled=True):
    print(text, end="", flush=True)
print()
