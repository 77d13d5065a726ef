"""The maps of routed blocks, fitted again to the tokens that skip them once it is known which these are.

Block after block: a block sees the states that the blocks before it leave, whose tokens skip already. Its map is the
one of its rank that leaves the least of what the block would add to the tokens that skip, with all tokens to attend to.
Of a token the error counts over the norm of its state, as in `missed_shares`. Tokens that enter count a little, too:
where few skip, these alone would say too little of a map. First tokens of documents do not count, as in `fit_blocks`.

Shapes: T tokens of a sequence, N of them that count, D hidden size, R rank of the maps.
"""

from typing import Any

import torch
from torch import Tensor

from mixture_of_depths.evaluation.calibration import through_blocks
from mixture_of_depths.model.modeling import DecoderLayer, MoDForCausalLM
from mixture_of_depths.model.routing import Bypass
from mixture_of_depths.retrofitting.fit import low_rank_map, precise, precise_device
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.packing import Sequences

# By how much a token counts that enters, where one that skips counts 1.
ENTERING_WEIGHT = 0.05


@torch.no_grad()
def fit_to_skipping(model: MoDForCausalLM, sequences: Sequences, end_of_text: int, bf16: bool = False) -> None:
    """Fits the maps of a model's routed blocks again, in place; see the file's description.

    Args:
        model: whose routed blocks have routers and maps, and route attention; it is left in the mode it came in.
        sequences: data set with the column `input_ids`; the states of all its tokens are held at once.
        end_of_text: the token after which a new document begins.
        bf16: whether to compute under bf16 autocast.
    """
    was_training = model.training
    model.eval()
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
    try:
        text = batches(sequences, range(len(sequences)), end_of_text, 1, model.device)
        for layer, passing in through_blocks(model, text, "top_k", autocast):
            if layer.bypass is not None:
                _fit_map(layer, layer.bypass, passing, autocast)
    finally:
        model.train(was_training)


def _fit_map(
    layer: DecoderLayer, bypass: Bypass, passing: list[tuple[Tensor, dict[str, Any]]], autocast: torch.autocast
) -> None:
    """Fits the map of one block to what each sequence brings to it, with what else the block is given."""
    assert layer.router is not None and layer.part != "mlp"
    home, size = precise_device(bypass.up.weight.device), bypass.down.weight.shape[1]
    moments_DD = torch.zeros(size, size, dtype=torch.float64, device=home)
    products_DD = torch.zeros_like(moments_DD)
    for hidden_1TD, others in passing:
        with autocast:
            delta_1TD, _ = layer.delta(hidden_1TD, others["placement"], None, "top_k")
        _, routing = layer.router(hidden_1TD, others["position_BT"], None, "top_k")
        counts_1T = others["position_BT"] != 0
        weight_N1 = torch.where(routing.entered[counts_1T], ENTERING_WEIGHT, 1.0)[:, None]
        # A token may have a state of zeros.
        norm_N1 = precise(hidden_1TD[counts_1T]).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        inputs_ND = precise(layer.part_norm(hidden_1TD)[counts_1T]) / norm_N1
        outputs_ND = precise(delta_1TD[counts_1T]) / norm_N1
        moments_DD += (inputs_ND.T @ (inputs_ND * weight_N1)).to(home, torch.float64)
        products_DD += (inputs_ND.T @ (outputs_ND * weight_N1)).to(home, torch.float64)
    down_RD, up_DR = low_rank_map(moments_DD, products_DD, bypass.down.weight.shape[0])
    bypass.down.weight.copy_(down_RD)
    bypass.up.weight.copy_(up_DR)
