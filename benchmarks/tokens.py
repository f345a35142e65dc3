"""Trainers on tokens: Markov chains whose optimum is known; digits of 64 pixels and peptides with judges nobody trains on.

    python -m benchmarks.tokens                     # results/tokens.csv and table: 8 positions, 4 tokens, beta .5
    python -m benchmarks.tokens --stage chain64     # results/tokens_chain64.csv: the chain of 64 positions, beta .5
    python -m benchmarks.tokens --stage pixels      # results/tokens_pixels.csv: ink, beta 1, legibility held out
    python -m benchmarks.tokens --stage peptides    # results/tokens_peptides.csv: antimicrobial, beta .3, its judge held out

About a minute a run on one core; resumes. Equal trajectories for all of a stage, and no estimator asks the reward for more. The
gap of chains is `beta log Z - (E r - beta KL)` of the averaged policy: 0 at the optimum only, by enumeration at 8 positions and
from samples at 64.
"""

from __future__ import annotations

from typing import NamedTuple

from _harness import Figures, arguments, built, in_stage, run_jobs, summary

TRAINERS = {
    "score_action": ["algorithm.name=score_action"],
    "ddpp, lb": ["algorithm.name=ddpp"],
    "ddpp, weighted": ["algorithm.name=ddpp", "algorithm.loss=weighted"],
    "ddpp, balance": ["algorithm.name=ddpp", "algorithm.loss=balance"],
    "dpok": ["algorithm.name=dpok"],
    "ddpo": ["algorithm.name=ddpo"],
    "vard": ["algorithm.name=vard"],
}
FIVE = ("score_action", "ddpo", "ddpp, balance", "dpok", "vard")
BATCH, SEEDS = 64, 3


class Stage(NamedTuple):
    """What the runs of a stage have in common: their recipe and its settings, the beta of all that have one."""

    recipe: str
    settings: list[str]
    beta: float
    iterations: int
    trainers: tuple[str, ...] = FIVE


STAGES = {
    "chain8": Stage(
        "markov_chain", ["model.length=8", "evaluation.n=256"], 0.5, 40, tuple(name for name in TRAINERS if name != "vard")
    ),
    "chain64": Stage("markov_chain", ["model.length=64", "evaluation.n=256"], 0.5, 40),
    "pixels": Stage("pixels", ["evaluation.n=200"], 1.0, 60),
    "peptides": Stage("peptides", ["evaluation.n=200"], 0.3, 20),
}


def measured(stage: str, trainer: str, seed: int, iterations: int) -> Figures:
    """A run's summary."""
    recipe, settings, beta, _, _ = STAGES[stage]
    place = "evaluation" if trainer == "ddpo" else "algorithm"  # ddpo has none of its own: its J is measured with it
    fixed = [f"{place}.beta={beta}", f"train.seed={seed}", f"train.batch={BATCH}", f"train.iterations={iterations}"]
    tuner = built(recipe, *TRAINERS[trainer], *settings, *fixed)
    for _ in tuner:
        pass
    return summary(tuner)


def jobs(stage: str) -> dict[str, Figures]:
    """All runs of a stage by name."""
    first = "8/" if stage == "chain8" else ""
    return {
        f"{first}{trainer}/{seed}": {"stage": stage, "trainer": trainer, "seed": seed, "iterations": STAGES[stage].iterations}
        for seed in range(SEEDS)
        for trainer in STAGES[stage].trainers
    }


def main() -> None:
    parser = arguments(__doc__ or "", "tokens")
    parser.add_argument("--stage", choices=STAGES, default="chain8")
    options = parser.parse_args()
    if options.stage != "chain8":
        in_stage(options)
    run_jobs(measured, jobs(options.stage), options)


if __name__ == "__main__":
    main()
