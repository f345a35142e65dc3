"""Log probability of the prompt's label by a classifier fitted on labelled samples of one's own: a new control (CTRL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.networks.labels import Labels
from scoreaction.rewards._images import check_range, is_images, texts_of
from scoreaction.settings import Settings
from scoreaction.tasks.labelled import LabelClassifier, LabelledData, fitted
from scoreaction.types import Prompts

EXAMPLE: dict[str, Any] = {"data": "labelled.npz"}


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, y) = log p(y|x)` in nats, at most 0, y the label that the prompt names: `"a red circle | large"` or `"large"`.

    At beta 1 fine-tuning on it draws from `p(x|y)` (Zhao et al. 2024, arXiv 2406.12120); a classifier that is too sure of
    itself is as a lower beta, so its temperature is fitted on the half of the data that it was not fitted on. Differentiable.
    data: an .npz with arrays `samples` (N, ...), as rewards see them (pictures in [0, 1]), and `labels` (N,), names or numbers;
    or a folder of pictures with a labels.csv of the columns file and label.
    """

    name: Literal["label"] = "label"
    data: Path
    judge: bool = Field(False, description="fit on the half that the reward is only calibrated on, for a judge to report")
    correct: bool = Field(False, description="1 where the prompt's label is the likeliest, else 0: accuracy; without gradient")


@dataclass(frozen=True, eq=False)
class LabelScore:
    """The reward; `judge` is fitted on the half that the reward is only calibrated on, `correct` scores 1 or 0."""

    net: LabelClassifier
    labels: Labels
    shape: tuple[int, ...]
    judge: bool = False
    correct: bool = False

    @property
    def differentiable(self) -> bool:
        """True unless it counts what is correct."""
        return not self.correct

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        numbers, log_prob = self.wanted(samples, prompts), self.log_prob(samples)
        if self.correct:
            return (log_prob.argmax(1) == numbers).to(samples)
        return log_prob.gather(1, numbers[:, None])[:, 0].to(samples)

    def log_prob(self, samples: Tensor) -> Tensor:
        """`log p(y|x)`, (batch, labels); ValueError for samples of another shape."""
        if tuple(samples.shape[1:]) != self.shape:
            own, got = self.shape, tuple(samples.shape[1:])
            raise ValueError(f"data: has samples of shape {own}, the model's are {got}; label such ones")
        return self.net.to(samples.device)(samples.float())

    def wanted(self, samples: Tensor, prompts: Prompts) -> Tensor:
        """The number of the label that each sample's prompt names, (batch,); ValueError where one names none."""
        texts_of(samples, prompts, name="label")
        numbers = torch.tensor([self.labels.split(prompt)[1] for prompt in prompts or []], device=samples.device)
        if bool((numbers == self.labels.none).any()):
            raise ValueError(f"prompts: each must name a label, such as '{self.labels.names[0]}' after ' | '")
        return numbers


def build(config: Config) -> LabelScore:
    """The reward; fits the classifier, in seconds. ValueError where the data cannot be used."""
    data = LabelledData.read(config.data)
    if is_images(data.samples):
        check_range(data.samples, where="data")
    halves = data.halves()
    net = fitted(*(reversed(halves) if config.judge else halves))
    return LabelScore(net, Labels(data.names), tuple(data.samples.shape[1:]), config.judge, config.correct)
