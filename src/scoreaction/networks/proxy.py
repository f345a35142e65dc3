"""A reward learned from few noisy answers, and what it does not know: ridge heads on a small network, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["ensemble", "ucb"]

STEPS, CHECK_EVERY, PATIENCE, ROWS, RATE = 600, 20, 6, 256, 3e-3
"""Of the hidden layers' training: most steps, steps between looks at the left-out rows, looks without a gain before it
ends, rows of a minibatch, Adam's rate."""


@dataclass(frozen=True)
class Ridge:
    """Bayesian linear regression `y = phi w + noise`: mean of w (D,), and `factor` (D, D) with `factor factor^T = cov(w)`.

    noise_std is that of one answer; `std(phi) = |phi factor|` is that of the mean answer, which more data make smaller.
    """

    mean: Tensor
    factor: Tensor
    noise_std: float

    def std(self, phi: Tensor) -> Tensor:
        """`sqrt(phi^T cov phi)`: phi (..., D) -> (...)."""
        return ((phi @ self.factor).square().sum(-1) + 1e-12).sqrt()


def fit_ridge(phi: Tensor, y: Tensor, *, rounds: int = 1000, prior: float = 1e-6) -> Ridge:
    """The posterior `cov = noise^2 (Phi^T Phi + l I)^-1`, `mean = (Phi^T Phi + l I)^-1 Phi^T y`; phi (n, D), y (n,).

    Noise and penalty l are those of the highest evidence (MacKay 1992, "Bayesian interpolation"; `prior` is the weight
    of the hyperpriors), so nothing is left to choose. In float64.

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
        known = float((precision * squares / shrunk).sum())
        left = float(y.square().sum() - 2 * weights @ aligned + (squares * weights.square()).sum())
        before = precision, penalty
        penalty = (known + 2 * prior) / (float(weights.square().sum()) + 2 * prior)
        precision = (n - known + 2 * prior) / (max(left, 0.0) + 2 * prior)
        if max(abs(precision / before[0] - 1), abs(penalty / before[1] - 1)) < 1e-10:
            break
    shrunk = precision * squares + penalty
    return Ridge(basis @ (precision * aligned / shrunk), basis / shrunk.sqrt(), precision**-0.5)


class Proxy(nn.Module):
    """`r(x) ~ mean + optimism * std`, from features of samples; differentiable, and refitted from nothing by `fit`.

    Hidden layers `h` are trained until the error on rows left out no longer falls, then the last layer is solved anew on
    `phi = (1, h)`:
    - `ensemble`: `members` networks, each on its own bootstrap resample (Efron 1979); std is theirs around their mean.
    - `ucb`: one network on all rows; std is `noise sqrt(phi^T (Phi^T Phi + l I)^-1 phi)`, the posterior's (Li et al. 2010,
      arXiv 1003.0146, on the last layer). Phi^T Phi is a sum over rows, so std falls as 1/sqrt(n).

    In both std is that of the mean answer, without the noise of one answer. optimism 0 is the mean, below 0 pessimism.
    hidden 0 leaves the hidden layers out: linear in the features. features (batch, F), groups (batch,) in [0, kinds): which
    prompt each row belongs to; kinds is 0 without prompts.
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
        """`mean + optimism * std`, (batch,)."""
        mean, std = self.judge(features, groups)
        return mean + self.optimism * std

    def judge(self, features: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (batch,), in the reward's units."""
        phi = self._represent(self._inputs(features, groups))
        answers = torch.einsum("mnd,md->mn", phi, self.heads)
        if self.kind == "ensemble":
            std = (answers.var(0) + 1e-12).sqrt()
        else:
            std = ((phi[0] @ self.factor).square().sum(-1) + 1e-12).sqrt()
        return self.level + self.spread * answers.mean(0), self.spread * std

    def _inputs(self, features: Tensor, groups: Tensor) -> Tensor:
        scaled = (features.to(self.center) - self.center) / self.scale
        if self.kinds == 0:
            return scaled
        return torch.cat([scaled, F.one_hot(groups.to(scaled.device), self.kinds).to(scaled)], 1)

    def _represent(self, inputs: Tensor) -> Tensor:
        """phi of each member: (batch, width) or (members, batch, width) -> (members, batch, 1 + hidden)."""
        h = inputs.expand(len(self.heads), *inputs.shape[-2:])
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = F.silu(torch.baddbmm(bias, h, weight))
        return torch.cat([torch.ones_like(h[..., :1]), h], -1)

    @torch.no_grad()
    def fit(self, features: Tensor, groups: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Forgets everything and learns from these rows: features (n, F), groups (n,), values (n,)."""
        features = features.to(self.center)
        self.center.copy_(features.mean(0))
        std = features.std(0, correction=0)
        self.scale.copy_(std.clamp(min=0.1 * float(std.mean()) + 1e-12))  # what hardly varied may vary in samples to come
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
            mine = rows[i] if self.kind == "ensemble" else torch.arange(n)
            ridge = fit_ridge(phi[mine], targets[mine])
            self.heads[i] = ridge.mean.to(self.heads)
            self.factor.copy_(ridge.factor)

    def _train_hidden(self, inputs: Tensor, targets: Tensor, rows: Tensor, generator: torch.Generator) -> None:
        """Hidden layers from a fresh start, each member's as they were when its error on rows it never saw was least."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight.shape[1]) ** 0.5)
            bias.zero_()
        last = torch.zeros(len(self.heads), self.heads.shape[1])
        trained = [*self.weights, *self.biases, last]
        left_out = torch.ones(len(self.heads), len(targets)).scatter_(1, rows, 0.0)
        least, best = torch.full((len(self.heads),), torch.inf), [part.clone() for part in trained]
        waited = 0
        optimiser = torch.optim.Adam(trained, lr=RATE)
        for step in range(STEPS):
            drawn = rows.gather(1, torch.randint(rows.shape[1], (len(rows), min(ROWS, rows.shape[1])), generator=generator))
            with torch.enable_grad():
                for part in trained:
                    part.requires_grad_(True)
                answers = torch.einsum("mnd,md->mn", self._represent(inputs[drawn]), last)
                loss = (answers - targets[drawn]).square().mean(1).sum()
                for part, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    part.grad = grad
            optimiser.step()
            if (step + 1) % CHECK_EVERY == 0:
                errors = (torch.einsum("mnd,md->mn", self._represent(inputs), last) - targets).square()
                error = (errors * left_out).sum(1) / left_out.sum(1).clamp(min=1)
                better = error < least
                least = torch.where(better, error, least)
                for kept, part in zip(best, trained, strict=True):
                    kept[better] = part.detach()[better]
                waited = 0 if bool(better.any()) else waited + 1
                if waited == PATIENCE:
                    break
        for kept, part in zip(best, trained, strict=True):
            part.requires_grad_(False).copy_(kept)
            part.grad = None
