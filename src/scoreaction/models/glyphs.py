"""Printed digits, three to five in a picture: a small text-to-image model, 12x40 pixels, prompts like "4071"."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError

from scoreaction.models.pipelines.decoding import from_unit, to_unit
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.tasks.glyphs.drawing import BLANK, HEIGHT, LONGEST, WIDTH, ids_of
from scoreaction.tasks.glyphs.network import load_net

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 12, "eta": 1.0, "guidance": 1.0},
    "train": {"iterations": 20, "batch": 64, "lr": 2e-3, "max_rows": 256},
    "evaluation": {"n": 192, "steps": 20, "held_out": [{"name": "ocr", "correct": True}]},
    "prompts": "glyphs",
    "algorithm": {"beta": 0.08, "rows": 80, "updates": 4, "critic_updates": 16},
}
RETRAIN = "write one with python -m scoreaction.tasks.glyphs.pretrain, or leave it out"


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder written by the retraining command, None for the shipped weights; lora_rank None trains all weights."""

    name: Literal["glyphs"] = "glyphs"
    path: Path | None = None
    lora_rank: int | None = Field(16, ge=1)


def build(config: Config) -> Model:
    """The model: v-prediction, an id for each of five places of the prompt's text, diversity in pixels."""
    try:
        net = load_net(config.path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"path: {config.path} has no glyphs.safetensors of this network; {RETRAIN}") from error
    return Model(
        net,
        process=net.process,
        predicts=net.predicts,
        shape=(1, HEIGHT, WIDTH),
        lora_rank=config.lora_rank,
        lora_targets=["text.0", "text.2", "first", "conv1", "conv2"] if config.lora_rank else None,
        encode=lambda prompts: ids_of([str(prompt) for prompt in prompts]),
        null=torch.full((1, LONGEST), BLANK),
        decode=to_unit,
        invert=from_unit,
    )
