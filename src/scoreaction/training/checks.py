"""Refusals of settings of a run that do not go together, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from scoreaction.algorithms._learner import Algorithm, Learner
from scoreaction.errors import UserError, check_kind
from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steering import Steering
from scoreaction.training.budget import Budget
from scoreaction.training.evaluation import Evaluation
from scoreaction.training.online import Online
from scoreaction.training.optimizer import Train
from scoreaction.world import World

NO_SIGNAL = 1000.0
"""The sigma/alpha at pure noise up to which an eps network is trained: DDPM's table ends at 157."""


def check_device(name: str, *, key: str) -> None:
    """Raises UserError unless tensors with numbers can be made on the device."""
    try:
        float(torch.zeros((), device=name))  # meta makes tensors, and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"{key}: {name!r} cannot be used here; take auto, cpu or, with a GPU, cuda") from error


def device_of(train: Train) -> torch.device:
    """The device of this process, for `auto` an accelerator where there is one; UserError where it cannot be used."""
    if train.device == "auto":
        return Accelerator().device
    check_device(train.device, key="train.device")
    return torch.device(train.device)


OBJECTS = {
    "model": (Model, "sa.Model(...)"),
    "algorithm": (Algorithm, "sa.DDPO()"),
    "sampler": (Sampler, "sa.Sampler(steps=20)"),
    "train": (Train, "sa.Train(iterations=100)"),
    "evaluation": (Evaluation, "sa.Evaluation(n=64)"),
    "online": (Online, "sa.Online(rounds=[64, 64])"),
    "steer": (Steering, "sa.Steering(particles=16)"),
    "held_out": (dict, "{'clip': reward}"),
}
"""Kinds of the parts of a run, each with one such."""


def check_objects(**parts: Any) -> None:
    """UserError where a part of a run that is given, not None, is no object of its kind."""
    for name, value in parts.items():
        if value is not None or name in ("model", "algorithm"):
            check_kind(name, value, *OBJECTS[name])


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


def listed(prompts: Sequence[Any] | None) -> list[Any] | None:
    """Prompts as a list, None for none; ValueError for one text, for none in a list, and for a recipe's mapping of one."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts: must be a list of prompts (got {prompts!r}); one prompt is [{prompts!r}]")
    texts = None if prompts is None else list(prompts)
    if texts == []:
        raise ValueError("prompts: the list is empty; give at least one prompt, or null for none")
    for text in texts or []:
        if isinstance(text, dict) and "prompt" in text:  # a model of one's own may encode other mappings
            raise ValueError(
                f"prompts: a mapping is a prompt in files and recipes; in Python it is sa.Prompt({text['prompt']!r},"
                " weight=..., metadata={...})"
            )
    return texts


def check_siblings(train: Train, learner: Learner) -> None:
    """ValueError where the trajectories with one prompt are no whole families of siblings."""
    each, branches = train.samples_per_prompt, learner.branches
    if each > 1 and each % branches:
        whole = -(-each // branches) * branches
        raise ValueError(
            f"train.samples_per_prompt: {each} are no whole families of algorithm.branches {branches}, which have one prompt;"
            f" set it to {whole}"
        )


def check_signal(model: Model, algorithm: Algorithm) -> None:
    """ValueError where steps are to be trained whose error of eps counts over `NO_SIGNAL` times in an x0 without bounds."""
    of_steps = not (algorithm.moves_noise or algorithm.chooses_prompts)
    if model.predicts not in ("eps", "score") or model.project is not None or not of_steps:
        return
    ratio = float(torch.exp(-model.process.log_snr(torch.ones((), dtype=torch.float64)) / 2))
    if ratio > NO_SIGNAL:
        raise ValueError(
            f"model.process: an error of {model.predicts} counts {ratio:.3g} times in x0 at t = 1, and policies follow it away;"
            " end it earlier (TableVP.cut, or a smaller sigma_max), or bound x0: Model(project=...), or clip_sample and"
            " clip_sample_range in a folder's scheduler_config.json"
        )


def check_parts(model: Model, sampler: Sampler, train: Train, prompts: list[Any] | None, world: World) -> None:
    """ValueError where batch and processes, or guidance and the consistency model's teacher, do not go together."""
    if train.batch % world.size:
        share = train.batch // world.size * world.size or world.size
        raise ValueError(f"train.batch: {train.batch} is not shared evenly by {world.size} processes; use {share}")
    teacher = model.consistency_guidance
    if prompts is not None and teacher not in (None, sampler.guidance):
        raise ValueError(
            f"model.consistency: was distilled at guidance {teacher:g}, and sampler.guidance is {sampler.guidance:g};"
            " make them equal, or distill again"
        )
