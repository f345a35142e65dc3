"""Solvers of the reverse dynamics: a step t -> s (s < t) is a Gaussian `Transition`; and the time grids to step on.

Reverse dynamics at noise level eta in [0, 1], with tau = 1 - t: `dX = [-f X + c g^2 score] dtau + eta g dB`,
`c = (1 + eta^2)/2`; eta = 0 is the probability-flow ODE, eta = 1 the reverse SDE. Coefficients are computed in
float64 whatever the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scoreaction.diffusion.predictions import expand, score
from scoreaction.diffusion.processes import Clock, Masking, Process
from scoreaction.diffusion.transitions import Kernel, Transition
from scoreaction.diffusion.unmasking import ancestral, confident, left_to_right, one_by_one
from scoreaction.types import Predict, Prediction

SolverName = Literal[
    "ddim", "euler_maruyama", "heun", "dpmpp_2m", "sde_dpmpp", "one_by_one", "ancestral", "left_to_right", "confident"
]
GridName = Literal["uniform", "power", "log_snr", "karras", "scheduler"]


@dataclass(frozen=True)
class Past:
    """Previous step of a trajectory, from which multistep solvers extrapolate: its time t () and the prediction there."""

    t: Tensor
    prediction: Prediction


StepFunction = Callable[[Any, Predict, Any, Tensor, Tensor, Tensor, float, Past | None], Kernel]


@dataclass(frozen=True)
class Solver:
    """Solver of the reverse dynamics, `step(process, predict, prediction, x, t, s, eta, past) -> Kernel`.

    order: of convergence in the step size at eta = 0, or 0 if the solver needs eta > 0. weak_order: of convergence in law at
    eta = 1, or 0 if it needs eta = 0. markov: the transition depends on x_t alone, so an update can compute its density
    again. evaluations: of the network, a step. summary: one line for `scoreaction list solvers`. process: the kind of process
    that it steps. kl: the solver on whose chain KLs are measured in its place. single: it shows one position a step, and takes
    as many as there are. by_reference: the pretrained model's prediction says which one.
    """

    step: StepFunction
    order: int
    weak_order: int
    markov: bool
    evaluations: int
    summary: str
    process: type[Clock] = Process
    kl: str = "ddim"
    single: bool = False
    by_reference: bool = False

    @property
    def noises(self) -> str:
        """Admissible eta: 'any', 'zero', 'positive', or 'one' where there is no other noise."""
        if self.process.noises:
            return self.process.noises
        if self.weak_order == 0:
            return "zero"
        return "any" if self.order else "positive"

    def takes(self, eta: float) -> bool:
        """Tells whether the solver can step at this eta.

        >>> SOLVERS["heun"].takes(0.0), SOLVERS["heun"].takes(1.0)
        (True, False)
        """
        return {"any": True, "zero": eta == 0, "positive": eta > 0, "one": eta == 1}[self.noises]


def noise_std(process: Process, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Std of a generalised DDIM step: `k^2 = eta^2 (sigma_s^2/sigma_t^2)(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2)`.

    t and s broadcast, float64. At alpha_t = 0, k = eta sigma_s. Song et al. 2021 (arXiv 2010.02502), eq. 16.

    >>> from scoreaction import Flow
    >>> one = torch.ones((), dtype=torch.float64)
    >>> float(noise_std(Flow(), one, 0.5 * one, 1.0))
    0.5
    """
    return eta * process.sigma(s) * torch.sqrt(-torch.expm1(process.log_snr(t) - process.log_snr(s)))


def ddim_step(process: Process, prediction: Prediction, t: Tensor, s: Tensor, eta: float) -> Transition:
    """Generalised DDIM step: `mean = alpha_s x0 + sqrt(sigma_s^2 - k^2) eps`, std k; eta = 1 is the DDPM posterior.

    t and s are () or (batch,) float64. Song et al. 2021 (arXiv 2010.02502), eq. 12.

    >>> from scoreaction import Flow
    >>> one = torch.ones((), dtype=torch.float64)
    >>> prediction = Prediction(torch.tensor([[4.0]]), torch.tensor([[2.0]]))
    >>> ddim_step(Flow(), prediction, one, 0.5 * one, eta=0.0).mean.item()  # 0.5 x0 + 0.5 eps
    3.0
    """
    k = noise_std(process, t, s, eta)
    direction = torch.sqrt((process.sigma2(s) - k**2).clamp(min=0))
    mean = expand(process.alpha(s), prediction.x0) * prediction.x0 + expand(direction, prediction.x0) * prediction.eps
    return Transition(mean, k)


def _ddim(
    process: Process, predict: Predict, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, eta: float, past: Past | None
) -> Transition:
    return ddim_step(process, prediction, t, s, eta)


def _euler_maruyama(
    process: Process, predict: Predict, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, eta: float, past: Past | None
) -> Transition:
    """Euler-Maruyama step in t: `mean = x + (t-s)[-f x + c g^2 score]`, std `eta g sqrt(t-s)`."""
    f, g2 = process.f(t), process.g2(t)
    if not bool(torch.isfinite(g2).all()):
        raise ValueError(
            f"solver euler_maruyama: g^2 of {type(process).__name__} is infinite at t = 1; use solver ddim or sde_dpmpp"
        )
    h, c = t - s, (1 + eta**2) / 2
    mean = expand(1 - h * f, x) * x + expand(h * c * g2, x) * score(process, t, prediction)
    return Transition(mean, eta * torch.sqrt(g2 * h))


def _heun(
    process: Process, predict: Predict, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, eta: float, past: Past | None
) -> Transition:
    """Heun's method on `d(x/alpha)/d(sigma/alpha) = eps` (Karras et al. 2022, arXiv 2206.00364, algorithm 1)."""
    first = ddim_step(process, prediction, t, s, 0.0)
    if float(process.sigma2(s)) == 0 or float(process.alpha(t)) == 0:
        return first
    second = predict(first.mean, s)
    ratio = process.alpha(s) / process.alpha(t)
    slope = process.sigma(s) - ratio * process.sigma(t)
    mean = expand(ratio, x) * x + expand(slope, x) * (prediction.eps + second.eps) / 2
    return Transition(mean, first.std)


def _multistep(
    process: Process, predict: Predict, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, eta: float, past: Past | None
) -> Transition:
    """DPM-Solver++(2M), ODE and SDE (Lu et al. 2022, arXiv 2211.01095): DDIM with an x0 extrapolated in log SNR.

    `x0 + (h/(2 h_past)) (x0 - x0_past)`, h and h_past this step and the previous one in log SNR; the first step, and one to
    sigma_s = 0, is plain DDIM.
    """
    if past is None or float(process.sigma2(s)) == 0:
        return ddim_step(process, prediction, t, s, eta)
    ratio = (process.log_snr(s) - process.log_snr(t)) / (process.log_snr(t) - process.log_snr(past.t))
    x0 = prediction.x0 + expand(ratio / 2, x) * (prediction.x0 - past.prediction.x0)
    eps = (x - expand(process.alpha(t), x) * x0) / expand(process.sigma(t), x)
    return ddim_step(process, Prediction(x0, eps), t, s, eta)


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(_ddim, 1, 1, True, 1, "generalised DDIM, any eta; eta 1 is DDPM, eta 0 an exponential Euler step"),
    "euler_maruyama": Solver(_euler_maruyama, 1, 1, True, 1, "Euler-Maruyama in the clock t, any eta"),
    "heun": Solver(_heun, 2, 0, True, 2, "Heun's second-order ODE solver (EDM), eta 0"),
    "dpmpp_2m": Solver(_multistep, 2, 0, False, 1, "DPM-Solver++(2M), second-order ODE solver, eta 0"),
    "sde_dpmpp": Solver(_multistep, 0, 2, False, 1, "SDE-DPM-Solver++(2M), eta > 0"),
    "one_by_one": Solver(
        one_by_one, 0, 0, True, 1, "tokens: one random position a step, exact", Masking, "one_by_one", single=True
    ),
    "ancestral": Solver(ancestral, 0, 1, True, 1, "tokens: several positions a step, first order in law", Masking, "ancestral"),
    "left_to_right": Solver(
        left_to_right, 0, 0, True, 1, "tokens: the first masked position a step", Masking, "left_to_right", single=True
    ),
    "confident": Solver(
        confident,
        0,
        0,
        True,
        2,
        "tokens: the position a step of which the pretrained model is surest",
        Masking,
        "confident",
        single=True,
        by_reference=True,
    ),
}


def find_solver(name: str, eta: float) -> Solver:
    """Looks up a solver by its name; ValueError if there is none, or it cannot step at this eta.

    >>> find_solver("ddim", 1.0).evaluations
    1
    """
    if name not in SOLVERS:
        raise ValueError(f"sampler.solver: unknown solver {name!r}; choose from {', '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta: must be between 0 and 1, got {eta}")
    solver = SOLVERS[name]
    if not solver.takes(eta):
        remedies = {"zero": "use ddim or sde_dpmpp", "positive": "use ddim, heun or dpmpp_2m", "one": "set sampler.eta to 1"}
        raise ValueError(f"sampler.solver: {name} takes eta {solver.noises} and eta is {eta}; {remedies[solver.noises]}")
    return solver


def time_grid(process: Any, steps: int, *, name: GridName = "uniform", rho: float = 1.5, t_min: float = 1e-3) -> Tensor:
    """Time grid of a sampler: decreasing times from 1 to 0, (steps + 1,) float64.

    uniform `i/N`; power `(i/N)^rho`; log_snr uniform in log SNR; karras uniform in `(sigma/alpha)^(1/7)` (Karras et al. 2022,
    arXiv 2206.00364, eq. 5). The last two run from t = 1 to t_min and end with a step to 0 if the process reaches data, else
    straight to 0; where alpha_1 = 0 they are spaced as if they began at 0.999. scheduler is the pretrained model's own grid,
    which may begin below 1 (Stable Diffusion's at 0.98). ValueError for an unknown name or fewer than one step.

    >>> time_grid(Process(), 2).tolist()
    [1.0, 0.5, 0.0]
    """
    if steps < 1:
        raise ValueError(f"sampler.steps: must be at least 1, got {steps}")
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    match name:
        case "uniform":
            return u
        case "power":
            return u**rho
        case "scheduler":
            return process.own_grid(steps)
        case "log_snr" | "karras":
            return u if steps == 1 else _snr_grid(process, steps, name, t_min)
    raise ValueError(f"sampler.grid: unknown grid {name!r}; choose from {', '.join(get_args(GridName))}")


def _snr_grid(process: Process, steps: int, name: Literal["log_snr", "karras"], t_min: float) -> Tensor:
    """Times uniform in log SNR, or in `(sigma/alpha)^(1/7) = exp(-log SNR/14)`, from 1 to t_min and 0."""
    end = t_min if process.reaches_data else 0.0
    start = 0.999 if float(process.alpha(torch.ones((), dtype=torch.float64))) == 0 else 1.0
    first, last = process.log_snr(torch.tensor([start, end], dtype=torch.float64))
    w = torch.linspace(0, 1, steps if process.reaches_data else steps + 1, dtype=torch.float64)
    if name == "log_snr":
        log_snr = first + w * (last - first)
    else:
        a, b = torch.exp(-first / 14), torch.exp(-last / 14)
        log_snr = -14 * torch.log(a + w * (b - a))
    times = process.time_at(log_snr)
    times[0], times[-1] = 1.0, end
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)]) if process.reaches_data else times


def jittered(times: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts the inner times of a grid together, by one random share, up to 1/2, of the distance to the next time.

    A fixed grid trains a network at a few times only; a grid drawn anew in each iteration trains it at all times but those
    within half a step of the ends. The times move together because a multistep solver extrapolates far where a long step
    follows a short one.

    >>> times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    >>> moved = jittered(times, torch.Generator().manual_seed(0))
    >>> moved[0].item(), 0.25 <= moved[1].item() <= 0.75, moved[2].item()
    (1.0, True, 0.0)
    """
    move = float(torch.rand((), generator=generator, dtype=torch.float64)) - 0.5
    gaps = times[:-1] - times[1:]
    moved = times.clone()
    moved[1:-1] += move * (gaps[:-1] if move > 0 else gaps[1:])
    return moved
