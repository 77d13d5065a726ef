"""One thread and no network: the models are tiny, and results must not depend on the machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from models import SENTENCE, options

from mixture_of_depths import Corpus, prepare

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A text of 40 small files, packed into short sequences."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(1, 60)) + SENTENCE)
    return prepare(options(folder, str(folder / "*.txt")))
