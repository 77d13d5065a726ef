"""The blocks that each token used."""

import torch

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.inspect.depth import blocks_used


def test_blocks_used_are_dense_blocks_and_those_entered() -> None:
    config = MoDConfig(vocab_size=31, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
    model = MoDForCausalLM(config).eval()
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.predictor.down_proj.bias.data.fill_(100.0 if layer.layer_idx == 1 else -100.0)
    assert blocks_used(model, torch.zeros(1, 5, dtype=torch.int64)).tolist() == [[3] * 5]
