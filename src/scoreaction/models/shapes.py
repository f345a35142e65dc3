"""Coloured shapes: a Stable Diffusion of two million parameters, 32x32 pictures, prompts like "two green triangles"."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from scoreaction.models import diffusers
from scoreaction.models.pipelines.assemble import build_from_pipeline
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.tasks.shapes.scorer import shipped

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 12, "eta": 1.0, "guidance": 1.0},
    "train": {"iterations": 78, "batch": 64, "lr": 3e-3, "max_rows": 256},
    "evaluation": {"n": 192, "steps": 20, "held_out": [{"name": "shapes", "correct": True}]},
    "prompts": "shapes",
    "algorithm": {"beta": 0.03, "rows": 80, "updates": 4, "critic_updates": 16},
}


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder written by the retraining command, None for the shipped pipeline; lora_rank None trains all weights.

    consistency: the folder of a consistency model that `scoreaction distill` made of this model.
    labels: names of labels that prompts may end with, `"a red circle | large"`, a control learned from labelled pictures.
    """

    name: Literal["shapes"] = "shapes"
    path: Path | None = None
    lora_rank: int | None = Field(16, ge=1)
    consistency: Path | None = None
    labels: list[str] | None = None


def build(config: Config) -> Model:
    """The pipeline's model, as `diffusers` makes it of any Stable Diffusion; so small that a batch goes through it whole."""
    pipeline = diffusers.load_pipeline(diffusers.Config(path=str(config.path or shipped()), lora_rank=config.lora_rank))
    model = build_from_pipeline(pipeline, lora_rank=config.lora_rank, labels=config.labels)
    model.max_rows = None
    return model if config.consistency is None else load_consistency(model, config.consistency)
