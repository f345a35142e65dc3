"""The certificate on the exact tasks, where the gap to the optimum is known: trained policies, and the optimum's own score.

    python -m benchmarks.certificates       # results/certificates.csv and its table; some four minutes a seed

Trained for a third of the iterations of `benchmarks.exact`, since a gap must be there to be measured; 4,096 samples, 200 steps.
The certificate's log Z is estimated by steering the pretrained model, and its KL is that of the chain; the known gap has the
closed form of log Z and the path KL of other samples, less what that comes to for the exact optimum: what steps leave of 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs
from torch import Tensor, nn

TASKS = {"mixture": 80, "mixture16": 50, "linear_quadratic": 30}
TRAINERS = ("score_action", "sqdf", "dpok")
N, STEPS = 4096, 200


class Between(nn.Module):
    """The exact v of a law, or at weight 1 that of its optimum."""

    def __init__(self, process: Any, law: Any, optimum: Any) -> None:
        super().__init__()
        self.process, self.laws, self.weight = process, (law, optimum), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        from scoreaction.diffusion.predictions import from_prediction

        t = t.double()
        own, best = (from_prediction(self.process, "v", t, law.prediction(self.process, x.double(), t)) for law in self.laws)
        return (own + self.weight * (best - own)).to(x)


def measured(task: str, trainer: str, seed: int) -> Figures:
    """The certificate and the known gap of one policy, with their standard errors."""
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.training.exact_task import ExactTask

    beta = load_recipe(task).values()["algorithm"]["beta"]
    chosen = [] if trainer == "optimum" else [f"algorithm.name={trainer}"]
    tuner = built(task, *chosen, f"train.iterations={TASKS[task]}", f"train.seed={seed}")
    known = ExactTask.of(tuner.model, tuner.reward.reward, beta)
    assert known is not None
    model = tuner.model if trainer != "optimum" else optimal(tuner.model, known)
    for _ in tuner if trainer != "optimum" else ():
        pass
    return gaps(tuner, model, beta, known.optimum.reward / beta - known.optimum.kl_nats, 1234 + 100 * seed)


def optimal(model: Any, task: Any) -> Any:
    """The model whose policy is the exact optimum."""
    import scoreaction as sa

    net = Between(model.process, task.law, task.optimum.law)
    out = sa.Model(net, process=model.process, predicts="v", shape=model.shape, decode=model.decode, law=task.law)
    with torch.no_grad():
        net.weight.fill_(1.0)
    return out


def gaps(tuner: Any, model: Any, beta: float, log_z: float, seed: int) -> Figures:
    """The gap by the certificate, and by the closed form of log Z with reward and path KL of other samples."""
    from scoreaction.training.evaluation import measure, measure_kl
    from scoreaction.training.steering import certificate

    sampler = tuner.sampler.model_copy(update={"steps": STEPS})
    found = certificate(model, sampler, tuner.reward, beta, n=N, prompts=None, seed=seed)
    figures, _ = measure(model, sampler, tuner.reward, {}, n=N, prompts=None, seed=seed + 1)
    kl = measure_kl(model, sampler, N, None, seed + 2)
    known = log_z - figures["reward"] / beta + kl["kl_nats"]
    return found | {"known": known, "known_se": math.hypot(figures["reward_se"] / beta, kl["kl_nats_se"])}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {
        f"{task}/{trainer}/seed{seed}": {"task": task, "trainer": trainer, "seed": seed}
        for seed in range(3)
        for task in TASKS
        for trainer in ("optimum", *TRAINERS)
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "certificates").parse_args())
