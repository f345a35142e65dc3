"""Steering and training on shapes with the program as a black box: prompts followed against evaluations a sample.

    python -m benchmarks.steering_shapes       # results/steering_shapes.csv and its table; some nine minutes a seed

Each of the 48 prompts is drawn four times in 12 steps without guidance, by the pretrained model and by a policy that Score as
Action tuned with 1,280 pictures, both plain and steered at beta 0.08. Diversity is that of the pictures of a prompt. Three
seeds, of the training and of the pictures.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs
from _prompted import MEASURED

STEPS, EACH, PROMPTS = 12, 4, 48
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{f"best of {m}": {"method": "best_of", "particles": m} for m in (2, 4, 8, 16)},
    **{f"svdd {m}": {"method": "svdd", "particles": m} for m in (4, 8)},
    **{f"smc {m}": {"method": "smc", "particles": m} for m in (4, 8, 16)},
    "smc 16, every 3": {"method": "smc", "particles": 16, "every": 3},
}
ON_TUNED = ("plain", "best of 4", "svdd 4", "smc 4")


def steered(seed: int) -> Figures:
    """Every method on the pretrained model, and some on the tuned one."""
    tuner = built("shapes", MEASURED, f"train.seed={seed}", f"evaluation.steps={STEPS}", f"evaluation.seed={1234 + seed}")
    points = [_point(tuner, "pretrained", name, seed) for name in METHODS]
    for _ in tuner:
        pass
    return {"curve": points + [_point(tuner, "tuned", name, seed) for name in ON_TUNED]}


def _point(tuner: Any, model: str, name: str, seed: int) -> Figures:
    from scoreaction.sampling.steering import Steering
    from scoreaction.training.evaluation import measure
    from scoreaction.training.steering import steered as steer_run

    n, reference, x0 = EACH * PROMPTS, model == "pretrained", None
    costs: Figures = {"evaluations_per_sample": STEPS, "queries_per_sample": 0}
    drawn: Figures = {"n": n, "prompts": tuner.prompts, "seed": 1234 + seed, "reference": reference}
    if METHODS[name]:
        result = steer_run(tuner, tuner.sampler, Steering(**METHODS[name]), **drawn)
        x0, costs = result.x0, {key: result.figures[key] for key in costs}
    figures, _ = measure(tuner.model, tuner.sampler, tuner.reward, tuner.held_out, drawn=x0, **drawn)
    kept = {"followed": figures["held_out.shapes"], "diversity": figures["diversity"], "reward": figures["reward"]}
    return {"model": model, "method": name, **kept, **costs}


if __name__ == "__main__":
    run_jobs(
        steered,
        {f"shapes/seed{seed}": {"seed": seed} for seed in range(3)},
        arguments(__doc__ or "", "steering_shapes").parse_args(),
    )
