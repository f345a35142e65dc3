"""Refusals of settings of a run that do not go together, each with its remedy."""

from __future__ import annotations

import torch

from scoreaction.errors import UserError
from scoreaction.networks.model import Model
from scoreaction.training.budget import Budget
from scoreaction.training.optimizer import Train
from scoreaction.world import World


def check_precision(model: Model, precision: str) -> None:
    """UserError, which names both keys, where weights and calls of the network are of widths that do not go together."""
    widths = {p.dtype for p in model.net.parameters()}
    if precision != "fp16" and torch.float16 in widths:
        why = (
            "gradients through fp16 weights vanish unless they are scaled; set it to fp16, or the weights' model.dtype to bf16"
        )
        raise UserError(f"train.precision: {why}")
    if precision == "fp16" and torch.bfloat16 in widths:
        raise UserError("train.precision: fp16 takes no bf16 weights; set it to bf16, or the weights' model.dtype to fp16")


def check_shard(train: Train, world: World) -> None:
    """ValueError, with the remedy, where processes cannot share networks."""
    if world.size == 1:
        raise ValueError(
            "train.shard: there is one process, and nobody to share with; start it with --processes N or torchrun, or set it"
            " to false"
        )
    if train.optimizer == "adam8bit":
        raise ValueError(
            "train.optimizer: adam8bit does not know parts of tensors; take adam, whose state train.shard divides among the"
            " processes"
        )
    if train.precision == "fp16":
        raise ValueError("train.precision: fp16 scales gradients by what one process sees of them; with train.shard take bf16")


def check_whole(model: Model) -> None:
    """ValueError where processes would divide weights that are quantised."""
    if any(not p.is_floating_point() for p in model.net.parameters()):
        raise ValueError("train.shard: quantised weights are not divided; set it to false, or leave model.quantize out")


def refuse_uncounted(budget: Budget | None, command: str) -> None:
    """UserError where a command would ask the oracle of a run with a budget and no run would know of it."""
    if budget is not None:
        raise UserError(
            f"online.budget: {command} asks the oracle too, and no run would count its questions; set online.budget=null to let"
            " it ask"
        )
