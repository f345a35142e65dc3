"""A menu of prompts and the small network that chooses among them, by what the pretrained model is about to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import Process
from scoreaction.networks.conditions import take
from scoreaction.networks.layers import time_features
from scoreaction.types import Conditions

SLOT = "{prompt}"
IDS = 256
"""Class ids are told apart by their remainder."""


class Menu(NamedTuple):
    """The texts that a model may be told for a prompt: templates with {prompt}, or as many texts for each prompt.

    >>> Menu(["{prompt}", "{prompt}, at night"]).texts(["a cat"])
    ['a cat', 'a cat, at night']
    >>> Menu({"a cat": ["a cat", "a kitten"]}).size
    2
    """

    entries: list[str] | dict[str, list[str]]

    @property
    def size(self) -> int:
        """Entries C of each prompt."""
        return len(self.entries) if isinstance(self.entries, list) else len(next(iter(self.entries.values())))

    def texts(self, prompts: Sequence[Any]) -> list[str]:
        """The entries of these prompts, prompt by prompt. ValueError for one that a menu of texts lacks."""
        if isinstance(self.entries, list):
            return [entry.replace(SLOT, str(prompt)) for prompt in prompts for entry in self.entries]
        missing = [str(prompt) for prompt in prompts if str(prompt) not in self.entries]
        if missing:
            raise ValueError(
                f"prompts: algorithm.menu has no entries for {missing[0]!r}; add them, or use templates with {SLOT}"
            )
        return [text for prompt in prompts for text in self.entries[str(prompt)]]


class Decisions(NamedTuple):
    """Choices of the prompts along paths, (K, rows, ...): the k-th of every path.

    t (K, rows) float64; features (K, rows, F) of the decoded x0_hat; previous (K, rows) the entry that was told until then, C
    for the prompt itself; entry (K, rows) the one that was chosen; log_prob (K, rows, C) of the policy that chose.
    """

    t: Tensor
    features: Tensor
    previous: Tensor
    entry: Tensor
    log_prob: Tensor


class PromptChooser(nn.Module):
    """`pi(c | x0_hat, prompt, t, previous) = softmax(log pi0 + f)_c` over the entries of a menu; f is 0 at the beginning.

    at: the times of its decisions, decreasing in (0, 1]; weights (C,): pi0 up to a factor, None for equal ones. Of conditions,
    those of the prompts that it begins with, it takes centre and spread. Features are standardised by the first that it is
    calibrated with. Those figures are parameters without a gradient, so that weights are whole without anything beside them.

    >>> from scoreaction.diffusion.processes import VP
    >>> chooser = PromptChooser(Menu(["{prompt}", "a {prompt}"]), [1.0], VP(), 3, torch.arange(2), weights=[1.0, 3.0])
    >>> t, previous = torch.ones(1, dtype=torch.float64), torch.tensor([2])
    >>> chooser(torch.zeros(1, 3), chooser.summary(torch.arange(1)), t, previous).exp()
    tensor([[0.2500, 0.7500]], grad_fn=<ExpBackward0>)
    """

    prior: Tensor

    def __init__(
        self,
        menu: Menu,
        at: Sequence[float],
        process: Process,
        features: int,
        conditions: Conditions,
        *,
        hidden: int = 128,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.menu, self.at, self.process = menu, tuple(at), process
        self.description = {"menu": menu.entries, "at": list(at), "hidden": hidden, "weights": weights}
        prior = torch.ones(menu.size) if weights is None else torch.tensor(weights)
        self.register_buffer("prior", (prior / prior.sum()).log(), persistent=False)
        summary = self.summary(conditions)

        def fixed(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value, requires_grad=False)

        self.centre, self.spread = fixed(torch.zeros(features)), fixed(torch.ones(features))
        self.taken = fixed(torch.zeros(()))
        self.text_centre, self.text_spread = (fixed(value) for value in _standard(summary))
        inputs = features + summary.shape[1] + 9 + menu.size + 1
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.last = nn.Linear(hidden, menu.size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def summary(self, conditions: Conditions) -> Tensor:
        """Conditions (prompts, ...) as vectors (prompts, D): features averaged over tokens, shares of class ids."""
        named = conditions if isinstance(conditions, dict) else {"": conditions}
        return torch.cat([_vectors(value) for _, value in sorted(named.items())], 1)

    @torch.no_grad()
    def calibrate(self, features: Tensor) -> None:
        """Takes centre and spread of the first features (rows, F), while f is 0 whatever they are; later calls do nothing."""
        if not bool(self.taken):
            for own, value in zip((self.centre, self.spread), _standard(features), strict=True):
                own.copy_(value)
            self.taken.fill_(1.0)

    def forward(self, features: Tensor, summary: Tensor, t: Tensor, previous: Tensor) -> Tensor:
        """log pi (rows, C) of features (rows, F), summary (rows, D), t (rows,) and previous (rows,)."""
        parts = [
            (features - self.centre) / self.spread,
            (summary - self.text_centre) / self.text_spread,
            time_features(self.process, t),
            nn.functional.one_hot(previous, self.menu.size + 1),
        ]
        hidden = self.body(torch.cat([part.to(self.centre) for part in parts], 1))
        return (self.prior + self.last(hidden)).log_softmax(1)

    def kl(self, log_prob: Tensor) -> Tensor:
        """`KL(pi || pi0)` in nats of log pi (..., C), (...)."""
        return (log_prob.exp() * (log_prob - self.prior)).sum(-1)

    def own(self, conditions: Conditions) -> Conditions:
        """The conditions of the prompts themselves, of those with all their entries."""
        return take(conditions, slice(self.prompts(conditions)))

    def prompts(self, conditions: Conditions) -> int:
        """The number of prompts that these conditions, with those of all entries after them, belong to."""
        first = next(iter(conditions.values())) if isinstance(conditions, dict) else conditions
        if first is None:
            raise ValueError("prompts: this model's policy chooses prompts, and there are none; give prompts")
        return len(first) // (1 + self.menu.size)


def _vectors(condition: Tensor | None) -> Tensor:
    """One tensor of conditions (prompts, ...) as (prompts, D) float32."""
    assert condition is not None
    value = condition.detach()
    if not value.is_floating_point() and value.dtype != torch.bool:
        value = nn.functional.one_hot(value.long() % IDS, IDS)
    value = value.float()[:, None] if value.ndim == 1 else value.float()
    return value.flatten(1, -2).mean(1) if value.ndim > 2 else value


def _standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of rows, 1 where they hardly differ."""
    spread = values.std(0, correction=0)
    return values.mean(0), torch.where(spread > 1e-6 * values.abs().amax(0), spread, torch.ones_like(spread))
