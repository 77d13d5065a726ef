"""Documents of data sets, from the Hugging Face hub or a folder, streamed by the datasets library."""

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import isdir
from pathlib import Path
from typing import Any, cast

import datasets
from huggingface_hub import dataset_info

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.documents import Skipped, texts_of, value_of
from mixture_of_depths.text.sources import HUB, FileFacts, file_facts


def read_hub(name: str, options: DataOptions, skipped: Skipped, shard: int | None = None) -> Iterator[str]:
    """The documents of a data set, or those of one of its shards.

    Raises:
        ValueError: when it cannot be read, or has no such column.
    """
    column = options.text_column
    for record in _records_of_hub(name, options.split, shard):
        has_column, value = value_of(record, column)
        if not has_column:
            raise ValueError(f"text_column={column} is missing in hub:{name}, which has: {', '.join(record)}")
        yield from texts_of([value], column, name, skipped)


def shards_of_hub(name: str, split: str) -> int:
    """How many parts a data set of the hub can be read in.

    Raises:
        ValueError: when it cannot be read.
    """
    place = _place_on_hub(name)
    with _reading_hub(name, split):
        return cast(datasets.IterableDataset, _stream(*place, split)).num_shards


def facts_of_hub(name: str, split: str) -> list[FileFacts]:
    """What tells a data set from a changed one: of the hub its commit, of a folder, as the hub's cache is, its files.

    Raises:
        ValueError: when the hub cannot be reached.
    """
    place, _ = _place_on_hub(name)
    if isdir(place):
        paths = (path for path in sorted(Path(place).rglob("*")) if path.is_file())
        return [file_facts(path) for path in paths if not _is_hidden(path.relative_to(place))]
    with _reading_hub(name, split):
        commit = dataset_info(place).sha
    assert commit is not None
    return [FileFacts(f"{HUB}{name}", 0, 0, commit)]


def _is_hidden(path: Path) -> bool:
    """Whether the datasets library passes a file over, as that of a repository's history."""
    return any(part.startswith(".") for part in path.parts)


def _place_on_hub(name: str) -> tuple[str, str | None]:
    """The name and the configuration of a data set."""
    # A folder may hold a colon, and has no configuration.
    if isdir(name):
        return name, None
    name, _, config = name.partition(":")
    if not name:
        raise ValueError("data=hub: names no data set; give hub:NAME or hub:NAME:CONFIGURATION")
    return name, config or None


def _stream(name: str, config: str | None, split: str) -> Any:
    return datasets.load_dataset(name, config, split=split, streaming=True)


@contextmanager
def _reading_hub(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Network, archive and format each have errors of their own, before the first record and after.
        raise ValueError(f"data=hub:{name} with split={split} cannot be read: {error}") from error


def _records_of_hub(name: str, split: str, shard: int | None) -> Iterator[dict[str, Any]]:
    place = _place_on_hub(name)
    with _reading_hub(name, split):
        stream = _stream(*place, split)
    records = iter(stream if shard is None else stream.shard(num_shards=stream.num_shards, index=shard))
    while True:
        with _reading_hub(name, split):
            record = next(records, None)
        if record is None:
            return
        yield record
