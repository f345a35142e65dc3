"""Predictions of the pretrained model along paths whose prompts are chosen on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, apart, normal
from scoreaction.diffusion.predictions import mapped
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.networks.prompt_chooser import Decisions, PromptChooser, features_of
from scoreaction.types import Conditions, Prediction


class PromptPath:
    """`predict(x, t)` of one batch of paths from t = 1: at each time of the model's chooser it picks an entry of the menu.

    At the first call at or below such a time x0_hat of what is told is decoded, and its features, the prompt, the time and the
    entry that is held say which entry is told from there on; rows whose entry changes are evaluated again. Several times
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
        self.held = torch.full_like(prompt, self.chooser.menu.size)
        self.decisions: list[Decisions] = []

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        if float(t) < self.off:
            return self._told(x, t, self.prompt)
        prediction = self._told(x, t, self.rows)
        due = sum(float(t) <= at for at in self.chooser.at)
        if due == self.made:
            return prediction
        self.made, before = due, self.held
        self._decide(t, prediction)
        changed = (self.held != before).nonzero().flatten()
        if len(changed) == 0:
            return prediction
        again = self._told(take(x, changed), t, self.rows[changed])
        return mapped(lambda whole, part: whole.index_copy(0, changed.to(whole.device), part), prediction, again)

    @property
    def rows(self) -> Tensor:
        """The rows of the conditions that are told."""
        size = self.chooser.menu.size
        return torch.where(self.held == size, self.prompt, self.count + self.prompt * size + self.held)

    def _told(self, x: Tensor, t: Tensor, rows: Tensor) -> Prediction:
        return self.model.reference(x, t, self.conditions, prompt=rows, guidance=self.guidance)

    @torch.no_grad()
    def _decide(self, t: Tensor, prediction: Prediction) -> None:
        features = features_of(self.model, prediction.x0)
        times = t.double().cpu().expand(len(features))
        summary = self.chooser.summary(self.chooser.own(self.conditions))[self.prompt]
        device = self.chooser.centre.device
        log_prob = self.chooser(features, summary.to(device), times.to(device), self.held.to(device)).cpu()
        uniform = torch.special.ndtr(normal((len(features),), self.noise, torch.float64))
        entry = (log_prob.double().exp().cumsum(1) < uniform[:, None]).sum(1).clamp(max=self.chooser.menu.size - 1)
        self.decisions.append(Decisions(times, features, self.held, entry, log_prob))
        self.held = entry

    @property
    def kl(self) -> Tensor:
        """`sum_k KL(pi_k || pi0)` of each path in nats, (rows,)."""
        nats = [self.chooser.kl(decided.log_prob.to(self.chooser.prior.device)).cpu() for decided in self.decisions]
        return torch.stack([*nats, torch.zeros(len(self.prompt))]).sum(0)

    def made_decisions(self) -> Decisions:
        """All decisions so far, (K, rows, ...)."""
        return Decisions(*(torch.stack(parts) for parts in zip(*self.decisions, strict=True)))
