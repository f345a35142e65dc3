"""Run folders and their state on disk: safetensors for numbers, JSON for the rest, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scoreaction.shelf import UserError


class RunFolder:
    """The folder of a run and the names in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.yaml"
        self.settings_path = self.path / "settings.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.queries_path = self.path / "queries.jsonl"
        self.summary_path = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self._lock = FileLock(self.path / ".lock", is_singleton=True, thread_local=False)  # one a process

    @property
    def exists(self) -> bool:
        """Whether a run is there."""
        return any(path.exists() for path in (self.description, self.metrics_path, self.queries_path))

    @property
    def description(self) -> Path:
        """What says what the run is: its recipe, or the settings of one that was started from Python."""
        return self.settings_path if self.settings_path.exists() else self.recipe_path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the folder for this process; one that died keeps nothing. ValueError where another has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            message = f"output: {self.path} is in use by another process; wait for it, or name another folder"
            raise ValueError(message) from error
        try:
            yield
        finally:
            self._lock.release()

    def saved_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first; one whose writing was cut off is not among them."""
        return sorted(
            (path for path in self.checkpoints.glob("[0-9]*") if path.name.isdigit()), key=lambda path: int(path.name)
        )

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest iteration."""
        found = self.saved_checkpoints()
        return found[-1] if found else None

    def cut_metrics(self, iteration: int) -> None:
        """Drops the lines of metrics.jsonl that come after this many iterations."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines(keepends=True)
            write_whole(self.metrics_path, "".join(lines[:iteration]))


def check_writable(folder: Path, key: str) -> None:
    """Makes the folder; UserError, before any work is done for it, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be written to ({error.strerror}); name another folder") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that a crash leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


DAMAGED = "cannot be read: damaged, or written by another version; delete it to go on from the one before it, or train again"


def save_tree(path: Path, tree: dict[str, Any]) -> None:
    """A tree of dicts, lists, tensors and plain values as `tensors.safetensors` and `tree.json` in a new folder."""
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
    """What `save_tree` wrote. UserError where it is damaged."""
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
