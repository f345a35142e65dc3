"""The pathwise kernel: improve the policy through one step against a look-ahead value, in continuous-time weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.gaussians import sum_event
from scoreaction.kl import score_weight
from scoreaction.predictions import expand
from scoreaction.processes import Process
from scoreaction.types import Prediction


@dataclass(frozen=True)
class Rates:
    """How the dynamics and the running reward weigh the score at noise level eta.

    drift: c = (1 + eta^2)/2, the score's factor in the drift `c g^2 a`; charge: the KL costs `charge/2 g^2 ||a - a_pre||^2`
    a unit of time, `(c/eta)^2` at eta > 0 (Girsanov). At eta = 0 the path KL is infinite and charge is 1: a quadratic
    cost of the action, whose optimum is not the tilted law.
    """

    drift: float
    charge: float

    @classmethod
    def at(cls, eta: float) -> Rates:
        """The rates of this eta."""
        drift = (1 + eta**2) / 2
        return cls(drift, (drift / eta) ** 2 if eta > 0 else 1.0)


def advantage_rate(
    process: Process, t: Tensor, eta: float, beta: float, *, grad_value: Tensor, action: Tensor, old: Tensor, pretrained: Tensor
) -> Tensor:
    """The advantage per unit of time of acting with the score `action` at (t, x), where the policy's own is `old`.

    `q = c g^2 <grad V, a - s_old> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s_old - s_pre||^2)`: closed form, with no
    Hessian and no time derivative, because the drift is affine in the action and the noise is free of it. All tensors
    (batch, *shape), t () or (batch,), result (batch,). Zhao et al. 2025 (arXiv 2502.01819), theorem 3 and eq. 18.
    `J(theta) - J(old) = E_theta integral of q dtau`.
    """
    rates = Rates.at(eta)
    g2 = process.g2(t).to(action)
    gain = rates.drift * sum_event(grad_value * (action - old))
    cost = beta / 2 * rates.charge * (sum_event((action - pretrained) ** 2) - sum_event((old - pretrained) ** 2))
    return g2 * (gain - cost)


def noise_weight(process: Process, t: Tensor, s: Tensor) -> Tensor:
    """`integral of g^2 over [s, t] / sigma_t^2`: the weight of squared differences of eps where that of scores is g^2."""
    return score_weight(process, t, s) / process.sigma2(t)


def lookahead_loss(
    eps: Tensor,
    *,
    sigma: Tensor,
    weight: Tensor,
    grad_value: Tensor,
    reference: Tensor,
    old: Tensor,
    beta: float,
    trust: float,
    rates: Rates,
) -> Tensor:
    """Minus the advantage of the policy's score `-eps/sigma` over one interval, with a penalty on leaving the old one.

    `w [c sigma <grad V, eps> + charge (beta/2 ||eps - eps_pre||^2 + trust/2 ||eps - eps_old||^2)]`, `w = noise_weight`;
    its gradient at eps_old is that of the policy gradient `E integral (ds)^T [c g^2 grad V - beta (c/eta)^2 g^2 (s - s_pre)]`.
    eps, grad_value, reference, old (rows, *shape); sigma, weight (rows,); result (rows,).
    """
    pull = rates.drift * sigma.to(eps) * sum_event(grad_value * eps)
    stay = beta * sum_event((eps - reference) ** 2) + trust * sum_event((eps - old) ** 2)
    return weight.to(eps) * (pull + rates.charge / 2 * stay)


def perturbed(
    process: Process, x: Tensor, t: Tensor, prediction: Prediction, size: float, generator: torch.Generator
) -> Prediction:
    """Exploration on the action: `eps + size z`, x0 to match; left alone at alpha = 0, where eps does not act."""
    if size == 0 or float(process.alpha(t)) == 0:
        return prediction
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    eps = prediction.eps + size * noise
    return Prediction((x - expand(process.sigma(t), x) * eps) / expand(process.alpha(t), x), eps)
