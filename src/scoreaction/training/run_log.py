"""The journal of a run: its recipe, a line of metrics an iteration, and TensorBoard's events."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any

from scoreaction.training.run_folder import RunFolder, write_whole


class Journal:
    """The files of a run folder that grow or are rewritten from iteration to iteration."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._board: Any = None

    def describe(self, recipe: str | None, settings: str) -> None:
        """Writes the recipe, or the settings of a run that has none; again each time, since a resumed run may have grown."""
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
