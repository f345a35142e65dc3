"""Trainers on tokens: a Markov chain of 8 positions and 4 tokens whose optimum is known, beta .5.

    python -m benchmarks.tokens         # results/tokens.csv and table; some minutes on one core, resumes

The gap is `beta log Z - (E r - beta KL)` of the averaged policy, by enumeration: 0 at the optimum only. Equal trajectories for
all.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs, summary

TRAINERS = {
    "score_action": ["algorithm.name=score_action"],
    "ddpp, lb": ["algorithm.name=ddpp"],
    "ddpp, weighted": ["algorithm.name=ddpp", "algorithm.loss=weighted"],
    "ddpp, balance": ["algorithm.name=ddpp", "algorithm.loss=balance"],
    "dpok": ["algorithm.name=dpok"],
    "ddpo": ["algorithm.name=ddpo", "evaluation.beta=0.5"],
}
LENGTH, ITERATIONS, BATCH = 8, 40, 64


def measured(trainer: str, length: int, seed: int, iterations: int) -> Figures:
    """A run, and what is missing to its optimum."""
    settings = [*TRAINERS[trainer], f"model.length={length}", f"train.seed={seed}", f"train.batch={BATCH}"]
    tuner = built("markov_chain", *settings, f"train.iterations={iterations}", "evaluation.n=256")
    for _ in tuner:
        pass
    return summary(tuner)


if __name__ == "__main__":
    jobs = {
        f"{LENGTH}/{trainer}/{seed}": {"trainer": trainer, "length": LENGTH, "seed": seed, "iterations": ITERATIONS}
        for seed in range(3)
        for trainer in TRAINERS
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "tokens").parse_args())
