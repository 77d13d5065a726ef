"""One thread and no network: the models are tiny, and results must not depend on the machine."""

import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# Kernels are interpreted where there is no GPU; Triton asks when it is loaded, as the package may have it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from models import options, write_numbers

from mixture_of_depths import Corpus, prepare

# They need an environment of their own; CONTRIBUTING.md has the command.
collect_ignore = [] if find_spec("vllm") else ["serving/vllm"]

torch.set_num_threads(1)
# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A text of 40 small files, packed into short sequences."""
    folder = tmp_path_factory.mktemp("text")
    write_numbers(folder)
    return prepare(options(folder, str(folder / "*.txt")))
