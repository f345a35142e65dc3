"""Labels of a mixture's components: the exact law given a label, and the exact probability of a label at a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.mixtures import Mixture


@dataclass(frozen=True, eq=False)
class Labelled:
    """A mixture of which each component has a label y: `p(x, y) = sum of w_k N(x; m_k, C_k) over the components of y`.

    labels (K,) integers, each of 0 to the largest at least once; ValueError otherwise.

    Fine-tuning on `r = log p(y|x)` at beta 1 has the optimum `p exp(r)/Z = p(x|y)`, with `log Z = log p(y)`
    (Zhao et al. 2024, arXiv 2406.12120).

    >>> four = Labelled(Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3), torch.tensor([0, 1, 0, 2]))
    >>> four.prior.tolist(), four.conditional(0).means.tolist()
    ([0.5, 0.25, 0.25], [[2.0, 0.0], [0.0, 2.0]])
    """

    law: Mixture
    labels: Tensor

    def __post_init__(self) -> None:
        k, labels = len(self.law.weights), self.labels.tolist()
        if self.labels.shape != (k,) or sorted(set(labels)) != list(range(len(set(labels)))) or len(set(labels)) < 2:
            raise ValueError(f"labels: must be {k} integers, one for each of the means, from 0 on, two or more (got {labels})")

    @property
    def count(self) -> int:
        """Number of labels."""
        return int(self.labels.max()) + 1

    @property
    def prior(self) -> Tensor:
        """`p(y)`, (labels,) float64."""
        return torch.zeros(self.count, dtype=torch.float64).index_add(0, self.labels, self.law.weights)

    def conditional(self, y: int) -> Mixture:
        """`p(x|y)`: the components of y alone."""
        own = self.labels == y
        return Mixture(self.law.weights[own], self.law.means[own], self.law.covariances[own])

    def log_posterior(self, x: Tensor) -> Tensor:
        """`log p(y|x)` of every label at x (batch, d), differentiable in x: (batch, labels)."""
        joint = [self.conditional(y).log_prob(x) + self.prior[y].log().to(x) for y in range(self.count)]
        return torch.stack(joint, 1).log_softmax(1)
