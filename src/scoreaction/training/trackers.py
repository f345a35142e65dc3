"""Trackers, which show the metrics of a run beside its own files: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import atexit
import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from scoreaction.errors import missing
from scoreaction.types import Values

Names = tuple[Literal["tensorboard", "wandb", "trackio"], ...]


class Tracker(Protocol):
    """A place that shows a run while it trains."""

    def log(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of one iteration, its number under `iteration`."""

    def show(self, pictures: NDArray[Any], iteration: int) -> None:
        """Adds pictures (n, C, height, width) in [0, 1]."""

    def flush(self) -> None:
        """Writes what is buffered."""


def check_trackers(names: Names | None) -> None:
    """ValueError, with the remedy, where a tracker cannot be imported."""
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"train.trackers: {name} {missing(error.name or name)}, or leave it out") from error


def open_trackers(names: Names | None, folder: Path, settings: Callable[[], Values], first: int) -> list[Tracker]:
    """The trackers of the run in this folder, from its iteration `first` on; None is TensorBoard where it is installed."""
    installed: Names = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    chosen = installed if names is None else names
    return [TensorBoard(folder / name, first) if name == "tensorboard" else Board(name, folder, settings()) for name in chosen]


class TensorBoard:
    """Event files in a folder of the run; those of iterations from `first` on, of a run that was cut off, no longer count."""

    def __init__(self, path: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=first)

    def log(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of one iteration."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, int(metrics["iteration"]))

    def show(self, pictures: NDArray[Any], iteration: int) -> None:
        """Adds pictures (n, C, height, width) in [0, 1]."""
        self._writer.add_images("samples", pictures, iteration)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()


class Board:
    """A run of `wandb` or `trackio`, which have one interface: project `scoreaction`, named as its folder.

    A run that goes on, in the same folder, goes on there too. Where it is kept and who may read it is their own affair: see
    WANDB_MODE and TRACKIO_DIR.
    """

    def __init__(self, name: Literal["wandb", "trackio"], folder: Path, settings: Values) -> None:
        self._module = importlib.import_module(name)
        place = folder.resolve()
        own = {"project": "scoreaction", "config": settings, "resume": "allow"}
        if name == "wandb":
            number = hashlib.sha256(str(place).encode()).hexdigest()[:8]
            own |= {"id": f"{place.name}-{number}", "name": place.name, "dir": str(place)}
        else:
            own |= {"name": place.name}
        self._run = self._module.init(**own)
        atexit.register(self._run.finish)

    def log(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of one iteration that are finite."""
        known = {key: value for key, value in metrics.items() if math.isfinite(value)}
        self._run.log(known, step=int(metrics["iteration"]))

    def show(self, pictures: NDArray[Any], iteration: int) -> None:
        """Adds pictures (n, C, height, width) in [0, 1]."""
        images = [self._module.Image((picture.transpose(1, 2, 0) * 255).round().astype("uint8")) for picture in pictures]
        self._run.log({"samples": images}, step=iteration)

    def flush(self) -> None:
        """Nothing: both packages write by themselves."""
