"""Every trainer on tokens: Markov chains whose optimum is known, of 8 positions (enumerated) and of 64, 4 tokens, beta .5.

    python -m benchmarks.tokens         # results/tokens.csv and tables; about 15 minutes on one core, resumes

The gap is `beta log Z - (E r - beta KL)` of the averaged policy: 0 at the optimum only, exact at length 8, of 256 trajectories
at length 64. Equal trajectories for all; candidates that DDPP's `is` and `kl` score are queries too.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, run_jobs, summary

TRAINERS = {
    "score_action": ["algorithm.name=score_action"],
    "score_action, likelihood ratio": ["algorithm.name=score_action", "algorithm.estimator=likelihood_ratio"],
    "ddpp, lb": ["algorithm.name=ddpp"],
    "ddpp, is": ["algorithm.name=ddpp", "algorithm.loss=is"],
    "ddpp, kl": ["algorithm.name=ddpp", "algorithm.loss=kl"],
    "ddpp, balance": ["algorithm.name=ddpp", "algorithm.loss=balance"],
    "ddpp, weighted": ["algorithm.name=ddpp", "algorithm.loss=weighted"],
    "vard, reward alone": ["algorithm.name=vard", "algorithm.kl_to_go=false"],
    "dpok": ["algorithm.name=dpok"],
    "ddpo": ["algorithm.name=ddpo", "evaluation.beta=0.5"],
}
LONG = ("score_action", "ddpp, lb", "ddpp, weighted", "dpok")
RUNS = {8: (40, 64), 64: (20, 32)}
"""Iterations and trajectories each, by length."""


def measured(trainer: str, length: int, seed: int, iterations: int) -> Figures:
    """A run, what is missing to its optimum, and what was missing before it."""
    batch = RUNS[length][1]
    settings = [*TRAINERS[trainer], f"model.length={length}", f"train.seed={seed}", f"train.batch={batch}"]
    tuner = built("markov_chain", *settings, f"train.iterations={iterations}", "evaluation.n=256")
    for _ in tuner:
        pass
    found = summary(tuner)
    best = found["optimum_reward"] - found["beta"] * found["optimum_kl_nats"]
    return found | {"base_gap": best - found["reward_base"]}


if __name__ == "__main__":
    jobs = {
        f"{length}/{trainer}/{seed}": {"trainer": trainer, "length": length, "seed": seed, "iterations": RUNS[length][0]}
        for seed in range(3)
        for length, trainers in ((8, TRAINERS), (64, LONG))
        for trainer in trainers
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "tokens").parse_args())
