"""From text to packed blocks of tokens: reading, splitting by document, packing, caching by content."""

import gzip
import hashlib
import json
import shutil
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.parquet as parquet
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixture_of_depths.checkpoint import is_whole, locked, seal, sync_folder
from mixture_of_depths.options import BUILTIN, DataOptions
from mixture_of_depths.tokenizer import end_of_text, load_tokenizer, start_of_text, tokenize, train_tokenizer

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
# Raised when the prepared form changes, so that older cache entries are not read.
CACHE_VERSION = 1


@dataclass
class Skipped:
    """Counts of what was read but not used."""

    not_utf8: int = 0
    empty: int = 0
    not_json: int = 0

    def __str__(self) -> str:
        return f"{self.not_utf8} not UTF-8, {self.empty} empty, {self.not_json} not JSON"


@dataclass(frozen=True)
class CorpusFacts:
    """What the prepared text consists of."""

    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    split: str
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def validation_bytes_per_token(self) -> float:
        return self.validation_bytes / self.validation_tokens


@dataclass(frozen=True)
class Corpus:
    """Tokenised text, packed into blocks of one length; each data set has the column `input_ids`.

    `key` names its content: text, split, tokenizer and length of the blocks.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    facts: CorpusFacts
    options: DataOptions
    key: str

    @property
    def end_of_text(self) -> int:
        """The token after every document."""
        return end_of_text(self.tokenizer)


def prepare(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None) -> Corpus:
    """Reads, splits, tokenises and packs text, or takes the result from the cache.

    Args:
        options: the text, and how it is cut.
        tokenizer: one to use in the place of that which the options name.

    Raises:
        ValueError: when there is no text, a path or column is missing, or the text is shorter than one block.
    """
    corpus = load_prepared(options, prepare_cache(options, tokenizer))
    # The cache's copy cuts text alike, but a chat template may differ.
    return corpus if tokenizer is None else replace(corpus, tokenizer=tokenizer)


def prepare_cache(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Puts prepared text into the cache if it is not there, and returns its key; see `prepare`."""
    _check(options)
    skipped = Skipped()
    documents = list(read_documents(options, skipped))
    if not documents:
        raise ValueError(
            f"data={' '.join(options.data)} holds no text (skipped: {skipped}); give other files, folders or globs of "
            f"{' '.join(SUFFIXES)}"
        )
    given = tokenizer or (load_tokenizer(options.tokenizer) if options.tokenizer else None)
    folder = options.cache_dir / _cache_key(options, documents, given)
    if not is_whole(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            # Another process may have written it meanwhile.
            if not is_whole(folder):
                _write_cache(folder, options, documents, given, skipped)
    return folder.name


def load_prepared(options: DataOptions, key: str) -> Corpus:
    """The text under a key of the cache; the text itself is not read again."""
    folder = options.cache_dir / key
    facts = json.loads((folder / "facts.json").read_text())
    return Corpus(
        datasets.Dataset.load_from_disk(str(folder / "train")),
        datasets.Dataset.load_from_disk(str(folder / "validation")),
        load_tokenizer(str(folder / "tokenizer")),
        CorpusFacts(**{**facts, "skipped": Skipped(**facts["skipped"])}),
        options,
        key,
    )


def _check(options: DataOptions) -> None:
    if not 0 < options.validation_fraction < 1:
        raise ValueError(f"validation_fraction={options.validation_fraction} must lie between 0 and 1")
    if options.sequence_length < 2:
        raise ValueError(f"sequence_length={options.sequence_length} must be at least 2")
    if options.tokenizer is None and not 257 <= options.vocab_size < 2**31:
        raise ValueError(
            f"vocab_size={options.vocab_size} must be at least 257, every byte and the end of text, and below 2**31"
        )
    if options.max_characters is not None and options.max_characters < 1:
        raise ValueError(f"max_characters={options.max_characters} must be at least 1")


def read_documents(options: DataOptions, skipped: Skipped) -> Iterator[str]:
    """Yields the documents of `options.data` in a fixed order, and counts in `skipped` what is no text."""
    remaining = options.max_characters
    for source in options.data:
        for text in _read_source(source, options, skipped):
            if not text.strip():
                skipped.empty += 1
                continue
            if remaining is not None:
                text = text[:remaining]
                remaining -= len(text)
            yield text
            if remaining == 0:
                return


def _read_source(source: str, options: DataOptions, skipped: Skipped) -> Iterator[str]:
    if source == BUILTIN:
        yield from _read_files(builtin_files(), options, skipped)
    elif source.startswith("hub:"):
        yield from _read_hub(source.removeprefix("hub:"), options)
    else:
        yield from _read_files(find_files(source), options, skipped)


def builtin_files() -> list[Path]:
    """The Python standard library's own modules, without their tests."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    found = (path for path in library.rglob("*.py") if not left_out & set(path.relative_to(library).parts[:-1]))
    return sorted(found, key=lambda path: path.relative_to(library).as_posix())


def find_files(source: str) -> list[Path]:
    """The text files that a path, folder or glob names.

    Raises:
        ValueError: when there is none.
    """
    path = Path(source)
    if path.is_file():
        if not _kind(path):
            raise ValueError(f"data={source} is not one of {' '.join(SUFFIXES)} (or these with .gz); rename or convert")
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
    elif has_magic(source):
        found = sorted(Path(p) for p in glob(source, recursive=True) if Path(p).is_file() and _kind(Path(p)))
    else:
        raise ValueError(f"data={source} does not exist; give a file, folder, glob, hub:NAME or {BUILTIN}")
    if not found:
        raise ValueError(f"data={source} holds no file that ends in {' '.join(SUFFIXES)} (or these with .gz)")
    return found


def _kind(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else None


def _read_files(paths: Iterable[Path], options: DataOptions, skipped: Skipped) -> Iterator[str]:
    for path in paths:
        kind = _kind(path)
        if kind == ".parquet":
            yield from _read_parquet(path, options.text_column)
            continue
        try:
            raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"data={path} is not a whole gzip file ({error}); compress it again") from error
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped.not_utf8 += 1
            continue
        if kind == ".jsonl":
            yield from _read_jsonl(path, text, options.text_column, skipped)
        else:
            yield text


def _read_jsonl(path: Path, text: str, column: str, skipped: Skipped) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            skipped.not_json += 1
            continue
        if not isinstance(record, dict) or column not in record:
            names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"text_column={column} is missing in line {number} of {path}, which has: {names}")
        yield _text(record[column], column, path)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"data={path} is not a Parquet file: {error}") from error
    names = file.schema_arrow.names
    if column not in names:
        raise ValueError(f"text_column={column} is missing in {path}, which has: {', '.join(names)}")
    for batch in file.iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield _text(value, column, path)


def _read_hub(name: str, options: DataOptions) -> Iterator[str]:
    name, _, config = name.partition(":")
    for record in _records_of_hub(name, config, options.split):
        if options.text_column not in record:
            names = ", ".join(record)
            raise ValueError(f"text_column={options.text_column} is missing in hub:{name}, which has: {names}")
        yield _text(record[options.text_column], options.text_column, name)


def _records_of_hub(name: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        yield from cast(Iterable[dict[str, Any]], stream)
    except Exception as error:
        # Network, archive and format each have errors of their own, before the first record and after.
        raise ValueError(f"data=hub:{name} with split={split} cannot be read: {error}") from error


def _text(value: object, column: str, source: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"text_column={column} of {source} holds {type(value).__name__}, not text")
    # JSON can spell half a surrogate pair, which is no text.
    return value.encode("utf-8", "replace").decode("utf-8")


def split_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str], str]:
    """Splits by document into train and validation; a document's content decides, so the split outlives reordering.

    Where that leaves one side empty, as with a single file, the tail of every document is held out instead.

    Returns:
        The training documents, the validation documents, and "documents" or "tails".
    """
    threshold = int(validation_fraction * 2**64)
    is_held_out = [int.from_bytes(_digest(text)[:8]) < threshold for text in documents]
    train = [text for text, held_out in zip(documents, is_held_out, strict=True) if not held_out]
    validation = [text for text, held_out in zip(documents, is_held_out, strict=True) if held_out]
    if train and validation:
        return train, validation, "documents"
    cuts = [int(len(text) * (1 - validation_fraction)) for text in documents]
    train = [text[:cut] for text, cut in zip(documents, cuts, strict=True)]
    return train, [text[cut:] for text, cut in zip(documents, cuts, strict=True)], "tails"


def pack(tokens: np.ndarray, sequence_length: int, name: str) -> datasets.Dataset:
    """Cuts a row of tokens into blocks; the rest that does not fill a block is dropped.

    Raises:
        ValueError: when the row is shorter than one block.
    """
    count = len(tokens) // sequence_length
    if count == 0:
        raise ValueError(
            f"sequence_length={sequence_length} is longer than the {name} text, which has {len(tokens)} tokens; give "
            "more text or a shorter sequence_length"
        )
    blocks = tokens[: count * sequence_length].reshape(count, sequence_length)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"), length=sequence_length)})
    return datasets.Dataset.from_dict({"input_ids": blocks}, features=features)


def document_positions(input_ids_BT: Tensor, end_of_text: int) -> Tensor:
    """Positions that start again at 0 after every end of text; of shape [B, T]."""
    slots_T = torch.arange(input_ids_BT.shape[1])
    is_start_BT = torch.zeros_like(input_ids_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = input_ids_BT[:, :-1] == end_of_text
    return slots_T - (is_start_BT * slots_T).cummax(dim=1).values


@dataclass(frozen=True)
class Collator:
    """Stacks blocks into a batch; the positions tell the model where documents begin."""

    end_of_text: int

    def __call__(self, blocks: list[dict[str, Any]]) -> dict[str, Tensor]:
        input_ids = torch.tensor(np.array([block["input_ids"] for block in blocks]), dtype=torch.int64)
        return {
            "input_ids": input_ids,
            "labels": input_ids.clone(),
            "position_ids": document_positions(input_ids, self.end_of_text),
        }


def batches(
    blocks: datasets.Dataset, chosen: Sequence[int], end_of_text: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The blocks `chosen`, stacked `batch_size` at a time, on a device."""
    collate = Collator(end_of_text)
    for start in range(0, len(chosen), batch_size):
        rows = list(blocks.select(chosen[start : start + batch_size]))
        yield {name: value.to(device) for name, value in collate(cast(list[dict[str, Any]], rows)).items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def _cache_key(options: DataOptions, documents: list[str], tokenizer: PreTrainedTokenizerFast | None) -> str:
    name = hashlib.sha256()
    tokenizer_key = f"bpe-{options.vocab_size}"
    if tokenizer is not None:
        beginning = tokenizer.convert_ids_to_tokens(start_of_text(tokenizer))
        tokenizer_key = json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token, *beginning])
    name.update(f"{CACHE_VERSION} {options.sequence_length} {options.validation_fraction} {tokenizer_key}".encode())
    for text in documents:
        name.update(_digest(text))
    return name.hexdigest()[:32]


def _write_cache(
    folder: Path,
    options: DataOptions,
    documents: list[str],
    tokenizer: PreTrainedTokenizerFast | None,
    skipped: Skipped,
) -> None:
    train, validation, split = split_documents(documents, options.validation_fraction)
    tokenizer = tokenizer or train_tokenizer(train, options.vocab_size)
    train_tokens, validation_tokens = tokenize(train, tokenizer), tokenize(validation, tokenizer)
    facts = CorpusFacts(
        train_documents=len(train),
        validation_documents=len(validation),
        train_tokens=len(train_tokens),
        validation_tokens=len(validation_tokens),
        validation_bytes=sum(len(text.encode("utf-8")) for text in validation),
        split=split,
        skipped=skipped,
    )
    # Written aside and renamed, so that a run that is stopped leaves no half entry behind; what a killed one left aside
    # makes way.
    aside = folder.with_name(f".preparing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        pack(train_tokens, options.sequence_length, "training").save_to_disk(str(aside / "train"))
        pack(validation_tokens, options.sequence_length, "validation").save_to_disk(str(aside / "validation"))
        tokenizer.save_pretrained(str(aside / "tokenizer"))
        (aside / "facts.json").write_text(json.dumps(asdict(facts)))
        seal(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
