"""How a text is divided among processes: pieces that depend on the files alone, so that any number of them agree."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.conversations import Conversation
from mixture_of_depths.text.documents import (
    Skipped,
    Span,
    check_column,
    read_all,
    read_file,
)
from mixture_of_depths.text.sources import COMPRESSIONS, FileFacts, file_facts, find_files, hub_name, is_tokens, kind_of
from mixture_of_depths.text.tokens import Vocabulary, open_tokens, read_token_documents

# Bytes on the disk that one process reads before it takes the next piece, and of a text that is one document.
PIECE = 1 << 26


@dataclass(frozen=True)
class Piece:
    """A part of the text that one process reads from its beginning to its end.

    Files from `first` to `last` of the plan, or shard `first` of a data set of the hub. Of a single file those bytes,
    row groups or tokens from `begin` to `end`, None for the file's end. `source` is its number in `data`; None for all
    of the text. `size` in bytes tells how much of the whole it is.
    """

    source: int | None
    first: int = 0
    last: int = 0
    begin: int = 0
    end: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Plan:
    """What a text is read from, files and data sets of the hub, and the pieces it is read in."""

    files: list[FileFacts]
    pieces: list[Piece]

    @property
    def size(self) -> int:
        """Bytes of all pieces, as far as they are known."""
        return sum(piece.size for piece in self.pieces)


def holds_tokens(data: Iterable[str]) -> bool:
    """Whether the text is tokenised already.

    Raises:
        ValueError: when that is so of some of it only.
    """
    kinds = {hub_name(source) is None and is_tokens(find_files(source)[0]) for source in data}
    if len(kinds) > 1:
        raise ValueError(f"data={' '.join(data)} names text and tokens; give one kind, or each a weight")
    return kinds == {True}


def facts_of(source: str, split: str) -> list[FileFacts]:
    """What tells the text of a source from a changed one."""
    name = hub_name(source)
    if name is not None:
        from mixture_of_depths.text.hub import facts_of_hub

        return facts_of_hub(name, split)
    return [file_facts(path) for path in find_files(source)]


def plan_of(options: DataOptions, vocabulary: Vocabulary | None) -> Plan:
    """Divides the text of `options`.

    Args:
        options: the text.
        vocabulary: the tokenizer's, where the text is tokenised already.

    Raises:
        ValueError: for text that is not there, or of no kind that can be read.
    """
    files: list[FileFacts] = []
    pieces: list[Piece] = []
    for number, source in enumerate(options.data):
        found = facts_of(source, options.split)
        files += found
        if (name := hub_name(source)) is not None:
            from mixture_of_depths.text.hub import shards_of_hub

            # Which documents the limit leaves is told by reading from the beginning.
            shards = 0 if options.max_characters else shards_of_hub(name, options.split)
            pieces += [Piece(number, shard) for shard in range(shards)]
            continue
        before = len(files) - len(found)
        pieces += _grouped(_pieces_of_files(number, before, found, options.text_column, vocabulary))
    if options.max_characters is not None:
        pieces = [Piece(None, size=options.max_characters)]
    return Plan(files, pieces)


def _pieces_of_files(
    source: int, before: int, files: list[FileFacts], column: str, vocabulary: Vocabulary | None
) -> Iterator[Piece]:
    for number, file in enumerate(files, start=before):
        path, size = Path(file.path), file.size
        if is_tokens(path):
            assert vocabulary is not None
            tokens = open_tokens(path, vocabulary)
            places = list(range(0, tokens.count, max(1, PIECE // tokens.dtype.itemsize)))
            ends: list[int | None] = [*places[1:], tokens.count]
        elif size <= PIECE or path.suffix in COMPRESSIONS or kind_of(path) == ".json":
            places, ends = [0], list[int | None]([None])
        elif kind_of(path) == ".parquet":
            places, ends = _row_groups(path, column, size)
        else:
            places = list(range(0, size, PIECE))
            ends = [*places[1:], None]
        for place, end in zip(places, ends, strict=True):
            yield Piece(source, number, number + 1, place, end, size // len(places))


def _row_groups(path: Path, column: str, size: int) -> tuple[list[int], list[int | None]]:
    """The first row groups of about equal parts of a table, and those after their last."""
    try:
        # The library opens no file whose name is not UTF-8.
        with path.open("rb") as file, parquet.ParquetFile(file) as table:
            groups, schema = table.num_row_groups, table.schema_arrow
    except (OSError, ValueError) as error:
        raise ValueError(f"data={path} is not a Parquet file: {error}") from error
    check_column(path, schema, column)
    parts = max(1, min(groups, size // PIECE))
    places = [groups * part // parts for part in range(parts)]
    return places, [*places[1:], None]


def _grouped(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Whole small files that follow one another are one piece."""
    group: Piece | None = None
    for piece in pieces:
        is_whole = piece.begin == 0 and piece.end is None
        if group is not None and is_whole and group.size + piece.size <= PIECE:
            group = Piece(group.source, group.first, piece.last, size=group.size + piece.size)
            continue
        if group is not None:
            yield group
        group = piece if is_whole else None
        if not is_whole:
            yield piece
    if group is not None:
        yield group


def conversations_in(source: str) -> ValueError:
    """What is wrong with conversations in text for shards."""
    return ValueError(
        f"data={source} holds conversations, which do not go into shards; keep them in files without texts, and name "
        "these as data of mod train or mod retrofit, beside the texts or their prepared folder"
    )


def read_piece(
    plan: Plan, number: int, options: DataOptions, vocabulary: Vocabulary, skipped: Skipped
) -> Iterator[str | np.ndarray]:
    """The documents of a piece: text, or tokens without the one that ends them; what is neither is counted.

    Raises:
        ValueError: for a conversation.
    """
    piece = plan.pieces[number]
    whole = piece.source is None
    documents = read_all(options, skipped) if whole else _read(plan, piece, options, vocabulary, skipped)
    for document in documents:
        if isinstance(document, Conversation):
            source = " ".join(options.data) if piece.source is None else options.data[piece.source]
            raise conversations_in(source)
        if isinstance(document, str) and not document.strip():
            skipped.empty += 1
        else:
            yield document


def _read(
    plan: Plan, piece: Piece, options: DataOptions, vocabulary: Vocabulary, skipped: Skipped
) -> Iterator[str | Conversation | np.ndarray]:
    assert piece.source is not None
    name = hub_name(options.data[piece.source])
    if name is not None:
        from mixture_of_depths.text.hub import read_hub

        yield from read_hub(name, options, skipped, piece.first)
        return
    for file in plan.files[piece.first : piece.last]:
        path = Path(file.path)
        if is_tokens(path):
            assert piece.end is not None
            yield from read_token_documents(open_tokens(path, vocabulary), vocabulary, piece.begin, piece.end)
        else:
            yield from read_file(path, options.text_column, skipped, Span(piece.begin, piece.end), PIECE)
