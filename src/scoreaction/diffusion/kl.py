"""KL in nats from one policy to another, along trajectories of the first: of the continuous path, and of the chain of steps.

Both take the difference of the two policies' predictions at the visited states and sum over event dimensions.
Shapes: times (N+1,) decreasing to 0, both fields of the difference (N, batch, *shape), result (batch,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import noise_std
from scoreaction.diffusion.transitions import sum_event
from scoreaction.types import Prediction


def drift_rate(eta: float) -> float:
    """Factor `c = (1 + eta^2)/2` of the score a in the reverse drift `-f x + c g^2 a`.

    >>> drift_rate(0.0), drift_rate(1.0)
    (0.5, 1.0)
    """
    return (1 + eta**2) / 2


def kl_rate(eta: float) -> float:
    """Factor `(c/eta)^2` of the path KL: scores that differ by d cost `(c/eta)^2 g^2 |d|^2/2` nats per unit of t (Girsanov).

    At eta = 0, where the path KL is infinite, it is 1: a quadratic cost of the action, whose optimum is not the tilted law.

    >>> kl_rate(1.0), kl_rate(0.5)
    (1.0, 1.5625)
    """
    return (drift_rate(eta) / eta) ** 2 if eta > 0 else 1.0


def g2_integral(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """Integral of g^2 over [s, t] by the midpoint rule, `(t - s) g^2((t + s)/2)`: finite even where g^2(1) is infinite.

    >>> from scoreaction import Flow
    >>> one = torch.ones((), dtype=torch.float64)
    >>> float(g2_integral(Flow(), one, 0.5 * one))  # 1/2 * 2 (3/4)/(1/4)
    3.0
    """
    return (t - s) * process.g2((t + s) / 2)


def _squares(difference: Tensor) -> Tensor:
    return torch.stack([sum_event(step**2) for step in difference])


def path_kl_steps(process: Process, times: Tensor, difference: Prediction, eta: float, t_min: float = 1e-3) -> Tensor:
    """Path KL (Girsanov) of each interval [s, t]: `1/2 (c/eta)^2 integral g^2 ||a - b||^2`, a - b the difference of scores.

    Times `(c/eta)^2`, c = (1 + eta^2)/2, an interval costs, with lambda the log SNR and d the difference of the predictions,
    - `1/4 (lambda_s - lambda_t)(||d eps_t||^2 + ||d eps_s||^2)`, the trapezoid in lambda;
    - `1/4 SNR_s (||d x0_t||^2 + ||d x0_s||^2)`, the same in x0, if alpha_t = 0;
    - `1/2 ||d eps_t||^2/sigma_t^2 integral g^2` down to t_min, with a constant score difference, if the interval is the last
      or contains t_min.
    Times below t_min do not count, so the result does not depend on the number of steps. Result (N, batch); ValueError at
    eta = 0. Oksendal, Stochastic Differential Equations, section 8.6.
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
    """Path KL of whole trajectories, the sum of `path_kl_steps`, (batch,): `kl_nats` in the log.

    >>> from scoreaction import VP
    >>> times = torch.linspace(1, 0, 51, dtype=torch.float64)
    >>> same = torch.zeros(50, 3, 2)
    >>> path_kl(VP(), times, Prediction(same, same), eta=1.0).tolist()
    [0.0, 0.0, 0.0]
    """
    return path_kl_steps(process, times, difference, eta, t_min).sum(0)


def chain_kl_steps(process: Process, times: Tensor, difference: Prediction, eta: float) -> Tensor:
    """KL of each DDIM step with noise eta, (N, batch).

    `(alpha_s - sqrt(sigma_s^2 - k^2) alpha_t/sigma_t)^2/(2 k^2) ||x0_a - x0_b||^2`, k the std of the step; 0 of steps with
    k = 0, which have no density.
    """
    t, s = times[:-1], times[1:]
    k = noise_std(process, t, s, eta)
    direction = torch.sqrt((process.sigma2(s) - k**2).clamp(min=0))
    gain = (process.alpha(s) - direction * process.alpha(t) / process.sigma(t)) ** 2
    weight = torch.where(k > 0, gain / (2 * k**2), 0.0)
    squares = _squares(difference.x0)
    return weight.to(squares)[:, None] * squares


def chain_kl(process: Process, times: Tensor, difference: Prediction, eta: float) -> Tensor:
    """KL of the whole chain, the sum of `chain_kl_steps`, (batch,): `kl_chain_nats` in the log. It depends on the time grid."""
    return chain_kl_steps(process, times, difference, eta).sum(0)
