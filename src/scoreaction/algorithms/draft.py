"""DRaFT: the reward's gradient back through the last sampling steps (Clark et al. 2023, arXiv 2309.17400); DRaFT-K and -LV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoreaction.algorithms._backprop import refuse_unfit, visited_kl
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner, roll_out_policy
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._step import StepWeights
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.diffusion.noise import RowNoise, Source, normal
from scoreaction.diffusion.predictions import expand, mapped
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.diffusion.transitions import Transition, sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.memory import fitting
from scoreaction.sampling.rollout import Rollout, followed
from scoreaction.types import Prediction


class DRaFT(Algorithm):
    """`max E r(x0) - beta KL`, differentiated through the policy's last `last` steps (all with null), noise held fixed.

    One update an iteration, one reward query a sample. low_variance n > 0 is DRaFT-LV: x0 is noised to the last step's time n
    times and denoised in one step, n queries more (its algorithm 1): a sum of 1 + n rewards, and of as many KLs. beta = 0, as
    published and whatever model or recipe have for others, has no KL: `kl_nats` in the log is then an estimate from a few
    states of each step. With beta the path KL is charged at all steps, its gradient exact within the differentiated ones and
    local before (`rows` points). With gradient_checkpointing a step's activations are computed again in its backward: memory
    of one step, a third more work.

    >>> DRaFT(last=2).beta
    0.0
    """

    name: Literal["draft"] = "draft"
    beta: float = Field(0.0, ge=0)
    last: int | None = Field(1, ge=1)
    low_variance: int = Field(0, ge=0)
    rows: int = Field(160, ge=1)
    gradient_checkpointing: bool = False

    def build(self, setting: Setting) -> DRaFTLearner:
        refuse_unfit(setting, self.name, self.beta)
        if self.last is not None and self.last > setting.sampler.steps:
            raise ValueError(f"algorithm.last: there are {setting.sampler.steps} steps; lower it, or null for all of them")
        if self.low_variance and self.last != 1:
            raise ValueError("algorithm.low_variance: is written for the last step alone; set algorithm.last to 1")
        return DRaFTLearner(self, setting)


class _End(NamedTuple):
    """The last steps of trajectories: x0 and the path KL (rows,) with their graph, the states and predictions without."""

    x0: Tensor
    cost: Tensor
    states: list[Tensor]
    predictions: list[Prediction]


class DRaFTLearner(Learner):
    """DRaFT at work: the last steps are differentiated as they are drawn, one part of the batch after another.

    Their gradient waits for the update, which evaluates them no more. Where the reward cannot be asked `at_once` they are drawn
    without a graph, and the update runs them again.
    """

    reward_gradient = True
    asks_in_its_update = True
    slope: list[tuple[Tensor, Tensor]] | None = None
    """Each parameter and its gradient, of the trajectories that were explored; None where the update is to find it."""

    def __init__(self, config: DRaFT, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta)
        self.config = config
        self.last = config.last or setting.sampler.steps
        self.price = config.beta * (1 + config.low_variance)  # of the KL beside the sum of rewards
        self.reference_rows = None if config.beta else LOGGED  # without a KL it is only logged

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """A trajectory for each prompt; at once with the rewards, and their gradient as `slope`."""
        self.slope = None
        if not self.reward.at_once():
            return super().explore(prompt, times, generator)
        first, source = self._first(times), self.noise(generator, prompt)
        if not first:
            return self._explored_end(self.model.start(len(prompt), source), prompt, times, source)
        start = roll_out_policy(self, prompt, times[: first + 1], generator)
        return followed(start, self._explored_end(start.x0, prompt, times[first:], source))

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One update: the reward through the last steps, and where there is a KL its part at the steps before."""
        n, batch = rollout.size
        first, terms = self._first(rollout.times), []
        if self.beta and first:
            rows = self.world.dealt(first, batch, self.config.rows, generator)
            terms.append(visited_kl(self, rollout, rows, (1 + self.config.low_variance) * first / n))
        source = self.noise(RowNoise.drawn(generator, self.world.stripe(batch * self.world.size)), rollout.prompt)
        if self.slope is None:
            terms.append(Term(batch, partial(self._again, rollout, first), calls=self._graphs(rollout.times[first:])))
        else:
            terms.append(Term(batch, partial(_known, self.slope), calls=0))
            self.slope = None
        for _ in range(self.config.low_variance):
            terms.append(Term(batch, partial(self._renoised, rollout, normal(rollout.x0.shape, source))))
        yield Update("policy", terms)

    def _first(self, times: Tensor) -> int:
        """The number of the first step that is differentiated."""
        return max(0, self._acted(times) - self.last)

    def _acted(self, times: Tensor) -> int:
        return int((times[:-1] >= self.sampler.acts_from).sum())

    def _graphs(self, times: Tensor) -> int:
        """Evaluations whose activations are there at a time: one with gradient checkpointing, else all on these times.

        With a KL the reference's are among them, but for the first of the steps.
        """
        return 1 if self.config.gradient_checkpointing else len(times) - 1 + (self._acted(times) - 1 if self.beta else 0)

    def _explored_end(self, x: Tensor, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """The last steps from x with their rewards, in parts that memory holds."""
        noise = [normal(x.shape, generator, x.dtype).to(x) for _ in times[1:]]
        graphs = self._graphs(times)
        graphs += not self.config.gradient_checkpointing  # decoder and reward, beside the graph of the steps
        work = partial(self._differentiated, x, prompt, times, noise, graphs)
        return fitting(self.model, len(x) * graphs, work)

    def _differentiated(
        self, x: Tensor, prompt: Tensor, times: Tensor, noise: list[Tensor], graphs: int, limit: int
    ) -> Rollout:
        """The last steps from x, with at most `limit` rows in graphs, `graphs` a row; the gradient of their mean is `slope`."""
        parameters, ends, rewards = [*self.model.parameters.values()], [], []
        for p in parameters:
            p.grad = None
        for rows in torch.arange(len(x)).split(max(1, limit // graphs)):
            follow = partial(_drawn, [take(z, rows) for z in noise])
            with torch.enable_grad():
                end = self._end(take(x, rows), times, take(prompt, rows), follow)
                scores, gradient = self._scored(end.x0, take(prompt, rows))
                loss = (self.price * end.cost - sum_event(gradient * end.x0)).sum() / len(x)
                if loss.requires_grad:
                    loss.backward()
            ends.append((end.states, end.predictions))
            rewards.append(scores)
        self.slope = [(p, p.grad) for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad = None
        states, old = (
            torch.cat([torch.stack(part) for part, _ in ends], 1),
            mapped(lambda *parts: torch.cat(parts, 1), *(mapped(_stack, *part) for _, part in ends)),
        )
        x = torch.cat([x[None], states])
        return Rollout(times, x, old, old, prompt, torch.cat(rewards), off_below=self.sampler.acts_from)

    def _scored(self, x0: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and their gradient by x0; both 0 where samples are not finite, which nobody can score."""
        if not bool(torch.isfinite(x0).all()):
            return x0.new_zeros(len(x0)), torch.zeros_like(x0)
        leaf = x0.detach().requires_grad_(True)
        scores = self.reward(leaf, prompt)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]

    def _again(self, rollout: Rollout, first: int, rows: Tensor) -> Loss:
        """`-r(x0) + beta KL` of these trajectories as its gradient: the stored states, with the graph from step `first` on."""
        assert rollout.reward_gradient is not None
        stored = take(rollout.x[first:].transpose(0, 1), rows).transpose(0, 1)

        def follow(i: int, step: Transition) -> Tensor:
            return stored[i + 1]

        end = self._end(stored[0], rollout.times[first:], take(rollout.prompt, rows), follow)
        return self.price * end.cost - sum_event(take(rollout.reward_gradient, rows) * end.x0), {}

    def _end(self, x: Tensor, times: Tensor, prompt: Tensor, follow: Callable[[int, Transition], Tensor]) -> _End:
        """The steps on these times from x, with their graph, noise held fixed; `follow` has the states that they lead to."""
        cost, states, predictions = x.new_zeros(len(x)), [], []
        for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
            prediction = self._checkpointed(self.policy, x, t, prompt)
            if self.beta and t >= self.sampler.acts_from:
                with torch.set_grad_enabled(x.requires_grad):  # at the first of the steps it needs none
                    pretrained = self._checkpointed(self.pretrained, x, t, prompt)
                weight = StepWeights.of_step(self.process, t, s, self.sampler.eta).cost.to(x) / 2
                cost = cost + weight * sum_event((prediction.x0 - pretrained.x0) ** 2)
            step = ddim_step(self.process, prediction, t, s, self.sampler.eta)
            states.append(follow(i, step))
            predictions.append(mapped(torch.detach, prediction))
            x = states[-1] + (step.mean - step.mean.detach())
        return _End(x, cost, states, predictions)

    def _checkpointed(
        self, predict: Callable[[Tensor, Tensor, Tensor], Prediction], x: Tensor, t: Tensor, prompt: Tensor
    ) -> Prediction:
        """A prediction; with gradient checkpointing its activations are computed again in the backward, and counted again."""
        if not self.config.gradient_checkpointing:
            return predict(x, t, prompt)
        return Prediction(*checkpoint(lambda x: tuple(predict(x, t, prompt)), x, use_reentrant=False))

    def _renoised(self, rollout: Rollout, z: Tensor, rows: Tensor) -> Loss:
        """`-r(x0_hat(alpha x0 + sigma z))` at the time of the policy's last step."""
        t, x0, prompt = rollout.acted[-2], take(rollout.x0, rows), take(rollout.prompt, rows)
        alpha, sigma = (expand(part, x0) for part in (self.process.alpha(t), self.process.sigma(t)))
        x = alpha * x0 + sigma * take(z, rows).to(x0)
        return -self.reward(self.policy(x, t, prompt).x0, prompt), {}


def _known(slope: list[tuple[Tensor, Tensor]], rows: Tensor) -> Loss:
    """A loss with this gradient, the same for each of the rows."""
    parts = [(p * gradient).sum().to(torch.float32) for p, gradient in slope]
    return (torch.stack(parts).sum() if parts else torch.zeros(())).expand(len(rows)), {}


def _drawn(noise: list[Tensor], i: int, step: Transition) -> Tensor:
    """The state that step i draws with this noise."""
    return step.mean.detach() + expand(step.std, step.mean) * noise[i]


def _stack(*parts: Tensor) -> Tensor:
    return torch.stack(parts)


Config = DRaFT
