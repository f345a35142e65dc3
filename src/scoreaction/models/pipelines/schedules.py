"""A diffusers scheduler's configuration as one of our processes, and the quantity that its network predicts."""

from __future__ import annotations

import math
from typing import Any, get_args

from torch import Tensor

from scoreaction.diffusion.predictions import Predicts
from scoreaction.diffusion.processes import Flow, Spacing, TableVP

PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

TABLE_REMEDY = "take a DDIM, DDPM, PNDM, DPM-Solver or Euler scheduler with a table of alphas"


def table_process(scheduler: Any) -> tuple[TableVP, Predicts]:
    """The process of a scheduler with a table `alphas_cumprod`, and the prediction it is trained for.

    Where the scheduler does not say, t = 0 is clean data (`set_alpha_to_one`). A `clip_sample` or `thresholding` of its
    predictions and its `variance_type` are no part of the process and are not applied. ValueError where there is no table, or
    one that cannot be used.
    """
    kind = type(scheduler).__name__
    table = vars(scheduler).get("alphas_cumprod")
    if not isinstance(table, Tensor) or table.ndim != 1 or len(table) < 4:
        raise ValueError(f"model.path: the scheduler {kind} holds no table of alphas; {TABLE_REMEDY}")
    table = table.double().cpu()
    steps = table[1:] - table[:-1]
    if not (0 < float(table[0]) <= 1 and float(table[-1]) >= 0 and bool((steps < 0).all())):
        raise ValueError(f"model.path: the alphas of the scheduler {kind} do not fall from 1 towards 0; {TABLE_REMEDY}")
    config = scheduler.config
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
    return process, PREDICTS[predicts]


def flow_process(scheduler: Any, tokens: int, *, equal_steps: bool) -> tuple[Flow, Predicts]:
    """Rectified flow, with the scheduler's shift as its own grid; `tokens` are those of the picture, for a dynamic shift.

    The process is always (1 - t, t): a shift only says at which times a sampler steps. equal_steps: the pipeline gives the
    scheduler times down to 1/steps (FLUX) instead of down to the scheduler's smallest (Stable Diffusion 3).
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"model.path: cannot read the scheduler {kind} of a flow model; take FlowMatchEulerDiscreteScheduler")
    strange = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
    for key in (*strange, "stochastic_sampling"):
        if config.get(key):
            raise ValueError(f"model.path: the scheduler's {key} is not supported; set it to null in scheduler_config.json")
    shift = float(scheduler.shift)
    if config.use_dynamic_shifting:
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return Flow(shift=shift, last=None if equal_steps else float(scheduler.sigma_min)), "velocity"
