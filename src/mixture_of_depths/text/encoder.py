"""Documents to tokens, by the tokenizers library alone: what every process that prepares text loads."""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

# Tokenising takes a hundred bytes and more for each of a text's characters.
LONGEST_PIECE = 1_000_000
# Where a byte-level tokenizer cuts, too.
BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)")


def cut(document: str, longest: int | None = None) -> Iterator[str]:
    """A document in pieces of one to two times `longest` characters, cut between words where there are any."""
    longest = LONGEST_PIECE if longest is None else longest
    start = 0
    while len(document) - start > 2 * longest:
        space = BETWEEN_WORDS.search(document, start + longest, start + 2 * longest)
        end = space.start() if space else start + longest
        yield document[start:end]
        start = end
    yield document[start:]


class Encoder:
    """Turns documents into tokens, each after its start, if it has one, and before the end-of-text token.

    Args:
        backend: the tokenizer, as its own JSON.
        first: what stands before every document.
        last: the token after it.
        longest: characters of the pieces in which a document is tokenised; by default `LONGEST_PIECE`.
    """

    def __init__(self, backend: str, first: list[int], last: int, longest: int | None = None) -> None:
        # A copy: what is set on it is no affair of others.
        self.backend: Tokenizer = Tokenizer.from_str(backend)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        self.first, self.last = np.array(first, dtype=np.int32), np.array([last], dtype=np.int32)
        self.longest = LONGEST_PIECE if longest is None else longest
        # Others may treat the beginning of a text in a way of their own.
        self.may_cut = self.backend.normalizer is None and isinstance(
            self.backend.pre_tokenizer, pre_tokenizers.ByteLevel
        )

    def encode(self, documents: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each document, as whole numbers of 32 bits."""
        rows = [[self.first] for _ in documents]
        for group in self._groups(documents):
            encoded = self.backend.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encoded, strict=True):
                rows[number].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate([*row, self.last]) for row in rows]

    def _groups(self, documents: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
        """Pieces to be tokenised together, each with its document's number."""
        group: list[tuple[int, str]] = []
        characters = 0
        for number, document in enumerate(documents):
            for piece in cut(document, self.longest) if self.may_cut else [document]:
                group.append((number, piece))
                characters += len(piece)
                if len(group) == 256 or characters >= 4 * self.longest:
                    yield group
                    group, characters = [], 0
        if group:
            yield group
