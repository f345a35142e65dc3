"""The command line for tests: a run that takes no time, its weights, and what stops it. conftest.py has the fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scoreaction.cli import main
from scoreaction.training.finetuner import Finetuner

TINY = ["algorithm.name=ddpo", "train.batch=8", "evaluation.n=16", "evaluation.steps=3", "sampler.steps=4", "model.hidden=8"]


def train(folder: Path, *more: str, iterations: int = 4) -> int:
    return main(["train", "mixture", *TINY, f"train.iterations={iterations}", "--output", str(folder), *more])


def weights(folder: Path) -> bytes:
    return (folder / "model" / "weights.safetensors").read_bytes()


class Stop:
    """Raises or signals after some iterations of any run, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, act: Callable[[], None]) -> None:
        iterate = Finetuner._iterate

        def counted(tuner: Finetuner) -> dict[str, Any]:
            metrics = iterate(tuner)
            if tuner.iteration == after:
                monkeypatch.setattr(Finetuner, "_iterate", iterate)
                act()
            return metrics

        monkeypatch.setattr(Finetuner, "_iterate", counted)
