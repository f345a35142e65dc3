"""The folder of a run: names of its files, the journal that grows with each iteration, and reading and writing them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scoreaction.errors import UserError
from scoreaction.types import Values
from scoreaction.yaml_text import parse_yaml, read_text


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
        """True if a run is in the folder."""
        return any(path.exists() for path in (self.description, self.metrics_path, self.queries_path))

    @property
    def description(self) -> Path:
        """The file that describes the run: its recipe, or the settings of one that was started from Python."""
        return self.settings_path if self.settings_path.exists() else self.recipe_path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process; that of a process that died is free. ValueError where another process has it."""
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
        return next(reversed(self.saved_checkpoints()), None)

    def cut_metrics(self, iteration: int) -> None:
        """Drops the lines of metrics.jsonl that come after this many iterations."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines(keepends=True)
            write_whole(self.metrics_path, "".join(lines[:iteration]))


class Journal:
    """The files of a run folder that grow or are rewritten from iteration to iteration."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._board: Any = None

    def describe(self, recipe: str | None, settings: str) -> None:
        """Writes the recipe, or the settings of a run that has none; again each time, since a resumed run may be longer."""
        if recipe is not None:
            write_whole(self.folder.recipe_path, recipe)
        elif not self.folder.recipe_path.exists():  # of a run that Python goes on with
            write_whole(self.folder.settings_path, settings)

    def log(self, metrics: dict[str, Any]) -> None:
        """Adds an iteration's metrics. What is not finite is null in JSON, which has no infinity."""
        with self.folder.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in metrics.items()}) + "\n")
        if self._board is None and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder.tensorboard), purge_step=metrics["iteration"])
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, metrics["iteration"])

    def flush(self) -> None:
        """Writes buffered events to disk."""
        if self._board is not None:
            self._board.flush()


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


def read_json_lines(path: Path) -> list[Values]:
    """The records of metrics.jsonl; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_description(folder: Path) -> tuple[Values, str]:
    """A run's recipe or settings, as values and as text. Nothing in them is imported, so that any run can be read."""
    path = RunFolder(folder).description
    text = read_text(path)
    values = parse_yaml(text, where=str(path))
    if not isinstance(values, dict) or not {"model", "reward", "algorithm", "train", "evaluation"} <= values.keys():
        raise UserError(f"{path}: is not what a run writes; train again, or put the file back")
    return values, text


def read_summary(folder: Path) -> Values | None:
    """A finished run's summary, or None."""
    path = RunFolder(folder).summary_path
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON; delete it, and train --resume measures again") from error
