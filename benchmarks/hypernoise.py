"""Moved noise beside tuned steps: hypernoise and DRaFT, both by the reward's gradient, at equal queries and equal evaluations.

    python -m benchmarks.hypernoise       # results/hypernoise.csv and its table; some three minutes a seed

mixture: 8 steps; the distance is to the exact optimum. digits: ten steps at guidance 2, the reward is ink, and hypernoise
learns through the shipped consistency model. Measured as drawn: moved noise without noise on the way, DRaFT with a KL at eta 1,
which it is of. Three seeds.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs, summary

BUDGETS = {  # rewards and evaluations at which a run is measured
    "mixture": {"reward_queries": 25_600, "model_evaluations": 640_000},
    "digits": {"reward_queries": 1_280, "model_evaluations": 25_600},
}
TASKS = {
    "mixture": ["sampler.steps=8", "evaluation.steps=8", "evaluation.n=4096", "evaluation.beta=0.5", "train.iterations=2000"],
    "digits": ["sampler.steps=10", "evaluation.steps=10", "evaluation.n=200", "train.batch=32",
               "train.iterations=2000", "train.lr=2e-4", "algorithm.beta=0.1"],
}  # fmt: skip
ODE = ["sampler.eta=0", "evaluation.eta=0"]
TRAINERS: dict[str, list[str]] = {
    "hypernoise": ["algorithm.name=hypernoise", *ODE],
    "hypernoise, published penalty": ["algorithm.name=hypernoise", "algorithm.penalty=published", *ODE],
    "draft, K = N, KL": ["algorithm.name=draft", "algorithm.last=null"],
    "draft-1, no KL": ["algorithm.name=draft", "algorithm.beta=0", *ODE],
}
KEPT = ("reward_tuned", "kl_nats", "diversity_tuned", "distance_to_optimum", "held_out.legibility_tuned")


def trained(task: str, trainer: str, seed: int) -> Figures:
    """A run, measured when it has asked as many rewards as its budget has, and when it has made as many evaluations."""
    own = ["model.consistency=shipped"] if task == "digits" and "hypernoise" in trainer else []
    own += ["algorithm.beta=0.5"] if task == "mixture" else []
    tuner = built(task, "train.schedule=constant", *TASKS[task], *own, *TRAINERS[trainer], f"train.seed={seed}")
    left, points = dict(BUDGETS[task]), []
    for metrics in tuner:
        for budget in [key for key, value in left.items() if metrics[key] >= value]:
            del left[budget]
            figures = summary(tuner)
            points.append({"budget": budget, **{key: figures.get(key) for key in KEPT}})
        if not left:
            break
    return {"task": task, "trainer": trainer, "curve": points}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {
        f"{task}/{trainer}/seed{seed}": {"task": task, "trainer": trainer, "seed": seed}
        for seed in range(3)
        for task in TASKS
        for trainer in TRAINERS
    }
    run_jobs(trained, jobs, arguments(__doc__ or "", "hypernoise").parse_args())
