"""The text coloured by the blocks that each token used."""

import torch
from models import TOKENIZER, model_with

from mixture_of_depths.inspect.depth import COLOURS, coloured


def test_tokens_are_coloured_by_the_dense_blocks_and_those_entered() -> None:
    model = model_with()
    for layer in model.model.layers:
        if layer.router is not None:
            layer.router.predictor.down_proj.bias.data.fill_(100.0 if layer.layer_idx == 1 else -100.0)
    tokens = torch.arange(65, 70).tolist()
    text = coloured(model, TOKENIZER, tokens)
    assert text.plain.startswith(TOKENIZER.decode(tokens))
    assert {span.style for span in text.spans[:5]} == {COLOURS[2]}
    assert "3 (100%)" in text.plain
    assert "mean 3.00 of 4" in text.plain
