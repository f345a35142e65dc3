"""Writing to the disk: whole or not at all, flushed before it counts, and never through a link."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from scoreaction.errors import UserError

PART = ".part"
"""Ending of what is being written; what a crash leaves under it is of no use."""


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write such that a crash, or a power cut, leaves the old one or the new one; a link is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    remove(part)
    try:
        with part.open("xb") as file:  # a new file: what lies there, a link too, is not opened
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a crash leaves the old one or the new one."""
    with whole(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def staged(path: Path, *, last: str) -> Iterator[Path]:
    """A folder to write into, whose files are moved into `path` once all are on the disk; the file `last` is moved last.

    `path` has that file only while all that belongs to it is there.
    """
    path.mkdir(parents=True, exist_ok=True)
    part = path / PART
    remove(part)
    part.mkdir()
    try:
        yield part
        settle(part)
        files = sorted((file for file in part.rglob("*") if file.is_file()), key=lambda file: (file.name == last, file))
        for folder in (path / file.parent.relative_to(part) for file in files):
            if folder != path and folder.is_symlink():
                raise UserError(f"{folder}: is a link, and nothing is written through one; remove it")
            folder.mkdir(parents=True, exist_ok=True)
        (path / last).unlink(missing_ok=True)
        for file in files:
            os.replace(file, path / file.relative_to(part))
            flush((path / file.relative_to(part)).parent)
    finally:
        remove(part)


def settle(folder: Path) -> None:
    """Flushes a folder with all in it. Its files may be read as the umask says, also those that a library wrote private."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Flushes a file or a folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove(path: Path) -> None:
    """Removes a file, a link (and nothing that it points at), or a folder with all in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_closed(folder: Path, key: str) -> None:
    """UserError where a folder, or the one that it would be made in, may not be written to; nothing is made."""
    there = next((place for place in (folder, *folder.absolute().parents) if os.path.isdir(place)), folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{key}: {folder} cannot be written to (no right to write in {there}); name another folder")


def check_writable(folder: Path, key: str) -> None:
    """Makes the folder; UserError, before any work is done for it, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # the second for a name that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key}: {folder} cannot be written to ({why}); name another folder") from error
