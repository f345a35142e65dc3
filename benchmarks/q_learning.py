"""q-learning beside Score as Action and VARD, on the linear-quadratic case and on a table: reward, KL, distance to the optimum.

    python -m benchmarks.q_learning     # results/q_learning.csv and its table; some five minutes on one core

25 iterations of 128 paths, 10 steps, evaluated with 1,024 samples of 50 steps.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs, summary

TASKS = ("linear_quadratic", "moons")
TRAINERS: dict[str, list[str]] = {  # what a trainer's name in the table means
    "score_action": ["algorithm.name=score_action"],
    "vard": ["algorithm.name=vard"],
    "q_learning": ["algorithm.name=q_learning"],
    "q_learning, 64 points": ["algorithm.name=q_learning", "algorithm.points=64"],
}
SETTINGS = ["sampler.steps=10", "train.batch=128", "train.lr=2e-3", "evaluation.n=1024", "evaluation.steps=50"]


def train(task: str, trainer: str, seed: int, iterations: int) -> Figures:
    """One run: its summary."""
    tuner = built(task, *TRAINERS[trainer], *SETTINGS, f"train.seed={seed}", f"train.iterations={iterations}")
    for _ in tuner:
        pass
    return summary(tuner)


def jobs() -> dict[str, Figures]:
    """All runs by name; only a table has points."""
    return {
        f"{task}/{trainer}/seed{seed}": {"task": task, "trainer": trainer, "seed": seed, "iterations": 25}
        for seed in range(2)
        for task in TASKS
        for trainer in TRAINERS
        if task == "moons" or "points" not in trainer
    }


if __name__ == "__main__":
    run_jobs(train, jobs(), arguments(__doc__ or "", "q_learning").parse_args())
