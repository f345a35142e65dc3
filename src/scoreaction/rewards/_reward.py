"""What a reward is to a run: checked and counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from scoreaction.types import EVERY, Background, RewardFunction


class RewardError(RuntimeError):
    """The reward raised, or gave what is not one finite number a sample."""


class Reward:
    """A function as a reward: `fn(samples, conditions) -> (batch,)`, higher is better.

    conditions are the samples' prompts, None without. `differentiable=True` promises that gradients flow from the result to
    the samples; a plain function given where a reward is asked for is taken as black-box.

    >>> Reward(lambda samples, conditions: samples.sum(1), differentiable=True)(torch.ones(2, 3), None)
    tensor([3., 3.])
    """

    def __init__(self, fn: Callable[[Tensor, Any], Tensor], *, differentiable: bool = False) -> None:
        self.fn, self.differentiable = fn, differentiable

    def __call__(self, samples: Tensor, conditions: Any) -> Tensor:
        return self.fn(samples, conditions)


def as_reward(reward: RewardFunction | Callable[[Tensor, Any], Tensor]) -> RewardFunction:
    """The reward itself; a plain function as a black box."""
    return cast("RewardFunction", reward if hasattr(reward, "differentiable") else Reward(reward))


def _version(samples: Tensor) -> int:
    """How often they were written into, as far as torch counts it."""
    return 0 if samples.is_inference() else samples._version


class CountedReward:
    """A reward as a run uses it: every row is counted in `queries`, every answer is checked (RewardError)."""

    def __init__(self, reward: RewardFunction | Callable[[Tensor, Any], Tensor], *, name: str = "reward") -> None:
        self.reward = as_reward(reward)
        self.name, self.queries = name, 0
        self.differentiable = self.reward.differentiable

    def __call__(self, samples: Tensor, prompts: list[Any] | None) -> Tensor:
        return self.begin(samples, prompts)()

    def begin(self, samples: Tensor, prompts: list[Any] | None) -> Callable[[], Tensor]:
        """Begins to score; calling what it gives waits for the checked scores. Only a `Background` reward works meanwhile."""
        self.queries += len(samples)
        before = _version(samples)
        scores = self._tried(partial(self._begun, samples, prompts))
        if _version(samples) != before:
            raise RewardError(
                f"{self.name}: changes its samples in place, which are measured after it; begin with samples.clone()"
            )
        return lambda: self._checked(self._tried(scores), samples)

    @property
    def rows(self) -> int | None:
        """How many samples it is best given at a time while other work goes on; None: it does not work in the background."""
        return self.reward.rows if isinstance(self.reward, Background) and self.reward.rows < EVERY else None

    def begin_decoded(self, x0: Tensor, decode: Callable[[Tensor], Tensor], prompts: list[Any] | None) -> Callable[[], Tensor]:
        """Begins to score decode(x0), in the background part by part while the next is decoded; see `begin`."""
        rows = self.rows or len(x0)
        parts = range(0, len(x0), rows)
        begun = [self.begin(decode(x0[i : i + rows]), None if prompts is None else prompts[i : i + rows]) for i in parts]
        return lambda: torch.cat([scores() for scores in begun])

    def _begun(self, samples: Tensor, prompts: list[Any] | None) -> Callable[[], Any]:
        if isinstance(self.reward, Background):
            return self.reward.begin(samples, prompts)
        scores = self.reward(samples, prompts)
        return lambda: scores

    def _tried(self, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except RewardError as error:
            raise RewardError(f"{self.name}: {error}") from error
        except Exception as error:
            raise RewardError(f"{self.name}: raised {type(error).__name__}: {error}") from error

    def _checked(self, scores: Any, samples: Tensor) -> Tensor:
        if not isinstance(scores, Tensor):
            try:
                scores = torch.as_tensor(scores, dtype=torch.float32, device=samples.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise RewardError(f"{self.name}: must return one number a sample, got {type(scores).__name__}") from error
        if scores.shape != (len(samples),):
            wanted, got = f"({len(samples)},)", tuple(scores.shape)
            raise RewardError(f"{self.name}: must return one number a sample, shape {wanted}, got shape {got}")
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise RewardError(f"{self.name}: {bad} of {len(scores)} values are NaN or infinite; return finite numbers")
        return scores.to(samples.device, torch.float32)
