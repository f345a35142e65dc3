"""Labels of samples as a held-out judge reads them, against those that prompts ask for: accuracy, F1 and macro-F1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scoreaction.networks.labels import Labels
from scoreaction.rewards import CountedReward
from scoreaction.rewards.label import LabelScore
from scoreaction.types import Prompts
from scoreaction.world import ALONE, World


def f1_scores(table: Tensor) -> Tensor:
    """F1 of each label, `2 TP/(2 TP + FP + FN)`, of counts (asked, read); NaN for a label neither asked for nor read.

    >>> f1_scores(torch.tensor([[3, 1], [2, 4]]))
    tensor([0.6667, 0.7273], dtype=torch.float64)
    """
    counts = table.double()
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))


class Confusion:
    """Counts of (asked, read) labels by the first held-out judge that counts what is correct; None where there is none."""

    def __init__(self, judge: LabelScore) -> None:
        self.judge = judge
        self.table = torch.zeros(len(judge.labels.names), len(judge.labels.names), dtype=torch.float64)

    @classmethod
    def of(cls, judges: dict[str, CountedReward]) -> Confusion | None:
        """The counts of these held-out rewards, still 0."""
        rewards = (judge.reward for judge in judges.values())
        return next(
            (cls(reward) for reward in rewards if isinstance(reward, LabelScore) and reward.judge and reward.correct), None
        )

    def add(self, samples: Tensor, prompts: Prompts) -> None:
        """Counts samples as rewards see them."""
        read = self.judge.log_prob(samples).argmax(1)
        ones = torch.ones(len(samples), dtype=torch.float64)
        self.table.index_put_((self.judge.wanted(samples, prompts).cpu(), read.cpu()), ones, accumulate=True)

    def figures(self, world: World = ALONE) -> dict[str, Any]:
        """`macro_f1`, the mean F1 of labels asked for or read, and `by_label`: accuracy and F1 of each that was asked for."""
        table = torch.tensor(world.reduced(self.table.flatten().tolist(), "sum"), dtype=torch.float64).view_as(self.table)
        f1, wanted = f1_scores(table), table.sum(1)
        return {
            "macro_f1": float(f1.nanmean()),
            "by_label": {
                name: {"accuracy": float(table[y, y] / wanted[y]), "f1": float(f1[y])}
                for y, name in enumerate(self.judge.labels.names)
                if wanted[y] > 0
            },
        }


def prompts_by_label(labels: Labels, prompts: list[Any] | None) -> dict[str, list[Any]]:
    """The prompts that name each label, by its name, those without a label left out.

    >>> prompts_by_label(Labels(("thin", "bold")), ["3 | bold", "4 | thin", "5 | bold", "6"])
    {'thin': ['4 | thin'], 'bold': ['3 | bold', '5 | bold']}
    """
    numbers = [(labels.split(prompt)[1], prompt) for prompt in prompts or []]
    every = {name: [prompt for number, prompt in numbers if number == y] for y, name in enumerate(labels.names)}
    return {name: own for name, own in every.items() if own}
