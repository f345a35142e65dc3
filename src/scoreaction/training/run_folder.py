"""The folder of a run: names of its files, the journal that grows with each iteration, and reading and writing them."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from scoreaction.disk import PART, check_writable, flush, remove, write_whole
from scoreaction.errors import UserError
from scoreaction.training.checkpoints import clear_parts, is_checkpoint
from scoreaction.training.trackers import Names, Tracker, open_trackers
from scoreaction.types import Values
from scoreaction.yaml_text import parse_yaml, read_text

MODEL_DESCRIPTION = "model.json"
"""File of a saved model that is written last."""


def sample_arrays(samples: NDArray[Any], prompts: Sequence[Any] | None, letters: str | None) -> dict[str, NDArray[Any]]:
    """The arrays of a file of samples: `samples`, the `prompts` of each, and the `letters` of tokens, where there are any.

    >>> arrays = sample_arrays(np.array([[0, 1, 1]]), None, "AB")
    >>> ["".join(row) for row in arrays["letters"][arrays["samples"]]]
    ['ABB']
    """
    arrays = {"samples": samples}
    if prompts is not None:
        arrays["prompts"] = np.array([str(prompts[i % len(prompts)]) for i in range(len(samples))])
    if letters is not None:
        arrays["letters"] = np.array(list(letters))
    return arrays


STUDENT = "student.json"
"""The file with the figures of a student, beside its teacher."""


def check_folder(folder: Path, remedy: str) -> None:
    """UserError, with the remedy, where a folder that is to be read is not there, is a file, or may not be read."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: {'is a file' if os.path.lexists(folder) else 'no such folder'}; {remedy}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: may not be read; ask its owner, or {remedy}")


class RunFolder:
    """The folder of a run and the names in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.recipe_path = self.path / "recipe.yaml"
        self.settings_path = self.path / "settings.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.queries_path = self.path / "queries.jsonl"
        self.asked_path = self.path / "asked.json"
        self.summary_path = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model"
        self.report_path = self.path / "report.html"
        self._lock = FileLock(self.path / ".lock", is_singleton=True, thread_local=False)  # one a process

    @property
    def exists(self) -> bool:
        """True if a run is in the folder, or anything that has the name of something that a run writes."""
        return any(os.path.lexists(path) for path in self._written())

    @property
    def holds_no_run(self) -> bool:
        """True where there are results or checkpoints without a recipe, settings or log that they could belong to."""
        known = (self.recipe_path, self.settings_path, self.metrics_path, self.queries_path)
        return self.exists and not any(path.exists() for path in known)

    def _written(self) -> list[Path]:
        return [path for path in vars(self).values() if isinstance(path, Path) and path != self.path]

    @property
    def complete(self) -> bool:
        """True where all that the end of a run writes is there: summary, samples and model."""
        samples = [self.samples / f"{kind}.npz" for kind in ("base", "tuned")]
        return all(path.is_file() for path in (self.summary_path, *samples, self.model / MODEL_DESCRIPTION))

    @property
    def description(self) -> Path:
        """The file that describes the run: its recipe, or the settings of one that was started from Python."""
        return self.settings_path if self.settings_path.exists() else self.recipe_path

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process; that of a process that died is free.

        ValueError where nothing can be written there, where another process has it, and for a link in it: what lies elsewhere
        is not written to.
        """
        check_writable(self.path, "output")
        for path in (*self._written(), self.path / ".lock"):
            if path.is_symlink():
                raise ValueError(
                    f"output: {path} is a link, and nothing is written through one; remove it, or name another folder"
                )
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
        """Whole checkpoints, oldest first; one whose writing was cut off is not among them, nor is anything else."""
        named = (path for path in self.checkpoints.glob("[0-9]*") if path.name.isascii() and path.name.isdecimal())
        return sorted((path for path in named if is_checkpoint(path)), key=lambda path: int(path.name))

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the highest iteration."""
        return next(reversed(self.saved_checkpoints()), None)

    def clear_parts(self) -> None:
        """Deletes what a crash left of files that were being written."""
        clear_parts(self.checkpoints)
        for path in (*self._written(), *(self.samples / f"{kind}.npz" for kind in ("base", "tuned"))):
            part = path.with_name(path.name + PART)
            if part.is_symlink() or part.is_file():
                remove(part)

    def cut_metrics(self, iteration: int) -> None:
        """Drops the lines of metrics.jsonl that come after this many iterations."""
        if self.metrics_path.exists():
            lines = self.metrics_path.read_text().splitlines(keepends=True)
            write_whole(self.metrics_path, "".join(lines[:iteration]))


class Journal:
    """The files of a run folder that grow or are rewritten from iteration to iteration."""

    def __init__(self, folder: RunFolder, trackers: Names | None) -> None:
        self.folder = folder
        self._names = trackers
        self._trackers: list[Tracker] | None = None

    def describe(self, recipe: str | None, settings: str) -> None:
        """Writes the recipe, or the settings of a run that has none; again each time, since a resumed run may be longer."""
        if recipe is not None:
            _keep(self.folder.recipe_path, recipe)
        elif not self.folder.recipe_path.exists():  # of a run that Python goes on with
            _keep(self.folder.settings_path, settings)

    def log(self, metrics: dict[str, Any]) -> None:
        """Adds an iteration's metrics. What is not finite is null in JSON, which has no infinity."""
        if self._trackers is not None and not self.folder.metrics_path.exists():
            logging.getLogger(__name__).warning(
                "%s: was removed; its lines before iteration %d are lost", self.folder.metrics_path, metrics["iteration"]
            )
        with self.folder.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: value if math.isfinite(value) else None for key, value in metrics.items()}) + "\n")
        if self._trackers is None:
            first, path = metrics["iteration"], self.folder.path
            self._trackers = open_trackers(self._names, path, lambda: read_description(path)[0], first)
        for tracker in self._trackers:
            tracker.log(metrics)

    def show(self, pictures: NDArray[Any], iteration: int) -> None:
        """Adds pictures (n, C, height, width) in [0, 1] to the trackers of the run."""
        for tracker in self._trackers or []:
            tracker.show(pictures, iteration)

    def flush(self) -> None:
        """Flushes the log to the disk, and buffered events."""
        if self.folder.metrics_path.exists():
            flush(self.folder.metrics_path)
        for tracker in self._trackers or []:
            tracker.flush()


def _keep(path: Path, text: str) -> None:
    """Writes a text unless the file has it already."""
    if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
        write_whole(path, text)


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
