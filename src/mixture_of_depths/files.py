"""Files that are whole or not there: JSON and records, written aside, sealed with checksums, locked."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
# Bytes, on every file system in use.
LONGEST_NAME = 255
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_place(folder: Path, field: str) -> None:
    """Raises ValueError, naming the field, where no folder can be made: a file is in the way, or the name too long."""
    for place in (folder, *folder.parents):
        if len(os.fsencode(place.name)) > LONGEST_NAME:
            raise _no_folder(folder, field, "file name too long")
        if os.path.isdir(place):
            return
        # A link may lead nowhere, or to itself.
        if os.path.lexists(place):
            raise _no_folder(
                folder, field, f"{place} is a {'link that leads nowhere' if place.is_symlink() else 'file'}"
            )


def make_folder(folder: Path, field: str) -> None:
    """Makes a folder, and those that it lies in, if it is not there.

    Raises:
        ValueError: naming the field, where none can be made.
        OSError: when the disk is full.
    """
    check_place(folder, field)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise _no_folder(folder, field, (error.strerror or str(error)).lower()) from error


def _no_folder(folder: Path, field: str, why: str) -> ValueError:
    return ValueError(f"{field}={folder} cannot be a folder ({why}); name another")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: naming the file, when it holds no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_aside(path: Path, text: str) -> None:
    """Writes a file whole or not at all: aside first, to the disk, and then renamed."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Writes to the disk which names a folder holds: a renaming, before anything that relies on it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off by a kill is left out."""
    # Not splitlines: that would also cut at characters which JSON allows within a text.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} is damaged in line {number}: {error}") from error
    return records


def follow_umask(paths: Iterable[Path]) -> None:
    """Gives files the mode that any other new one has; safetensors leaves its own to their owner alone."""
    # It can only be read by setting it: for a moment, to the strictest.
    umask = os.umask(0o077)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


def seal(folder: Path) -> None:
    """Writes the checksums of all files in a folder into it, last, and all to the disk; the umask gives the modes."""
    follow_umask(path for path in folder.rglob("*") if path.is_file())
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sums[str(path.relative_to(folder))] = checksum(path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    write_aside(folder / CHECKSUMS, json.dumps(sums, indent=2))


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder holds what it held when it was sealed.

    Raises:
        OSError: when that cannot be told, because a file that is there cannot be read.
    """
    try:
        sums = read_json(folder / CHECKSUMS)
        return bool(sums) and all(checksum(folder / name) == value for name, value in sums.items())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, AttributeError, TypeError):
        return False


def checksum(path: Path) -> str:
    """The hash of all that a file holds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Only one process at a time holds a file; a killed one lets go of it. Yields whether it is this one.

    Args:
        path: the file, made if it is not there.
        wait: whether to wait for others, and not to go on without it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def put_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Has an entry of the cache written if it is not whole there, once of several processes that ask for it."""
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        # Another process may have written it meanwhile.
        if not is_whole(folder):
            with _written_whole(folder) as aside:
                write(aside)


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, aside, which is then sealed and gets its name.

    So a run that is stopped leaves no half entry behind; what a killed one left aside makes way.
    """
    aside = folder.with_name(f".preparing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        seal(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
