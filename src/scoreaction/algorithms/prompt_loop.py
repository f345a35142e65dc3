"""PromptLoop: a policy that chooses what a frozen model is told, by what it is about to draw (arXiv 2510.00430)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner
from scoreaction.algorithms._likelihood_ratio import clipped_surrogate, spread_is_rounding
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Largest, Loss, Term, Update, Updates
from scoreaction.algorithms._writer import Writer, write_menu
from scoreaction.diffusion.noise import Source
from scoreaction.errors import UserError
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.networks.prompt_chooser import SLOT, Menu, PromptChooser
from scoreaction.rewards import RewardError
from scoreaction.sampling.prompt_path import PromptPath, make_chooser
from scoreaction.sampling.rollout import Rollout, roll_out
from scoreaction.sampling.sampler import Sampler, follow
from scoreaction.types import Values
from scoreaction.world import World

TEMPLATES = [
    "{prompt}",
    "a photo of {prompt}",
    "{prompt}, sharp focus, highly detailed",
    "{prompt}, centred, the whole subject in view",
    "a simple picture of {prompt}, plain background",
    "{prompt}, vivid colours, soft light",
    "exactly {prompt}, nothing else",
    "{prompt}. {prompt}",
]
"""The menu that ships."""


class PromptLoop(Algorithm):
    """`max E r(x0) - beta sum_k KL(pi_k || pi_0)` over which of C texts a frozen model is told from each of K times on.

    At time t_k the policy pi sees the features of the decoded x0_hat, the prompt, the time and the text that is told; pi_0 is
    the menu's prior. The loss is PPO's clipped surrogate on the K choices alone, with the return
    `r - beta sum_{j > k} KL_j` less its mean over other samples of the prompt, and the exact KL of each choice; all divided by
    one std of the rewards, of which the fixed point is free: `pi_k ~ pi_0 exp(Q_k/beta)`. The noise of the samples
    belongs to the environment: any solver with one evaluation a step, any eta. One reward query a sample.

    menu: templates with {prompt}, a mapping from each prompt to as many texts, or a JSON file with either; null for eight
    templates that ship. writer: a server that writes the menu once, before training, where none is given. at: the times of the
    decisions, each within a step of its own. weights: pi_0 up to a factor, null for equal ones.

    >>> PromptLoop(menu=["{prompt}", "{prompt}, at night"], at=[1.0, 0.4]).beta
    0.1
    """

    name: Literal["prompt_loop"] = "prompt_loop"
    chooses_prompts: ClassVar[bool] = True
    menu: list[str] | dict[str, list[str]] | None = Field(
        None, description="templates with {prompt}, texts by prompt, or a file of either; null for eight templates that ship"
    )
    writer: Writer | None = Field(None, description="a server that writes the menu before training, where there is none")
    at: list[float] = Field([1.0, 0.6, 0.35, 0.2, 0.1], min_length=1, description="times at which a text is chosen")
    weights: list[float] | None = Field(None, description="of the menu's entries before training; null for equal ones")
    beta: float = Field(0.1, gt=0, description="reward units per nat of the choices")
    clip: float = Field(0.2, gt=0)
    epochs: int = Field(4, ge=1, description="updates an iteration")
    hidden: int = Field(128, ge=1)

    @field_validator("menu", mode="before")
    @classmethod
    def _read(cls, menu: Any) -> Any:
        """Reads a file's menu, which is kept, so that runs stand alone."""
        if not isinstance(menu, str):
            return menu
        try:
            return json.loads(Path(menu).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"no file {menu} that can be read; name one, or give a list of templates with {SLOT}") from error
        except ValueError as error:
            raise ValueError(f"{menu} is not JSON; write a list of templates, or texts by prompt") from error

    @field_validator("menu")
    @classmethod
    def _checked(cls, menu: list[str] | dict[str, list[str]] | None) -> list[str] | dict[str, list[str]] | None:
        if menu is None:
            return None
        lists = {"": menu} if isinstance(menu, list) else menu
        sizes = {len(texts) for texts in lists.values()}
        if not sizes or min(sizes) < 2:
            raise ValueError("a menu of one text leaves nothing to choose; give 2 or more")
        if len(sizes) > 1:
            raise ValueError(f"every prompt needs as many texts (got {min(sizes)} and {max(sizes)}); repeat some")
        blank = next((text for texts in lists.values() for text in texts if not text.strip()), None)
        if blank is not None:
            raise ValueError(f"the text {blank!r} is empty; write one")
        without = next((text for text in menu if SLOT not in text), None) if isinstance(menu, list) else None
        if without is not None:
            raise ValueError(f"the template {without!r} has no {SLOT}; put it where the prompt belongs")
        return menu

    @field_validator("at")
    @classmethod
    def _decreasing(cls, at: list[float]) -> list[float]:
        if not all(0 < t <= 1 for t in at) or any(s >= t for t, s in zip(at, at[1:], strict=False)):
            raise ValueError(f"times must decrease and lie in (0, 1], 1 being noise (got {at})")
        return at

    @model_validator(mode="after")
    def _weighed(self) -> PromptLoop:
        if self.writer is not None and self.menu is not None:
            raise ValueError(
                "writer: there is a menu, so that nobody would be asked; set algorithm.menu=null, or give no writer"
            )
        size = Menu(self._menu).size
        if self.weights is not None and (len(self.weights) != size or min(self.weights) <= 0):
            raise ValueError(f"weights: give a number above 0 for each of the menu's {size} entries (got {self.weights})")
        return self

    @property
    def _menu(self) -> list[str] | dict[str, list[str]]:
        """The menu; while a writer has not been asked, as many entries, all the prompt itself."""
        return (self.menu or TEMPLATES) if self.writer is None else [SLOT] * (1 + self.writer.texts)

    def settled(self, model: Model, sampler: Sampler, prompts: Sequence[Any] | None, *, seed: int, world: World) -> PromptLoop:
        """With the menu that its writer gives, where it has one and the model takes prompts, in the place of the writer."""
        writer = self.writer
        if writer is None or not prompts or model.encode is None:
            return self

        def ask() -> dict[str, list[str]]:
            try:
                menu = write_menu(model, writer, prompts, sampler=sampler, seed=seed)
                model.conditions([text for own in menu.values() for text in own])  # refused where it is known whose they are
                return menu
            except (ValueError, RewardError) as error:
                setting = str(error).partition(":")[0] in Writer.model_fields
                raise ValueError(f"algorithm.writer{'.' if setting else ': '}{error}") from error

        menu = world.broadcast(world.together(lambda: ask() if world.leads else None))
        return self.model_copy(update={"menu": menu, "writer": None})

    def resumed(self, saved: Values) -> PromptLoop:
        """With the menu that a writer gave its run when it began."""
        menu = saved.get("menu")
        if self.writer is None or not isinstance(menu, dict):
            return self
        size = Menu(menu).size - 1
        if size != self.writer.texts:
            raise UserError(f"algorithm.writer.texts: the run began with {size} texts for each prompt, and goes on with them")
        return self.model_copy(update={"menu": menu, "writer": None})

    def chooser(self, model: Model, prompts: Sequence[Any] | None) -> PromptChooser:
        """The network that chooses, for a model that takes prompts."""
        return make_chooser(model, prompts, menu=self._menu, at=self.at, hidden=self.hidden, weights=self.weights)

    def build(self, setting: Setting) -> PromptLoopLearner:
        sampler, process = setting.sampler, setting.model.process
        if setting.model.sharded:
            raise ValueError("train.shard: prompt_loop trains a small network and shares none; set it to false")
        if setting.group < 2:
            raise ValueError(
                f"train.samples_per_prompt: {self.name} compares samples of one prompt, of which a batch has"
                f" {setting.group:g}; set it to 2 or more"
            )
        first = [next((t for t in sampler.times(process)[:-1].tolist() if t <= at), 0.0) for at in self.at]
        if len(set(first)) < len(first) or min(first) <= sampler.acts_from:
            raise ValueError(
                f"algorithm.at: two of {self.at} fall on one of the {sampler.steps} steps, or one on none that the policy acts"
                " in; use fewer times, or more sampler.steps"
            )
        return PromptLoopLearner(self, setting)


class PromptLoopLearner(Learner):
    """PromptLoop at work."""

    def __init__(self, config: PromptLoop, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta)
        self.config, self.reference_rows = config, LOGGED  # the KL of the samples is only logged
        assert self.model.chooser is not None
        self.chooser = self.model.chooser

    def times(self, generator: torch.Generator) -> Tensor:
        """The sampler's grid as it is."""
        return self.sampler.times(self.process)

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the pretrained model with the prompts that the policy chooses on the way."""
        source = self.noise(generator, prompt)
        path = follow(self.model, self.sampler, self.conditions, prompt, source)
        assert isinstance(path, PromptPath)
        rollout = roll_out(self.model, self.sampler, path, prompt, source, times=times)
        return replace(rollout, decisions=path.made_decisions())

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """Passes over all choices of the batch; nothing where all rewards are equal."""
        choices, rewards = rollout.decisions, self.world.gather(rollout.rewards)
        assert choices is not None
        self.chooser.calibrate(self.world.gather(choices.features.transpose(0, 1)).flatten(0, 1))
        if spread_is_rounding(rewards):
            return
        nats = self.world.gather(self.chooser.kl(choices.log_prob.to(rollout.rewards)).T)  # (batch, K)
        values = returns(rewards, nats, self.beta)
        spread = float(rewards.std(correction=0))
        advantage = self.world.own(group_advantages(values, self.world.gather(rollout.prompt)) / spread).T.flatten()
        summary = self.chooser.summary(self.chooser.own(self.conditions))
        steps, paths = choices.entry.shape
        flat = [part.flatten(0, 1) for part in choices]
        prompt = rollout.prompt.repeat(steps)

        def loss(rows: Tensor, *, first: bool) -> Loss:
            device = self.chooser.centre.device
            t, features, previous, entry, old = (take(part, rows).to(device) for part in flat)
            log_prob = self.chooser(features, summary[prompt[rows]].to(device), t, previous)
            ratio = (log_prob - old).gather(1, entry[:, None])[:, 0]
            nats = self.chooser.kl(log_prob)
            gain = clipped_surrogate(ratio, take(advantage, rows).to(ratio), self.config.clip)
            figures: dict[str, Tensor | Largest] = {"log_ratio_first": Largest(ratio.detach().abs())} if first else {}
            figures["kl_choice_nats"] = steps * nats.detach()
            figures["switches"] = steps * (previous != entry).to(nats)
            return steps * (gain + self.beta / spread * nats), figures

        for epoch in range(self.config.epochs):
            yield Update("policy", [Term(steps * paths, partial(loss, first=epoch == 0), calls=0)])


def returns(rewards: Tensor, nats: Tensor, beta: float) -> Tensor:
    """`r - beta sum_{j > k} KL_j`, what a choice is worth beside its own KL: rewards (batch,), nats (batch, K) -> (batch, K).

    >>> returns(torch.tensor([1.0]), torch.tensor([[0.5, 0.2]]), 1.0)
    tensor([[0.8000, 1.0000]])
    """
    later = nats.flip(1).cumsum(1).flip(1) - nats
    return rewards[:, None] - beta * later.to(rewards)


def group_advantages(values: Tensor, groups: Tensor) -> Tensor:
    """`v_i - mean of v_j, j != i in its group`, 0 of one that is alone: values (batch, K), groups (batch,).

    Its gradient's mean is the exact one, so that the KL beside it has the weight that it should.

    >>> group_advantages(torch.tensor([[1.0], [3.0], [9.0]]), torch.tensor([4, 4, 7])).flatten().tolist()
    [-2.0, 2.0, 0.0]
    """
    _, number, counts = groups.unique(return_inverse=True, return_counts=True)
    number, size = number.to(values.device), counts.to(values)[number.to(values.device)][:, None]
    mean = values.new_zeros(len(counts), values.shape[1]).index_add(0, number, values / size)[number]
    return torch.where(size > 1, (values - mean) * size / (size - 1).clamp(min=1), 0)


Config = PromptLoop
