"""DPO from labelled pairs, beside trainers on rewards with as many answers: the Markov chain of `tokens`, and digits.

    python -m benchmarks.pairs --only markov_chain   # results/pairs.csv and table; a minute on one quiet core, resumes
    python -m benchmarks.pairs                       # also digits, beside Score as Action: some 7 minutes a seed

Pairs are drawn once from the pretrained model, their labels by the chance sigmoid(r1 - r2). On the chain 1,280 of them, as many
answers as the trainers of `tokens` have, beta .5; on digits 2,000, beta .1, ten sampling steps, guidance 2.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _harness import Figures, arguments, built, run_jobs, summary

PAIRS = {"markov_chain": 1280, "digits": 2000}
DIGITS = ["algorithm.beta=0.1", "reward.differentiable=false", "evaluation.n=300", "evaluation.steps=20"]
TRAINERS: dict[str, list[str]] = {
    "markov_chain/dpo": ["algorithm.name=dpo", "train.iterations=40", "train.batch=8", "evaluation.n=256"],
    "digits/dpo": [*DIGITS, "algorithm.name=dpo", "train.iterations=30", "train.batch=8", "train.lr=2e-4", "algorithm.rows=32",
                   "algorithm.times=4", "algorithm.updates=4"],
    "digits/score_action": [*DIGITS, "train.iterations=62", "train.batch=64", "algorithm.trust_region=1"],
}  # fmt: skip


def measured(task: str, trainer: str, seed: int) -> Figures:
    """A run; `answers` are the rewards that it learned from."""
    from scoreaction.commands.pairs import make_pairs
    from scoreaction.recipes.recipe import load_recipe

    settings = [*TRAINERS[f"{task}/{trainer}"], f"train.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        answers = 0
        if trainer == "dpo":
            path = Path(folder) / "pairs.npz"
            drawn = load_recipe(task, ["evaluation.steps=10"] if task == "digits" else [])
            answers = make_pairs(drawn, path, n=PAIRS[task], temperature=1.0, seed=seed)["queries"]
            settings.append(f"data.path={path}")
        tuner = built(task, *settings)
        for _ in tuner:
            pass
        figures = summary(tuner)
    return figures | {"answers": answers or figures["reward_queries"]}


if __name__ == "__main__":
    jobs = {
        f"{name}/{seed}": {"task": name.partition("/")[0], "trainer": name.partition("/")[2], "seed": seed}
        for seed in range(3)
        for name in TRAINERS
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "pairs").parse_args())
