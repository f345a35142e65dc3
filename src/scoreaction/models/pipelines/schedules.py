"""A diffusers scheduler's configuration as one of our processes, and the quantity that its network predicts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from scoreaction.diffusion.predictions import Predicts
from scoreaction.diffusion.processes import Flow, Process, Spacing, TableVP
from scoreaction.models.pipelines.config_keys import FLOW, STEPPING, TABLE, check_keys

PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

TABLE_REMEDY = "take a DDIM, DDPM, PNDM, DPM-Solver or Euler scheduler with a table of alphas"


class Schedule(NamedTuple):
    """A scheduler as this code has it: the process, what its network predicts, and what bounds x0, None without it."""

    process: Process
    predicts: Predicts
    project: Callable[[Tensor], Tensor] | None


def table_schedule(scheduler: Any) -> Schedule:
    """The schedule of a scheduler with a table `alphas_cumprod`.

    Where the scheduler does not say, t = 0 is clean data (`set_alpha_to_one`). `clip_sample` is the bound; its
    `variance_type` is `sampler.eta`'s to say. ValueError where there is no table, one that cannot be used, or a key that
    is not known and has another value than its default.
    """
    kind = type(scheduler).__name__
    table = vars(scheduler).get("alphas_cumprod")
    if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 4:
        raise ValueError(f"model.path: the scheduler {kind} holds no table of alphas; {TABLE_REMEDY}")
    table = table.double().cpu()
    steps = table[1:] - table[:-1]
    if not (0 < float(table[0]) <= 1 and float(table[-1]) >= 0 and bool((steps < 0).all())):
        raise ValueError(f"model.path: the alphas of the scheduler {kind} do not fall from 1 towards 0; {TABLE_REMEDY}")
    check_keys("scheduler", scheduler, TABLE | STEPPING)
    config, own = scheduler.config, inspect.signature(type(scheduler).__init__).parameters
    clips = "clip_sample" in own and config.clip_sample
    project = partial(torch.clamp, min=-config.clip_sample_range, max=config.clip_sample_range) if clips else None
    predicts = config.get("prediction_type", "epsilon")
    if predicts not in list(PREDICTS):
        raise ValueError(
            f"model.path: the scheduler's prediction_type {predicts!r} is not known; it must be {', '.join(PREDICTS)}"
        )
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in get_args(Spacing):
        known = ", ".join(get_args(Spacing))
        raise ValueError(f"model.path: the scheduler's timestep_spacing {spacing!r} is not known; it must be {known}")
    ends_at_data = bool(config.get("set_alpha_to_one", True)) and float(table[0]) < 1
    process = TableVP.from_scheduler(
        table, ends_at_data=ends_at_data, spacing=spacing, steps_offset=int(config.get("steps_offset", 0))
    )
    return Schedule(process, PREDICTS[predicts], project)


def flow_schedule(scheduler: Any, tokens: int, *, equal_steps: bool) -> Schedule:
    """Rectified flow, with the scheduler's shift as its own grid; `tokens` are those of the picture, for a dynamic shift.

    The process is always (1 - t, t): a shift only says at which times a sampler steps. equal_steps: the pipeline gives the
    scheduler times down to 1/steps (FLUX) instead of down to the scheduler's smallest (Stable Diffusion 3).
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"model.path: cannot read the scheduler {kind} of a flow model; take FlowMatchEulerDiscreteScheduler")
    check_keys("scheduler", scheduler, FLOW)
    shift = float(scheduler.shift)
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return Schedule(Flow(shift=shift, last=None if equal_steps else float(scheduler.sigma_min)), "velocity", None)
