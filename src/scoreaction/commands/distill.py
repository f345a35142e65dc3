"""Distilling a recipe's model into a folder: the loop with its progress, how good the result is, and the writing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track

from scoreaction.commands.signals import Signals
from scoreaction.disk import check_writable
from scoreaction.errors import Failed, Interrupted, UserError
from scoreaction.networks.consistency import DESCRIPTION
from scoreaction.recipes.build import build_model, named
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Recipe, distill_settings
from scoreaction.training.distillation import Distiller, endpoint_errors
from scoreaction.world import World

POINTS = 256


def distill_recipe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Makes a consistency model of the recipe's model, at the guidance of its sampler, and writes it; its errors by time.

    UserError where the input is wrong; Failed or Interrupted where nothing was written.
    """
    world = World.joined(recipe.train.device)
    world.together(lambda: _claim(folder) if world.leads else None)
    if recipe.train.precision == "fp16":
        raise UserError("train.precision: distill takes fp32 or bf16")
    settings = recipe.distill or distill_settings(recipe.model)
    device = recipe.train.device
    model = build_model(recipe).to(Accelerator().device if device == "auto" else device)
    if recipe.train.precision == "bf16":
        model.autocast = partial(torch.autocast, model.device.type, dtype=torch.bfloat16)
    if any(p.dtype == torch.float16 for p in model.net.parameters()):
        raise UserError("model.dtype: distill takes fp32 or bf16, as for train.precision")
    prompts = prompt_list(recipe.prompts)
    try:
        distiller = Distiller(model, settings, guidance=recipe.sampler.guidance, prompts=prompts, world=world)
        if recipe.sampler.negative_prompt is not None and prompts is not None:
            model.lead_away_from(recipe.sampler.negative_prompt, guidance=recipe.sampler.guidance)
    except ValueError as error:
        raise UserError(named(str(error), "distill")) from error
    try:
        with Signals(at_once=True):
            seen = iterated(distiller, settings.iterations, leads=world.leads)
            errors = endpoint_errors(model, POINTS, guidance=recipe.sampler.guidance, prompts=prompts, seed=settings.seed + 1)
    except KeyboardInterrupt:
        raise Interrupted("stopped while distilling; nothing was written") from None
    except (ValueError, RuntimeError) as error:
        raise Failed(f"distilling: {error}") from error
    if world.leads:
        distiller.save(folder, described={"model": recipe.model.dump(), "metrics": {"loss": seen, "errors": errors}})
    return errors


def _claim(folder: Path) -> None:
    check_writable(folder, "--output")
    if (folder / DESCRIPTION).exists():
        raise UserError(f"--output: {folder} already holds a consistency model; name another folder")


def iterated(distiller: Iterable[dict[str, Any]], total: int, *, leads: bool) -> float:
    """Runs it with a bar on a terminal, else about ten lines; the mean loss of the last tenth."""
    console = Console(stderr=True, quiet=not leads)
    losses: list[float] = []
    for metrics in track(distiller, "distilling", total=total, console=console, disable=not console.is_terminal):
        losses.append(metrics["loss"])
        every = math.ceil(total / 10)
        if not console.is_terminal and (metrics["iteration"] % every == 0 or metrics["iteration"] == total):
            print(
                f"distilling  {metrics['iteration']}/{total}  loss {sum(losses[-every:]) / len(losses[-every:]):.4f}",
                flush=True,
            )
    return float(torch.tensor(losses[-math.ceil(total / 10) :]).mean())
