"""Maps fitted again are the reduced-rank regression of what a block would add to the tokens that skip it."""

import copy
from typing import Any

import datasets
import pytest
import torch
from runs import dense_for
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths import MoDForCausalLM
from mixture_of_depths.model.modeling import DecoderLayer
from mixture_of_depths.retrofitting import skipping
from mixture_of_depths.retrofitting.fit import MAP_RIDGE, fit_blocks
from mixture_of_depths.retrofitting.measure import routed_from, set_fit
from mixture_of_depths.retrofitting.skipping import ENTERING_WEIGHT, fit_to_skipping
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus

FIELDS = {"routed_parts": "block_keep_keys", "bypass_rank": 2, "routed_layers": [0, 2, 3], "capacity": [0.5, 0.25, 1.0]}
# Ends of documents: of five documents in twelve tokens. At a capacity of a quarter not all first tokens have a place.
ENDS = [3, 5, 7, 9]


def some_sequences(dense: MoDForCausalLM, goes_on: bool = False, count: int = 6) -> datasets.Dataset:
    """Sequences of twelve tokens, of several documents, or each of one that began before."""
    rows = torch.randint(1, dense.config.vocab_size, (count, 12))
    if goes_on:
        positions = [list(range(12 * row + 5, 12 * row + 17)) for row in range(count)]
        return datasets.Dataset.from_dict({"input_ids": rows.tolist(), "position_ids": positions})
    rows[:, ENDS] = 0
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def fitted(dense: MoDForCausalLM, sequences: datasets.Dataset, **changes: Any) -> MoDForCausalLM:
    """The model with maps that are fitted to all tokens."""
    model = routed_from(dense, **{**FIELDS, **changes})
    set_fit(model, fit_blocks(dense, sequences, 0, 2))
    return model.eval()


def map_of(model: MoDForCausalLM, block: int) -> Tensor:
    bypass = model.model.layers[block].bypass
    return (bypass.up.weight @ bypass.down.weight).detach()


def alone(dense: MoDForCausalLM, block: int) -> MoDForCausalLM:
    """The dense model with one of its blocks and nothing after it."""
    one = copy.deepcopy(dense)
    one.model.layers = one.model.layers[block : block + 1]
    one.model.norm = nn.Identity()
    return one


@pytest.mark.parametrize(
    ("changes", "goes_on"),
    [({}, False), ({}, True), ({"routed_parts": "block"}, False), ({"router_type": "random"}, False)],
)
def test_every_map_leaves_the_least_of_what_its_block_would_add_after_blocks_that_are_skipped(
    corpus: Corpus, changes: dict[str, Any], goes_on: bool
) -> None:
    dense = dense_for(corpus).double()
    for layer in dense.model.layers:
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    sequences = some_sequences(dense, goes_on)
    first = [] if goes_on else [0, *(end + 1 for end in ENDS)]
    model = fitted(dense, sequences, **changes)
    before = copy.deepcopy(model)
    fit_to_skipping(model, sequences, 0)
    for block in (0, 2, 3):
        inputs, outputs, skipped = [], [], 0
        for batch in batches(sequences, range(6), 0, 1, dense.device):
            seen = model(**batch, use_cache=False, routing="top_k", output_hidden_states=True, output_routing=True)
            hidden_1TD = seen.hidden_states[block].detach()
            shared = {"position_ids": batch["position_ids"], "use_cache": False}
            after_1TD = alone(dense, block).model(inputs_embeds=hidden_1TD, **shared).last_hidden_state.detach()
            for token in set(range(12)) - set(first):
                enters = bool(seen.routing[block].entered[0, token])
                skipped += not enters
                norm_D = dense.model.layers[block].input_layernorm.weight.detach()
                normed_D = F.rms_norm(hidden_1TD[0, token], (16,), eps=dense.config.rms_norm_eps) * norm_D
                # Of a token in the sums so often, its square is.
                share = (ENTERING_WEIGHT if enters else 1) ** 0.5 / hidden_1TD[0, token].norm()
                inputs.append(normed_D * share)
                outputs.append((after_1TD - hidden_1TD)[0, token] * share)
        assert (skipped > 0) == (block != 3)
        x_SD, y_SD = torch.stack(inputs), torch.stack(outputs)
        # The decay of the map is as good as a token more in each direction, to which nothing is added.
        decay = MAP_RIDGE * (x_SD.T @ x_SD).diagonal().mean()
        x_SD = torch.cat([x_SD, decay.sqrt() * torch.eye(16).double()])
        y_SD = torch.cat([y_SD, torch.zeros(16, 16).double()])
        whole_DD = torch.linalg.lstsq(x_SD, y_SD).solution
        directions_DD = torch.linalg.svd(x_SD @ whole_DD).Vh[:2]
        expected_DD = (whole_DD @ directions_DD.T @ directions_DD).T
        torch.testing.assert_close(map_of(model, block), expected_DD, atol=1e-8, rtol=1e-6)
    for name, weight in before.state_dict().items():
        if ".bypass." not in name:
            assert torch.equal(model.state_dict()[name], weight), name


def test_where_few_skip_a_map_is_no_worse_for_others_that_skip_than_one_of_all_tokens(corpus: Corpus) -> None:
    dense = dense_for(corpus).double()
    fitting, others = (some_sequences(dense, goes_on=True, count=count) for count in (20, 60))
    # One of twelve skips, so that twenty say what sixteen inputs become.
    model = fitted(dense, fitting, routed_layers=[0], capacity=0.95)
    errors = []
    for _ in range(2):
        error = 0.0
        for batch in batches(others, range(60), 0, 1, dense.device):
            seen = model(**batch, use_cache=False, routing="top_k", output_hidden_states=True, output_routing=True)
            before_1TD, after_1TD = (states.detach() for states in seen.hidden_states[:2])
            shared = {"position_ids": batch["position_ids"], "use_cache": False}
            wanted_1TD = alone(dense, 0).model(inputs_embeds=before_1TD, **shared).last_hidden_state.detach()
            skips_1T = ~seen.routing[0].entered
            error += ((after_1TD - wanted_1TD)[skips_1T] / before_1TD[skips_1T].norm(dim=-1, keepdim=True)).norm() ** 2
        errors.append(float(error))
        fit_to_skipping(model, fitting, 0)
    assert errors[1] < 1.1 * errors[0]


def test_the_states_that_maps_are_fitted_to_are_those_of_the_whole_model(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    model = fitted(dense, sequences)
    last: list[Tensor] = []
    layer = model.model.layers[-1]
    assert isinstance(layer, DecoderLayer)
    hook = layer.register_forward_hook(lambda _, args, output: last.append(output[0]))
    fit_to_skipping(model, sequences, 0)
    # The whole model calls the same block once more.
    for row, batch in enumerate(batches(sequences, range(6), 0, 1, dense.device)):
        model(**batch, use_cache=False, routing="top_k")
        assert torch.equal(last[row], last[6 + row])
    hook.remove()


@pytest.mark.parametrize("is_training", [False, True])
def test_the_model_is_left_in_the_mode_it_came_in(corpus: Corpus, is_training: bool) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    model = fitted(dense, sequences).train(is_training)
    fit_to_skipping(model, sequences, 0)
    assert {module.training for module in model.modules()} == {is_training}


def test_under_bf16_autocast_what_is_summed_up_is_nearly_that_of_float32(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    sums: list[Tensor] = []

    def recorded(moments_DD: Tensor, products_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        sums.append(torch.stack([moments_DD, products_DD]))
        return torch.zeros(rank, 16), torch.zeros(16, rank)

    monkeypatch.setattr(skipping, "low_rank_map", recorded)
    for bf16 in (False, True):
        # Of random routing, where the same tokens skip whatever the states are.
        fit_to_skipping(fitted(dense, sequences, router_type="random"), sequences, 0, bf16)
    for exact_2DD, rounded_2DD in zip(sums[:3], sums[3:], strict=True):
        for exact_DD, rounded_DD in zip(exact_2DD, rounded_2DD, strict=True):
            assert (rounded_DD - exact_DD).norm() < 0.02 * exact_DD.norm()
        # What blocks add is computed in bf16.
        assert not torch.equal(exact_2DD[1], rounded_2DD[1])


def test_tokens_with_an_embedding_of_zeros_that_skip_leave_the_maps_finite(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    dense.model.embed_tokens.weight.data[5] = 0
    # Of six places five are first tokens', so that of each row two at least skip.
    rows = [[row[0], 5, 5, *row[3:11], 5] for row in some_sequences(dense)["input_ids"]]
    sequences = datasets.Dataset.from_dict({"input_ids": rows})
    model = fitted(dense, sequences)
    fit_to_skipping(model, sequences, 0)
    assert all(map_of(model, block).isfinite().all() for block in (0, 2, 3))
