"""What is measured survives a kill, and is held against what it depends on."""

from pathlib import Path

import pytest
import torch

from mixture_of_depths.retrofitting.fit import Fit
from mixture_of_depths.retrofitting.measure import BlockImportance
from mixture_of_depths.retrofitting.record import Measured, has_measured


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    assert not has_measured(tmp_path)
    measured = Measured(tmp_path, {"source": "dense", "capacity": (0.25,)})
    assert has_measured(tmp_path)
    assert measured.fit() is None
    assert measured.importance() == []
    fit = Fit(torch.randn(3, 4), torch.randn(3, 2, 4), torch.randn(3, 4, 2))
    block = BlockImportance(0.1, (1.0, 0.3, 0.0))
    measured.keep_fit(fit)
    measured.keep_importance([block])
    again = Measured(tmp_path, {"source": "dense", "capacity": (0.25,)})
    found = again.fit()
    assert found is not None
    assert all(torch.equal(getattr(found, name), tensor) for name, tensor in vars(fit).items())
    assert again.importance() == [block]


def test_what_depends_on_something_else_or_is_damaged_is_refused(tmp_path: Path) -> None:
    dense = {"source": "dense", "source_digest": "5c1f"}
    measured = Measured(tmp_path, dense)
    Measured(tmp_path, {**dense, "source": "./dense"})
    with pytest.raises(ValueError, match="source=other is another model than dense was when the run in"):
        Measured(tmp_path, {"source": "other", "source_digest": "d03a"})
    old = Measured(tmp_path / "old", {"source": "dense"})
    with pytest.raises(ValueError, match="was begun by an earlier version, which did not write down which model"):
        Measured(old.place.parent, dense)
    text = Measured(tmp_path / "of a text", {"text": "2e82"})
    with pytest.raises(
        ValueError, match=r"^the text, its tokenizer or sequence_length differs from that of the run in"
    ):
        Measured(text.place.parent, {"text": "9ab1"})
    (measured.place / "fit.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"fit\.safetensors is damaged"):
        measured.fit()
    for damage in ('[{"loss": 0.1}]', "[0.1]", '{"loss": 0.1}', "{}", ""):
        (measured.place / "blocks.json").write_text(damage)
        with pytest.raises(ValueError, match=r"blocks\.json is damaged: .*; remove it"):
            measured.importance()
    for damage in ("[]", '{"source', '{"a": 1}'):
        (measured.place / "facts.json").write_text(damage)
        with pytest.raises(ValueError, match=r"facts\.json is damaged: .*; remove .*measured, to have all of it"):
            Measured(tmp_path, dense)
