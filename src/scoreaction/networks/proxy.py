"""A reward model for few noisy answers, with its uncertainty: a small network whose last layer is Bayesian ridge regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["ensemble", "ucb"]

STEPS, CHECK_EVERY, PATIENCE, ROWS, RATE = 600, 20, 6, 256, 3e-3
"""Training of the hidden layers: maximal steps, steps between validations, validations without a gain before it ends, rows of
a minibatch, Adam's learning rate."""


@dataclass(frozen=True)
class Ridge:
    """Posterior of the Bayesian linear regression `y = phi w + noise`: mean of w (D,), `factor factor^T = cov(w)` (D, D).

    noise_std is the standard deviation of one answer around its mean. That of the predicted mean is `mean_std`.
    """

    mean: Tensor
    factor: Tensor
    noise_std: float


def mean_std(phi: Tensor, factor: Tensor) -> Tensor:
    """Standard deviation of a predicted mean, `sqrt(phi^T cov phi)`, which falls with more data: phi (..., D) -> (...)."""
    return ((phi @ factor).square().sum(-1) + 1e-12).sqrt()


def fit_ridge(phi: Tensor, y: Tensor, *, rounds: int = 1000, prior: float = 1e-6) -> Ridge:
    """Fits `cov = noise^2 (Phi^T Phi + l I)^-1`, `mean = (Phi^T Phi + l I)^-1 Phi^T y`, in float64; phi (n, D), y (n,).

    Noise and penalty l are those of the highest evidence, found in at most `rounds` iterations (MacKay 1992, "Bayesian
    interpolation"; `prior` is the weight of the hyperpriors), so nothing is left to choose.

    >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    >>> [round(float(w), 3) for w in fit_ridge(x, 2 * x[:, 0]).mean]
    [2.0]
    """
    phi, y = phi.double(), y.double()
    n = len(y)
    squares, basis = torch.linalg.eigh(phi.T @ phi)
    squares = squares.clamp(min=0)
    aligned = basis.T @ (phi.T @ y)
    precision, penalty = 1 / (float(y.var(correction=0)) + prior), 1.0  # of the noise, of the weights
    for _ in range(rounds):
        shrunk = precision * squares + penalty
        weights = precision * aligned / shrunk
        effective = float((precision * squares / shrunk).sum())  # number of weights that the data determine
        residual = float(y.square().sum() - 2 * weights @ aligned + (squares * weights.square()).sum())
        before = precision, penalty
        penalty = (effective + 2 * prior) / (float(weights.square().sum()) + 2 * prior)
        precision = (n - effective + 2 * prior) / (max(residual, 0.0) + 2 * prior)
        if max(abs(precision / before[0] - 1), abs(penalty / before[1] - 1)) < 1e-10:
            break
    shrunk = precision * squares + penalty
    return Ridge(basis @ (precision * aligned / shrunk), basis / shrunk.sqrt(), precision**-0.5)


class Proxy(nn.Module):
    """Reward model `mean + optimism * std` on features of samples, differentiable; `fit` forgets and learns anew.

    Hidden layers h are trained until the error on validation rows no longer falls; then the last layer is solved in closed
    form on `phi = (1, h)`:
    - `ensemble`: `members` networks, each on its own bootstrap resample (Efron 1979); std is the spread of their outputs.
    - `ucb`: one network; std is that of the posterior, `noise sqrt(phi^T (Phi^T Phi + l I)^-1 phi)` (Li et al. 2010, arXiv
      1003.0146, on the last layer). Phi^T Phi is a sum over rows, so std falls as 1/sqrt(n).

    In both, std is the uncertainty of the mean answer, without the noise of single answers; a negative optimism is
    pessimism. hidden = 0 means no hidden layers, linear in the features. features (batch, F); groups (batch,) long, the
    prompt's number of each row, in [0, kinds); kinds = 0 without prompts.
    """

    center: Tensor
    scale: Tensor
    level: Tensor
    spread: Tensor
    heads: Tensor
    factor: Tensor

    def __init__(
        self,
        features: int,
        *,
        kinds: int = 0,
        kind: Kind = "ensemble",
        members: int = 8,
        hidden: int = 32,
        optimism: float = 0.0,
    ) -> None:
        super().__init__()
        self.kinds, self.kind, self.optimism = kinds, kind, optimism
        count, width = (members if kind == "ensemble" else 1), features + kinds
        sizes = [width, hidden, hidden] if hidden else []
        last = 1 + (hidden or width)
        self.weights = nn.ParameterList(torch.zeros(count, a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.biases = nn.ParameterList(torch.zeros(count, 1, b) for b in sizes[1:])
        self.requires_grad_(False)
        self.register_buffer("center", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("heads", torch.zeros(count, last))
        self.register_buffer("factor", torch.zeros(last, last))

    def forward(self, features: Tensor, groups: Tensor) -> Tensor:
        """Estimated reward `mean + optimism * std`, (batch,)."""
        mean, std = self.judge(features, groups)
        return mean + self.optimism * std

    def judge(self, features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the reward and its uncertainty, each (batch,), in the reward's units."""
        phi = self._represent(self._inputs(features, groups))
        answers = torch.einsum("mnd,md->mn", phi, self.heads)
        std = (answers.var(0) + 1e-12).sqrt() if self.kind == "ensemble" else mean_std(phi[0], self.factor)
        return self.level + self.spread * answers.mean(0), self.spread * std

    def _inputs(self, features: Tensor, groups: Tensor) -> Tensor:
        scaled = (features.to(self.center) - self.center) / self.scale
        if self.kinds == 0:
            return scaled
        return torch.cat([scaled, F.one_hot(groups.to(scaled.device), self.kinds).to(scaled)], 1)

    def _represent(self, inputs: Tensor) -> Tensor:
        """Features phi of each member: (batch, width) or (members, batch, width) -> (members, batch, 1 + hidden)."""
        h = inputs.expand(len(self.heads), *inputs.shape[-2:])
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = F.silu(torch.baddbmm(bias, h, weight))
        return torch.cat([torch.ones_like(h[..., :1]), h], -1)

    @torch.no_grad()
    def fit(self, features: Tensor, groups: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Fits the proxy to these rows alone: features (n, F), groups (n,), values (n,)."""
        features = features.to(self.center)
        self.center.copy_(features.mean(0))
        std = features.std(0, correction=0)
        # features that hardly vary here may vary in later samples
        self.scale.copy_(std.clamp(min=0.1 * float(std.mean()) + 1e-12))
        self.level.copy_(values.mean())
        self.spread.copy_(values.std(correction=0).clamp(min=1e-6 * float(values.abs().max()) + 1e-12))
        targets = (values.to(self.level) - self.level) / self.spread
        inputs, n = self._inputs(features, groups), len(values)
        if self.kind == "ensemble":
            rows = torch.randint(n, (len(self.heads), n), generator=generator)
        else:
            rows = torch.randperm(n, generator=generator)[None, : max(1, n - n // 5)]
        if len(self.weights):
            self._train_hidden(inputs, targets, rows, generator)
        for i, phi in enumerate(self._represent(inputs)):
            index = rows[i] if self.kind == "ensemble" else torch.arange(n)
            ridge = fit_ridge(phi[index], targets[index])
            self.heads[i] = ridge.mean.to(self.heads)
            self.factor.copy_(ridge.factor)

    def _train_hidden(self, inputs: Tensor, targets: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Trains the hidden layers from new weights and keeps each member's of its least error on the rows not in `rows`."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight.shape[1]) ** 0.5)
            bias.zero_()
        last = torch.zeros(len(self.heads), self.heads.shape[1])
        trained = [*self.weights, *self.biases, last]
        validation = torch.ones(len(self.heads), len(targets)).scatter_(1, rows, 0.0)
        least, best = torch.full((len(self.heads),), torch.inf), [part.clone() for part in trained]
        waited = 0
        optimiser = torch.optim.Adam([part.requires_grad_(True) for part in trained], lr=RATE)
        for step in range(STEPS):
            drawn = rows.gather(1, torch.randint(rows.shape[1], (len(rows), min(ROWS, rows.shape[1])), generator=generator))
            optimiser.zero_grad()
            with torch.enable_grad():
                answers = torch.einsum("mnd,md->mn", self._represent(inputs[drawn]), last)
                (answers - targets[drawn]).square().mean(1).sum().backward()
            optimiser.step()
            if (step + 1) % CHECK_EVERY == 0:
                errors = (torch.einsum("mnd,md->mn", self._represent(inputs), last) - targets).square()
                error = (errors * validation).sum(1) / validation.sum(1).clamp(min=1)
                better = error < least
                least = torch.where(better, error, least)
                for saved, part in zip(best, trained, strict=True):
                    saved[better] = part.detach()[better]
                waited = 0 if bool(better.any()) else waited + 1
                if waited == PATIENCE:
                    break
        for saved, part in zip(best, trained, strict=True):
            part.requires_grad_(False).copy_(saved)
            part.grad = None
