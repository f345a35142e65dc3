"""The likelihood-ratio kernel: log densities of the steps that were taken, advantages, the clipped surrogate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Setting, Update
from scoreaction.diffusion.transitions import Transition
from scoreaction.sampling.experience import Experience, Points
from scoreaction.types import Prediction


def refuse_without_density(setting: Setting, algorithm: str) -> None:
    """ValueError unless every step but a noiseless one has a density that can be had again, and one step has noise."""
    solver, process = setting.sampler.find(), setting.model.process
    if setting.sampler.eta == 0:
        raise ValueError(f"sampler.eta: {algorithm} needs densities and eta 0 has none; set sampler.eta above 0, 1 is safe")
    if not solver.markov:
        raise ValueError(
            f"sampler.solver: {algorithm} needs densities and {setting.sampler.solver} looks back; use ddim or euler_maruyama"
        )
    if not bool((process.sigma2(setting.sampler.times(process)[1:]) > 0).any()):
        raise ValueError(f"sampler.steps: no step has a density, which {algorithm} needs; use more of them, at least 2")


@dataclass(frozen=True)
class Steps:
    """All steps of an iteration that have a density, steps outermost.

    points (rows,); s (rows,) where the step went; outcome (rows, *shape) what was drawn; old what the behaviour policy
    predicted, reference what the pretrained model did (None where not asked); trajectory and index (rows,): which path and
    which step. With exploration > 0 the outcome is the action eps, of std `exploration`; else it is x_s.
    """

    points: Points
    s: Tensor
    outcome: Tensor
    old: Prediction
    reference: Prediction | None
    trajectory: Tensor
    index: Tensor
    exploration: float

    def take(self, rows: Tensor) -> Steps:
        """These rows."""
        reference = None if self.reference is None else Prediction(self.reference.x0[rows], self.reference.eps[rows])
        return Steps(
            self.points.take(rows),
            self.s[rows],
            self.outcome[rows],
            Prediction(self.old.x0[rows], self.old.eps[rows]),
            reference,
            self.trajectory[rows],
            self.index[rows],
            self.exploration,
        )


def steps_taken(setting: Setting, experience: Experience, *, exploration: float = 0.0, above: float = 0.0) -> Steps:
    """The steps from times later than `above` that have a density: not the last where its std is 0, not pure noise when
    exploring.
    """
    batch = experience.size[1]
    rollout, reference, process = experience.rollout, experience.reference, setting.model.process
    if exploration > 0:
        has_density = process.alpha(rollout.times[:-1]) > 0
        outcome = rollout.action.eps
    else:
        has_density = process.sigma2(rollout.times[1:]) > 0
        outcome = rollout.x[1:]
    kept = (has_density & (rollout.times[:-1] > above)).nonzero().flatten()
    if len(kept) == 0:
        where = f" above time {above:g}" if above > 0 else ""
        raise ValueError(f"sampler.steps: no step{where} has a density to learn from; use more of them, at least 2")
    part = slice(int(kept[0]), int(kept[-1]) + 1)  # only the ends of a path lack one: views of the rollout, no copies
    full = reference is not None and reference.eps.shape[1] == batch
    trajectory = torch.arange(batch).repeat(len(kept))
    return Steps(
        Points(rollout.x[part].flatten(0, 1), rollout.times[part].repeat_interleave(batch), experience.conditions, trajectory),
        rollout.times[1:][part].repeat_interleave(batch),
        outcome[part].flatten(0, 1),
        _flattened(rollout.prediction, part),
        _flattened(reference, part) if full and reference is not None else None,
        trajectory,
        kept.repeat_interleave(batch),
        exploration,
    )


def _flattened(prediction: Prediction, part: slice) -> Prediction:
    """These steps of (N, batch, *shape), as (rows, *shape)."""
    return Prediction(prediction.x0[part].flatten(0, 1), prediction.eps[part].flatten(0, 1))


def transition(setting: Setting, prediction: Prediction, steps: Steps) -> Transition:
    """The law of the outcome of these steps, for these predictions."""
    if steps.exploration > 0:
        return Transition(prediction.eps, torch.tensor(steps.exploration, dtype=torch.float64))
    sampler = setting.sampler
    points = steps.points
    return sampler.find().step(setting.model.process, _never, prediction, points.x, points.t, steps.s, sampler.eta, None)


def _never(x: Tensor, t: Tensor) -> Prediction:
    raise AssertionError("a step with a density asks the network once")


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """`-min(rho A, clip(rho, 1-e, 1+e) A)` with `rho = exp(log_ratio)`, (rows,). Schulman et al. 2017 (1707.06347), eq. 7.

    The ratio is of densities summed over dimensions. Without a clip: `-rho A`, whose gradient at rho = 1 is REINFORCE's.

    >>> clipped_surrogate(torch.tensor([0.5]), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    ratio = torch.exp(log_ratio)
    if clip is None:
        return -ratio * advantage
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def spread_is_rounding(rewards: Tensor) -> bool:
    """Whether rewards differ by no more than rounding: max - min against a relative 1e-6."""
    return float(rewards.max() - rewards.min()) <= 1e-6 * float(rewards.abs().max())


def standardised(rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """`(r - mean)/std` over all or within each group; 0 where rewards differ by rounding only, (batch,).

    >>> standardised(torch.tensor([1.0, 3.0])).tolist()
    [-1.0, 1.0]
    """
    if groups is None:
        if spread_is_rounding(rewards):
            return torch.zeros_like(rewards)
        return (rewards - rewards.mean()) / rewards.std(correction=0)
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        out[groups == group] = standardised(rewards[groups == group])
    return out


Penalty = Callable[[Prediction, Steps], Tensor]


def step_kl(setting: Setting, prediction: Prediction, steps: Steps) -> Tensor:
    """`KL(p_theta(x_s|x_t) || p_pre(x_s|x_t))` of these steps, (rows,)."""
    if steps.reference is None:
        raise ValueError("the KL of a step needs the reference's prediction")
    return transition(setting, prediction, steps).kl(transition(setting, steps.reference, steps))


def ratio_updates(
    learner: Learner,
    steps: Steps,
    advantage: Tensor,
    *,
    penalty: Penalty | None,
    clip: float | None,
    epochs: int,
    minibatches: int,
    generator: torch.Generator,
) -> Iterator[Update]:
    """Passes over all steps in shuffled minibatches; yields `sum over steps of surrogate + penalty`, mean over paths.

    advantage (rows,), one a step. The first minibatch of an iteration is scored by the policy that sampled it, so its
    largest absolute log-ratio (`log_ratio_first`) must be rounding.
    """
    setting = learner.setting
    per_path = len(steps.s) / len(steps.trajectory.unique())
    for epoch in range(epochs):
        for number, batch in enumerate(torch.randperm(len(steps.s), generator=generator).chunk(minibatches)):
            pieces = batch.split(setting.max_rows)
            for i, rows in enumerate(pieces):
                part = steps.take(rows)
                prediction = learner.policy(part.points.conditions)(part.points.x, part.points.t)
                now, then = transition(setting, prediction, part), transition(setting, part.old, part)
                log_ratio = now.log_ratio(then, part.outcome)
                loss = clipped_surrogate(log_ratio, advantage[rows], clip)
                if penalty is not None:
                    loss = loss + penalty(prediction, part)
                moved = log_ratio.detach()
                metrics = {"log_ratio": float(moved.abs().max())}
                if clip is not None:
                    metrics["clip_fraction"] = float((moved.exp() - 1).abs().gt(clip).float().mean())
                if epoch == number == i == 0:
                    metrics["log_ratio_first"] = metrics["log_ratio"]
                yield Update(loss.sum() * per_path / len(batch), "policy", metrics, step=i == len(pieces) - 1)
