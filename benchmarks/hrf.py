"""Windows, branches and late rewards on the mixture: HRF beside DDPO at equal queries and at equal evaluations, and delays.

    nice -n 15 python -m benchmarks.hrf      # results/hrf.csv and its tables; some four minutes on one core

40 iterations of 128 trajectories of 10 steps, three seeds; the longer run has as many more as make up for its cheaper ones.
What a run came to is measured on 2,048 samples of 20 steps. The delays are of rewards, in iterations.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs, summary

ITERATIONS, SEEDS, DELAYS = 40, 3, (1, 2, 4, 8)
SETTINGS = ["train.batch=128", "sampler.steps=10", "evaluation.n=2048", "evaluation.steps=20"]
DDPO = ["algorithm.name=ddpo", "algorithm.baseline=batch"]
DPOK = ["algorithm.name=dpok", "algorithm.baseline=batch"]
SIBLINGS = ["algorithm.name=dpok", "algorithm.baseline=branch", "algorithm.branches=8", "algorithm.window.kind=random"]
RATIO = ["algorithm.estimator=likelihood_ratio", "algorithm.look_ahead=none"]
TRAINERS: dict[str, tuple[list[str], int]] = {  # settings, and iterations
    "ddpo": (DDPO, ITERATIONS),
    "hrf, random": (["algorithm.name=hrf"], ITERATIONS),
    "hrf, random, longer": (["algorithm.name=hrf"], 77),  # which evaluates as often as ddpo
    "hrf, signal": (["algorithm.name=hrf", "algorithm.window.kind=signal"], ITERATIONS),
    "hrf, sliding": (["algorithm.name=hrf", "algorithm.window.kind=sliding"], ITERATIONS),
    "dpok": (DPOK, ITERATIONS),
    "dpok, random": (SIBLINGS, ITERATIONS),
    "likelihood_ratio": (RATIO, ITERATIONS),
    "likelihood_ratio, random": ([*RATIO, "algorithm.branches=8", "algorithm.window.kind=random"], ITERATIONS),
}
RUNS = [(name, 0) for name in TRAINERS] + [(name, delay) for name in ("ddpo", "dpok") for delay in DELAYS]
KEYS = ("reward_tuned", "kl_nats", "diversity_tuned", "distance_to_optimum", "model_evaluations", "reward_queries")


def run_of(trainer: str, delay: int, seed: int) -> Figures:
    """What a run came to; a late one learns from as many batches as the others."""
    settings, iterations = TRAINERS[trainer]
    late = [f"train.reward_delay={delay}", f"train.iterations={iterations + delay}"]
    tuner, last = built("mixture", *SETTINGS, *settings, *late, f"train.seed={seed}"), dict[str, Any]()
    for metrics in tuner:
        last = metrics
    found = summary(tuner)
    figures = {key: found[key] for key in KEYS} | {"objective": found["reward_tuned"] - tuner.beta * found["kl_nats"]}
    return {"trainer": trainer, "delay": delay, **figures, "log_ratio_stale": last.get("log_ratio_stale")}


def runs(seed: int) -> Figures:
    """All runs at one seed."""
    return {"iterations": ITERATIONS, "curve": [run_of(name, delay, seed) for name, delay in RUNS]}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {f"mixture/seed{seed}": {"seed": seed} for seed in range(SEEDS)}
    run_jobs(runs, jobs, arguments(__doc__ or "", "hrf").parse_args())
