"""Groups whose rewards are all equal: nothing is learned from them, they are drawn again, or with a hint (arXiv 2510.09388)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scoreaction.algorithms._baselines import dead
from scoreaction.algorithms._learner import Draw, Learner, roll_out_chain
from scoreaction.algorithms._setting import Setting
from scoreaction.diffusion.noise import Source
from scoreaction.networks.conditions import take
from scoreaction.sampling.hints import Hint, Hinted, predicted, steered
from scoreaction.sampling.rollout import Rollout, with_rows
from scoreaction.settings import Settings
from scoreaction.types import Conditions, Prompt

KEY = "algorithm.ineffective"
STRONGER = 2.0
"""By what the guidance of a hint is above the sampler's where nothing else is said."""
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "hint": ("guidance", "prompt", "steer", "branch"),
    "weight": ("guidance", "prompt", "steer"),
    "nats": ("guidance", "prompt", "steer"),
    "guidance": ("guidance",),
    "beta": ("steer",),
    "at": ("branch",),
}
"""The hints that a setting is of; others refuse any value of it but the default."""


class Ineffective(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings for the groups of samples of one prompt whose rewards are all equal: they say nothing.

    do: `skip` them, their advantage is 0; `resample`, draw the group again; or draw it again with a `hint`. At most `tries`
    times.

    hint: stronger `guidance`, by default 2 above the sampler's; another `prompt`, the `hint` in the prompt's metadata;
    `steer`, the steps of twisted steering at `beta`; `branch`, the prompt's best earlier path, gone on with from the time `at`.
    The first three move the policy's steps, by at most `nats` of path KL, and each path counts for `weight`: `path`, its exact
    ratio dP_policy/dP_hint; `truncated`, min(1, ratio), with less variance and biased towards no change; `none`, the gradient
    at the hinted policy, as published. Steps of a branch are the policy's own: what is learned is what to do from there.

    >>> Ineffective(do="hint").weight
    'path'
    """

    do: Literal["skip", "resample", "hint"] = "skip"
    hint: Literal["guidance", "prompt", "steer", "branch"] = "guidance"
    tries: int = Field(1, ge=1, description="times that a group is drawn again at most")
    weight: Literal["path", "truncated", "none"] = "path"
    nats: float = Field(1.0, gt=0, description="path KL that a hint may move")
    guidance: float | None = Field(None, gt=0, description="of the hint guidance")
    beta: float | None = Field(None, gt=0, description="of the hint steer, reward units per nat")
    at: float = Field(0.5, gt=0, lt=1, description="of the hint branch: the time, 1 is noise")

    def check(self, setting: Setting, baseline: str) -> None:
        """ValueError, with the key and the remedy, for what does not go together."""
        for key, hints in TAKEN_BY.items():
            used = self.do == "hint" and self.hint in hints
            if not used and getattr(self, key) != type(self).model_fields[key].default:
                use = f"{KEY}.do to hint" if self.do != "hint" else f"{KEY}.hint to {' or '.join(hints)}"
                raise ValueError(
                    f"{KEY}.{key}: nothing here has use for it (got {getattr(self, key)}); leave it out, or set {use}"
                )
        if self.do == "skip":
            return
        if baseline != "group":
            raise ValueError(f"{KEY}.do: {self.do} is of groups with one prompt; set algorithm.baseline to group")
        if setting.delay:
            raise ValueError(
                f"{KEY}.do: rewards of groups that are drawn again come late too, by train.reward_delay; set it to skip"
            )
        if setting.model.sharded:
            raise ValueError("train.shard: groups are drawn again by each process alone; set it to false")
        if self.do == "hint":
            setting.model.refuse_tokens(f"{KEY}.do: hint")
            self._check_hint(setting)

    def _check_hint(self, setting: Setting) -> None:
        model, sampler = setting.model, setting.sampler
        if self.hint == "guidance":
            if setting.conditions is None or (model.null is None and model.true_cfg is None):
                raise ValueError(
                    f"{KEY}.hint: guidance needs prompts and an unconditional condition, and the model has none; use prompt,"
                    " steer or branch"
                )
            if self.guidance is not None and self.guidance <= sampler.guidance:
                raise ValueError(
                    f"{KEY}.guidance: {self.guidance:g} is no stronger than sampler.guidance {sampler.guidance:g}; raise it"
                )
        if self.hint == "prompt":
            without = [repr(str(prompt)) for prompt in setting.prompts or ["null"] if not hint_of(prompt)]
            if without:
                raise ValueError(
                    f"{KEY}.hint: prompt needs a hint in the metadata of each, and there is none of {', '.join(without[:3])}"
                    + (" and others" if len(without) > 3 else "")
                )
        if self.hint == "steer":
            if not setting.reward.differentiable:
                raise ValueError(
                    f"{KEY}.hint: steer needs the reward's gradient and this one has none; use guidance, prompt or branch"
                )
            if self.beta is None:
                raise ValueError(f"{KEY}.beta: steer needs it; set it, in reward units per nat")
        if self.hint == "branch":
            times = sampler.times(model.process)
            if not bool(((times[1:-1] <= self.at) & model.process.has_density(times[2:])).any()):
                raise ValueError(f"{KEY}.at: no step between t = {self.at:g} and the data has noise; raise it")


def hint_of(prompt: Any) -> str | None:
    """The hint in a prompt's metadata, None where there is none."""
    return prompt.metadata.get("hint") if isinstance(prompt, Prompt) else None


class BestStates(nn.Module):
    """Of each prompt the state at one time on the path with the highest reward so far; kept in checkpoints."""

    x: Tensor
    reward: Tensor

    def __init__(self, prompts: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("x", torch.zeros(prompts, *shape))
        self.register_buffer("reward", torch.full((prompts,), -torch.inf))

    def remember(self, learner: Learner, rollout: Rollout, step: int, rewards: Tensor, groups: Tensor) -> None:
        """Takes what is better in a rollout; rewards and groups (batch,) of all processes."""
        world, best = learner.world, []
        for prompt in groups.unique().tolist():
            rows = (groups == prompt).nonzero().flatten()
            row = int(rows[rewards[rows].argmax()])
            if float(rewards[row]) > float(self.reward[prompt]):
                best.append(row)
        if not best:
            return
        rows = torch.tensor(best)
        place = (rows % world.size == world.rank).nonzero().flatten()
        states = world.merged(take(rollout.x[step], rows[place] // world.size), place, len(rows))
        at = groups[rows].to(self.reward.device)
        self.x[at], self.reward[at] = states.to(self.x), rewards[rows].to(self.reward)


class Redrawn:
    """Groups that are drawn again, for a learner by likelihood ratios."""

    def __init__(self, learner: Learner, settings: Ineffective, setting: Setting) -> None:
        self.learner, self.settings = learner, settings
        self.hints: Conditions = None
        if settings.do == "hint" and settings.hint == "prompt":
            self.hints = learner.model.conditions([hint_of(prompt) for prompt in setting.prompts or []])
        if settings.do == "hint" and settings.hint == "branch":
            learner.networks["best_states"] = BestStates(len(setting.prompts or [None]), learner.model.shape)

    def __call__(self, rollout: Rollout, draw: Draw) -> tuple[Rollout, dict[str, float]]:
        """The rollout with its dead groups drawn again, and figures for the log."""
        world, settings = self.learner.world, self.settings
        groups = world.gather(rollout.prompt)
        first = rewards = world.gather(rollout.rewards)
        without = dead(rewards, groups)
        figures = {"dead_groups": len(groups[without.cpu()].unique()) / len(groups.unique())}
        if settings.do == "skip":
            return rollout, figures
        paths = Paths(rollout)
        step = self._branch_step(rollout.times)
        if step is not None:
            self.best.remember(self.learner, rollout, step, rewards, groups)
        ever = torch.zeros_like(without)
        for _ in range(settings.tries):
            rows = (without if step is None else without & self._better(rewards, groups)).nonzero().flatten().cpu()
            if len(rows) == 0:
                break
            ever[rows] = True
            rollout = self._drawn(rollout, draw, rows, paths, step)
            rewards = world.gather(rollout.rewards)
            without = without & dead(rewards, groups)
        if not bool(ever.any()):
            return rollout, figures
        return self._weighted(rollout, paths), figures | self._figures(paths, ever.cpu(), first, rewards)

    @property
    def best(self) -> BestStates:
        """The states that branches begin at."""
        kept = self.learner.networks["best_states"]
        assert isinstance(kept, BestStates)
        return kept

    def _branch_step(self, times: Tensor) -> int | None:
        """The number of the state that branches begin at, None without them."""
        if self.settings.do != "hint" or self.settings.hint != "branch":
            return None
        return int((times <= self.settings.at).nonzero()[0])

    def _better(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """True where an earlier path of the prompt had a higher reward."""
        return self.best.reward.to(rewards)[groups.to(rewards.device)] > rewards * (1 + 1e-6 * rewards.sign())

    def _drawn(self, rollout: Rollout, draw: Draw, rows: Tensor, paths: Paths, step: int | None) -> Rollout:
        """These rows of all drawn again: by the policy, by a hint, or from where branches begin."""
        world = self.learner.world
        hinted: list[Hinted] = []
        own = rows[rows % world.size == world.rank] // world.size
        explore = partial(self._explore, rollout.times, step, hinted.append)
        new = draw(explore, rows)
        if new is None:
            return rollout
        if hinted:
            paths.log_weight[own] = torch.cat([hint.log_weight for hint in hinted])
            paths.kl[own] = torch.cat([hint.kl for hint in hinted])
        if step is not None:
            paths.begins[own] = step
        return with_rows(rollout, own, new)

    def _explore(
        self, times: Tensor, step: int | None, seen: Callable[[Hinted], None], prompt: Tensor, noise: Source
    ) -> Rollout:
        learner, settings = self.learner, self.settings
        if step is not None:
            x = take(self.best.x, prompt).to(learner.model.device)
            return roll_out_chain(learner, prompt, times[step:], noise, x=x)
        if settings.do == "resample":
            return roll_out_chain(learner, prompt, times, noise)
        noise = learner.noise(noise, prompt)
        x = learner.model.start(len(prompt), noise)
        moved = learner.process.has_density(times[1:]) & (times[:-1] >= learner.sampler.acts_from)
        hint = Hinted(self._hint(prompt), x, moved, settings.nats)
        rollout = roll_out_chain(learner, prompt, times, noise, x=x, choose=hint.chooser(noise))
        seen(hint)
        return rollout

    def _hint(self, prompt: Tensor) -> Hint:
        learner, settings = self.learner, self.settings
        if settings.hint == "prompt":
            return predicted(learner.model, learner.sampler, self.hints, prompt)
        if settings.hint == "guidance":
            stronger = settings.guidance or learner.sampler.guidance + STRONGER
            sampler = learner.sampler.model_copy(update={"guidance": stronger})
            return predicted(learner.model, sampler, learner.conditions, prompt)
        assert settings.beta is not None
        return steered(lambda x, t: learner.reward(learner.policy(x, t, prompt).x0, prompt), settings.beta)

    def _weighted(self, rollout: Rollout, paths: Paths) -> Rollout:
        """The rollout with what each step of each path counts for: nothing before a branch."""
        weight = {"path": paths.log_weight.exp(), "truncated": paths.log_weight.exp().clamp(max=1)}
        path = weight.get(self.settings.weight, torch.ones_like(paths.log_weight))
        return replace(rollout, weight=path * (torch.arange(len(rollout.times) - 1)[:, None] >= paths.begins))

    def _figures(self, paths: Paths, ever: Tensor, first: Tensor, rewards: Tensor) -> dict[str, float]:
        """Figures of the paths that were drawn again, in the end."""
        hinted = self.settings.do == "hint"
        figures = {"redrawn_paths": float(ever.sum()), "redrawn_reward": float(rewards[ever.to(rewards.device)].mean())}
        if hinted and self.settings.hint != "branch":
            world = self.learner.world
            kl, weight = (world.gather(values)[ever] for values in (paths.kl, paths.log_weight.exp()))
            figures |= {
                "hint_kl_nats": float(kl.mean()),
                "hint_ess": float(weight.sum() ** 2 / weight.square().sum() / len(weight)),
            }
        return figures


class Paths:
    """Log dP_policy/dP_behaviour of own paths, the KL of the behaviour, and the step that they begin at, (batch,) each."""

    def __init__(self, rollout: Rollout) -> None:
        batch = rollout.x.shape[1]
        self.log_weight, self.kl = (torch.zeros(batch, dtype=torch.float64) for _ in range(2))
        self.begins = torch.zeros(batch, dtype=torch.long)
