"""Control with delay: a linear system whose state is seen late, and the cost of acting by windows of a diffusion model.

    python -m benchmarks.delay           # results/delay.csv and its table; some two minutes on one core

x' = 1.1 x + 0.5 u + w, w of variance 0.3, cost x^2 + 0.2 u^2 a step, seen d steps late. The model has the exact law of windows
under actions drawn from N(0, 1.5^2), x_0 from N(0, 2); 512 particles, 50 steps. 120 steps of control after 10, the same noise
for all three: predictor is the best controller there is, stale takes the state that was seen for the present one. Two seeds.
"""

from __future__ import annotations

import math

import torch
from _harness import Figures, arguments, run_jobs
from torch import Tensor, nn

A, B, Q, R, NOISE, VARIANCE, SPREAD = 1.1, 0.5, 1.0, 0.2, 0.3, 2.0, 1.5
BURN, STEPS, LARGEST = 10, 120, 1e4


class Exact(nn.Module):
    """The v of a Gaussian law of windows."""

    def __init__(self, delay: int) -> None:
        from scoreaction.diffusion.mixtures import Mixture

        super().__init__()
        basis = torch.eye(2 * delay + 2, dtype=torch.float64)
        x, rows = math.sqrt(VARIANCE) * basis[0], []
        for step in range(delay + 1):
            u = SPREAD * basis[1 + 2 * step]
            rows += [x, u]
            if step < delay:
                x = A * x + B * u + math.sqrt(NOISE) * basis[2 + 2 * step]
        factor = torch.stack(rows)
        self.law = Mixture(torch.ones(1), torch.zeros(1, len(rows)).double(), (factor @ factor.T)[None])
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        import scoreaction as sa
        from scoreaction.diffusion.predictions import from_prediction

        return from_prediction(sa.VP(), "v", t.double(), self.law.prediction(sa.VP(), x.double(), t.double())).to(x)


def riccati() -> tuple[float, float]:
    """Cost-to-go P and gain L of the best controller of a state that is seen."""
    p = 1.0
    for _ in range(1000):
        p = Q + A * A * p - (A * B * p) ** 2 / (R + B * B * p)
    return p, A * B * p / (R + B * B * p)


def optimum(delay: int) -> float:
    """Average cost of the best controller, `P W + L^2 (r + b^2 P) W sum_{i < d} a^{2 i}`."""
    p, gain = riccati()
    return p * NOISE + gain**2 * (R + B * B * p) * NOISE * sum(A ** (2 * i) for i in range(delay))


def controlled(delay: int, seed: int) -> Figures:
    """Average costs of the windows' controller, of the best one and of one that takes the stale state for the present."""
    import scoreaction as sa

    p, gain = riccati()
    model = sa.Model(Exact(delay), process=sa.VP(), predicts="v", shape=(2 * delay + 2,))

    def critic(states: Tensor, actions: Tensor) -> Tensor:
        x, u = states[:, 0], actions[:, 0]
        return -(Q * x**2 + R * u**2 + p * (A * x + B * u) ** 2)

    windows = sa.DelayedController(model, critic, delay=delay, state=1)

    def predictor(seen: float, taken: list[float], step: int) -> float:
        for u in taken:
            seen = A * seen + B * u
        return -gain * seen

    def by_windows(seen: float, taken: list[float], step: int) -> float:
        return float(windows.act([seen], [[u] for u in taken], seed=1000 * seed + step))

    def stale(seen: float, taken: list[float], step: int) -> float:
        return -gain * seen

    forms = {"windows": by_windows, "predictor": predictor, "stale": stale}
    costs = {name: _average(delay, seed, act) for name, act in forms.items()}
    return {"optimum": optimum(delay), **costs, "over_predictor": costs["windows"] / costs["predictor"]}


def _average(delay: int, seed: int, act: object) -> float:
    """The average cost a step; infinite where the state runs away."""
    noise = math.sqrt(NOISE) * torch.randn(BURN + STEPS + 1, generator=torch.Generator().manual_seed(seed)).double()
    xs, us, total = [0.0] * (delay + 1), [0.0] * delay, 0.0
    for step in range(BURN + STEPS):
        u = act(xs[-1 - delay], us[len(us) - delay :], step)  # type: ignore[operator]
        total += Q * xs[-1] ** 2 + R * u**2 if step >= BURN else 0.0
        xs.append(A * xs[-1] + B * u + float(noise[step]))
        us.append(u)
        if abs(xs[-1]) > LARGEST:
            return math.inf
    return total / STEPS


if __name__ == "__main__":
    jobs = {f"d{delay}-seed{seed}": {"delay": delay, "seed": seed} for seed in range(2) for delay in (1, 2, 4)}
    run_jobs(controlled, jobs, arguments(__doc__ or "", "delay").parse_args())
