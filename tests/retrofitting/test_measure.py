"""A retrofitted model starts as the dense one, with routers fitted to it, and its blocks' importance is measured."""

import copy
import os
import subprocess
import sys

import datasets
import pytest
import torch
from models import TINY
from runs import QUIET, dense_for
from torch import nn
from torch.nn import functional as F

from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.retrofitting.measure import RIDGE, fit_routers, measure_importance, routed_from, set_routers
from mixture_of_depths.text.batches import batches
from mixture_of_depths.text.corpus import Corpus


def some_sequences(dense: MoDForCausalLM, count: int = 6, length: int = 12) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"input_ids": torch.randint(1, dense.config.vocab_size, (count, length)).tolist()}
    )


@pytest.mark.parametrize("router_type", ["learned", "random"])
def test_at_capacity_one_the_retrofitted_model_is_the_dense_one(corpus: Corpus, router_type: str) -> None:
    dense = dense_for(corpus).double()
    model = routed_from(dense, routed_layers=[0, 2, 3], capacity=1.0, router_type=router_type)
    input_ids = torch.randint(0, dense.config.vocab_size, (2, 16))
    difference = model(input_ids, routing="top_k", use_cache=False).logits - dense(input_ids).logits
    assert difference.abs().max() < 1e-12


def test_fitted_routers_are_the_least_squares_of_how_much_a_block_adds(corpus: Corpus) -> None:
    dense = dense_for(corpus).double()
    # A document ends within a row: the first tokens of both do not count.
    sequences = datasets.Dataset.from_dict(
        {"input_ids": [[*row[:7], 0, *row[8:]] for row in some_sequences(dense)["input_ids"]]}
    )
    fitted = fit_routers(dense, sequences, 0)

    for layer_idx in (2, dense.config.num_hidden_layers - 1):
        inputs, norms = [], []
        shorter = copy.deepcopy(dense)
        shorter.model.layers = shorter.model.layers[: layer_idx + 1]
        shorter.model.norm = nn.Identity()
        for batch in batches(sequences, range(len(sequences)), 0, 1, dense.device):
            before_TD, after_TD = shorter(**batch, use_cache=False, output_hidden_states=True).hidden_states[-2:]
            for token in (*range(1, 8), *range(9, 12)):
                inputs.append(F.rms_norm(before_TD[0, token], (16,), eps=dense.config.rms_norm_eps))
                norms.append((after_TD - before_TD)[0, token].norm())
        x_ND = torch.stack(inputs).detach()
        mean_square = (x_ND.square().sum(dim=0).sum() + len(x_ND)) / 17
        x_ND, y_N = x_ND - x_ND.mean(dim=0), torch.stack(norms).detach()
        # The intercept is not held back; the weights are, by the mean square of the inputs, the intercept's included.
        ridge = RIDGE * mean_square * torch.eye(16, dtype=torch.float64)
        weight_D = torch.linalg.solve(x_ND.T @ x_ND + ridge, x_ND.T @ (y_N - y_N.mean()))
        weight_D = weight_D / (x_ND @ weight_D).std(correction=0)
        assert torch.allclose(fitted[layer_idx].double(), weight_D, atol=1e-3)


THREADS = """
import datasets, torch
torch.set_num_threads(2)
from mixture_of_depths import MoDConfig, MoDForCausalLM
from mixture_of_depths.retrofitting.measure import fit_routers
config = MoDConfig(vocab_size=31, hidden_size=576, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1,
                   head_dim=2, initializer_range=0.3, routed_layers=[])
sequences = datasets.Dataset.from_dict({"input_ids": torch.randint(1, 31, (20, 40)).tolist()})
weights_LD = fit_routers(MoDForCausalLM(config), sequences, 0)
assert weights_LD.isfinite().all() and (weights_LD.norm(dim=1) > 0).all()
"""


def test_routers_of_a_width_of_576_are_fitted_whatever_the_number_of_threads() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_sequences_of_first_tokens_alone_are_refused() -> None:
    model = MoDForCausalLM(MoDConfig(**TINY, routed_layers=[]))
    sequences = datasets.Dataset.from_dict({"input_ids": [[0] * 8] * 3})
    with pytest.raises(ValueError, match="sequences have no token to fit the routers to"):
        fit_routers(model, sequences, 0)


def test_importance_is_what_the_loss_rises_by(corpus: Corpus) -> None:
    dense = dense_for(corpus)
    sequences = some_sequences(dense)
    weights_LD = fit_routers(dense, sequences, 0)
    found = measure_importance(dense, weights_LD, 0.25, sequences, 0, console=QUIET)

    given = next(batches(sequences, range(len(sequences)), 0, len(sequences), dense.device))
    before = dense(**given, use_cache=False).lm_loss.item()
    shorter = MoDForCausalLM(MoDConfig(**{**dense.config.to_dict(), "num_hidden_layers": 3})).eval()
    renamed = {
        name.replace("layers.3.", "layers.2."): w for name, w in dense.state_dict().items() if "layers.2." not in name
    }
    shorter.load_state_dict(renamed)
    assert found[2].bypassed == pytest.approx(shorter(**given, use_cache=False).lm_loss.item() - before, abs=1e-5)
    routed = routed_from(dense, routed_layers=[2], capacity=0.25).eval()
    set_routers(routed, weights_LD)
    loss = routed(**given, use_cache=False, routing="top_k").lm_loss.item()
    assert found[2].lower_ranked == pytest.approx(loss - before, abs=1e-5)
