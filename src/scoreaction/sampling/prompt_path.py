"""Predictions of the pretrained model along paths whose prompts are chosen on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, apart, normal
from scoreaction.diffusion.predictions import mapped
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.networks.prompt_chooser import Decisions, Menu, PromptChooser
from scoreaction.types import Conditions, Prediction


class PromptPath:
    """`predict(x, t)` of one batch of paths from t = 1: at each time of the model's chooser it picks an entry of the menu.

    At the first call at or below such a time x0_hat of what is told is decoded, and its features, the prompt, the time and the
    entry of before say which entry is told from there on; rows whose entry changes are evaluated again. Several times
    between two steps are one decision. Below `off_below` the prompt itself is told. The choices have noise of their own, that
    of the samples is as without them. conditions are those of all prompts with their entries, prompt (rows,) the numbers.
    """

    def __init__(
        self, model: Model, conditions: Conditions, prompt: Tensor, noise: Source | None, *, guidance: float, off_below: float
    ) -> None:
        assert model.chooser is not None
        assert noise is not None
        self.model, self.conditions, self.prompt, self.guidance, self.off = model, conditions, prompt, guidance, off_below
        self.chooser: PromptChooser = model.chooser
        self.noise, self.count, self.made = apart(noise), self.chooser.prompts(conditions), 0
        self.previous = torch.full_like(prompt, self.chooser.menu.size)
        self.decisions: list[Decisions] = []

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        if float(t) < self.off:
            return self._predict(x, t, self.prompt)
        prediction = self._predict(x, t, self.rows)
        due = sum(float(t) <= at for at in self.chooser.at)
        if due == self.made or len(self.prompt) == 0:  # of a process without rows
            return prediction
        self.made, before = due, self.previous
        self._decide(t, prediction)
        changed = (self.previous != before).nonzero().flatten()
        if len(changed) == 0:
            return prediction
        again = self._predict(take(x, changed), t, self.rows[changed])
        return mapped(lambda whole, part: whole.index_copy(0, changed.to(whole.device), part), prediction, again)

    @property
    def rows(self) -> Tensor:
        """The rows of the conditions that are told."""
        size = self.chooser.menu.size
        return torch.where(self.previous == size, self.prompt, self.count + self.prompt * size + self.previous)

    def _predict(self, x: Tensor, t: Tensor, rows: Tensor) -> Prediction:
        return self.model.reference(x, t, self.conditions, prompt=rows, guidance=self.guidance)

    @torch.no_grad()
    def _decide(self, t: Tensor, prediction: Prediction) -> None:
        features = features_of(self.model, prediction.x0)
        times = t.double().cpu().expand(len(features))
        summary = self.chooser.summary(self.chooser.own(self.conditions))[self.prompt]
        device = self.chooser.centre.device
        log_prob = self.chooser(features, summary.to(device), times.to(device), self.previous.to(device)).cpu()
        uniform = torch.special.ndtr(normal((len(features),), self.noise, torch.float64))
        entry = (log_prob.double().exp().cumsum(1) < uniform[:, None]).sum(1).clamp(max=self.chooser.menu.size - 1)
        self.decisions.append(Decisions(times, features, self.previous, entry, log_prob))
        self.previous = entry

    @property
    def kl(self) -> Tensor:
        """`sum_k KL(pi_k || pi0)` of each path in nats, (rows,)."""
        nats = [self.chooser.kl(decided.log_prob.to(self.chooser.prior.device)).cpu() for decided in self.decisions]
        return torch.stack([*nats, torch.zeros(len(self.prompt))]).sum(0)

    def made_decisions(self) -> Decisions:
        """All decisions so far, (K, rows, ...)."""
        return Decisions(*(torch.stack(parts) for parts in zip(*self.decisions, strict=True)))


@torch.no_grad()
def features_of(model: Model, x0: Tensor) -> Tensor:
    """Features (rows, F) float32 of x0 before decoding, as many rows at a time as the model takes."""
    parts = x0.split(model.max_rows or max(1, len(x0)))
    return torch.cat([model.features(model.decode(part)).float() for part in parts])


def make_chooser(
    model: Model,
    prompts: Sequence[Any] | None,
    *,
    menu: list[str] | dict[str, list[str]],
    at: Sequence[float],
    hidden: int,
    weights: Sequence[float] | None,
) -> PromptChooser:
    """That of a model and the prompts that it begins with. ValueError where there are none."""
    model.refuse_tokens("prompt_loop, which looks at x0_hat,")
    if model.encode is None:
        raise ValueError("algorithm.name: prompt_loop chooses what a model is told, and this one takes no prompts")
    if not prompts:
        raise ValueError("prompts: prompt_loop chooses among texts for prompts, and there are none; give prompts")
    Menu(menu).texts(prompts)
    width = features_of(model, model.example(1, torch.Generator().manual_seed(0))).shape[1]
    conditions = model.conditions(list(prompts))
    return PromptChooser(Menu(menu), at, model.process, width, conditions, hidden=hidden, weights=weights)
