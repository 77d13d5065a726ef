"""Maps are the reduced-rank regression of what blocks add, routers that of the size of what the maps leave out."""

import copy
import os
import subprocess
import sys

import datasets
import pytest
import torch
from models import TINY
from runs import dense_for
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.retrofitting.fit import (
    MAP_RIDGE,
    ROUTER_RIDGE,
    fit_blocks,
    low_rank_map,
    missed_shares,
)
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus


def some_sequences(dense: MoDForCausalLM, count: int = 6, length: int = 12) -> datasets.Dataset:
    """Of which each holds the end of a document."""
    rows = torch.randint(1, dense.config.vocab_size, (count, length))
    rows[:, 7] = 0
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()})


def seen_by(dense: MoDForCausalLM, sequences: datasets.Dataset, layer_idx: int) -> tuple[Tensor, Tensor]:
    """The tokens before a block and what it adds to them, first ones of documents left out; each [N, D]."""
    shorter = copy.deepcopy(dense)
    shorter.model.layers = shorter.model.layers[: layer_idx + 1]
    shorter.model.norm = nn.Identity()
    hidden, deltas = [], []
    for batch in batches(sequences, range(len(sequences)), 0, 1, dense.device):
        before_TD, after_TD = shorter(**batch, use_cache=False, output_hidden_states=True).hidden_states[-2:]
        for token in (*range(1, 8), *range(9, 12)):
            hidden.append(before_TD[0, token].detach())
            deltas.append((after_TD - before_TD)[0, token].detach())
    return torch.stack(hidden), torch.stack(deltas)


@pytest.mark.parametrize("rank", [0, 3])
def test_fitted_routers_are_the_least_squares_of_the_logarithm_of_what_is_missed(corpus: Corpus, rank: int) -> None:
    dense = dense_for(corpus).double()
    sequences = some_sequences(dense)
    fit = fit_blocks(dense, sequences, 0, rank)
    for layer_idx in (2, dense.config.num_hidden_layers - 1):
        hidden_ND, missed_ND = seen_by(dense, sequences, layer_idx)
        x_ND = torch.stack([F.rms_norm(x_D, (16,), eps=dense.config.rms_norm_eps) for x_D in hidden_ND])
        if rank:
            normed_ND = dense.model.layers[layer_idx].input_layernorm(hidden_ND).detach()
            map_DD = fit.up_LDR[layer_idx].double() @ fit.down_LRD[layer_idx].double()
            missed_ND = torch.stack([delta_D - map_DD @ x_D for delta_D, x_D in zip(missed_ND, normed_ND, strict=True)])
        y_N = missed_ND.norm(dim=-1).log()
        mean_square = (x_ND.square().sum() + len(x_ND)) / 17
        x_ND = x_ND - x_ND.mean(dim=0)
        # The intercept is not held back; the weights are, by the mean square of the inputs, the intercept's included.
        ridge_DD = ROUTER_RIDGE * mean_square * torch.eye(16, dtype=torch.float64)
        weight_D = torch.linalg.solve(x_ND.T @ x_ND + ridge_DD, x_ND.T @ (y_N - y_N.mean()))
        weight_D = weight_D / (x_ND @ weight_D).std(correction=0)
        assert torch.allclose(fit.router_LD[layer_idx].double(), weight_D, atol=1e-5)


def test_no_map_of_the_rank_leaves_less_squared_error_than_the_fitted_one(corpus: Corpus) -> None:
    dense = dense_for(corpus).double()
    sequences = some_sequences(dense)
    for layer_idx in (0, 3):
        layer = dense.model.layers[layer_idx]
        layer.input_layernorm.weight.data.uniform_(0.5, 2)
    fit = fit_blocks(dense, sequences, 0, 2)
    for layer_idx in (0, 3):
        hidden_ND, delta_ND = seen_by(dense, sequences, layer_idx)
        x_ND = dense.model.layers[layer_idx].input_layernorm(hidden_ND).detach()
        decay = MAP_RIDGE * (x_ND.T @ x_ND).diagonal().mean()

        def error(
            down_RD: Tensor, up_DR: Tensor, x_ND: Tensor = x_ND, y_ND: Tensor = delta_ND, d: Tensor = decay
        ) -> Tensor:
            """What is minimised: the squared error, and the decay of the map."""
            map_DD = up_DR @ down_RD
            return (y_ND - x_ND @ map_DD.T).square().sum() + d * map_DD.square().sum()

        fitted = [fit.down_LRD[layer_idx].double(), fit.up_LDR[layer_idx].double()]
        least = error(*fitted)
        # By descent from the fitted factors, which finds nothing better, and from elsewhere.
        for start in (fitted, [torch.randn(2, 16).double() * 0.1, torch.randn(16, 2).double() * 0.1]):
            factors = [factor.clone().requires_grad_() for factor in start]
            optimizer = torch.optim.LBFGS(factors, max_iter=300, line_search_fn="strong_wolfe")

            def closure(factors: list[Tensor] = factors, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = error(*factors)
                loss.backward()
                return loss

            optimizer.step(closure)
            assert error(*factors).item() >= least.item() * (1 - 1e-6)


def test_a_token_with_an_embedding_of_zeros_does_no_harm_to_what_is_fitted_and_measured(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    dense.model.embed_tokens.weight.data[5] = 0
    sequences = some_sequences(dense)
    sequences = datasets.Dataset.from_dict({"input_ids": [[*row[:3], 5, *row[4:]] for row in sequences["input_ids"]]})
    fit = fit_blocks(dense, sequences, 0, 2)
    assert fit.up_LDR is not None
    assert fit.up_LDR.isfinite().all()
    assert missed_shares(dense, fit, sequences, 0).isfinite().all()


def test_a_map_of_that_rank_is_found_again() -> None:
    x_ND, map_DD = torch.randn(200, 8).double(), torch.randn(8, 2).double() @ torch.randn(2, 8).double()
    y_ND = x_ND @ map_DD.T
    down_RD, up_DR = low_rank_map(x_ND.T @ x_ND, x_ND.T @ y_ND, 2)
    assert (up_DR @ down_RD - map_DD).norm() < 0.005 * map_DD.norm()
    torch.testing.assert_close(down_RD.norm(dim=1), up_DR.norm(dim=0))


def test_what_is_missed_falls_from_all_to_nothing_and_faster_than_at_random(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense, 40)
    missed_LC = missed_shares(dense, fit_blocks(dense, sequences, 0, 2), sequences, 0)
    assert torch.allclose(missed_LC[:, 0], torch.ones(4).double())
    assert missed_LC[:, -1].abs().max() < 1e-12
    assert (missed_LC.diff(dim=1) <= 0).all()
    assert (missed_LC[:, missed_LC.shape[1] // 2] < 0.5).all()


THREADS = """
import datasets, torch
torch.set_num_threads(2)
from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.retrofitting.fit import fit_blocks
config = MoDConfig(vocab_size=31, hidden_size=576, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
                   head_dim=2, initializer_range=0.3, routed_layers=[])
sequences = datasets.Dataset.from_dict({"input_ids": torch.randint(1, 31, (20, 40)).tolist()})
fit = fit_blocks(MoDForCausalLM(config), sequences, 0, 64)
for fitted in (fit.router_LD, fit.down_LRD, fit.up_LDR):
    assert fitted.isfinite().all()
assert (fit.router_LD.norm(dim=1) > 0).all()
"""


def test_blocks_of_a_width_of_576_are_fitted_whatever_the_number_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sequences_of_first_tokens_alone_are_refused() -> None:
    model = MoDForCausalLM(MoDConfig(**TINY, routed_layers=[]))
    sequences = datasets.Dataset.from_dict({"input_ids": [[0] * 8] * 3})
    with pytest.raises(ValueError, match="sequences have no token to fit the routers to"):
        fit_blocks(model, sequences, 0)
