"""Score as Action and SQDF, plain and corrected, on random exact tasks: none diverges, and how far away the worst end.

python -m benchmarks.stability                          # results/stability.csv and its tables; resumes
python -m benchmarks.stability --only 007/ 012/         # runs whose name contains one of these
python -m benchmarks.stability --only varied            # six that ended far away, with a larger budget
python -m benchmarks.stability --stage unseen           # results/stability_unseen.csv: the task that once ended in no number

A task is drawn from its number: a Gaussian mixture of 1 to 32 dimensions and 1 to 8 modes, of unequal weights and standard
deviations from 0.05 to 1; a linear, concave or convex quadratic reward of standard deviation 1 on it, beta from 0.1 to 5; VP,
VE or flow; 5 to 100 training steps, 32 to 512 trajectories, a learning rate from 3e-4 to 5e-3. Numbers on a scale are drawn
evenly in their logarithm. An optimum of more than 6 nats, or less than 0.02, is drawn again, and so are, for the time, more
than 8192 states an iteration. The budget is 60 iterations, whatever the task.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from _harness import Figures, arguments, built, in_stage, run_jobs, summary
from torch import Tensor

TASKS, ITERATIONS = 200, 60
TRAINERS: dict[str, Figures] = {
    "score_action": {"name": "score_action"},
    "sqdf": {"name": "sqdf"},
    "sqdf, corrected": {"name": "sqdf", "correction": True},
}
LEAST_NATS, MOST_NATS = 0.02, 6.0
MOST_STATES = 8192
SHAPES = ("linear", "concave", "convex")
LONGER = {"train.lr": 2e-3, "train.iterations": 240}
VARIED: dict[str, tuple[int, str, Figures]] = {  # task, trainer and what is not as it was drawn
    "011/score_action, varied": (11, "score_action", LONGER),
    "022/score_action, varied": (22, "score_action", LONGER),
    "025/score_action, varied": (25, "score_action", {**LONGER, "sampler.steps": 25, "train.batch": 128}),
    "090/score_action, varied": (90, "score_action", {**LONGER, "sampler.steps": 25}),
    "103/score_action, varied": (103, "score_action", LONGER),
    "114/score_action, varied": (114, "score_action", {**LONGER, "sampler.steps": 25}),
}
"""Tasks that ended far away, with a larger budget: more iterations at a higher rate, and finer steps where there were five."""

UNSEEN: Figures = {
    "model": {
        "name": "gaussian_mixture", "std": [0.35] * 5, "weights": [0.35, 0.05, 0.3, 0.1, 0.2], "process": "vp",
        "means": [[1.5, 0.5, -1.0], [-1.0, 1.8, 0.2], [0.3, -1.6, 1.4], [-1.7, -0.9, -0.8], [0.9, 1.2, 1.7]],
    },
    "reward": {"name": "linear", "direction": [0.6, -0.5, 0.8]},
    "sampler.steps": 50, "train.batch": 256, "train.lr": 2e-3, "beta": 0.6, "shape": "linear",
}  # fmt: skip
"""A task in three dimensions on which, at 50 steps and seed 77, an earlier Score as Action ended in no number."""
LENGTHS = {10: 400, 50: 800}
"""Iterations on it, by training steps."""


class Draw:
    """Random numbers of one task."""

    def __init__(self, task: int) -> None:
        self.generator = torch.Generator().manual_seed(1000 + task)

    def uniform(self, low: float, high: float) -> float:
        """A number between two, evenly."""
        return low + (high - low) * float(torch.rand((), generator=self.generator, dtype=torch.float64))

    def scale(self, low: float, high: float) -> float:
        """A number between two, evenly in its logarithm."""
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def count(self, low: int, high: int) -> int:
        """A whole number from low to high, evenly in its logarithm."""
        return min(int(self.scale(low, high + 1)), high)

    def one(self, names: tuple[str, ...]) -> str:
        """One of these."""
        return names[int(torch.randint(len(names), (), generator=self.generator))]

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def settings(task: int) -> dict[str, Any]:
    """The settings of a task over the recipe mixture, by key; the first draw whose optimum costs a fitting number of nats.

    Task -1 is `UNSEEN`.
    """
    if task < 0:
        return dict(UNSEEN)
    from scoreaction.diffusion.mixtures import Mixture, Quadratic

    draw = Draw(task)
    while True:
        d, k = draw.count(1, 32), draw.count(1, 8)
        weights = torch.softmax(draw.normal(k), 0)
        stds = torch.tensor([draw.scale(0.05, 1.0) for _ in range(k)], dtype=torch.float64)
        law = Mixture(weights, 1.5 * draw.normal(k, d), stds[:, None, None] ** 2 * torch.eye(d, dtype=torch.float64))
        shape, beta = draw.one(SHAPES), draw.scale(0.1, 5.0)
        direction = draw.normal(d)
        center = law.sample(1, draw.generator)[0] + 0.5 * draw.normal(d)
        q = {
            "linear": 0.0,
            "concave": draw.scale(0.1, 10.0),
            "convex": -draw.uniform(0.1, 0.5) * beta / float(stds.max()) ** 2,
        }[shape]
        reward = Quadratic(q * torch.eye(d, dtype=torch.float64), direction, center)
        spread = float(reward(law.sample(4096, draw.generator)).std())
        scale = 1 / spread if shape != "convex" else min(1.0, 1 / spread)
        setting: Figures = {
            "model": {"name": "gaussian_mixture", "means": law.means.tolist(), "weights": weights.tolist(),
                      "std": stds.tolist(), "process": draw.one(("vp", "ve", "flow"))},
            "reward": {"name": "quadratic", "center": center.tolist(), "curvature": scale * q,
                       "linear": (scale * direction).tolist()},
            "sampler.steps": draw.count(5, 100),
            "train.batch": 2 * draw.count(16, 256),
            "train.lr": draw.scale(3e-4, 5e-3),
        }  # fmt: skip
        fitted = Quadratic(scale * reward.Q, scale * direction, center)
        states = setting["sampler.steps"] * setting["train.batch"]
        if LEAST_NATS <= law.optimum(fitted, beta).kl_nats <= MOST_NATS and states <= MOST_STATES:
            return {**setting, "beta": beta, "shape": shape}


def train(task: int, trainer: str, iterations: int, changes: Figures | None = None) -> Figures:
    """One run: what was drawn, whether it went to its end, its summary, and the largest path KL of an iteration.

    changes: settings that are not as they were drawn.
    """
    from scoreaction.rewards import RewardError
    from scoreaction.training.errors import TrainingError

    drawn = settings(task)
    shape, beta, model = drawn.pop("shape"), drawn.pop("beta"), drawn["model"]
    keys = {**drawn, "algorithm": {**TRAINERS[trainer], "beta": beta}, "train.iterations": iterations, "train.seed": task}
    keys |= {"evaluation.n": 2048, "evaluation.steps": 50, **(changes or {})}
    tuner = built("mixture", *(f"{key}={json.dumps(value)}" for key, value in keys.items()))
    moved, taken, finished = 0.0, 0.0, True
    try:
        for metrics in tuner:
            moved, taken = max(moved, metrics["kl_to_old"]), taken + metrics.get("taken_back", 0.0)
    except (TrainingError, RewardError) as error:
        finished = False
        print(f"task {task}, {trainer}: {error}", flush=True)
    try:
        measured = {
            key: value if math.isfinite(value) else math.inf for key, value in summary(tuner).items() if value is not None
        }
    except (TrainingError, RewardError):
        finished = False
        measured = dict.fromkeys(("reward_tuned", "kl_nats", "distance_to_optimum"), math.inf)
    figures = {
        "task": task, "trainer": trainer, "dimension": len(model["means"][0]), "modes": len(model["means"]),
        "least_weight": min(model["weights"]), "least_std": min(model["std"]), "shape": shape, "process": model["process"],
        "beta": beta, "steps": keys["sampler.steps"], "batch": keys["train.batch"], "lr": keys["train.lr"],
        "finished": int(finished), "most_moved": moved, "taken_back": taken, "iterations": tuner.iteration,
    }  # fmt: skip
    return measured | figures


def jobs(stage: str) -> dict[str, Figures]:
    """All runs by name."""
    if stage == "unseen":
        return {
            f"{steps} steps/seed{seed}": {
                "task": -1, "trainer": "score_action", "iterations": iterations,
                "changes": {"sampler.steps": steps, "train.seed": seed},
            }
            for steps, iterations in LENGTHS.items()
            for seed in (77, 78, 79)
        }  # fmt: skip
    drawn: dict[str, Figures] = {
        f"{task:03d}/{trainer}": {"task": task, "trainer": trainer, "iterations": ITERATIONS}
        for task in range(TASKS)
        for trainer in TRAINERS
    }
    varied = {
        name: {"task": task, "trainer": trainer, "iterations": changes["train.iterations"], "changes": changes}
        for name, (task, trainer, changes) in VARIED.items()
    }
    return drawn | varied


if __name__ == "__main__":
    parser = arguments(__doc__ or "", "stability")
    parser.add_argument("--stage", choices=["unseen", "main"], default="main")
    options = parser.parse_args()
    if options.stage != "main":
        in_stage(options)
    run_jobs(train, jobs(options.stage), options, alone=False)
