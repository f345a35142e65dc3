"""The state of a run on disk: safetensors for numbers, JSON for the rest, and the checksum of every byte.

A checkpoint is a folder, written whole or not at all: `tensors.safetensors`, `tree.json`, `run.json` (the identity of the
run that wrote it) and `SHA256SUMS`, which `sha256sum -c` reads too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scoreaction.disk import PART, flush, remove, settle
from scoreaction.errors import UserError
from scoreaction.training.identity import difference
from scoreaction.types import Values

DAMAGED = "cannot be read: damaged, or written by another version; delete it to go on from the one before it, or train again"
TENSORS, TREE, RUN, SUMS = "tensors.safetensors", "tree.json", "run.json", "SHA256SUMS"
KEPT = 2
"""Number of checkpoints that stay."""


class DamagedError(UserError):
    """A checkpoint whose bytes are not those that were written."""


def save_tree(path: Path, tree: dict[str, Any], run: Values | None = None) -> None:
    """Writes a tree of dicts, lists, tensors and plain values into a new folder, with the identity of its run.

    It is flushed to the disk before it gets its name. UserError where something else has that name.
    """
    if path.is_symlink() or (path.exists() and not is_checkpoint(path)):
        raise UserError(f"{path}: is not a checkpoint of this run, and it is not written over; move it away")
    part, old = (path.with_name(f"{path.name}{ending}{PART}") for ending in ("", ".old"))
    remove(part)
    part.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain = _plain(tree, "", tensors)
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, part / TENSORS)
    (part / TREE).write_text(json.dumps(plain), encoding="utf-8")
    (part / RUN).write_text(json.dumps(run or {}), encoding="utf-8")
    (part / SUMS).write_text(_sums(part), encoding="ascii")
    settle(part)
    if path.exists():  # a damaged one, which was passed over
        remove(old)
        os.replace(path, old)
    os.replace(part, path)
    flush(path.parent)
    remove(old)


def load_tree(path: Path) -> dict[str, Any]:
    """Reads the tree that `save_tree` wrote; DamagedError where a single byte of its files is another."""
    try:
        if (path / SUMS).read_bytes() != _sums(path).encode():
            raise ValueError("checksum")
        tensors = load_file(path / TENSORS)
        return _whole(json.loads((path / TREE).read_text(encoding="utf-8")), tensors)
    except PermissionError as error:
        raise UserError(f"{path}: may not be read ({error.strerror}); change who may read it") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path}: {DAMAGED}") from error


def load_newest(paths: Sequence[Path], run: Values, *, besides: tuple[str, ...] = ()) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint of these, oldest first, with its tree; None where there are none.

    A damaged one is named, and the one before it is taken. besides: how settings begin that do not matter here. UserError
    where all are damaged, or that one is of another run than `run`.
    """
    damaged: list[DamagedError] = []
    for path in reversed(paths):
        try:
            tree = load_tree(path)
        except DamagedError as error:
            damaged.append(error)
            continue
        before, now = ({k: v for k, v in one.items() if not k.startswith(besides)} for one in (run_of(path) or {}, run))
        changed = difference(before, now)
        if changed is not None:
            key, old, new = changed
            raise UserError(f"{key}: {path} is of a run with {old!r}, not {new!r}; set it as it was, or name another --output")
        for other in paths[len(paths) - len(damaged) :]:
            logging.getLogger(__name__).warning("%s: damaged; going on from %s", other, path)
        return path, tree
    if damaged:
        raise damaged[0]
    return None


def run_of(path: Path) -> Values | None:
    """The identity of the run that wrote a checkpoint; None where it cannot be read."""
    try:
        return json.loads((path / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_checkpoint(path: Path) -> bool:
    """True for a folder, and no link, that holds what `save_tree` writes and nothing else."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir() if not file.name.startswith(".tmp")}  # of safetensors, cut off
    return bool(names) and names <= {TENSORS, TREE, RUN, SUMS}


def prune(paths: Sequence[Path], run: Values) -> None:
    """Deletes all but the newest of these checkpoints, oldest first; only those that this run wrote."""
    for path in [path for path in paths if run_of(path) == run][:-KEPT]:
        part = path.with_name(path.name + PART)
        remove(part)
        os.replace(path, part)
        remove(part)


def clear_parts(folder: Path) -> None:
    """Deletes what a crash left of checkpoints that were being written or deleted."""
    for path in folder.glob(f"[0-9]*{PART}"):
        if is_checkpoint(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
            remove(path)


def _sums(folder: Path) -> str:
    """The checksums of a checkpoint's files, a line each."""
    lines = []
    for name in (TENSORS, TREE, RUN):
        sha = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(2**20):
                sha.update(block)
        lines.append(f"{sha.hexdigest()}  {name}\n")
    return "".join(lines)


def _plain(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": [[key, _plain(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_plain(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    return {"value": value}


def _whole(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return {key: _whole(item, tensors) for key, item in value["items"]}
    if "list" in value:
        return [_whole(item, tensors) for item in value["list"]]
    return value["value"]
