"""Text of any size on its way into a folder of shards: what is there of it, what it is made from, its tokenizer."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from mixture_of_depths.fields import refuse_without_use, validate_fields
from mixture_of_depths.files import DISK_FULL, check_place, locked, make_folder, sync_folder, write_aside
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.documents import Skipped, cut_tail, digest, holds_conversations, is_held_out
from mixture_of_depths.text.plan import Plan, conversations_in, facts_of, holds_tokens, plan_of, read_piece
from mixture_of_depths.text.shards import (
    SIDES,
    VERSION,
    MadeFrom,
    Prepared,
    Shard,
    Side,
    changed_file,
    key_of,
    open_prepared,
    parts_of,
    read_record,
    with_samples,
)
from mixture_of_depths.text.sources import PREPARED, hub_name, is_prepared, is_utf8, unweighted, weighted
from mixture_of_depths.text.tokenizer import (
    VOCABULARY,
    encoding,
    end_of_text,
    identity,
    load_tokenizer,
    save_tokenizer,
    start_of_text,
    train_tokenizer,
)
from mixture_of_depths.text.tokens import Vocabulary
from mixture_of_depths.text.work import Split, Work, carry_out

PLAN = "plan.json"
LOCK = ".lock"
TOKENIZER, HALF_TOKENIZER = "tokenizer", ".tokenizer"
# Characters a tokenizer is trained on, taken evenly from the pieces of a text: more teach it next to nothing.
TOKENIZER_SAMPLE = 1 << 26
SAMPLED_PIECES = 64


@dataclass(frozen=True)
class Begun:
    """What a folder is being prepared from."""

    made_from: MadeFrom
    split: Split


def check_text(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Raises ValueError for options that are out of their range, or have no use beside others."""
    validate_fields(options)
    sources = [unweighted(source) for source in options.data]
    if not any(hub_name(source) is not None for source in sources):
        refuse_without_use(options, "without a data set of the hub, hub:NAME, in data", "split")
    if sources and all(map(is_prepared, sources)):
        where = f"with data={' '.join(sources)}, which is prepared"
        refuse_without_use(options, where, "text_column", "max_characters", "vocab_size", "validation_fraction")
    if tokenizer is None and options.tokenizer is not None:
        refuse_without_use(options, f"with tokenizer={options.tokenizer}, which is not trained", "vocab_size")
    elif options.vocab_size is not None and options.vocab_size < 257:
        raise ValueError(f"vocab_size={options.vocab_size} must be at least 257: every byte and the end of text")


def prepare_shards(
    options: DataOptions,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    processes: int | None = None,
    console: Console | None = None,
) -> Prepared:
    """Prepares text of any size in a folder, or takes what is there of it and goes on.

    What is written depends on text, options and tokenizer alone: not on the processes, and not on how often it was
    stopped or killed. From a script this is called under `if __name__ == "__main__":`, as further processes need.

    Args:
        options: the text; its `sequence_length` has no part in this.
        folder: where it is put.
        tokenizer: one to use in the place of that which the options name.
        processes: how many work on it; by default one a core.
        console: where progress is shown.

    Raises:
        ValueError: for text that is not there or is none, or a folder that holds something else.
        OSError: when the disk is full; the same call goes on then.
    """
    console = console or Console(quiet=True)
    check_text(options, tokenizer)
    if weighted(options.data):
        raise ValueError(
            f"data={' '.join(options.data)} has weights, which are those of a run: prepare each source by itself, with "
            "one tokenizer, and give the weights to mod train"
        )
    if processes is not None and processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    if not is_utf8(str(folder)):
        raise ValueError(f"out={str(folder)!a} is not UTF-8; name another folder")
    check_place(folder, "out")
    # Before anything is written there, be it the lock.
    names = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if names - {LOCK, f"{PLAN}.part"} and not names & {PLAN, PREPARED}:
        raise ValueError(f"out={folder} is not empty, and holds no prepared text; name another folder")
    for source in options.data:
        if holds_conversations(source, options.text_column):
            raise conversations_in(source)
    own = tokenizer or (load_tokenizer(options.tokenizer) if options.tokenizer else None)
    check_tokens(options, own)
    plan = plan_of(options, vocabulary_of(own) if own else None)
    for name, kind in ((PLAN, Begun), (PREPARED, Prepared)):
        # Another process may finish it, and remove the plan.
        with suppress(FileNotFoundError):
            read_record(kind, folder / name)
    make_folder(folder, "out")
    # Whoever looks at finished text is soon done.
    with locked(folder / LOCK, wait=(folder / PREPARED).is_file()) as ours:
        if not ours:
            raise ValueError(f"out={folder} is being prepared by another process; wait for it, or name another folder")
        try:
            return _prepare(options, folder, own, plan, processes or os.cpu_count() or 1, console)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise OSError(
                error.errno,
                f"out={folder}: the disk is full ({error.strerror}); make room, and the same command goes on",
            ) from error


def check_tokens(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Raises ValueError for tokens beside text, or without the tokenizer that made them."""
    if not holds_tokens(options.data):
        return
    if tokenizer is None:
        raise ValueError(
            f"data={' '.join(options.data)} holds tokens; name the folder of their tokenizer, as tokenizer"
        )
    if options.max_characters is not None:
        raise ValueError(f"max_characters={options.max_characters} has no use with tokens; leave it out")


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    """What the reading of tokens needs to know of a tokenizer."""
    first = start_of_text(tokenizer)
    return Vocabulary(max(tokenizer.get_vocab().values()), end_of_text(tokenizer), first[0] if first else None)


def _prepare(
    options: DataOptions,
    folder: Path,
    own: PreTrainedTokenizerFast | None,
    plan: Plan,
    processes: int,
    console: Console,
) -> Prepared:
    described = MadeFrom(json.loads(json.dumps(_described(options, own))), [asdict(file) for file in plan.files])
    if (folder / PREPARED).exists():
        prepared = open_prepared(folder)
        _check_same(folder, prepared.made_from, described)
        _tidy(folder)
        return prepared
    split = _begun(folder, described)
    if split is None:
        split = "documents"
        _write_plan(folder, described, split)
    _tidy(folder, all_of_it=False)
    prepared = _fill(options, folder, own, plan, split, processes, console, described)
    if prepared is None:
        # Nothing of one side: few documents, or one alone.
        console.print("the documents are too few to hold some of them out: the tails of all are held out instead")
        _clear(folder)
        split = "tails"
        _write_plan(folder, described, split)
        prepared = _fill(options, folder, own, plan, split, processes, console, described)
    assert prepared is not None
    now = [asdict(file) for source in options.data for file in facts_of(source, options.split)]
    if (path := changed_file(described.files, now)) is not None:
        # Of no use: what was read of it may be of before or after.
        _clear(folder)
        raise ValueError(f"{path} has changed while out={folder} was prepared from it; give the same command again")
    write_aside(folder / PREPARED, json.dumps(asdict(prepared), indent=1))
    _tidy(folder)
    return open_prepared(folder)


def _described(options: DataOptions, own: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    """What of the options decides what is written."""
    kept = ("data", "text_column", "split", "max_characters", "vocab_size", "validation_fraction")
    described = {name: getattr(options, name) for name in kept}
    return {**described, "tokenizer": None if own is None else digest(identity(own)).hex()[:32]}


def _check_same(folder: Path, before: MadeFrom, now: MadeFrom) -> None:
    """Raises ValueError when a folder was begun with other options, or a file has changed since."""
    for name, value in now.options.items():
        if before.options.get(name) != value:
            raise ValueError(
                f"{name}={value} differs from {before.options.get(name)}, with which out={folder} was prepared; "
                "give the same options, or name another folder"
            )
    if (path := changed_file(before.files, now.files)) is not None:
        raise ValueError(f"{path} has changed since out={folder} was prepared from it; name another folder")


def _begun(folder: Path, described: MadeFrom) -> Split | None:
    """How the text is split that was begun in a folder; None where nothing of it is written yet."""
    if not (folder / PLAN).exists():
        return None
    begun: Begun = read_record(Begun, folder / PLAN)
    if begun.made_from != described and not any(folder.glob("part-*.json")):
        # What ended it may have been a mistake in the options or a broken file, which is mended now.
        _clear(folder)
        return None
    _check_same(folder, begun.made_from, described)
    return begun.split


def _write_plan(folder: Path, described: MadeFrom, split: Split) -> None:
    write_aside(folder / PLAN, json.dumps(asdict(Begun(described, split))))


def _tidy(folder: Path, all_of_it: bool = True) -> None:
    """Removes what a killed process left half written, and with `all_of_it` the records of what is finished."""
    for path in [*folder.glob(".*.part"), *folder.glob("*.json.part")]:
        path.unlink()
    for path in [*folder.glob("part-*.json"), folder / PLAN] if all_of_it else []:
        path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Removes all that was prepared; the plan last, without which the rest is nobody's."""
    for pattern in ("part-*.json", *(f"{side}-*" for side in SIDES)):
        for path in folder.glob(pattern):
            path.unlink()
    for name in (TOKENIZER, HALF_TOKENIZER):
        shutil.rmtree(folder / name, ignore_errors=True)
    _tidy(folder)


def _fill(
    options: DataOptions,
    folder: Path,
    own: PreTrainedTokenizerFast | None,
    plan: Plan,
    split: Split,
    processes: int,
    console: Console,
    described: MadeFrom,
) -> Prepared | None:
    """Trains the tokenizer and writes all shards; None where one side of the split stays empty."""
    tokenizer, sample = _tokenizer(options, folder, own, _sample(options, plan, split), console)
    if own is None and sample[0] == 0 and split == "documents":
        return None
    vocabulary = vocabulary_of(tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    work = Work(folder, options, plan, split, backend, start_of_text(tokenizer), vocabulary)
    carry_out(work, processes, console)
    shards: dict[Side, list[Shard]] = {side: [] for side in SIDES}
    skipped = Skipped()
    for number in range(len(plan.pieces)):
        parts = parts_of(folder, number)
        for part in parts:
            for side, shard in part.shards.items():
                shards[side].append(shard)
        for each in fields(Skipped):
            setattr(skipped, each.name, getattr(skipped, each.name) + getattr(parts[-1].skipped, each.name))
    if not any(shards.values()):
        _clear(folder)
        raise ValueError(f"data={' '.join(options.data)} holds no text (skipped: {skipped}); give other files")
    if not all(shards.values()):
        if split == "documents":
            return None
        _clear(folder)
        missing, change = ("held out", "raise") if shards["train"] else ("trained on", "lower")
        raise ValueError(
            f"data={' '.join(options.data)} is too little text to train on and hold some out: with validation_fraction="
            f"{options.validation_fraction:g} nothing is {missing}; give more, or {change} that"
        )
    shards = {side: with_samples(folder, shards[side]) for side in SIDES}
    return Prepared(
        version=VERSION,
        key=key_of(encoding(tokenizer), vocabulary.end_of_text, shards),
        dtype=cast(Any, work.dtype.str),
        last_token=vocabulary.last,
        end_of_text=vocabulary.end_of_text,
        split=split,
        tokenizer_sample=sample,
        skipped=skipped,
        made_from=described,
        shards=shards,
    )


def _tokenizer(
    options: DataOptions,
    folder: Path,
    own: PreTrainedTokenizerFast | None,
    sample: Iterable[str],
    console: Console,
) -> tuple[PreTrainedTokenizerFast, tuple[int, int]]:
    """The tokenizer of the folder, made if it is not there, and the documents and bytes it was trained on."""
    record = folder / TOKENIZER / "sample.json"
    if record.exists():
        return load_tokenizer(str(folder / TOKENIZER)), read_record(tuple[int, int], record)
    counted = [0, 0]

    def counting() -> Iterator[str]:
        for text in sample:
            counted[0] += 1
            counted[1] += len(text.encode("utf-8"))
            yield text

    if own is None:
        console.print(f"training a tokenizer on up to {TOKENIZER_SAMPLE / 1e6:.0f} million characters of the text")
    tokenizer = own or train_tokenizer(counting(), options.vocab_size or VOCABULARY)
    half = folder / HALF_TOKENIZER
    shutil.rmtree(half, ignore_errors=True)
    save_tokenizer(tokenizer, half)
    (half / record.name).write_text(json.dumps(counted))
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    half.rename(folder / TOKENIZER)
    sync_folder(folder)
    return load_tokenizer(str(folder / TOKENIZER)), (counted[0], counted[1])


def _sample(options: DataOptions, plan: Plan, split: Split, characters: int = TOKENIZER_SAMPLE) -> Iterator[str]:
    """What a tokenizer is trained on, without what is held out.

    The beginnings of pieces spread evenly, and of the first piece of each source, however small.
    """
    count = min(SAMPLED_PIECES, len(plan.pieces))
    firsts = {piece.source: number for number, piece in reversed(list(enumerate(plan.pieces)))}
    chosen = sorted({*firsts.values(), *(len(plan.pieces) * number // count for number in range(count))})
    nothing = Vocabulary(0, 0, None)
    for number in chosen:
        remaining = characters // len(chosen)
        for text in read_piece(plan, number, options, nothing, Skipped()):
            assert isinstance(text, str)
            if split == "tails":
                text = text[: cut_tail(len(text), options.validation_fraction)]
            elif is_held_out(digest(text), options.validation_fraction):
                continue
            yield text[:remaining]
            remaining -= len(text)
            if remaining <= 0:
                break


def name_of(options: DataOptions, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """A name for the text of `options`, from sizes, times and pieces of its files."""
    plan = plan_of(options, vocabulary_of(tokenizer) if tokenizer else None)
    described = {"options": _described(options, tokenizer), "files": [asdict(file) for file in plan.files]}
    return digest(json.dumps([VERSION, described])).hex()[:32]


def shared_tokenizer(options: DataOptions, cache: Path, console: Console | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer trained on equal samples of the sources of `options`, each split by itself, kept in the cache."""

    def sample() -> Iterator[str]:
        for source in options.data:
            text = replace(options, data=(source,))
            plan, characters = plan_of(text, None), TOKENIZER_SAMPLE // len(options.data)
            by_documents = _sample(text, plan, "documents", characters)
            first = next(by_documents, None)
            # All that it has is held out: few documents, of which the tails will be instead.
            yield from _sample(text, plan, "tails", characters) if first is None else chain([first], by_documents)

    folder = cache / f"tokenizer-{name_of(options, None)}"
    make_folder(folder, "cache_dir")
    with locked(folder / LOCK):
        return _tokenizer(options, folder, None, sample(), console or Console(quiet=True))[0]
