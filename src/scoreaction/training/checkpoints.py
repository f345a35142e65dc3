"""The state of a run on disk: safetensors for numbers, JSON for the rest, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scoreaction.errors import UserError

DAMAGED = "cannot be read: damaged, or written by another version; delete it to go on from the one before it, or train again"


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """Writes a tree of dicts, lists, tensors and plain values as `tensors.safetensors` and `tree.json` in a new folder."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    plain = _plain(tree, "", tensors)
    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, part / "tensors.safetensors"
    )
    (part / "tree.json").write_text(json.dumps(plain))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(part, path)


def load_tree(path: Path) -> dict[str, Any]:
    """Reads the tree that `save_tree` wrote; UserError where it is damaged."""
    try:
        tensors = load_file(path / "tensors.safetensors")
        return _whole(json.loads((path / "tree.json").read_text(encoding="utf-8")), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {DAMAGED}") from error


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
