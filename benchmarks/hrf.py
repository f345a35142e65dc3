"""Windows, branches and late rewards on the mixture: HRF beside DDPO at equal queries and at equal evaluations, and delays.

    nice -n 15 python -m benchmarks.hrf      # results/hrf.csv and its tables; some ten minutes on one core

100 iterations of 128 trajectories of 10 steps, three seeds; the longer run has as many more as make up for its cheaper ones.
What it came to is measured on 2,048 samples of 20 steps. The delays are of rewards, in iterations.
"""

from __future__ import annotations

from typing import Any

from _harness import Figures, arguments, built, run_jobs, summary

ITERATIONS, BATCH, STEPS, SEEDS = 100, 128, 10, 3
DDPO = ["algorithm.name=ddpo", "algorithm.baseline=batch"]
DPOK = ["algorithm.name=dpok", "algorithm.baseline=batch"]
BRANCHES = ["algorithm.baseline=branch", "algorithm.branches=8"]
TRAINERS: dict[str, tuple[list[str], int]] = {  # settings, and iterations
    "ddpo": (DDPO, ITERATIONS),
    "hrf, random": (["algorithm.name=hrf"], ITERATIONS),
    "hrf, random, longer": (["algorithm.name=hrf"], 192),  # which evaluates as often as ddpo
    "hrf, signal": (["algorithm.name=hrf", "algorithm.window.kind=signal"], ITERATIONS),
    "hrf, sliding": (["algorithm.name=hrf", "algorithm.window.kind=sliding"], ITERATIONS),
    "dpok": (DPOK, ITERATIONS),
    "dpok, random windows": ([DPOK[0], *BRANCHES, "algorithm.window.kind=random"], ITERATIONS),
}
DELAYS = (1, 2, 4, 8)


def run_of(trainer: str, seed: int, delay: int) -> Figures:
    """What a run came to; a late one learns from as many batches as the others."""
    settings, iterations = TRAINERS[trainer]
    tuner = built(
        "mixture", *settings, f"train.seed={seed}", f"train.iterations={iterations + delay}", f"train.reward_delay={delay}",
        f"train.batch={BATCH}", f"sampler.steps={STEPS}", "train.lr=2e-3", "evaluation.n=2048", "evaluation.steps=20",
    )  # fmt: skip
    last: dict[str, Any] = {}
    for metrics in tuner:
        last = metrics
    found = summary(tuner)
    keys = ("reward_tuned", "kl_nats", "diversity_tuned", "distance_to_optimum", "model_evaluations", "reward_queries")
    stale = {key: last.get(key) for key in ("log_ratio_stale", "truncated_fraction")}
    return {key: found[key] for key in keys} | {"objective": found["reward_tuned"] - 0.5 * found["kl_nats"]} | stale


if __name__ == "__main__":
    plan = [(name, 0) for name in TRAINERS] + [(name, delay) for delay in DELAYS for name in ("ddpo", "dpok")]
    run_jobs(
        run_of,
        {
            f"{name}, delay {delay}/seed{seed}": {"trainer": name, "seed": seed, "delay": delay}
            for seed in range(SEEDS)
            for name, delay in plan
        },
        arguments(__doc__ or "", "hrf").parse_args(),
    )
