"""How long and how fast a run trains: its settings, its optimisers, its schedule."""

from __future__ import annotations

import importlib.util
import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from scoreaction.model import Model


class Train(BaseModel):
    """How long and how fast: iterations, trajectories an iteration, learning rate, seed, device, averages, checkpoints.

    max_rows is the largest batch of one network call (guidance doubles it); optimizer adam8bit keeps the policy's Adam in 8
    bits, for full fine-tuning on a GPU; held_out_rows how many samples an iteration the held-out rewards and diversity are
    measured on. select: the metric whose best weights are kept, higher is better; they are then what is reported, sampled
    and saved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    iterations: int = Field(300, ge=1)
    batch: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    optimizer: Literal["adam", "adam8bit"] = "adam"
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: bool = True
    ema_decay: float = Field(0.99, gt=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)
    max_rows: int = Field(4096, ge=1)
    samples_per_prompt: int = Field(1, ge=1)
    checkpoint_every: int = Field(50, ge=1)
    held_out_rows: int = Field(64, ge=2)
    select: str | None = None


def policy_optimiser(train: Train, model: Model) -> torch.optim.Optimizer:
    """The optimiser of the trained weights. ValueError, with the remedy, where it cannot be had."""
    parameters = model.parameters.values()
    if train.optimizer == "adam":
        return adam(parameters, train.lr)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError('train.optimizer: adam8bit needs the package bitsandbytes: pip install "scoreaction[adam8bit]"')
    if model.device.type != "cuda":
        raise ValueError(f"train.optimizer: adam8bit runs on a GPU only, and train.device is {model.device.type}; use adam")
    from bitsandbytes.optim import Adam8bit

    return Adam8bit(list(parameters), lr=train.lr, eps=1e-12)


def learning_rate(train: Train, iteration: int) -> float:
    """The share of the learning rate at this iteration: cosine from 1 to 0.01 over the run."""
    if train.schedule == "constant":
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * iteration / train.iterations))


def adam(parameters: Any, lr: float) -> torch.optim.Adam:
    """Adam with an eps far below the scale of any gradient, so that steps do not depend on the reward's units."""
    chosen = list(parameters)
    if not chosen:
        raise ValueError("the network has no trainable parameters; unfreeze some, or set lora_rank")
    return torch.optim.Adam(chosen, lr=lr, eps=1e-12, fused=True)
