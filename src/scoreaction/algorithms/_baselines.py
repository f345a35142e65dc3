"""The rewards that a reward is compared with: the batch's, earlier ones of its prompt, or those of its group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scoreaction.algorithms._learner import State
from scoreaction.algorithms._likelihood_ratio import spread_is_rounding, standardised
from scoreaction.algorithms._setting import Setting

Baseline = Literal["batch", "prompt", "group", "branch"]
ENOUGH, KEPT = 16, 64
"""Rewards of a prompt from which on it has statistics of its own, and how many of them count."""


def check_baseline(setting: Setting, baseline: Baseline, branches: int) -> None:
    """ValueError, with the remedy, where what is compared is not there: siblings, or groups of one prompt."""
    if baseline == "branch" and branches == 1:
        raise ValueError("algorithm.branches: baseline branch compares siblings and 1 has none; set it to 2 or more")
    if baseline != "branch" and branches > 1:
        raise ValueError(f"algorithm.baseline: with branches the siblings are the baseline; set it to branch (got {baseline})")
    refuse_groups_of_one(setting, baseline)


def refuse_groups_of_one(setting: Setting, baseline: Baseline) -> None:
    """ValueError, with the remedy, where samples are compared with those of their prompt, of which there are no others."""
    if baseline == "group" and setting.group < 2:
        why = f"algorithm.baseline group compares samples of one prompt, of which a batch has {setting.group:g}"
        raise ValueError(f"train.samples_per_prompt: {why}; set it to 2 or more, or algorithm.baseline to prompt")


def prompt_advantages(
    history: dict[str, list[float]], rewards: Tensor, prompt: Tensor, *, spread: float | None = None, keep: int = KEPT
) -> Tensor:
    """Rewards minus the mean of the last `keep` of their prompt, over their std (or `spread`), (batch,); adds to `history`.

    A prompt with fewer than `ENOUGH` takes the statistics of the batch. Black et al. 2023, appendix D.2.
    """
    advantage = standardised(rewards)
    for number in prompt.unique().tolist():
        rows = (prompt == number).to(rewards.device)
        last = history[str(number)] = (history.get(str(number), []) + rewards[rows].tolist())[-keep:]
        if len(last) >= ENOUGH:
            past = torch.tensor(last, dtype=torch.float64)
            centred = rewards[rows] - past.mean()
            flat = spread_is_rounding(past)
            advantage[rows] = 0.0 if flat else (centred / (spread or past.std(correction=0))).to(advantage)
    return advantage


@dataclass
class PromptState(State):
    """The last rewards of each prompt, by its number."""

    prompt_rewards: dict[str, list[float]] = field(default_factory=dict)


def dead(rewards: Tensor, groups: Tensor) -> Tensor:
    """True for samples of a group whose rewards differ by rounding only, max - min against a relative 1e-6; (batch,).

    >>> dead(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([7, 7, 3, 3])).tolist()
    [True, True, False, False]
    """
    _, number = groups.unique(return_inverse=True)
    number = number.to(rewards.device)
    zeros = rewards.new_zeros(int(number.max()) + 1)
    high, low, size = (
        zeros.scatter_reduce(0, number, values, how, include_self=False)[number]
        for values, how in ((rewards, "amax"), (rewards, "amin"), (rewards.abs(), "amax"))
    )
    return high - low <= 1e-6 * size


def bessel(groups: Tensor) -> Tensor:
    """`B/(B-1)` for each sample of a group of B, 1 for one that is alone, (batch,) float64.

    A mean that holds the sample's own reward takes `1/B` of its gradient away. Times this all of it is there, as beside a KL it
    has to be.

    >>> bessel(torch.tensor([7, 7, 3])).tolist()
    [2.0, 2.0, 1.0]
    """
    _, number, counts = groups.unique(return_inverse=True, return_counts=True)
    size = counts[number].double()
    return size / (size - 1 + (size == 1))


def whole(baseline: Baseline, prompt: Tensor, history: dict[str, list[float]]) -> Tensor:
    """Factor that gives a sample its whole gradient where the mean it is compared with holds its own reward, (batch,) float64.

    `bessel` of its group, of the batch, or of the last rewards of its prompt in `history`, this batch's among them; 1 where
    those are so many others that its own is no longer among them.

    >>> whole("batch", torch.tensor([7, 3]), {}).tolist()
    [2.0, 2.0]
    >>> whole("prompt", torch.tensor([7, 3]), {"7": [0.0], "3": [0.0] * 21}).tolist()
    [2.0, 1.05]
    """
    if baseline == "group":
        return bessel(prompt)
    out = bessel(torch.zeros_like(prompt))
    if baseline == "prompt":
        for number in prompt.unique().tolist():
            rows, size = (prompt == number).nonzero().flatten(), len(history[str(number)])
            if size >= ENOUGH:
                out[rows], out[rows[-size:]] = 1.0, size / (size - 1)
    return out


def group_advantages(rewards: Tensor, groups: Tensor, weight: Tensor) -> Tensor:
    """`(1 - 1/B) (r_i - b_i)`, `b_i = sum_{j != i} w_j r_j / sum_{j != i} w_j`, of each group of B samples, (batch,).

    weight (batch,): dP_policy/dP_behaviour of each path; with equal ones it is `r - mean`. Times w_i and the path's score its
    mean is the policy's gradient times (1 - 1/B), whatever behaviour drew the group: the baseline of a path holds nothing of
    its own. A constant added to the rewards changes nothing, and a group of equal rewards has no advantages.

    >>> group_advantages(torch.tensor([1.0, 3.0]), torch.zeros(2), torch.ones(2)).tolist()
    [-1.0, 1.0]
    """
    _, number, counts = groups.unique(return_inverse=True, return_counts=True)
    number, counts = number.to(rewards.device), counts.to(rewards.device)
    weight, size = weight.to(rewards), counts[number].to(rewards)
    centred = rewards - torch.zeros_like(size[: len(counts)]).index_add(0, number, rewards / size)[number]

    def others(values: Tensor) -> Tensor:
        return torch.zeros_like(size[: len(counts)]).index_add(0, number, values)[number] - values

    baseline = others(weight * centred) / others(weight).clamp(min=torch.finfo(rewards.dtype).tiny)
    return (1 - 1 / size) * (centred - baseline)


def standardised_groups(rewards: Tensor, groups: Tensor, weight: Tensor) -> Tensor:
    """`group_advantages` over the std of the rewards in each group, 0 where they differ by rounding only."""
    advantage = group_advantages(rewards, groups, weight)
    for group in groups.unique():
        rows = (groups == group).to(rewards.device)
        flat = spread_is_rounding(rewards[rows])
        advantage[rows] = 0.0 if flat else advantage[rows] / rewards[rows].std(correction=0)
    return advantage
