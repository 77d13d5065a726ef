"""Trains a model whose routers are of your own kind: here a small MLP in the place of the linear map.

A router gives every token a weight. Who enters under top-k, and how the block's result is scaled, follows from it as
before. In sampling the predictors decide; thresholds would have to be calibrated.

python examples/own_router.py runs/own-router
"""

import argparse
from pathlib import Path

from rich.console import Console
from torch import nn

from mixture_of_depths import DataOptions, MoDConfig, MoDForCausalLM, Router, TrainOptions, Tuning, prepare, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
arguments = parser.parse_args()


class MLPRouter(Router):
    """The weight of a token by an MLP of its hidden state."""

    def __init__(self, config: MoDConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.proj = nn.Sequential(nn.Linear(config.hidden_size, 32), nn.SiLU(), nn.Linear(32, 1))


corpus = prepare(DataOptions(max_characters=4_000_000))
config = MoDConfig(vocab_size=len(corpus.tokenizer), hidden_size=128, num_hidden_layers=6, num_attention_heads=4)
model = MoDForCausalLM(config)
for block in config.routed_layers:
    model.model.layers[block].router = MLPRouter(config, block)
start = Tuning(model, facts={"router": "MLP"})
_, result = train(config, corpus, TrainOptions(max_flops=1e12), arguments.out, console=Console(), tuning=start)
for block, share in result.evaluation.causal_routers["predictor"].share_entering.items():
    print(f"block {block}: {share:.1%} of the tokens enter, each by its own decision")
