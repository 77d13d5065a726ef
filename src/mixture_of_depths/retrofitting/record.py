"""What is measured of a dense model, kept in the run's folder as it is made: a run that is killed measures it once."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mixture_of_depths.files import read_json, write_aside
from mixture_of_depths.retrofitting.fit import Fit
from mixture_of_depths.retrofitting.measure import BlockImportance
from mixture_of_depths.training.folder import check_same_text, check_unchanged

# In the run's folder.
MEASURED = "measured"
FACTS, FIT, BLOCKS = "facts.json", "fit.safetensors", "blocks.json"


def has_measured(folder: Path) -> bool:
    """Whether a run's folder holds anything that was measured."""
    return (folder / MEASURED / FACTS).exists()


def _read(path: Path, kind: type, remedy: str) -> Any:
    """What a JSON file holds; raises ValueError, with a remedy, where that is of another kind."""
    try:
        kept = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if not isinstance(kept, kind):
        raise ValueError(f"{path} is damaged: it does not hold what was written; {remedy}")
    return kept


def check_facts(folder: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises ValueError where what a run is to go on with is not what it had before; both as in `Measured`."""
    for name, value in json.loads(json.dumps(facts)).items():
        if name == "text":
            check_same_text(folder, before.get(name), value)
        elif name == "source_digest":
            _check_same_source(folder, before, facts)
        # The same model may be given by another name.
        elif name != "source":
            check_unchanged(folder, name, before.get(name), value)


def _check_same_source(folder: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises ValueError for another model than before, or where it is not known."""
    if "source_digest" not in before:
        raise ValueError(
            f"out={folder} was begun by an earlier version, which did not write down which model "
            f"source={before.get('source')} was; begin anew in another folder"
        )
    if before["source_digest"] != facts["source_digest"]:
        raise ValueError(
            f"source={facts['source']} is another model than {before.get('source')} was when the run in out={folder} "
            "began; give that one, or use another folder"
        )


class Measured:
    """What was fitted and measured for a run, and what is added to it.

    Args:
        folder: the run's folder.
        facts: what it depends on; of these the model, by its name and its digest, under "source" and
            "source_digest", and the text, by the key of its preparation, under "text".

    Raises:
        ValueError: when the folder holds what depends on other facts, or is damaged.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.place = folder / MEASURED
        if has_measured(folder):
            remedy = f"remove {self.place}, to have all of it measured again"
            before = _read(self.place / FACTS, dict, remedy)
            if not before.keys() & facts.keys():
                raise ValueError(f"{self.place / FACTS} is damaged: it tells nothing of {', '.join(facts)}; {remedy}")
            check_facts(folder, before, facts)
        else:
            self.place.mkdir(parents=True, exist_ok=True)
            write_aside(self.place / FACTS, json.dumps(facts, indent=2))

    def fit(self) -> Fit | None:
        """What was fitted; None if nothing was."""
        path = self.place / FIT
        if not path.exists():
            return None
        try:
            return Fit(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, to have it fitted again") from error

    def fit_once(self, fitting: Callable[[], Fit]) -> Fit:
        """What was fitted, or is now."""
        fit = self.fit()
        if fit is None:
            self.keep_fit(fitting())
            # Read back, as a run that goes on does: where tensors lie in memory may change how products are rounded.
            fit = self.fit()
            assert fit is not None
        return fit

    def keep_fit(self, fit: Fit) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(fit).items() if tensor is not None}
        aside = self.place / f"{FIT}.part"
        save_file(tensors, aside)
        aside.replace(self.place / FIT)

    def importance(self) -> list[BlockImportance]:
        """What was measured of the first blocks."""
        path = self.place / BLOCKS
        if not path.exists():
            return []
        remedy = "remove it, to have that measured again"
        try:
            return [block_importance(block) for block in _read(path, list, remedy)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: it does not say what skipping blocks costs; {remedy}") from error

    def measure_rest(
        self, num_blocks: int, measuring: Callable[[Sequence[BlockImportance]], Iterable[BlockImportance]]
    ) -> list[BlockImportance]:
        """What was measured of the first blocks, and is now of the others, each written down once it is measured."""
        importance = self.importance()
        if len(importance) < num_blocks:
            for block in measuring(tuple(importance)):
                importance.append(block)
                self.keep_importance(importance)
        return importance

    def keep_importance(self, importance: list[BlockImportance]) -> None:
        write_aside(self.place / BLOCKS, json.dumps([asdict(block) for block in importance]))


def block_importance(record: dict[str, Any]) -> BlockImportance:
    """Of one block, from JSON."""
    return BlockImportance(record["loss"], tuple(record["missed"]))
