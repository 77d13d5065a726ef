"""The text of recipes/isoflop-gpu.yaml: the Python source of well-known packages, from their source distributions.

    python recipes/python_text.py python-text.jsonl --keep sdists

Each source distribution is fetched from the package index by its exact version and held against its SHA-256. Nothing of
it is run. A line of the file is {"text": ...}, the whole of one module; packages come in the order below, their modules
in that of their paths. Left out are tests, modules that are not UTF-8 or have no text, and repeats of an earlier one.
The same versions give the same bytes, whose SHA-256 must be `TEXT_SHA256`. Needs nothing but Python.
"""

import argparse
import hashlib
import html
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin, urlsplit
from urllib.request import urlopen

# Every index has this page, also mirrors; not all have an interface in JSON.
INDEX = "https://pypi.org/simple/{name}/"
TESTS = {"test", "tests"}
TEXT_SHA256 = "e8d8e710cea85991e1ec4cfbbd6d8c7d9980a0a321a07e63d731e44fa75f4088"
# Name, version, SHA-256 of the source distribution.
PACKAGES = """
astropy 8.0.2 e6af35823099ad6a40b57dbe5ff845f577374ea131925c9fa4b49eeab06c5310
cinder 29.0.0 6372ca98db3d7781031ce5950b44698badd6176db794ff1f74b0621be583429e
dask 2026.8.0 8a94c37b5de6d869343340dc26c3c3acca7ec48a3abdabe00ea3abb1125884d5
django 6.1.3 b5d2d9e35295065d13b1927b3f19a59bd119f737aa6299def14ccca1ae3c8c0d
jax 0.12.0.1 f543fb1151c351d328b7dd9e40865c01bf9ae10cdf7e21637196172891d51914
keras 3.15.1 92ae7c1dd7f61041953dc2d42253181ee099086f0b58ae36fcf98147a6f08a29
matplotlib 3.11.2 cec596316640f2b394b8f0daa0ea61a8eae82d017b620b9f202befb972a59ea4
mypy 2.4.1 63b590965691e540a335fa74dadf31a7069142f6b72e234689bbd244edf55623
networkx 3.7 fd77a511bd90f39f3d016351345b52cf5319b813bdca01de3f755d3cca62e96a
neutron 29.0.0 4dc123ed085a4b2cc8af1c4fa8d7162042c4e7cfa5e895f62e99a3b46d92ba31
nova 34.0.0 919eef77cda4ce0cc4746a5853b5d9341ebd0ae37bc8b1939eb77d17727c00df
numpy 2.5.5 5cddc243c75114ba845f01b1f87aca1572dbf7b6c2d88636ed3e1d2bccd7f1bf
pandas 3.1.1 05fed3e3b7c99b226f160e29d7d6cb7ef39638c758cbfe42b3f24ba34f04b859
salt 3008.5 0259deafd601d783721e5aa8ed10677d8c4d6cc12f5de17499af71590d593315
scikit-learn 1.9.1 629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977
scipy 1.18.1 52c4b7422442aba924d03ad4019852b08a92e64ea187b933135687bfe2747307
sqlalchemy 2.1.9 d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28
statsmodels 0.15.0 5d257fe58d0772bc46a557880ca78e2a8e07fec7bfd9d11074aef8e33e1aecbc
sympy 1.14.0 d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517
transformers 5.24.0 906cb8c3cb2123575e263962586a4d21a979ce97feeb95fe6aaf66fe6ae88bf3
twisted 26.10.0 5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de
"""


def packages() -> list[tuple[str, str, str]]:
    """Name, version and SHA-256 of every source distribution."""
    return [(name, version, sha256) for name, version, sha256 in map(str.split, PACKAGES.strip().splitlines())]


def fetch(name: str, version: str, sha256: str, folder: Path | None) -> bytes:
    """A source distribution, from `folder` or from the index; `folder`, if there is one, keeps it.

    Raises:
        ValueError: when the index has no such file, or it holds something else.
    """
    kept = None if folder is None else folder / f"{name}-{version}.tar.gz"
    if kept is not None and kept.exists():
        archive = kept.read_bytes()
    else:
        page = INDEX.format(name=name)
        with urlopen(page, timeout=60) as answer:
            page = answer.url
            links = [html.unescape(link) for link in re.findall(r'href="([^"]+)"', answer.read().decode())]
        # A file's name may have _ for the - of its package's, and capitals.
        names = [PurePosixPath(urlsplit(link).path).name.replace("_", "-").lower() for link in links]
        wanted = [link for link, file in zip(links, names, strict=True) if file == f"{name}-{version}.tar.gz"]
        if not wanted:
            raise ValueError(f"{page} has no {name}-{version}.tar.gz; the version was taken back")
        # Mirrors write links relative to the page.
        with urlopen(urljoin(page, wanted[0]), timeout=600) as answer:
            archive = answer.read()
    if hashlib.sha256(archive).hexdigest() != sha256:
        raise ValueError(f"{kept or name} is not {name} {version}: its SHA-256 is another; delete it and start again")
    if kept is not None and not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(archive)
    return archive


def modules(archive: bytes) -> Iterator[str]:
    """The modules of a source distribution in the order of their paths, without tests."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        members = [member for member in files if member.isfile() and member.name.endswith(".py")]
        for member in sorted(members, key=lambda member: member.name):
            if TESTS & set(PurePosixPath(member.name).parts[:-1]):
                continue
            content = files.extractfile(member)
            assert content is not None
            try:
                text = content.read().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write, .jsonl")
    parser.add_argument("--keep", type=Path, help="folder that keeps the source distributions")
    arguments = parser.parse_args()
    seen: set[bytes] = set()
    whole, characters = hashlib.sha256(), 0
    with arguments.out.open("wb") as out:
        for name, version, sha256 in packages():
            before = characters
            for text in modules(fetch(name, version, sha256, arguments.keep)):
                digest = hashlib.sha256(text.encode()).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                out.write(line)
                whole.update(line)
                characters += len(text)
            print(f"{name} {version}: {(characters - before) / 1e6:.1f} million characters", file=sys.stderr)
    print(f"{len(seen)} modules, {characters / 1e6:.1f} million characters, SHA-256 {whole.hexdigest()}")
    if whole.hexdigest() != TEXT_SHA256:
        raise SystemExit(f"the text is not that of the recipe, whose SHA-256 is {TEXT_SHA256}")


if __name__ == "__main__":
    main()
