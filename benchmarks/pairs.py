"""Preference pairs against rewards: digits, DPO from 2,000 pairs labelled by `ink` and Score as Action with as many answers.

    python -m benchmarks.pairs          # results/pairs.csv and table; some 7 minutes a seed on one quiet core, resumes

Both at beta .1, ten sampling steps, guidance 2. The pairs are drawn once from the pretrained model, their labels by the
chance sigmoid(r1 - r2); DPO sees each about twice. Score as Action draws anew, 64 trajectories in each of 62 iterations.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _harness import Figures, arguments, built, run_jobs, summary

PAIRS = 2000
TRAINERS: dict[str, list[str]] = {
    "score_action": ["algorithm.name=score_action", "train.iterations=62", "train.batch=64", "algorithm.trust_region=1"],
    "dpo": ["algorithm.name=dpo", "train.iterations=30", "train.batch=8", "train.lr=2e-4", "algorithm.rows=32",
            "algorithm.times=4", "algorithm.updates=4"],
}  # fmt: skip


def measured(trainer: str, seed: int, iterations: int) -> Figures:
    """A run; `answers` are the rewards that it learned from."""
    from scoreaction.commands.pairs import make_pairs
    from scoreaction.recipes.recipe import load_recipe

    fixed = [
        "algorithm.beta=0.1",
        "reward.differentiable=false",
        f"train.seed={seed}",
        "evaluation.n=300",
        "evaluation.steps=20",
    ]
    settings = [*TRAINERS[trainer], *fixed]
    with tempfile.TemporaryDirectory() as folder:
        data, answers = [], 62 * 64
        if trainer == "dpo":
            path = Path(folder) / "pairs.npz"
            drawn = load_recipe("digits", ["evaluation.steps=10"])
            answers = make_pairs(drawn, path, n=PAIRS, temperature=1.0, seed=seed)["queries"]
            data = [f"data.path={path}"]
        tuner = built("digits", *settings, *data, *([f"train.iterations={iterations}"] if iterations < 62 else []))
        for _ in tuner:
            pass
        return summary(tuner) | {"answers": answers}


if __name__ == "__main__":
    jobs = {
        f"{trainer}/{seed}": {"trainer": trainer, "seed": seed, "iterations": 62} for seed in range(3) for trainer in TRAINERS
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "pairs").parse_args())
