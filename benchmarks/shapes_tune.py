"""How the black-box trainers of the shapes were tuned: single runs of other settings, with seeds that no table shows.

    python -m benchmarks.shapes_tune                   # results/shapes_tune.csv: hours on one core; resumes
    python -m benchmarks.shapes_tune --only "awm"      # those of one trainer

Each draws 1,280 pictures as in benchmarks/shapes.py. Accuracy is that of 960 pictures of the
training prompts, KL that of 480 paths; half way a quarter of that.
"""

from __future__ import annotations

from _harness import Figures, arguments, run_jobs
from shapes import TASK

SEEDS, ITERATIONS, N = (7, 8), 20, 960
FORWARD = "name: score_action, estimator: forward, each: 10"
AVERAGING = f"{FORWARD}, averaging: 0.5, updates: 8, trust_region: 0.2"
TRIALS: dict[str, str] = {
    "score_action, beta 0.08": f"{FORWARD}, beta: 0.08",
    "score_action, beta 0.05": f"{FORWARD}, beta: 0.05",
    "score_action, beta 0.05, 8 updates": f"{FORWARD}, beta: 0.05, updates: 8",
    "score_action, averaging, beta 0.05": f"{AVERAGING}, beta: 0.05",
    "score_action, averaging, beta 0.03": f"{AVERAGING}, beta: 0.03",
    "score_action, averaging, beta 0.05, own": f"{AVERAGING}, beta: 0.05, errors: own",
    "score_action, averaging, beta 0.03, own": f"{AVERAGING}, beta: 0.03, errors: own",
    "nft": "name: nft",
    "nft, lag 0.5": "name: nft, lag: 0.5",
    "nft, lag 0.5, rate 1e-2": "name: nft, lag: 0.5",
    "nft, lag 0.3, rate 1e-2": "name: nft, lag: 0.3",
    "nft, lag 0.5, rate 2e-2": "name: nft, lag: 0.5",
    "awm, rate 1e-2": "name: awm",
    "awm, clip 1e-4": "name: awm, clip: 1e-4",
    "awm, 16 minibatches": "name: awm, minibatches: 16",
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
        f"{trainer}/seed{seed}": {
            "trainer": trainer,
            "settings": [
                "reward.name=shapes",
                f"algorithm={{{settings}}}",
                f"train.lr={trainer.partition('rate ')[2] or 3e-3}",
            ],
            "iterations": ITERATIONS,
            "seed": seed,
        }
        for seed in SEEDS
        for trainer, settings in TRIALS.items()
    }
    run_jobs(run, jobs, options)


if __name__ == "__main__":
    main()
