"""Text-to-image alignment of the shipped shapes: share of prompts followed, by the exact program, at equal budget.

    python -m benchmarks.shapes                                # results/shapes.csv: up to five seeds; resumes
    python -m benchmarks.shapes --only base                    # the pretrained model alone, with and without guidance
    python -m benchmarks.shapes --iterations 1 --n 48 --output /tmp/shapes.csv    # does it run?
    python -m benchmarks figures                               # results/shapes_frontier.png from the CSV

Accuracy is the share of pictures that are their prompt's scene in every respect; prompts that ask for things which no
training prompt named are measured apart. Nothing is guided but the base where it says so, and under guidance 2 only the first
seed's runs. All black-box trainers draw 1,280 pictures, ask the program once for each, and leave times below 0.1 to the
pretrained model. Those that follow the learned scorer's gradient draw 2,560.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from _harness import Figures, arguments, run_jobs
from _prompted import Prompted, base_and_trainers, shown

SHOWN = 12
BLACK_BOX, LEARNED = ["reward.name=shapes", "train.lr=3e-3"], ["reward.name=shapes_scorer"]
TRUSTING = (
    "algorithm={name: score_action, estimator: forward, beta: 0.05, each: 10, averaging: 0.5, errors: own, trust: 12,"
    " trust_region: 1}"
)
PPO = [*BLACK_BOX, "algorithm={name: ddpo, minibatches: 4}", "sampler.grid=scheduler"]
TRAINERS: dict[str, tuple[int, list[str]]] = {
    "score_action": (20, BLACK_BOX),
    "score_action, trust 12, rate 1e-2": (20, [*BLACK_BOX, TRUSTING, "train.lr=1e-2"]),
    "ram": (20, [*BLACK_BOX, "algorithm={name: ram, beta: 0.05, each: 4}"]),
    "nft": (20, [*BLACK_BOX, "algorithm={name: nft}"]),
    "nft, lag 0.5, rate 1e-2": (20, [*BLACK_BOX, "algorithm={name: nft, lag: 0.5}", "train.lr=1e-2"]),
    "awm": (20, [*BLACK_BOX, "algorithm={name: awm}"]),
    "awm, rate 1e-2": (20, [*BLACK_BOX, "algorithm={name: awm}", "train.lr=1e-2"]),
    "grpo": (20, [*PPO, "algorithm.baseline=group", "train.samples_per_prompt=8"]),
    "ddpo": (20, PPO),
    "ddpo, clip 0.03": (20, [*PPO, "algorithm.clip=0.03"]),
    "ddpo, ungated": (20, [*PPO, "sampler.off_below=0"]),
    "dpok": (20, [*BLACK_BOX, "algorithm={name: dpok, beta: 0.01, minibatches: 4}", "sampler.grid=scheduler"]),
    "sqdf, scorer": (
        40,
        [*LEARNED, "algorithm={name: sqdf, beta: 3, x0_steps: 3, updates: 4, rows: 80}", "train.lr=1e-3"],
    ),
    "draft, scorer": (
        40,
        [*LEARNED, "algorithm={name: draft, last: null, beta: 0.3}", "train.lr=2e-3"],
    ),
}  # fmt: skip
TASK = Prompted(
    "shapes",
    "shapes",
    ("reward", "held_out.shapes", "held_out.shapes_se", "held_out.shapes_scorer", "diversity", "vendi"),
    ("evaluation.held_out=[{name: shapes, correct: true}, {name: shapes_scorer}]",),
)


def run(trainer: str, settings: list[str], iterations: int, seed: int, n: int, guidance: float, *, pictures: Path) -> Figures:
    """A run, or without iterations the base under this guidance: figures on the training prompts and on the unseen ones."""
    if not iterations:
        return TASK.measured(TASK.built(settings, iterations, seed, n), n, guidance, reference=True)
    tuner, figures = TASK.trained(settings, iterations, seed, n)
    if seed == 0:
        picture(tuner, seed, pictures / f"shapes_{trainer.replace(', ', '_').replace(' ', '_')}.png")
        figures["guided"] = TASK.measured(tuner, n, 2.0)
    return figures


def picture(tuner: Any, seed: int, path: Path) -> None:
    """Base and tuned model from the same noise."""
    from scoreaction.report.sample_figures import pairs_figure

    prompts, before, after = shown(tuner, SHOWN, seed)
    pairs_figure(before.numpy(), after.numpy(), prompts).savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__ or "", "shapes")
    parser.add_argument("--n", type=int, default=480, help="pictures of a measurement")
    options = parser.parse_args()
    run_jobs(partial(run, pictures=options.output.parent), base_and_trainers(TRAINERS, options.n, seeds=5), options)


if __name__ == "__main__":
    main()
