"""A Gaussian mixture whose score, tilted law and optimal policy are known exactly; the policy is the exact score plus a net."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from scoreaction.diffusion.labels import Labelled
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import expand, from_prediction
from scoreaction.diffusion.processes import PROCESSES, Process, ProcessName
from scoreaction.networks.consistency import load_consistency
from scoreaction.networks.labels import LabelAdapter
from scoreaction.networks.layers import VectorNet
from scoreaction.networks.model import Model
from scoreaction.settings import Settings

DEFAULTS: dict[str, Any] = {
    "sampler": {"steps": 50, "eta": 1.0},
    "train": {"iterations": 300, "batch": 256, "lr": 2e-3},
    "evaluation": {"n": 8192, "steps": 200},
    "distill": {"iterations": 1000, "paths": 64, "lr": 5e-3},
}


class Config(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """means (K, d), weights (K,) (equal by default), one std for all or one for each; process vp, cosine, ve or flow.

    labels (K,): a label from 0 on for each of the means; prompts then are labels, "0" and so on, and train a control.

    consistency: the folder of a consistency model that `scoreaction distill` made of this model.
    """

    name: Literal["gaussian_mixture"] = "gaussian_mixture"
    means: list[list[float]] = [[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]]
    weights: list[float] | None = None
    std: float | list[float] = 0.3
    labels: list[int] | None = None
    process: ProcessName = "vp"
    hidden: int = Field(128, ge=1, le=2**14)
    depth: int = Field(3, ge=1, le=100)
    consistency: Path | None = None

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        k = len(self.means)
        if k == 0 or len({len(mean) for mean in self.means}) != 1 or not self.means[0]:
            raise ValueError("means: must be a non-empty list of points of one dimension")
        if self.weights is not None and (len(self.weights) != k or min(self.weights) <= 0):
            raise ValueError(f"weights: must be {k} positive numbers, one for each of the means")
        stds = self.std if isinstance(self.std, list) else [self.std]
        if min(stds, default=0) <= 0 or (isinstance(self.std, list) and len(stds) != k):
            raise ValueError(f"std: must be positive, one number or {k} of them")
        if self.labels is not None:
            Labelled(self.law(), torch.tensor(self.labels))
        return self

    def law(self) -> Mixture:
        """The data law."""
        means = torch.tensor(self.means, dtype=torch.float64)
        k, d = means.shape
        variances = torch.as_tensor(self.std, dtype=torch.float64).expand(k) ** 2
        weights = torch.ones(k) if self.weights is None else torch.tensor(self.weights)
        return Mixture(weights, means, variances[:, None, None] * torch.eye(d, dtype=torch.float64))


class ExactPlusNet(nn.Module):
    """`v = v_exact - sigma F(x, t)`: the exact prediction of the law plus a perceptron F that begins at 0.

    That is `eps_exact - alpha sigma F/n` and `x0_exact + sigma^2 F/n`, `n = alpha^2 + sigma^2`: an F of order one is a change
    of order one under every process. The difference of scores, `alpha F/n`, is bounded as t -> 0, so the path KL is finite, and
    both predictions are finite at pure noise.
    """

    def __init__(self, law: Mixture, process: Process, hidden: int, depth: int) -> None:
        super().__init__()
        self.law, self.process = law, process
        self.change = VectorNet(process, law.dimension, law.dimension, hidden=hidden, depth=depth)
        nn.init.zeros_(self.change.last.weight)
        nn.init.zeros_(self.change.last.bias)

    def forward(self, x: Tensor, t: Tensor, cond: None) -> Tensor:
        t = t.double()
        exact = from_prediction(self.process, "v", t, self.law.prediction(self.process, x, t))
        return exact - expand(self.process.sigma(t), x) * self.change(x, t)


def build(config: Config) -> Model:
    """The model, with its law for measuring distances."""
    return exact_model(config.law(), config.process, config.hidden, config.depth, config.consistency, config.labels)


def exact_model(
    law: Mixture, name: ProcessName, hidden: int, depth: int, consistency: Path | None, labels: list[int] | None = None
) -> Model:
    """The model of a law whose score is exact, told one of these labels if there are any."""
    process = PROCESSES[name]()
    net: nn.Module = ExactPlusNet(law, process, hidden, depth)
    more: dict[str, Any] = {}
    if labels is not None:
        net = LabelAdapter(net, at="change.body.0", labels=[str(label) for label in sorted(set(labels))])
        more = {"encode": net.encode(), "null": net.null()}
    model = Model(net, process=process, predicts="v", shape=(law.dimension,), law=law, **more)
    return model if consistency is None else load_consistency(model, consistency)
