"""How the black-box trainers of the shapes were tuned: single runs of other settings, with seeds that no table shows.

    python -m benchmarks.shapes_tune                   # results/shapes_tune.csv: hours on one core; resumes
    python -m benchmarks.shapes_tune --only "awm"      # those of one trainer

Each draws 1,280 pictures as in benchmarks/shapes.py. Accuracy is that of 960 pictures of the
training prompts, KL that of 480 paths.
"""

from __future__ import annotations

from _harness import Figures, arguments, run_jobs
from shapes import TASK, TRAINERS

SEEDS, ITERATIONS, N = (7, 8), 20, 960
FORWARD, AWM, NFT = (TRAINERS[name][1] for name in ("score_action", "awm", "nft"))
TRIALS: dict[str, list[str]] = {
    "score_action": FORWARD,
    "score_action, 4 updates": [*FORWARD, "algorithm.updates=4"],
    "score_action, 4 updates, beta 0.05": [*FORWARD, "algorithm.updates=4", "algorithm.beta=0.05"],
    "score_action, 8 updates, beta 0.05": [*FORWARD, "algorithm.updates=8", "algorithm.beta=0.05"],
    "nft": NFT,
    "awm": AWM,
    "awm, rate 1e-2": [*AWM, "train.lr=1e-2"],
    "awm, clip 1e-4": [*AWM, "algorithm.clip=1e-4"],
    "awm, 16 minibatches": [*AWM, "algorithm.minibatches=16"],
}


def run(trainer: str, settings: list[str], iterations: int, seed: int) -> Figures:
    """A run to its end: accuracy and KL half way and at the end."""
    tuner, figures = TASK.built(settings, iterations, seed, N), {}
    for metrics in tuner:
        if metrics["iteration"] == max(1, iterations // 2):
            figures["half"] = TASK.accuracy_and_kl(tuner, N // 4)
    return {**figures, **TASK.accuracy_and_kl(tuner, N), "model_evaluations": tuner.counts()["model_evaluations"]}


def main() -> None:
    options = arguments(__doc__ or "", "shapes_tune").parse_args()
    jobs = {
        f"{trainer}/seed{seed}": {"trainer": trainer, "settings": settings, "iterations": ITERATIONS, "seed": seed}
        for seed in SEEDS
        for trainer, settings in TRIALS.items()
    }
    run_jobs(run, jobs, options)


if __name__ == "__main__":
    main()
