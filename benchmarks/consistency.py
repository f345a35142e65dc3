"""Predictors of the clean sample against the end of the reference's ODE: root mean square error a coordinate, by time.

python -m benchmarks.consistency            # results/consistency.csv and a table; resumes

Tweedie is the reference's x0, which is also one DDIM step; DDIM takes 2 and 4 steps on the grid `t (i/n)^1.5`; the
consistency model is distilled here on the mixture (leap: all the way, and one step as published), the shipped one on digits.
"""

from __future__ import annotations

import time
from typing import Any

from _harness import Figures, arguments, run_jobs

TIMES = (0.999, 0.8, 0.6, 0.4, 0.2, 0.1)
TRUTH_STEPS = 200
N = {"mixture": 4096, "digits": 200}
JOBS: dict[str, dict[str, Any]] = {
    "mixture": {"task": "mixture", "leap": None},
    "mixture, leap 1": {"task": "mixture", "leap": 1},
    "digits": {"task": "digits", "leap": None},
}


def _prepared(task: str, leap: int | None) -> tuple[Any, float, list[str] | None, float]:
    """The model with its consistency model, the guidance, the prompts, and the seconds that distilling took."""
    import scoreaction as sa
    from scoreaction.recipes.build import build_model
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.recipes.recipe import distill_settings, load_recipe

    recipe = load_recipe(task, ["model.consistency=shipped"] if task == "digits" else [])
    model, prompts, began = build_model(recipe), prompt_list(recipe.prompts), time.process_time()
    if not model.has_consistency:
        settings = distill_settings(recipe.model).model_copy(update={"leap": leap})
        for _ in sa.Distiller(model, settings, guidance=recipe.sampler.guidance, prompts=prompts):
            pass
    return model, recipe.sampler.guidance, prompts, time.process_time() - began


def errors(task: str, leap: int | None) -> Figures:
    """Errors by predictor and time, at points of the reference's own ODE paths."""
    import torch

    from scoreaction.diffusion.solvers import SOLVERS, time_grid
    from scoreaction.sampling.draw import spread_prompts
    from scoreaction.sampling.trajectory import trajectory
    from scoreaction.training.distillation import follow

    model, guidance, prompts, seconds = _prepared(task, leap)
    generator = torch.Generator().manual_seed(7)
    conditions = model.conditions(spread_prompts(prompts, N[task]))

    @torch.no_grad()
    def reference(x: torch.Tensor, t: torch.Tensor) -> Any:
        return model.reference(x, t, conditions, guidance=guidance)

    def ddim(x: torch.Tensor, t: torch.Tensor, n: int) -> torch.Tensor:
        grid = t * (torch.arange(n, -1, -1, dtype=torch.float64) / n) ** 1.5
        for visit in trajectory(reference, model.process, x, grid, solver=SOLVERS["ddim"], eta=0.0):
            x = visit.x_next
        return x

    times = time_grid(model.process, TRUTH_STEPS, name="log_snr")
    states = follow(reference, model.process, model.start(N[task], generator), times)
    end = states[-1]
    curve: list[Figures] = []
    with torch.no_grad():
        for at in TIMES:
            i = int((times - at).abs().argmin())
            x, t = states[i], times[i]
            predicted = {
                "tweedie": reference(x, t).x0,
                "ddim 2": ddim(x, t, 2),
                "ddim 4": ddim(x, t, 4),
                "consistency": model.consistency(x, t, conditions),
            }
            off = {name: float((x0 - end).double().square().mean().sqrt()) for name, x0 in predicted.items()}
            curve.append({"t": float(t), **off})
    return {"spread": float(end.std()), "seconds_distilling": round(seconds, 1), "curve": curve}


if __name__ == "__main__":
    run_jobs(errors, JOBS, arguments(__doc__ or "", "consistency").parse_args())
