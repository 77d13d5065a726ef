"""A corpus: text ready to be trained on, of any size.

Text that fits into memory is prepared at once, into a cache, under a name made from what it says: the same text has the
same name on every machine, which the runs of a study compare. Larger text, text that is tokenised already and text from
weighted sources lies in shards, whose names come from their files' sizes, times and pieces: nobody reads 100 GB to
learn that they are the same. Conversations are always prepared in memory, also beside shards.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mixture_of_depths.fields import refuse_without_use
from mixture_of_depths.files import check_place, is_whole, put_whole, read_json
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.batches import IS_CONVERSATION, as_text, pack
from mixture_of_depths.text.conversations import Conversation
from mixture_of_depths.text.documents import (
    Skipped,
    digest,
    holds_conversations,
    read_all,
    split_conversations,
    split_documents,
)
from mixture_of_depths.text.packing import Cut, Joined, Sequences, ShardSequences
from mixture_of_depths.text.plan import facts_of
from mixture_of_depths.text.preparation import (
    TOKENIZER,
    check_text,
    check_tokens,
    name_of,
    prepare_shards,
    shared_tokenizer,
)
from mixture_of_depths.text.sequences import by_kind, cut_documents
from mixture_of_depths.text.shards import Prepared, Side, changed_file, key_of, open_prepared
from mixture_of_depths.text.sources import (
    NAMES,
    find_files,
    hub_name,
    is_prepared,
    is_tokens,
    is_utf8,
    text_size,
    unweighted,
    weighted,
)
from mixture_of_depths.text.tokenizer import (
    VOCABULARY,
    encoding,
    end_of_text,
    identity,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

# Raised when the prepared form changes, so that older cache entries are not read.
CACHE_VERSION = 1
# Bytes or characters of text that are prepared in memory, which takes some ten times as much.
IN_MEMORY = 1 << 28
# Tokens of held-out text in shards that are evaluated on, spread evenly over all of it.
EVALUATED = 1 << 22
# Which shards a cache entry stands for.
SHARDS = "shards.json"


@dataclass(frozen=True)
class CorpusFacts:
    """What the prepared text consists of.

    `cut` tells of documents in the sequences, where that is known. `mixed_bytes_per_token` are those of several
    sources' held-out text, in the proportion of their weights.
    """

    train_documents: int
    validation_documents: int
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    split: str
    skipped: Skipped = field(default_factory=Skipped)
    cut: Cut | None = None
    mixed_bytes_per_token: float | None = None

    def __str__(self) -> str:
        cut = "" if self.cut is None else f"; {self.cut}"
        return (
            f"{self.train_documents} documents, {self.train_tokens:,} tokens to train on; held out "
            f"{self.validation_documents} ({self.split}), {self.validation_tokens:,} tokens; skipped: "
            f"{self.skipped}{cut}"
        )

    @property
    def validation_bytes_per_token(self) -> float:
        return self.mixed_bytes_per_token or self.validation_bytes / self.validation_tokens


@dataclass(frozen=True)
class Source:
    """One of several sources: its name and weight, and its held-out text; no weight where they are mixed by size.

    `share` is that of its sequences among all that are trained on.
    """

    name: str
    weight: float | None
    validation: datasets.Dataset
    bytes_per_token: float
    share: float


@dataclass(frozen=True)
class Corpus:
    """Tokenised text in sequences of one length; of each, `input_ids` are the tokens.

    `key` names its content: text, split, tokenizer and length of the sequences. `sources` tell the held-out text of
    several apart, and are empty for one; of their sequences in `train` each has its `weight`. In `validation` they are
    mixed, to calibrate on; figures are the means of those of each source.
    """

    train: Sequences
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    facts: CorpusFacts
    options: DataOptions
    key: str
    sources: tuple[Source, ...] = ()

    @property
    def end_of_text(self) -> int:
        """The token after every document."""
        return end_of_text(self.tokenizer)

    @property
    def weights(self) -> list[float] | None:
        """The sources' shares of the sequences that are trained on; None where they are one text."""
        weights = [source.weight for source in self.sources if source.weight is not None]
        return weights or None


def prepare(
    options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None, console: Console | None = None
) -> Corpus:
    """Reads, splits, tokenises and packs text, or takes the result from the cache or a folder of prepared text.

    Args:
        options: the text, and how it is cut.
        tokenizer: one to use in the place of that which the options name.
        console: where progress is shown.

    Raises:
        ValueError: when there is no text, a path or column is missing, or the text is shorter than one sequence.
    """
    corpus = load_prepared(options, *prepare_cache(options, tokenizer, console))
    # The cache's copy cuts text alike, but a chat template may differ.
    return corpus if tokenizer is None else replace(corpus, tokenizer=tokenizer)


def prepare_cache(
    options: DataOptions, tokenizer: PreTrainedTokenizerFast | None = None, console: Console | None = None
) -> tuple[str, Skipped | None]:
    """Puts prepared text into the cache if it is not there; returns its key, and what was left out; see `prepare`."""
    check_text(options, tokenizer)
    check_place(options.cache_dir, "cache_dir")
    if _is_for_shards(options):
        return _prepare_sharded(options, tokenizer, console), None
    return _prepare_in_memory(options, tokenizer)


def _prepare_in_memory(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> tuple[str, Skipped]:
    skipped = Skipped()
    before = _facts(options)
    documents = list(read_all(options, skipped))
    if (changed := changed_file(before, _facts(options))) is not None:
        raise ValueError(f"data={changed} has changed while it was read; give the same command again")
    if not documents:
        raise ValueError(
            f"data={' '.join(options.data)} holds no text (skipped: {skipped}); give other files, folders or globs of "
            f"{NAMES}"
        )
    own_tokenizer = tokenizer or (load_tokenizer(options.tokenizer) if options.tokenizer else None)
    if any(isinstance(document, Conversation) for document in documents):
        _check_template(options, own_tokenizer)
    key = _cache_key(options, documents, own_tokenizer)
    put_whole(options.cache_dir / key, lambda folder: _write_cache(folder, options, documents, own_tokenizer, skipped))
    return key, skipped


def _facts(options: DataOptions) -> list[dict[str, Any]]:
    """What tells the files of a text from changed ones."""
    sources = (source for source in options.data if hub_name(source) is None)
    return [asdict(facts) for source in sources for facts in facts_of(source, options.split)]


def _check_template(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> None:
    if tokenizer is None:
        raise ValueError(
            f"data={' '.join(options.data)} holds conversations, and a tokenizer that is trained has no chat template "
            "to make text of them; give a tokenizer that has one"
        )


def load_prepared(options: DataOptions, key: str, skipped: Skipped | None = None) -> Corpus:
    """The text under a key of the cache; the text itself is not read again.

    Args:
        options: the text, and how it is cut.
        key: its key.
        skipped: what was left out, where this text was read from others than the files that the entry was made of.
    """
    folder = options.cache_dir / key
    if (folder / SHARDS).exists():
        return _load_sharded(options, key, read_json(folder / SHARDS))
    facts = json.loads((folder / "facts.json").read_text())
    return Corpus(
        datasets.Dataset.load_from_disk(str(folder / "train")),
        datasets.Dataset.load_from_disk(str(folder / "validation")),
        load_tokenizer(str(folder / "tokenizer")),
        CorpusFacts(**{**facts, "skipped": skipped or Skipped(**facts["skipped"])}),
        options,
        key,
    )


def _is_for_shards(options: DataOptions) -> bool:
    """Whether the text is more than is held in memory, or of a kind that lies in shards."""
    if options.packing != "cut" or weighted(options.data) or any(map(is_prepared, options.data)):
        return True
    files = [path for source in options.data if hub_name(source) is None for path in find_files(source)]
    if any(map(is_tokens, files)):
        return True
    if options.max_characters is not None:
        return options.max_characters > IN_MEMORY
    # How much a data set of the hub is, is told by reading it.
    streamed = any(hub_name(source) is not None for source in options.data)
    if streamed or sum(map(text_size, files)) <= IN_MEMORY:
        return streamed
    return not all(holds_conversations(source, options.text_column) for source in options.data)


def _entries(options: DataOptions) -> int:
    return VOCABULARY if options.vocab_size is None else options.vocab_size


def _cache_key(
    options: DataOptions, documents: list[str | Conversation], tokenizer: PreTrainedTokenizerFast | None
) -> str:
    name = hashlib.sha256()
    tokenizer_key = f"bpe-{_entries(options)}"
    if tokenizer is not None:
        tokenizer_key = identity(tokenizer)
        if any(isinstance(document, Conversation) for document in documents):
            tokenizer_key += json.dumps(tokenizer.chat_template)
    name.update(f"{CACHE_VERSION} {options.sequence_length} {options.validation_fraction} {tokenizer_key}".encode())
    for text in documents:
        name.update(digest(text))
    return name.hexdigest()[:32]


def _write_cache(
    folder: Path,
    options: DataOptions,
    documents: list[str | Conversation],
    tokenizer: PreTrainedTokenizerFast | None,
    skipped: Skipped,
) -> None:
    texts, conversations = by_kind(documents)
    train, validation, split = split_documents(texts, options.validation_fraction) if texts else ([], [], "documents")
    chats, held_out_chats = split_conversations(conversations, options.validation_fraction)
    tokenizer = tokenizer or train_tokenizer(train, _entries(options))
    length = options.sequence_length
    to_train = cut_documents([*train, *chats], tokenizer, length, "training")
    held_out = cut_documents([*validation, *held_out_chats], tokenizer, length, "validation")
    facts = CorpusFacts(
        train_documents=len(train) + len(chats),
        validation_documents=len(validation) + len(held_out_chats),
        train_tokens=to_train.tokens,
        validation_tokens=held_out.tokens,
        validation_bytes=held_out.bytes,
        split=split,
        skipped=skipped,
    )
    to_train.sequences.save_to_disk(str(folder / "train"))
    held_out.sequences.save_to_disk(str(folder / "validation"))
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "facts.json").write_text(json.dumps(asdict(facts)))


def _prepare_sharded(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None, console: Console | None) -> str:
    """Has all sources in shards, and an entry of the cache say where they are; returns its key."""
    shares = {share.source: share.weight for share in weighted(options.data)}
    sources = [unweighted(source) for source in options.data]
    for source in sources:
        if not is_utf8(source):
            raise ValueError(f"data={source!a} is not UTF-8, and names the text in records; rename it")
    chats = [source for source in sources if holds_conversations(source, options.text_column)]
    texts = [source for source in sources if source not in chats]
    is_apart = bool(shares) or any(map(is_prepared, sources))
    groups = [(source,) for source in sources] if is_apart else [tuple(some) for some in (texts, chats) if some]
    if not texts:
        refuse_without_use(options, f"with data={' '.join(sources)}, conversations alone", "packing")
    own = tokenizer or (load_tokenizer(options.tokenizer) if options.tokenizer else None)
    prepared_before = [source for source in sources if is_prepared(source)]
    if own is None and prepared_before:
        own = load_tokenizer(str(Path(prepared_before[0]) / TOKENIZER))
    for group in groups:
        if group[0] not in (*chats, *prepared_before):
            check_tokens(replace(options, data=group), own)
    if chats:
        _check_template(options, own)
    elif own is None and len(groups) > 1:
        own = shared_tokenizer(replace(options, data=tuple(sources)), options.cache_dir, console)
    described: list[dict[str, Any]] = []
    for group in groups:
        is_streamed = any(hub_name(source) is not None for source in group)
        text = replace(options, data=group, split=options.split if is_streamed else DataOptions.split)
        if group[0] in chats:
            # In the cache, and not in a folder of its own.
            folder, key = None, _prepare_in_memory(replace(text, max_characters=None), own)[0]
        else:
            folder, key = _shards_of(text, own, console)
        name = " ".join(group)
        described.append({"name": name, "weight": shares.get(name), "folder": folder, "key": key})
    facts = [(source["weight"], source["key"]) for source in described]
    name = json.dumps([CACHE_VERSION, options.sequence_length, options.packing, facts])
    key = hashlib.sha256(name.encode()).hexdigest()[:32]

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / SHARDS).write_text(json.dumps(described))

    folder = options.cache_dir / key
    if is_whole(folder) and read_json(folder / SHARDS) != described:
        # The same text lies elsewhere now.
        shutil.rmtree(folder)
    put_whole(folder, write)
    return key


def _shards_of(
    options: DataOptions, tokenizer: PreTrainedTokenizerFast | None, console: Console | None
) -> tuple[str, str]:
    """Where the shards of a text lie, prepared now if they were not before, and their key."""
    if is_prepared(options.data[0]):
        folder = Path(options.data[0])
        prepared = open_prepared(folder)
        _check_tokenizer(folder, prepared, tokenizer)
    else:
        folder = options.cache_dir / f"shards-{name_of(options, tokenizer)}"
        prepared = prepare_shards(options, folder, tokenizer, console=console)
    # Packed here, where only one of several processes is at work.
    ShardSequences(folder, prepared, "train", options.sequence_length, options.packing, options.cache_dir)
    return str(folder.resolve()), prepared.key


def _check_tokenizer(folder: Path, prepared: Prepared, own: PreTrainedTokenizerFast | None) -> None:
    """Raises ValueError when a folder was prepared with another tokenizer than it holds, or than is asked for."""
    theirs = load_tokenizer(str(folder / TOKENIZER))
    if key_of(encoding(theirs), end_of_text(theirs), prepared.shards) != prepared.key:
        raise ValueError(
            f"data={folder} is damaged: {folder / TOKENIZER} is not the tokenizer that made its tokens; prepare the "
            "text again"
        )
    if own is not None and identity(own) != identity(theirs):
        raise ValueError(
            f"data={folder} was prepared with another tokenizer, {folder / TOKENIZER}; prepare all text with one, as "
            "tokenizer"
        )


class _Part(NamedTuple):
    """One of the sources of a corpus."""

    train: Sequences
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    facts: CorpusFacts


def _load_sharded(options: DataOptions, key: str, described: list[dict[str, Any]]) -> Corpus:
    """The text of the sources that an entry of the cache stands for."""
    parts: list[_Part] = []
    for source in described:
        if source["folder"] is None:
            entry = options.cache_dir / source["key"]
            if not is_whole(entry):
                raise ValueError(
                    f"data={source['name']} is not whole in the cache, as {entry}; give the command that trained on it "
                    "again"
                )
            corpus = load_prepared(options, source["key"])
            parts.append(_Part(corpus.train, corpus.validation, corpus.tokenizer, corpus.facts))
        else:
            parts.append(_load_shards(options, Path(source["folder"]), source["name"], source["key"]))
    several = len(parts) > 1
    # The conversations' one has their chat template.
    in_memory = (part for part, source in zip(parts, described, strict=True) if source["folder"] is None)
    tokenizer = next(in_memory, parts[0]).tokenizer
    held_out = [part.validation for part in parts]
    if any(IS_CONVERSATION in sequences.column_names for sequences in held_out):
        held_out = [as_text(sequences, end_of_text(tokenizer)) for sequences in held_out]
    weights: list[float] = [source["weight"] or len(part.train) for source, part in zip(described, parts, strict=True)]
    sources = [
        Source(source["name"], source["weight"], sequences, part.facts.validation_bytes_per_token, own / sum(weights))
        for source, sequences, part, own in zip(described, held_out, parts, weights, strict=True)
    ]
    return Corpus(
        Joined([part.train for part in parts]) if several else parts[0].train,
        _mixed(sources, weights) if several else parts[0].validation,
        tokenizer,
        _summed([part.facts for part in parts], weights) if several else parts[0].facts,
        options,
        key,
        tuple(sources) if several else (),
    )


def _load_shards(options: DataOptions, folder: Path, source: str, key: str) -> _Part:
    length, prepared = options.sequence_length, open_prepared(folder)
    if prepared.key != key:
        raise ValueError(
            f"data={source} is not what it was: {folder} holds other text than was trained on; put that text back, or "
            "name what to read as data"
        )
    train = ShardSequences(folder, prepared, "train", length, options.packing, options.cache_dir)
    held_out = ShardSequences(folder, prepared, "validation", length, "cut", options.cache_dir)
    checked: list[tuple[str, Side, ShardSequences]] = [
        ("training", "train", train),
        ("validation", "validation", held_out),
    ]
    for name, side, some in checked:
        if len(some) == 0:
            raise ValueError(
                f"sequence_length={length} is longer than every shard of the {name} text of {source}, "
                f"which has {prepared.total(side, 'tokens'):,} tokens; give more text or a shorter sequence_length"
            )
    facts = CorpusFacts(
        train_documents=prepared.total("train", "documents"),
        validation_documents=prepared.total("validation", "documents"),
        train_tokens=prepared.total("train", "tokens"),
        validation_tokens=prepared.total("validation", "tokens"),
        validation_bytes=prepared.total("validation", "bytes"),
        split=prepared.split,
        skipped=prepared.skipped,
        cut=train.cut,
    )
    return _Part(train, _some(held_out, length), load_tokenizer(str(folder / TOKENIZER)), facts)


def _summed(facts: list[CorpusFacts], weights: list[float]) -> CorpusFacts:
    """What several sources consist of together; of their bytes the mean by their weights."""

    def total(name: str) -> int:
        return sum(getattr(of_one, name) for of_one in facts)

    sizes = [weight * of_one.validation_bytes_per_token for weight, of_one in zip(weights, facts, strict=True)]
    cuts = [of_one.cut for of_one in facts if of_one.cut is not None]
    return CorpusFacts(
        train_documents=total("train_documents"),
        validation_documents=total("validation_documents"),
        train_tokens=total("train_tokens"),
        validation_tokens=total("validation_tokens"),
        validation_bytes=total("validation_bytes"),
        split="documents" if all(of_one.split == "documents" for of_one in facts) else "tails",
        skipped=Skipped(*(sum(getattr(of_one.skipped, each.name) for of_one in facts) for each in fields(Skipped))),
        cut=Cut(*(sum(getattr(cut, each.name) for cut in cuts) for each in fields(Cut))) if cuts else None,
        mixed_bytes_per_token=sum(sizes) / sum(weights),
    )


def _some(sequences: ShardSequences, length: int) -> datasets.Dataset:
    """As many sequences as are evaluated on, spread evenly, in memory."""
    count = min(len(sequences), max(2, EVALUATED // length))
    rows = [sequences[len(sequences) * number // count]["input_ids"] for number in range(count)]
    return pack(np.concatenate(rows).astype(np.int32), length, "validation")


def _mixed(sources: list[Source], weights: list[float]) -> datasets.Dataset:
    """Held-out sequences of all sources in about the proportion of their weights, of each two if it has them."""
    total = min(len(source.validation) / weight for source, weight in zip(sources, weights, strict=True))
    total = min(total, max(len(source.validation) for source in sources) / sum(weights))
    # Even numbers: every second one of all is then every second one of each, for what calibrates and what evaluates.
    counts = [
        min(len(source.validation), max(2, int(total * weight) // 2 * 2))
        for source, weight in zip(sources, weights, strict=True)
    ]
    return datasets.concatenate_datasets(
        [source.validation.select(range(count)) for source, count in zip(sources, counts, strict=True)]
    )
