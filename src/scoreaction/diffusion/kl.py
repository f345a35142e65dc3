"""The KL from one policy to another along visited states, in nats: of the path, and of the chain that was run.

Both take the difference of two predictions at the visited states of one rollout (of the first policy), and sum
over event dimensions. Shapes: times (N+1,) decreasing to 0, differences (N, batch, *shape), result (batch,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import noise_std
from scoreaction.diffusion.transitions import sum_event
from scoreaction.types import Prediction


def drift_rate(eta: float) -> float:
    """c = (1 + eta^2)/2, the factor of the score a in the reverse drift `-f x + c g^2 a`."""
    return (1 + eta**2) / 2


def kl_rate(eta: float) -> float:
    """(c/eta)^2: two scores that differ by d cost `(c/eta)^2 g^2 |d|^2/2` nats a unit of time (Girsanov).

    At eta = 0 the path KL is infinite and the rate is 1: a quadratic cost of the action, whose optimum is not the tilted law.
    """
    return (drift_rate(eta) / eta) ** 2 if eta > 0 else 1.0


def g2_integral(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """The integral of g^2 over [s, t] by the midpoint rule: finite also where g^2 is infinite at t = 1."""
    return (t - s) * process.g2((t + s) / 2)


def _squares(difference: Tensor) -> Tensor:
    return torch.stack([sum_event(step**2) for step in difference])


def path_kl_steps(process: Process, times: Tensor, difference: Prediction, eta: float, t_min: float = 1e-3) -> Tensor:
    """Path KL (Girsanov) of each interval: `1/2 (c/eta)^2 integral g^2 ||score difference||^2`, (N, batch).

    Trapezoid in log SNR, `1/4 (lambda_s - lambda_t)(||d eps_t||^2 + ||d eps_s||^2)`; from alpha = 0 in the x0 form; in the
    interval that holds t_min, and in the last, the score difference is held constant down to t_min. Nothing below t_min
    counts, so that the figure does not depend on the number of steps. Oksendal, Stochastic Differential Equations, theorem 8.6.
    """
    if eta == 0:
        raise ValueError("the path KL of a deterministic sampler is infinite or zero: measure it at eta > 0")
    eps, x0 = _squares(difference.eps), _squares(difference.x0)
    t, s = times[:-1], times[1:]
    log_snr = process.log_snr(times)
    snr_s = torch.exp(log_snr[1:])
    steps = []
    for i in range(len(t)):
        if i == len(t) - 1 or float(s[i]) < t_min:
            end = max(float(s[i]), t_min)
            grid = torch.linspace(end, max(float(t[i]), end), 65, dtype=torch.float64)
            integral = float(torch.trapezoid(process.g2(grid), grid)) if float(process.alpha(t[i])) > 0 else 0.0
            steps.append(0.5 * eps[i] * integral / float(process.sigma2(t[i])))
        elif float(process.alpha(t[i])) == 0:
            steps.append(0.25 * float(snr_s[i]) * (x0[i] + x0[i + 1]))
        else:
            steps.append(0.25 * float(log_snr[i + 1] - log_snr[i]) * (eps[i] + eps[i + 1]))
    return kl_rate(eta) * torch.stack(steps)


def path_kl(process: Process, times: Tensor, difference: Prediction, eta: float, t_min: float = 1e-3) -> Tensor:
    """Path KL of a whole trajectory, (batch,): the sum of `path_kl_steps`. This is `kl_nats`."""
    return path_kl_steps(process, times, difference, eta, t_min).sum(0)


def chain_kl(process: Process, times: Tensor, difference: Prediction, eta: float) -> Tensor:
    """KL of the chain of DDIM(eta) steps that was run, (batch,): this is `kl_chain_nats`, and it depends on the grid.

    A step costs `(alpha_s - sqrt(sigma_s^2 - k^2) alpha_t/sigma_t)^2/(2 k^2) ||x0_a - x0_b||^2`; steps with k = 0 have no
    density and are left out.
    """
    t, s = times[:-1], times[1:]
    k = noise_std(process, t, s, eta)
    direction = torch.sqrt((process.sigma2(s) - k**2).clamp(min=0))
    gain = (process.alpha(s) - direction * process.alpha(t) / process.sigma(t)) ** 2
    weight = torch.where(k > 0, gain / (2 * k**2), 0.0)
    squares = _squares(difference.x0)
    return (weight.to(squares)[:, None] * squares).sum(0)
