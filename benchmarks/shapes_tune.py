"""How the black-box trainers of the shapes were tuned: single runs of other settings, with seeds that no table shows.

    python -m benchmarks.shapes_tune                   # results/shapes_tune.csv: hours on one core; resumes
    python -m benchmarks.shapes_tune --only "awm"      # those of one trainer

Each draws 1,280 pictures as in benchmarks/shapes.py. Accuracy is that of 960 pictures of the
training prompts, KL that of 480 paths; half way a quarter of that.
"""

from __future__ import annotations

from _harness import Figures, arguments, run_jobs
from _prompted import PLAIN
from shapes import TASK

SEEDS, ITERATIONS, N = (7, 8), 20, 960
AVERAGING = f"{PLAIN}, averaging: 0.5, updates: 8, trust_region: 0.2"
TRIALS: dict[str, tuple[str, float]] = {  # the algorithm and the learning rate
    "score_action, beta 0.08": (f"{PLAIN}, beta: 0.08", 3e-3),
    "score_action, beta 0.05": (f"{PLAIN}, beta: 0.05", 3e-3),
    "score_action, beta 0.05, 8 updates": (f"{PLAIN}, beta: 0.05, updates: 8", 3e-3),
    "score_action, averaging, beta 0.05": (f"{AVERAGING}, beta: 0.05", 3e-3),
    "score_action, averaging, beta 0.03": (f"{AVERAGING}, beta: 0.03", 3e-3),
    "score_action, averaging, beta 0.05, own": (f"{AVERAGING}, beta: 0.05, errors: own", 3e-3),
    "score_action, averaging, beta 0.03, own": (f"{AVERAGING}, beta: 0.03, errors: own", 3e-3),
    "nft": ("name: nft", 3e-3),
    "nft, lag 0.5": ("name: nft, lag: 0.5", 3e-3),
    "nft, lag 0.5, rate 1e-2": ("name: nft, lag: 0.5", 1e-2),
    "nft, lag 0.3, rate 1e-2": ("name: nft, lag: 0.3", 1e-2),
    "nft, lag 0.5, rate 2e-2": ("name: nft, lag: 0.5", 2e-2),
    "awm, rate 1e-2": ("name: awm", 1e-2),
    "awm, clip 1e-4": ("name: awm, clip: 1e-4", 3e-3),
    "awm, 16 minibatches": ("name: awm, minibatches: 16", 3e-3),
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
                f"train.lr={lr}",
            ],
            "iterations": ITERATIONS,
            "seed": seed,
        }
        for seed in SEEDS
        for trainer, (settings, lr) in TRIALS.items()
    }
    run_jobs(run, jobs, options)


if __name__ == "__main__":
    main()
