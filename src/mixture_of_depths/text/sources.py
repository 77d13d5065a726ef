"""What `data` names: files of text or tokens, data sets of the hub, prepared text; each with a weight or none."""

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape, glob, has_magic

# Of names that are too long pathlib's own raise errors.
from os.path import exists, isdir, isfile, join
from pathlib import Path

from mixture_of_depths.options import BUILTIN

# What a data set of the Hugging Face hub is named with.
HUB = "hub:"
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
# Among other files these describe them more often than they hold text; alone or compressed they are named on purpose.
JSON = ".json"
# Rows of tokens, as nanoGPT, llm.c and Megatron write them.
TOKENS = ".bin"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES = f"{' '.join(SUFFIXES)} {JSON} (or these with {' '.join(COMPRESSIONS)})"
# Bytes of text that a byte of a compressed file or of Parquet may stand for: of prose some four, of markup ten or more.
EXPANSION = 10
# Written last into a folder of prepared text.
PREPARED = "prepared.json"

# A number with a decimal point, or one that is refused as a weight. Other numbers, as 2018, may end a name.
WEIGHT = re.compile(r"(.+):([+-]?\d*\.\d+|-\d+|0|(?i:nan|inf))", re.DOTALL)
# The part of a glob that stands for a folder and all folders in it, and what stands before.
DEEP = re.compile(r"(^|.*?/)\*\*(?:/+|$)", re.DOTALL)
# Places of a run in which every source has exactly its share, up to one of them.
BLOCK = 4096
# Bytes read of a file to tell it from others: at its beginning, in its middle and at its end.
SAMPLE = 1 << 16


@dataclass(frozen=True)
class Weighted:
    """A source of text and its share of the sequences that are trained on; of all sources together it is 1."""

    source: str
    weight: float


def unweighted(source: str) -> str:
    """A source without its weight."""
    match = WEIGHT.fullmatch(source)
    if match is None or exists(source):
        _check_no_weight(source)
        return source
    return match[1]


def _check_no_weight(source: str) -> None:
    """Raises ValueError for the name of a file with a number that is not written as weights are."""
    name, _, number = source.rpartition(":")
    if not name or exists(source) or not (name == BUILTIN or exists(name)):
        return
    try:
        float(number)
    except ValueError:
        return
    raise ValueError(f"data={source} does not exist; write a weight with a decimal point, as {name}:0.5")


def weighted(data: Sequence[str]) -> list[Weighted]:
    """The sources with their shares, where they have weights; none where they have not, and are one text.

    Raises:
        ValueError: when some have a weight and others not, one is not positive, or a source is named twice, or by
            what is not text.
    """
    sources = [unweighted(source) for source in data]
    if sources == list(data):
        return []
    places = [Path(source).resolve() for source in sources]
    weights = []
    for given, source, place in zip(data, sources, places, strict=True):
        if given == source:
            raise ValueError(f"data={given} has no weight, and others have; give every source one, as {given}:0.5")
        weight = given[len(source) + 1 :]
        weights.append(float(weight))
        if not 0 < weights[-1] < math.inf:
            raise ValueError(
                f"data={given} has the weight {weight}, which is not a positive number; change it, or leave the source "
                "out"
            )
        if places.count(place) > 1:
            raise ValueError(f"data={source} is named twice; add up its weights")
        if not is_utf8(source):
            raise ValueError(f"data={source!a} is not UTF-8, and names a source's line in records; rename it")
    shares = [weight / sum(weights) for weight in weights]
    for given, places_of_it in zip(data, shares_of(shares), strict=True):
        if places_of_it == 0:
            raise ValueError(f"data={given} has less than one sequence in {BLOCK:,} by its weight; raise it")
    return [Weighted(source, share) for source, share in zip(sources, shares, strict=True)]


def is_utf8(name: str) -> bool:
    """Whether the name of a file is text; any other comes with half characters in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shares_of(weights: Sequence[float]) -> list[int]:
    """Of each source its places in a block: the whole parts, and what is left to the largest remainders."""
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: BLOCK - sum(shares)]:
        shares[source] += 1
    return shares


def is_prepared(source: str) -> bool:
    """Whether a source is a folder of prepared text."""
    return bool(source) and isfile(join(source, PREPARED))


def hub_name(source: str) -> str | None:
    """What the library of data sets knows a source by; None for one that it does not read.

    Raises:
        ValueError: for a folder of the hub's cache that does not say which of several revisions is meant.
    """
    if source.startswith(HUB):
        return source.removeprefix(HUB)
    path = Path(source)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("datasets--"):
        return source
    revisions = path / "snapshots"
    if not path.name.startswith("datasets--") or not isdir(revisions):
        return None
    there = sorted(revision for revision in revisions.iterdir() if revision.is_dir())
    main = path / "refs" / "main"
    if isfile(main):
        meant = main.read_text(errors="replace").strip()
        for revision in there:
            if revision.name == meant:
                return str(revision)
    if len(there) != 1:
        raise ValueError(
            f"data={source} holds {len(there)} revisions, and refs/main names none; name one of its snapshots/"
        )
    return str(there[0])


def kind_of(path: Path) -> str | None:
    """The suffix that tells how a file of text is read; None for another file."""
    suffix = Path(path.name.removesuffix(path.suffix) if path.suffix in COMPRESSIONS else path.name).suffix
    return suffix if suffix in (*SUFFIXES, JSON) else None


def is_tokens(path: Path) -> bool:
    """Whether a file is named as one that holds tokens."""
    return path.suffix == TOKENS


def text_size(path: Path) -> int:
    """Bytes of text that a file may hold."""
    is_compressed = path.suffix in COMPRESSIONS or kind_of(path) == ".parquet"
    return path.stat().st_size * (EXPANSION if is_compressed else 1)


def builtin_files() -> list[Path]:
    """The Python standard library's own modules, without their tests."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    modules = (path for path in library.rglob("*.py") if not left_out & set(path.relative_to(library).parts[:-1]))
    return sorted(modules, key=lambda path: path.relative_to(library).as_posix())


def find_files(source: str) -> list[Path]:
    """The files that a path, folder or glob names; those of tokens only where a file or glob does.

    Raises:
        ValueError: when there is none, or some hold text and others tokens.
    """
    if source == BUILTIN:
        return builtin_files()
    if not source:
        # As a path it would be the working directory.
        raise ValueError(f"data={source!r} names no text; give a file, folder, glob, hub:NAME or {BUILTIN}")
    path = Path(source)
    if isfile(path):
        if not kind_of(path) and not is_tokens(path):
            raise ValueError(f"data={source} is not one of {NAMES}; rename or convert")
        return [path]
    if is_prepared(source):
        raise ValueError(f"data={source} holds prepared text, which only training reads; give the text itself")
    if isdir(path):
        paths = sorted(p for p in path.rglob("*") if p.is_file() and _is_among_others(p))
    elif has_magic(source):
        there = [Path(p) for p in _matches(source)]
        on_purpose = source.endswith(JSON)
        paths = sorted(p for p in there if p.is_file() and (_is_among_others(p) or is_tokens(p) or on_purpose))
    elif exists(path):
        raise ValueError(f"data={source} is no regular file, which cannot be read again; write its text to a file")
    else:
        raise ValueError(f"data={source} does not exist; give a file, folder, glob, hub:NAME or {BUILTIN}")
    if not paths:
        raise ValueError(f"data={source} holds no file that ends in {NAMES}")
    if len({is_tokens(p) for p in paths}) > 1:
        raise ValueError(f"data={source} names text and tokens ({TOKENS}); name one kind")
    # A link to a file that is there anyway is no more text.
    once: dict[str, Path] = {}
    for p in paths:
        once.setdefault(os.path.realpath(p), p)
    return list(once.values())


def _matches(pattern: str) -> Iterator[str]:
    """What a glob names; under `**` every folder is entered once, though links lead to it again or into itself."""
    match = DEEP.match(pattern)
    if match is None:
        yield from glob(pattern)
        return
    before, after = match[1], pattern[match.end() :] or "*"
    for root in glob(before) if before else [""]:
        entered = {os.path.realpath(root)}
        for place, folders, _ in os.walk(root or ".", followlinks=True):
            # As everywhere in a glob, hidden ones are not meant.
            names, folders[:] = sorted(name for name in folders if not name.startswith(".")), []
            for name in names:
                if (real := os.path.realpath(os.path.join(place, name))) not in entered:
                    entered.add(real)
                    folders.append(name)
            yield from _matches(os.path.join(escape(place), after))


def _is_among_others(path: Path) -> bool:
    return kind_of(path) is not None and path.suffix != JSON


@dataclass(frozen=True)
class FileFacts:
    """What tells a file from a changed one without reading it all; of a data set of the hub `sample` is its commit."""

    path: str
    size: int
    modified_ns: int
    sample: str


def file_facts(path: Path) -> FileFacts:
    """Size, time of change, and the hash of pieces of a file, and of Megatron's index beside it."""
    status = path.stat()
    sample, index = sample_hash(path, status.st_size), path.with_suffix(".idx")
    if path.suffix == TOKENS and index.is_file():
        described = f"{sample} {index.stat().st_mtime_ns} {sample_hash(index, index.stat().st_size)}"
        sample = hashlib.sha256(described.encode()).hexdigest()[:32]
    return FileFacts(str(path), status.st_size, status.st_mtime_ns, sample)


def sample_hash(path: Path, size: int, length: int = SAMPLE) -> str:
    """The hash of a file's beginning, middle and end; of all of a small one."""
    sample, is_small = hashlib.sha256(), size <= 3 * length
    with path.open("rb") as file:
        for place in (0,) if is_small else (0, (size - length) // 2, size - length):
            file.seek(place)
            sample.update(file.read(3 * length if is_small else length))
    return sample.hexdigest()[:32]
