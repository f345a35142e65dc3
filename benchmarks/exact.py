"""Every trainer on the exact tasks: distance to the optimum beside floor and oracle, over training step counts and seeds.

python -m benchmarks.exact                                        # results/exact.csv and its tables; resumes
python -m benchmarks.exact --only mixture/sqdf/ mixture/ddpo/25   # runs whose name contains one of these
python -m benchmarks.exact --only mixture/score_action/25 --again --mix     # anew, beside rows of other commits
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from _harness import Figures, arguments, built, run_jobs, summary
from torch import Tensor

ITERATIONS = {10: 250, 25: 250, 50: 300}
FEWER = {"mixture16": 150, "linear_quadratic": 100}  # tasks that need fewer; Score as Action has as many as on the mixture
STEPS = (10, 25, 50)
TRAINERS: dict[str, list[str]] = {  # what a trainer's name in the tables means
    "score_action": ["algorithm.name=score_action"],
    "sqdf": ["algorithm.name=sqdf"],
    "sqdf, corrected": ["algorithm.name=sqdf", "algorithm.correction=true"],
    "sqdf, chain": ["algorithm.name=sqdf", "algorithm.weights=chain"],
    "vard": ["algorithm.name=vard"],
    "pi_ft": ["algorithm.name=pi_ft"],
    "adjoint_matching": [  # its adjoints have heavy tails: more paths, and no clipping, which would bias them
        "algorithm.name=adjoint_matching",
        "train.max_grad_norm=1e9",
        "train.batch=1024",
        "algorithm.rows=1000",
    ],
    "dpok": ["algorithm.name=dpok"],
    "draft, K = N, KL": ["algorithm.name=draft", "algorithm.last=null", "algorithm.beta=BETA"],
    "draft, K = N": ["algorithm.name=draft", "algorithm.last=null", "algorithm.beta=0"],
    "draft-1": ["algorithm.name=draft", "algorithm.beta=0"],
    "refl, KL": ["algorithm.name=refl", "algorithm.beta=BETA"],
    "ddpo": ["algorithm.name=ddpo"],
    # of these, as of dpok and ddpo, nobody sees the reward's gradient
    "score_action, surrogate": ["algorithm={name: score_action, look_ahead: surrogate, beta: BETA}"],
    "score_action, ratio": ["algorithm={name: score_action, estimator: likelihood_ratio, look_ahead: surrogate, beta: BETA}"],
    "score_action, forward": ["algorithm={name: score_action, estimator: forward, errors: eps, beta: BETA}", "train.lr=3e-3"],
    "ram": ["algorithm={name: ram, beta: BETA}", "train.lr=3e-4"],  # at 1e-3 its gradient ends on the mixture
    "nft": ["algorithm={name: nft}"],
    "awm": ["algorithm={name: awm}"],
}
MAIN = ("score_action", "sqdf", "sqdf, corrected", "sqdf, chain")
PLAN = [  # task, trainer, training steps
    *[("mixture", trainer, steps) for trainer in (*MAIN, "ddpo", "dpok") for steps in STEPS],
    *[("mixture16", "score_action", steps) for steps in STEPS],
    *[(task, trainer, 25) for trainer in TRAINERS for task in ("mixture", "mixture16", "linear_quadratic")],
]
GRID_N, GRID_SEED = 4096, 77
GRID: list[tuple[Any, float, int]] = [(solver, eta, steps) for steps in (5, 10, 25, 50, 200) for solver, eta in
        (("ddim", 1.0), ("ddim", 0.0), ("heun", 0.0), ("dpmpp_2m", 0.0), ("sde_dpmpp", 1.0))]  # fmt: skip


def train(task: str, trainer: str, steps: int, seed: int, iterations: int) -> Figures:
    """One run: its summary, and with seed 0 of three trainers on the mixture distance and reward over samplers.

    Without a KL the reward may grow until numbers end: the run is measured as it then is, infinite where it cannot be.
    """
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.rewards import RewardError
    from scoreaction.training.errors import TrainingError

    beta = load_recipe(task).values()["algorithm"]["beta"]  # of the optimum that all are measured to
    settings = [setting.replace("BETA", str(beta)) for setting in TRAINERS[trainer]]
    settings += [f"sampler.steps={steps}", f"train.seed={seed}", f"train.iterations={iterations}", f"evaluation.beta={beta}"]
    settings.append(f"evaluation.seed={1234 + 100 * seed}")  # so that errors over seeds hold those of the measurement
    tuner = built(task, *settings)
    try:
        for _ in tuner:
            pass
    except (TrainingError, RewardError) as error:
        print(f"{task}, {trainer}, {steps} steps, seed {seed}: {error}", flush=True)
    counts = {"iterations": tuner.iteration, **tuner.counts()}
    try:
        figures = {key: value if math.isfinite(value) else math.inf for key, value in summary(tuner).items()}
    except (TrainingError, RewardError):
        return counts | dict.fromkeys(("reward_tuned", "kl_nats", "distance_to_optimum"), math.inf)
    shown = task == "mixture" and seed == 0 and trainer in ("score_action", "dpok", "ddpo")
    return figures | {"curve": over_samplers(tuner, beta) if shown else []}


def over_samplers(tuner: Any, beta: float) -> list[Figures]:
    """Distance to the optimum and reward of the policy under other solvers and step counts."""
    import scoreaction as sa
    from scoreaction.training.exact_task import ExactTask

    task = ExactTask.of(tuner.model, tuner.reward.reward, beta)
    assert task is not None
    out = []
    for solver, eta, steps in GRID:
        x = sa.sample(tuner.model, n=GRID_N, steps=steps, eta=eta, solver=solver, seed=GRID_SEED)
        distance = task.distance(partial(_same, x), GRID_N, GRID_SEED, repeats=1)
        reward = float(tuner.reward.reward(x, None).mean())
        out.append({"solver": solver, "eta": eta, "steps": steps, "distance": distance, "reward": reward})
    return out


def _same(x: Tensor, seed: int) -> Tensor:
    return x


def jobs() -> dict[str, Figures]:
    """All runs by name."""
    return {
        f"{task}/{trainer}/{steps}/seed{seed}": {
            "task": task, "trainer": trainer, "steps": steps, "seed": seed,
            "iterations": FEWER.get(task, ITERATIONS[steps]) if trainer != "score_action" else ITERATIONS[steps],
        }
        for seed in range(5)
        for task, trainer, steps in dict.fromkeys(PLAN)
    }  # fmt: skip


if __name__ == "__main__":
    run_jobs(train, jobs(), arguments(__doc__ or "", "exact").parse_args())
