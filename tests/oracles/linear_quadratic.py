"""Test oracle of Gaussian data and a quadratic reward: values, actions, laws and KL in closed form, at every noise level eta.

Nothing in the package imports it: tests compare the package with it, and `tests/test_linear_quadratic.py` compares it with
the HJB equation, moment ODEs, quadrature and real solver steps.

Reward `r(x) = -1/2 (x - mu)^T Q (x - mu) + l^T x`, data `N(m, C)`, objective `E r - beta KL` over paths of the
reverse dynamics at eta. `LinearQuadratic` is the optimum in any dimension; `ScalarLQ` is one dimension, where the
value of any affine policy, the chains of N steps and the fixed points of the algorithms are also known.
P_t = alpha^2 C + sigma^2 is the covariance of x_t and c = (1 + eta^2)/2 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.processes import Process

Coefficient = Callable[[float], float]
"""A scalar function of t: the slope A(t) or the offset b(t) of an affine policy."""


@dataclass(frozen=True, eq=False)
class PathOptimum:
    """The optimum over paths: x0 ~ N(mean (d,), covariance (d, d)), the path KL paid, and `objective = E r - beta KL`."""

    mean: Tensor
    covariance: Tensor
    kl_nats: float
    objective: float


@dataclass(frozen=True, eq=False)
class LinearQuadratic:
    """The optimal policy on data N(m, C) with a quadratic reward, for 0 < eta <= 1, in any dimension.

    Under the pretrained dynamics `x0 | x_t = x ~ N(M, S)` with `R = (alpha^2 C P^-1)^(eta^2/2)`,
    `K = (C P^-1)^(1/2) R`, `S = C (I - R^2)`, `M = m + K (x - alpha m)`. With `d = M - mu`, `G = (I + S Q/beta)^-1`:
    `V = l.mu - 1/2 d^T Q G d + l^T G d + l^T G S l/(2 beta) - beta/2 logdet(I + S Q/beta)`,
    `grad V = K G^T (l - Q d)`, `a* = s_pre + (eta^2/c) grad V/beta`. m, l, mu (d,); C, Q (d, d); times () float64.
    """

    process: Process
    m: Tensor
    C: Tensor
    Q: Tensor
    l: Tensor
    mu: Tensor
    beta: float
    eta: float = 1.0

    def __post_init__(self) -> None:
        for name in ("m", "C", "Q", "l", "mu"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().double())
        if not 0 < self.eta <= 1 or self.beta <= 0:
            raise ValueError(f"needs 0 < eta <= 1 and beta > 0, got eta {self.eta} and beta {self.beta}")
        if float(torch.linalg.eigvalsh(self.C).min()) <= 0:
            raise ValueError("the data covariance C must be positive definite")
        if float(torch.linalg.eigvalsh(torch.linalg.inv(self.C) + self.Q / self.beta).min()) <= 0:
            raise ValueError("no optimum: C^-1 + Q/beta is not positive definite; raise beta or Q")

    def _posterior(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """K, S (d, d) and G (d, d) at t ()."""
        c, axes = torch.linalg.eigh(self.C)
        alpha2, alpha = self.process.alpha(t) ** 2, self.process.alpha(t)
        p = alpha2 * c + self.process.sigma2(t)
        squared = (alpha2 * c / p) ** (self.eta**2)  # R^2
        K = axes @ torch.diag(torch.sqrt(c / p * squared)) @ axes.T
        if self.eta == 1:
            K = axes @ torch.diag(alpha * c / p) @ axes.T  # differentiable at alpha = 0
        S = axes @ torch.diag(c * (1 - squared)) @ axes.T
        return K, S, torch.linalg.inv(torch.eye(len(c), dtype=torch.float64) + S @ self.Q / self.beta)

    def pretrained_score(self, x: Tensor, t: Tensor) -> Tensor:
        """`s_pre = -P^-1 (x - alpha m)`, (batch, d)."""
        alpha = self.process.alpha(t)
        P = alpha**2 * self.C + self.process.sigma2(t) * torch.eye(len(self.m), dtype=torch.float64)
        return -torch.linalg.solve(P, (x - alpha * self.m).T).T

    def value(self, x: Tensor, t: Tensor) -> Tensor:
        """`V_eta(t, x) = beta log E_eta[exp(r/beta) | x_t = x]`; x (batch, d) float64, (batch,)."""
        K, S, G = self._posterior(t)
        d = self.m + (x - self.process.alpha(t) * self.m) @ K.T - self.mu
        quadratic = -((d @ self.Q @ G) * d).sum(1) / 2 + d @ G.T @ self.l
        constant = self.l @ self.mu + self.l @ G @ S @ self.l / (2 * self.beta) + self.beta / 2 * torch.logdet(G)
        return quadratic + constant

    def value_grad(self, x: Tensor, t: Tensor) -> Tensor:
        """`grad V = K G^T (l - Q d)`, (batch, d)."""
        K, _, G = self._posterior(t)
        d = self.m + (x - self.process.alpha(t) * self.m) @ K.T - self.mu
        return (self.l - d @ self.Q) @ G @ K.T

    def action(self, x: Tensor, t: Tensor) -> Tensor:
        """The optimal action `a* = s_pre + (eta^2/c) grad V/beta`, (batch, d). At eta = 1 only it is a score."""
        factor = 2 * self.eta**2 / (1 + self.eta**2)
        return self.pretrained_score(x, t) + factor * self.value_grad(x, t) / self.beta

    def optimum(self, *, start: tuple[Tensor, Tensor] | None = None, t: float = 1.0) -> PathOptimum:
        """Law of x0, path KL and objective of the optimal policy started at t from x ~ N(start).

        start = (mean (d,), covariance (d, d)); None is the memoryless limit, where x0 is independent of x_1 and the
        law is the tilted one.
        """
        eye = torch.eye(len(self.m), dtype=torch.float64)
        if start is None:
            M0, VM, S = self.m, torch.zeros_like(self.C), self.C
            G = torch.linalg.inv(eye + S @ self.Q / self.beta)
        else:
            time = torch.tensor(t, dtype=torch.float64)
            K, S, G = self._posterior(time)
            M0 = self.m + K @ (start[0] - self.process.alpha(time) * self.m)
            VM = K @ start[1] @ K.T
        Q, l, beta = self.Q, self.l, self.beta
        mean = G @ (M0 + S @ (Q @ self.mu + l) / beta)
        within = G @ S
        # the mean moves by G S (l - Q (M - mu))/beta: what that costs in the metric S^-1
        slope = l - Q @ (M0 - self.mu)
        metric = within.T @ torch.linalg.solve(S, within) / beta**2
        shift = slope @ metric @ slope + torch.trace(metric @ Q @ VM @ Q)
        kl = 0.5 * (torch.trace(G) - len(self.m) - torch.logdet(G) + shift)
        covariance = within + G @ VM @ G.T
        from_mu = mean - self.mu
        reward = l @ mean - (torch.trace(Q @ covariance) + from_mu @ Q @ from_mu) / 2
        return PathOptimum(mean, (covariance + covariance.T) / 2, float(kl), float(reward - beta * kl))


@dataclass(frozen=True)
class ChainOptimum:
    """Optimum of a chain of N steps with fixed stds: law N(mean, variance) of x0, chain KL, objective, and for each step the
    error ratio `-k^2 Pi_s/beta` of PI-FT's inner iteration."""

    mean: float
    variance: float
    kl_nats: float
    objective: float
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class ScalarLQ:
    """One dimension: data N(m, v), reward `-q (x - mu)^2/2 + l x`, at noise level eta.

    Values are kept as (Pi, h, e) with `V(x) = -Pi x^2/2 + h x + e`; an affine policy is `a = s_pre + A(t) x + b(t)`.
    """

    process: Process
    m: float = 0.0
    v: float = 1.0
    q: float = 0.0
    l: float = 0.0
    mu: float = 0.0
    beta: float = 1.0
    eta: float = 1.0

    def _rates(self, t: float) -> tuple[float, float, float, float]:
        """f, g^2, alpha, P at t."""
        time = torch.tensor(t, dtype=torch.float64)
        alpha = float(self.process.alpha(time))
        return (
            float(self.process.f(time)),
            float(self.process.g2(time)),
            alpha,
            alpha**2 * self.v + float(self.process.sigma2(time)),
        )

    def terminal_value(self) -> tuple[float, float, float]:
        """(Pi, h, e) of the reward itself."""
        return self.q, self.q * self.mu + self.l, -self.q * self.mu**2 / 2

    def marginal(self, t: Tensor) -> tuple[float, float]:
        """Mean and variance of x_t under the noised data law, `alpha m` and P: the default start of every chain."""
        alpha = float(self.process.alpha(t))
        return alpha * self.m, alpha**2 * self.v + float(self.process.sigma2(t))

    def affine_value(self, A: Coefficient, b: Coefficient, t: float = 1.0) -> tuple[float, float, float]:
        """(Pi, h, e) at t of the affine policy: E r minus beta times the path KL from t on.

        With `F = -f + c g^2 (A - 1/P)`, `H = c g^2 (alpha m/P + b)`, integrated from the data in t:
        `Pi' = 2 F Pi + beta (c/eta)^2 g^2 A^2`, `h' = F h - H Pi - beta (c/eta)^2 g^2 A b`,
        `e' = H h - eta^2 g^2 Pi/2 - (beta/2)(c/eta)^2 g^2 b^2`.
        """
        from scipy.integrate import solve_ivp

        c = (1 + self.eta**2) / 2

        def rate(time: float, value: list[float]) -> list[float]:
            f, g2, alpha, P = self._rates(time)
            slope, offset = A(time), b(time)
            Pi, h, _ = value
            F, H = -f + c * g2 * (slope - 1 / P), c * g2 * (alpha * self.m / P + offset)
            price = self.beta * (c / self.eta) ** 2 * g2
            return [
                2 * F * Pi + price * slope**2,
                F * h - H * Pi - price * slope * offset,
                H * h - self.eta**2 * g2 * Pi / 2 - price * offset**2 / 2,
            ]

        Pi, h, e = solve_ivp(rate, (0.0, t), self.terminal_value(), rtol=1e-11, atol=1e-12, method="DOP853").y[:, -1]
        return float(Pi), float(h), float(e)

    def affine_objective(self, A: Coefficient, b: Coefficient, *, start: tuple[float, float], t: float = 1.0) -> float:
        """`J = E V(t, x)` of the affine policy, x ~ N(mean, variance) = start."""
        Pi, h, e = self.affine_value(A, b, t)
        mean, variance = start
        return -Pi * (variance + mean**2) / 2 + h * mean + e

    def steps(self, times: Tensor) -> list[tuple[float, float, float]]:
        """Per step t -> s of a DDIM chain with the exact score: `x_s ~ N(A x + b, k^2)` as (A, b, k).

        `c_k = sqrt(sigma_s^2 - k^2)`, `A = (alpha_s alpha_t v + c_k sigma_t)/P_t`, `b = alpha_s m - A alpha_t m`.
        """
        alpha, sigma2 = self.process.alpha(times).tolist(), self.process.sigma2(times).tolist()
        steps = []
        for i in range(len(times) - 1):
            a_t, v_t, a_s, v_s = alpha[i], sigma2[i], alpha[i + 1], sigma2[i + 1]
            k2 = self.eta**2 * (v_s / v_t) * (v_t - (a_t / a_s) ** 2 * v_s)
            A = (a_s * a_t * self.v + math.sqrt(max(v_s - k2, 0.0) * v_t)) / (a_t**2 * self.v + v_t)
            steps.append((A, a_s * self.m - A * a_t * self.m, math.sqrt(k2)))
        return steps

    def chain_moments(self, times: Tensor, start: tuple[float, float] | None = None) -> tuple[float, float]:
        """Mean and variance of x0 from the pretrained chain: `M <- A M + b`, `Var <- A^2 Var + k^2`."""
        mean, variance = start or self.marginal(times[0])
        for A, b, k in self.steps(times):
            mean, variance = A * mean + b, A**2 * variance + k**2
        return mean, variance

    def chain_correlation(self, times: Tensor) -> float:
        """corr(x0, x_1) of the pretrained chain: 0 is memoryless."""
        _, first = self.marginal(times[0])
        _, last = self.chain_moments(times)
        return math.prod(A for A, _, _ in self.steps(times)) * math.sqrt(first / last)

    def chain_optimum(self, times: Tensor, start: tuple[float, float] | None = None) -> ChainOptimum:
        """Optimum over chains of N steps with fixed stds; a step without noise follows the reference.

        Backward from the reward with `D = 1 + Pi k^2/beta`:
        `e <- (-Pi b^2/2 + h b + k^2 h^2/(2 beta))/D - Pi k^2/2 + e`, `h <- A (h - Pi b)/D`, `Pi <- A^2 Pi/D`.
        """
        steps = self.steps(times)
        Pi, h, _ = self.terminal_value()
        values, ratios = [], []
        for A, b, k in reversed(steps):
            D = 1 + Pi * k**2 / self.beta
            if D <= 0:
                raise ValueError("no optimum: k^2 |Pi| >= beta for a reward that is convex; raise beta or take more steps")
            values.append((h, Pi))
            ratios.append(-(k**2) * Pi / self.beta)
            h, Pi = A * (h - Pi * b) / D, A**2 * Pi / D
        return self._shifted_chain(steps, values[::-1], ratios[::-1], start or self.marginal(times[0]))

    def sqdf_fixed_point(
        self, times: Tensor, *, gamma: float = 1.0, rho: float = 0.0, start: tuple[float, float] | None = None
    ) -> ChainOptimum:
        """Fixed point of SQDF with its training-free soft Q: the chain shifted by the discounted `grad r(x0_hat(x_s))`.

        arXiv 2512.04559. `Phi = alpha_s v/P_s`, `c0 = m - Phi alpha_s m`; the discount w is `gamma^j`, j the steps left
        after x_s, times `exp(-rho s)`, which does not depend on the grid:
        `Pi -> w q Phi^2`, `h -> w Phi (l - q (c0 - mu))`.
        """
        steps = self.steps(times)
        alpha, sigma2 = self.process.alpha(times[1:]).tolist(), self.process.sigma2(times[1:]).tolist()
        values, ratios = [], []
        for i, (a, s2) in enumerate(zip(alpha, sigma2, strict=True)):
            Phi = a * self.v / (a**2 * self.v + s2)
            discount = gamma ** (len(steps) - 1 - i) * math.exp(-rho * float(times[i + 1]))
            c0 = self.m - Phi * a * self.m
            values.append((discount * Phi * (self.l - self.q * (c0 - self.mu)), discount * self.q * Phi**2))
            ratios.append(-(steps[i][2] ** 2) * values[-1][1] / self.beta)
        return self._shifted_chain(steps, values, ratios, start or self.marginal(times[0]))

    def _shifted_chain(
        self,
        steps: list[tuple[float, float, float]],
        values: list[tuple[float, float]],
        ratios: list[float],
        start: tuple[float, float],
    ) -> ChainOptimum:
        """Moments and KL of the chain whose step is moved by `(k^2/beta)(h - Pi (A x + b))/D`, for (h, Pi) per step."""
        (mean, variance), kl = start, 0.0
        for (A, b, k), (h, Pi) in zip(steps, values, strict=True):
            mean, variance = A * mean + b, A**2 * variance
            D = 1 + Pi * k**2 / self.beta
            kl += k**2 / (2 * (self.beta * D) ** 2) * ((h - Pi * mean) ** 2 + Pi**2 * variance)
            mean, variance = (mean + k**2 * h / self.beta) / D, variance / D**2 + k**2
        reward = -self.q * (variance + (mean - self.mu) ** 2) / 2 + self.l * mean
        return ChainOptimum(mean, variance, kl, reward - self.beta * kl, tuple(ratios))


def chain_kl(reference: ScalarLQ, policy: ScalarLQ, times: Tensor, start: tuple[float, float] | None = None) -> float:
    """KL in nats of the whole chain of `policy`'s data law to that of `reference`'s, both with their exact score.

    `sum E ||(A' - A) x + b' - b||^2/(2 k^2)` over the steps with noise, x along the policy's chain.

    >>> from scoreaction.diffusion.processes import VP
    >>> times = torch.linspace(1, 0, 51, dtype=torch.float64)
    >>> round(chain_kl(ScalarLQ(VP()), ScalarLQ(VP(), m=1.0), times), 4)
    0.5981
    """
    mean, variance = start or policy.marginal(times[0])
    total = 0.0
    for (A, b, k), (A2, b2, _) in zip(reference.steps(times), policy.steps(times), strict=True):
        if k > 0:
            total += (((A2 - A) * mean + b2 - b) ** 2 + (A2 - A) ** 2 * variance) / (2 * k**2)
        mean, variance = A2 * mean + b2, A2**2 * variance + k**2
    return total


def path_kl(reference: ScalarLQ, policy: ScalarLQ, *, t_min: float = 0.0, t_max: float = 1.0) -> float:
    """Path KL (Girsanov) of two Gaussian data laws' exact scores, in nats, along the policy's own marginals.

    `1/2 (c/eta)^2 E int g^2 (s_a - s_b)^2 dt` over [t_min, t_max], by adaptive quadrature.

    >>> from scoreaction.diffusion.processes import Flow
    >>> round(path_kl(ScalarLQ(Flow()), ScalarLQ(Flow(), m=1.0)), 6)
    0.5
    """
    from scipy.integrate import quad

    eta = policy.eta
    weight = ((1 + eta**2) / (2 * eta)) ** 2 / 2

    def rate(t: float) -> float:
        _, g2, alpha, P = reference._rates(t)
        _, _, _, P2 = policy._rates(t)
        at_mean, slope = alpha * (policy.m - reference.m) / P, 1 / P - 1 / P2
        return g2 * (at_mean**2 + slope**2 * P2)

    return weight * quad(rate, t_min, t_max, epsabs=1e-12, epsrel=1e-11, limit=200)[0]
