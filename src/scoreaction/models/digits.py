"""Handwritten digits: a small class-conditional diffusion model trained on scikit-learn's digits, 16x16, prompts like "7"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.models.pipelines.decoding import from_unit, to_unit
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.labels import LabelAdapter
from scoreaction.networks.model import Model
from scoreaction.settings import Settings
from scoreaction.tasks.digits.networks import NO_CLASS, judge, load_net, parse_digit_prompt, shipped
from scoreaction.types import Conditions

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 10, "eta": 1.0, "guidance": 2.0},
    "train": {"iterations": 20, "batch": 64, "lr": 1e-4, "max_rows": 512},
    "evaluation": {"n": 200, "steps": 25, "held_out": [{"name": "legibility"}]},
    "prompts": "digits",
    "distill": {"iterations": 450, "paths": 6, "rank": 12},
    "algorithm": {"beta": 0.1, "rows": 80, "updates": 8, "critic_updates": 16},
}
RETRAIN = "write one with python -m scoreaction.tasks.digits.pretrain, or leave it out"


class Config(Settings, frozen=True, extra="forbid"):
    """path: a folder in diffusers format written by the retraining command, None for the shipped weights.

    consistency: the folder of a consistency model that `scoreaction distill` made, or `shipped`, that of the shipped weights.
    labels: names of labels that prompts may end with, `"7 | bold"`, for a control that is learned from labelled pictures.
    """

    name: Literal["digits"] = "digits"
    path: Path | None = None
    lora_rank: int | None = Field(None, ge=1)
    consistency: Literal["shipped"] | Path | None = None
    labels: list[str] | None = None


def build(config: Config) -> Model:
    """The model: v-prediction on the scheduler's own table, diversity in the held-out classifier's features."""
    try:
        net = load_net(config.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"path: {config.path} is no folder with the digits' network in diffusers format; {RETRAIN}") from error
    process, predicts = net.process, net.predicts
    encode: Callable[[list[Any]], Conditions] = _class_ids
    null: Conditions = torch.tensor([NO_CLASS])
    policy: nn.Module = net
    if config.labels is not None:
        policy = adapter = LabelAdapter(net, at="unet.time_embedding", labels=config.labels)
        encode, null = adapter.encode(encode), adapter.null(null)
    model = Model(
        policy,
        process=process,
        predicts=predicts,
        shape=(1, 16, 16),
        lora_rank=config.lora_rank,
        lora_targets=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"] if config.lora_rank else None,
        encode=encode,
        null=null,
        decode=to_unit,
        invert=from_unit,
        features=judge().features,
    )
    if config.consistency is None:
        return model
    return load_consistency(model, shipped() / "consistency" if config.consistency == "shipped" else config.consistency)


def _class_ids(prompts: list[Any]) -> Tensor:
    return torch.tensor([parse_digit_prompt(str(prompt)) for prompt in prompts])
