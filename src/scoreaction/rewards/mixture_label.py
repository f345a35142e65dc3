"""Exact log probability of the prompt's label at a sample of a mixture whose components are labelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from scoreaction.diffusion.labels import Labelled
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.networks.labels import Labels
from scoreaction.rewards._images import texts_of
from scoreaction.settings import Settings
from scoreaction.types import Prompts

EXAMPLE: dict[str, Any] = {"means": [[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]], "std": 0.3, "labels": [0, 1, 0, 2]}


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, y) = log p(y|x)` in nats, at most 0, of the mixture with these means, weights and std; y is the prompt.

    means, weights, std and labels as those of the model `gaussian_mixture`. Differentiable. Trained on it at beta 1 a model of
    that mixture ends at `p(x|y)`.
    """

    name: Literal["mixture_label"] = "mixture_label"
    means: list[list[FiniteFloat]] = Field(min_length=2)
    weights: list[FiniteFloat] | None = None
    std: FiniteFloat = Field(gt=0)
    labels: list[int] = Field(min_length=2, description="a label from 0 on for each of the means")


@dataclass(frozen=True, eq=False)
class LabelReward:
    """The reward; its law and labels are in `labelled`."""

    labelled: Labelled
    differentiable: bool = True

    @property
    def labels(self) -> Labels:
        """The names of the labels: their numbers."""
        return Labels(tuple(str(y) for y in range(self.labelled.count)))

    def __call__(self, samples: Tensor, prompts: Prompts = None) -> Tensor:
        d = self.labelled.law.dimension
        if samples.ndim != 2 or samples.shape[1] != d:
            raise ValueError(f"means: have {d} dimensions, got samples {tuple(samples.shape)}; give the model's own means")
        texts_of(samples, prompts, name="mixture_label")
        numbers = [self.labels.split(prompt)[1] for prompt in prompts or []]
        if self.labels.none in numbers:
            raise ValueError(f"prompts: must be labels, {', '.join(self.labels.names)}")
        y = torch.tensor(numbers, device=samples.device)
        return self.labelled.log_posterior(samples).gather(1, y[:, None])[:, 0]


def build(config: Config) -> LabelReward:
    """The reward; ValueError for labels that do not fit the means."""
    law = Mixture.isotropic(config.means, std=config.std, weights=config.weights)
    return LabelReward(Labelled(law, torch.tensor(config.labels)))
