"""Both estimators of Score as Action, and DDPO's, on the linear-quadratic case, where every answer is known in closed form.

    python -m benchmarks.estimators     # results/estimators.csv and tables; minutes on one core, resumes

Data N(.3, .8), reward `-(x - 1)^2/2 + .2 x`, beta .5, policy `a = s_pre + th0 alpha^2 x + th1 alpha` at (-.2, .3), compared
with (-.6, .9). Rollouts, weights, losses and critic are the package's own; gradients and differences are given the exact V.
"""

from __future__ import annotations

import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from _harness import Figures, arguments, run_jobs

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from affine import (  # noqa: E402
    BETA,
    LAW,
    NEW,
    OLD,
    ExactValue,
    experienced,
    model,
    none,
    policy,
    problem,
    setting,
    with_value,
)  # fmt: skip
from driving import each  # noqa: E402

import scoreaction as sa  # noqa: E402
from scoreaction.algorithms.score_action import advantage_rate, score_action_loss  # noqa: E402
from scoreaction.diffusion.kl import g2_integral, kl_rate  # noqa: E402
from scoreaction.diffusion.predictions import score  # noqa: E402
from scoreaction.diffusion.solvers import ddim_step, time_grid  # noqa: E402
from scoreaction.networks.conditions import take  # noqa: E402
from scoreaction.types import Prediction  # noqa: E402

F64 = torch.float64
PROCESSES = {"vp": (sa.VP, 1.0), "flow": (sa.Flow, 0.999)}
STEPS = (25, 100, 400)


def learner(
    name: str,
    eta: float,
    estimator: Any,
    steps: int,
    batch: int,
    parameters: tuple[float, float] = OLD,
    solver: str = "ddim",
    **options: Any,
) -> Any:
    made = model(PROCESSES[name][0](), parameters)
    chosen: Figures = {"updates": 1, "rows": 10**8, "trust": 0.0, "clip": 100.0, "gae_lambda": 0.0} | options
    config = sa.ScoreAction(beta=BETA, estimator=estimator, look_ahead="reward", **chosen)
    return config.build(setting(made, eta=eta, steps=steps, batch=batch, solver=solver)), made


def objective(name: str, eta: float, parameters: tuple[float, float]) -> float:
    process, end = PROCESSES[name][0](), PROCESSES[name][1]
    lq = problem(process, eta)
    return lq.affine_objective(*policy(process, parameters), start=lq.marginal(torch.tensor(end, dtype=F64)), t=end)


def gradient(process: str, eta: float, estimator: str, steps: int) -> Figures:
    """The policy gradient at old: sixteen seeds of 1,000 paths, other ones in every case, all points, exact V."""
    exact, h = ExactValue(PROCESSES[process][0](), eta, OLD, end=PROCESSES[process][1]), 1e-3
    agent, made = learner(process, eta, estimator, steps, 1000)
    with_value(agent, exact)
    draws = []
    first = zlib.crc32(f"{process} {eta} {estimator} {steps}".encode())
    for seed in range(first, first + 16):
        generator = torch.Generator().manual_seed(seed)
        made.parameters["th"].grad = None
        for _, loss, _ in each(agent.updates(experienced(agent, 1000, generator), generator)):
            loss.backward()
        draws.append(-made.parameters["th"].grad)
    found = torch.stack(draws).double()
    truth = [
        (objective(process, eta, (OLD[0] + h * i, OLD[1] + h * j)) - objective(process, eta, (OLD[0] - h * i, OLD[1] - h * j)))
        / (2 * h)
        for i, j in ((1, 0), (0, 1))
    ]
    figures = {"mean": found.mean(0).tolist(), "error": (found.std(0) / math.sqrt(16)).tolist(), "truth": truth}
    return {name: {"th0": one, "th1": other} for name, (one, other) in figures.items()}


@torch.no_grad()
def difference(process: str, eta: float, steps: int) -> Figures:
    """J(new) - J(old) as the old policy's advantage rate, with the exact V, summed along the new policy's rollouts."""
    row = PROCESSES[process][0]()
    old, batch = ExactValue(row, eta, OLD, end=PROCESSES[process][1]), 4000
    agent, _ = learner(process, eta, "pathwise", steps, batch, NEW)
    before = model(row, OLD)
    generator = torch.Generator().manual_seed(0)
    rollout = agent.explore(none(batch), agent.times(generator), generator)
    total = torch.zeros(batch, dtype=F64)
    for i, (t, s) in enumerate(zip(rollout.times[:-1], rollout.times[1:], strict=True)):
        x = rollout.x[i].double()
        place = Prediction(*(part[i].double() for part in rollout.old))
        action, own, base = (score(row, t, prediction) for prediction in (place, before.predict(x, t), before.reference(x, t)))
        grad, g2dt = old.grad(x, t.expand(batch)), g2_integral(row, t, s)
        total += advantage_rate(action, old=own, pretrained=base, grad_value=grad, g2=g2dt, eta=eta, beta=BETA)
    truth = objective(process, eta, NEW) - objective(process, eta, OLD)
    return {"mean": float(total.mean()), "error": float(total.std()) / math.sqrt(batch), "truth": truth}


def value(process: str, eta: float) -> Figures:
    """Two critics, each after 4,000 updates of the martingale loss on 200,000 paths of their own, and their mean.

    Errors are root mean squares over visited points, in units of the rewards' spread; the standard error of the mean of two is
    half their difference. Paths are of 100 steps of SDE-DPM-Solver++(2M): the first-order step's own error in the law of x0
    would be larger than the critic's.
    """
    exact = ExactValue(PROCESSES[process][0](), eta, OLD, end=PROCESSES[process][1])
    agent, _ = learner(process, eta, "pathwise", 100, 4000, solver="sde_dpmpp", rows=30_000)
    test = experienced(agent, 4000, torch.Generator().manual_seed(1))
    states = take(test.steps().states, test.chosen.own)
    truth, spread = exact.value(states.x, states.t), float(test.rewards.std())
    before = float((agent.value.critic(*states, test.look).detach() - truth).square().mean().sqrt()) / spread
    one, two = (fitted_value(process, eta, seed, states, test.look) for seed in (2, 3))
    error, difference = ((one + two) / 2 - truth, (one - two) / 2)
    return {
        "untrained": before,
        "error": float(error.square().mean().sqrt()) / spread,
        "mean_error": float(error.mean()) / spread,
        "standard_error": float(difference.square().mean().sqrt()) / spread,
    }


def fitted_value(process: str, eta: float, seed: int, states: Any, look: torch.Tensor) -> torch.Tensor:
    """The value that a critic trained from this seed has at these states."""
    rounds, batch = 50, 4000
    torch.manual_seed(seed)
    agent, _ = learner(process, eta, "pathwise", 100, batch, solver="sde_dpmpp", rows=30_000)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(agent.value.critic.parameters())
    for turn in range(rounds):
        optimiser.param_groups[0]["lr"] = 4e-3 * (0.001 + 0.5 * (1 + math.cos(math.pi * turn / rounds)))
        rollout = experienced(agent, batch, generator)
        for _, loss, _ in each(agent.value.updates(rollout, critic=80, generator=generator)):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return agent.value.critic(*states, look)


def spread(process: str, eta: float, dimensions: int) -> Figures:
    """sd/|mean| of the gradient of one trajectory of 25 steps: of both parameters together (norms), and of th1 alone."""
    row, n = PROCESSES[process][0](), 40_000 if dimensions == 1 else 1500
    exact = ExactValue(row, eta, OLD, end=PROCESSES[process][1])
    generator = torch.Generator().manual_seed(0)
    times = time_grid(row, 25)
    x = row.prior_std * torch.randn(n, dimensions, generator=generator, dtype=F64)
    th = torch.tensor(OLD, dtype=F64).repeat(n, 1).requires_grad_()  # one copy a trajectory

    def whole(function: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return function(x.reshape(-1, 1), t.expand(x.numel())).reshape(x.shape)

    pathwise: Any = 0.0
    ratio: Any = 0.0
    density: Any = 0.0
    for t, s in zip(times[:-1], times[1:], strict=True):
        alpha, sigma = row.alpha(t), row.sigma(t)
        flat = LAW.prediction(row, x.reshape(-1, 1), t)
        base = Prediction(flat.x0.reshape(x.shape), flat.eps.reshape(x.shape))
        move = th[:, :1] * alpha * x + th[:, 1:]
        said = Prediction(base.x0 + sigma**2 * move, base.eps - sigma * alpha * move)
        action, pretrained, g2dt = score(row, t, said), score(row, t, base), g2_integral(row, t, s)
        fixed = {"old": action.detach(), "pretrained": pretrained, "eta": eta, "beta": BETA, "trust": 0.0}
        pathwise = pathwise - score_action_loss(action, grad_value=whole(exact.grad, x, t), g2dt=g2dt, **fixed)
        step = ddim_step(row, said, t, s, eta)
        if float(s) > 0:
            x_next = step.sample(generator).detach()
            cost = BETA * kl_rate(eta) / 2 * g2dt * ((action - pretrained) ** 2).sum(1)
            log_prob = step.log_prob(x_next)
            gain = whole(exact.value, x_next, s).sum(1) - whole(exact.value, x, t).sum(1) - cost.detach()
            ratio, density = ratio + log_prob * gain.detach() - cost, density + log_prob
        else:
            x_next = step.mean.detach()
        x = x_next
    reward = (-((x - 1) ** 2) / 2 + 0.2 * x).sum(1)
    ddpo = density * (reward - reward.mean())
    out = {}
    for name, total in (("pathwise", pathwise), ("likelihood_ratio", ratio), ("ddpo", ddpo)):
        (found,) = torch.autograd.grad(total.sum(), th, retain_graph=True)
        sd, mean = found.std(0), found.mean(0)
        out[name] = {"both": float(sd.norm() / mean.norm()), "th1": float(sd[1] / mean[1].abs())}
    return out


JOBS: dict[str, Any] = {"gradient": gradient, "difference": difference, "value": value, "spread": spread}


def run(kind: str, **job: Any) -> Figures:
    return JOBS[kind](**job)


def jobs() -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    for process in PROCESSES:
        for eta in (1.0, 0.5):
            case, at = f"{process} eta={eta}", {"process": process, "eta": eta}
            found[f"value {case}"] = {"kind": "value", **at}
            for steps in STEPS:
                found[f"difference {case} {steps}"] = {"kind": "difference", **at, "steps": steps}
                for estimator in ("pathwise", "likelihood_ratio"):
                    name = f"gradient {case} {estimator} {steps}"
                    found[name] = {"kind": "gradient", **at, "estimator": estimator, "steps": steps}
            for dimensions in (1, 256):
                found[f"spread {case} {dimensions}"] = {"kind": "spread", **at, "dimensions": dimensions}
    return found


if __name__ == "__main__":
    run_jobs(run, jobs(), arguments(__doc__ or "", "estimators").parse_args())
