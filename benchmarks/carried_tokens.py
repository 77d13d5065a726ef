"""A study's text as one small file of tokens, for a machine that has no network and no room for the text.

    python benchmarks/carried_tokens.py recipes/isoflop-gpu.yaml python-tokens.tar.xz

Prepares the text as `mod isoflop plan` does, in the cache, and writes its sequences as 16-bit numbers, with the
tokenizer and the cache's key, so that records say of which text they are. `benchmarks/gpu.py --tokens` reads it.
Prints the key and the SHA-256 of the archive before its compression: the same text and versions give the same.
"""

import argparse
import hashlib
import io
import json
import lzma
import tarfile
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import numpy as np

from mixture_of_depths.cli.common import quiet_libraries
from mixture_of_depths.isoflop.plan import load_study
from mixture_of_depths.options import DataOptions
from mixture_of_depths.text.batches import pack
from mixture_of_depths.text.corpus import Corpus, CorpusFacts, prepare
from mixture_of_depths.text.documents import Skipped
from mixture_of_depths.text.tokenizer import load_tokenizer

# For numbers of 16 bits: the place within a number counts, the bits of the one before do not.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 2**28, "lc": 0, "lp": 1, "pb": 1}]
SIDES = ("train", "validation")


def tokens_of(sequences: datasets.Dataset) -> np.ndarray:
    """All tokens of the sequences, in their order, as 16-bit numbers."""
    column = sequences.data.column("input_ids").combine_chunks()
    return column.flatten().to_numpy().astype("<u2")


def archive_of(corpus: Corpus) -> bytes:
    """The corpus as a tar archive, without times and owners.

    Raises:
        ValueError: when its vocabulary is more than 16 bits hold.
    """
    if len(corpus.tokenizer) > 2**16:
        raise ValueError(f"vocab_size={len(corpus.tokenizer)} is more than 65,536; give a smaller one")
    facts = {"key": corpus.key, "sequence_length": corpus.options.sequence_length, "facts": asdict(corpus.facts)}
    members = {"corpus.json": json.dumps(facts).encode()}
    with tempfile.TemporaryDirectory() as folder:
        corpus.tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            members[f"tokenizer/{path.name}"] = path.read_bytes()
    for side in SIDES:
        members[f"{side}.u16"] = tokens_of(getattr(corpus, side)).tobytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_tokens(path: Path, options: DataOptions) -> Corpus:
    """The corpus in a file of tokens.

    Args:
        path: the file.
        options: how the text was to be cut.

    Raises:
        ValueError: when it was cut to sequences of another length.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(folder, filter="data")
        described = json.loads((folder / "corpus.json").read_text())
        if described["sequence_length"] != options.sequence_length:
            raise ValueError(
                f"tokens={path} was written for sequence_length={described['sequence_length']}, and the study has "
                f"{options.sequence_length}; write it again"
            )
        sides = {
            side: pack(np.fromfile(folder / f"{side}.u16", "<u2").astype(np.int32), options.sequence_length, side)
            for side in SIDES
        }
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
    facts = CorpusFacts(**{**described["facts"], "skipped": Skipped(**described["facts"]["skipped"])})
    return Corpus(sides["train"], sides["validation"], tokenizer, facts, options, described["key"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="study file, YAML")
    parser.add_argument("out", type=Path, help="file to write, .tar.xz")
    parser.add_argument("--cache-dir", type=Path, help="where prepared text is kept, in the place of the study's")
    arguments = parser.parse_args()
    if not arguments.study.is_file():
        parser.error(f"study={arguments.study} is no file; name a study, such as recipes/isoflop-gpu.yaml")
    quiet_libraries()
    try:
        options = load_study(arguments.study).data
        corpus = prepare(replace(options, cache_dir=arguments.cache_dir) if arguments.cache_dir else options)
        archive = archive_of(corpus)
    except ValueError as error:
        parser.error(str(error))
    arguments.out.write_bytes(lzma.compress(archive, format=lzma.FORMAT_XZ, filters=FILTERS))
    size = arguments.out.stat().st_size / 1e6
    print(f"{corpus.facts}\nkey {corpus.key}, SHA-256 {hashlib.sha256(archive).hexdigest()}, {size:.1f} MB")


if __name__ == "__main__":
    main()
