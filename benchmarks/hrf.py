"""Windows, branches and late rewards: HRF beside DDPO at equal queries and at equal evaluations, and delays.

    python -m benchmarks.hrf                     # results/hrf.csv and its tables; some 45 minutes on one core
    python -m benchmarks.hrf --only mixture      # some four minutes

Three seeds; the longer run has as many more iterations as make up for its cheaper ones. Delays are in iterations. mixture: ten
steps, 40 iterations of 128 trajectories, measured on 2,048 samples of 20 steps. digits: ten steps, 16 iterations of 64 with
`ink` as a black box, guidance 2, at a learning rate of 1e-4, measured on 300 pictures of 20 steps. shapes: delays alone, two
seeds, the recipe with its 12 steps, 20 iterations of 64 at a learning rate of 3e-3, measured on 480 pictures.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs, summary

SEEDS, DELAYS = {"mixture": 3, "digits": 3, "shapes": 2}, (1, 2, 4, 8)
SETTINGS = {
    "mixture": ["train.batch=128", "sampler.steps=10", "evaluation.n=2048", "evaluation.steps=20"],
    "digits": ["train.batch=64", "train.lr=1e-4", "reward.differentiable=false", "evaluation.n=300", "evaluation.steps=20"],
    "shapes": ["train.batch=64", "train.lr=3e-3", "sampler.grid=scheduler", "evaluation.n=480"],
}
DDPO = ["algorithm.name=ddpo", "algorithm.baseline=batch"]
DPOK = ["algorithm.name=dpok", "algorithm.baseline=batch"]
SIBLINGS = ["algorithm.name=dpok", "algorithm.baseline=branch", "algorithm.branches=8", "algorithm.window.kind=random"]
RATIO = ["algorithm.estimator=likelihood_ratio", "algorithm.look_ahead=none"]
TRAINERS: dict[str, dict[str, tuple[list[str], int]]] = {  # settings, and iterations
    "mixture": {
        "ddpo": (DDPO, 40),
        "hrf, random": (["algorithm.name=hrf"], 40),
        "hrf, random, longer": (["algorithm.name=hrf"], 77),  # which evaluates as often as ddpo
        "hrf, signal": (["algorithm.name=hrf", "algorithm.window.kind=signal"], 40),
        "hrf, sliding": (["algorithm.name=hrf", "algorithm.window.kind=sliding"], 40),
        "dpok": (DPOK, 40),
        "dpok, random": (SIBLINGS, 40),
        "likelihood_ratio": (RATIO, 40),
        "likelihood_ratio, random": ([*RATIO, "algorithm.branches=8", "algorithm.window.kind=random"], 40),
    },
    "digits": {
        "ddpo": (["algorithm.name=ddpo"], 16),
        "hrf, random": (["algorithm.name=hrf"], 16),
        "hrf, random, longer": (["algorithm.name=hrf"], 31),
    },
    "shapes": {"ddpo": (["algorithm={name: ddpo, minibatches: 4}"], 20)},
}
LATE = {"mixture": ("ddpo", "dpok"), "digits": ("ddpo",), "shapes": ("ddpo",)}
KEYS = {
    "mixture": ("reward_tuned", "kl_nats", "diversity_tuned", "distance_to_optimum", "model_evaluations", "reward_queries"),
    "digits": (
        "reward_tuned", "kl_nats", "diversity_tuned", "held_out.legibility_tuned", "model_evaluations", "reward_queries",
    ),
    "shapes": (
        "reward_tuned", "kl_nats", "held_out.shapes_tuned", "held_out.shapes_base", "model_evaluations", "reward_queries",
    ),
}  # fmt: skip


def run_of(task: str, trainer: str, delay: int, seed: int) -> Figures:
    """What a run came to; a late one learns from as many batches as the others."""
    settings, iterations = TRAINERS[task][trainer]
    late = [f"train.reward_delay={delay}", f"train.iterations={iterations + delay}"]
    tuner, last = built(task, *SETTINGS[task], *settings, *late, f"train.seed={seed}"), dict[str, Any]()
    for metrics in tuner:
        last = metrics
    found = summary(tuner)
    figures = {key: found[key] for key in KEYS[task]} | {"objective": found["reward_tuned"] - tuner.beta * found["kl_nats"]}
    return {"trainer": trainer, "delay": delay, **figures, "log_ratio_stale": last.get("log_ratio_stale")}


def runs(task: str, seed: int) -> Figures:
    """All runs of a task at one seed."""
    plan = [(name, 0) for name in TRAINERS[task]] + [(name, delay) for name in LATE[task] for delay in DELAYS]
    return {"task": task, "curve": [run_of(task, name, delay, seed) for name, delay in plan]}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {
        f"{task}/seed{seed}": {"task": task, "seed": seed} for task in TRAINERS for seed in range(SEEDS[task])
    }
    run_jobs(runs, jobs, arguments(__doc__ or "", "hrf").parse_args())
