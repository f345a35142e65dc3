"""Reward values only: trainers on the exact tasks at equal queries, distance to the optimum beside floor and oracle.

    python -m benchmarks.black_box                                       # results/black_box.csv and its table; resumes
    python -m benchmarks.black_box --only mixture/score_action seed0     # runs whose name contains one of these

25 steps, 256 rewards an iteration; nobody sees the reward's gradient. The optimum, and how it is measured, are the recipe's.
"""

from __future__ import annotations

import math

from _harness import Figures, arguments, built, run_jobs, summary

STEPS, ITERATIONS, SEEDS = 25, 100, 3
TASKS = ("mixture", "mixture16", "linear_quadratic")
TRAINERS = {  # a trainer's name in the table, and its settings; BETA is the task's
    "score_action, likelihood_ratio": "{name: score_action, estimator: likelihood_ratio, look_ahead: surrogate, beta: BETA}",
    "score_action, surrogate": "{name: score_action, look_ahead: surrogate, beta: BETA}",
    "score_action, forward": "{name: score_action, estimator: forward, beta: BETA}",
    "dpok": "{name: dpok, beta: BETA}",
    "ram": "{name: ram, beta: BETA}",
    "nft": "{name: nft}",
    "awm": "{name: awm}",
    "ddpo": "{name: ddpo}",
}


def train(task: str, trainer: str, seed: int, iterations: int) -> Figures:
    """One run: its summary; what diverges is measured as it then is, infinite where it cannot be."""
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.rewards import RewardError
    from scoreaction.training.optimizer import TrainingError

    beta = load_recipe(task).values()["algorithm"]["beta"]
    keys = {"sampler.steps": STEPS, "train.seed": seed, "train.iterations": iterations, "evaluation.beta": beta}
    algorithm = TRAINERS[trainer].replace("BETA", str(beta))
    tuner = built(task, f"algorithm={algorithm}", *(f"{key}={value}" for key, value in keys.items()))
    try:
        for _ in tuner:
            pass
        return {key: value if math.isfinite(value) else math.inf for key, value in summary(tuner).items()}
    except (TrainingError, RewardError) as error:
        print(f"{task}, {trainer}, seed {seed}: {error}", flush=True)
    return tuner.counts() | dict.fromkeys(("reward_tuned", "kl_nats", "distance_to_optimum"), math.inf)


def jobs() -> dict[str, Figures]:
    """All runs by name."""
    return {
        f"{task}/{trainer}/seed{seed}": {"task": task, "trainer": trainer, "seed": seed, "iterations": ITERATIONS}
        for seed in range(SEEDS)
        for task in TASKS
        for trainer in TRAINERS
    }


if __name__ == "__main__":
    run_jobs(train, jobs(), arguments(__doc__ or "", "black_box").parse_args())
