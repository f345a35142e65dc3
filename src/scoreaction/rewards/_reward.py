"""Rewards as a run uses them: checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from scoreaction.errors import Failed, UserError, one_line
from scoreaction.rewards._images import check_range, is_images
from scoreaction.types import EVERY, Background, Prompts, RewardFunction


class RewardError(Failed):
    """A reward that raised, or returned anything but one finite number a sample."""


LONGEST = 1000
"""Letters of an error of a reward, or of its server, that a message repeats."""


class Reward:
    """A function as a reward: `fn(samples, prompts) -> (batch,)`, higher is better.

    Images come in [0, 1]; prompts is a list with one a sample, or None. `differentiable=True` promises that gradients flow
    from the result to the samples; a plain function in place of a reward is taken as a black box.

    >>> Reward(lambda samples, prompts: samples.sum(1), differentiable=True)(torch.ones(2, 3), None)
    tensor([3., 3.])
    """

    def __init__(self, fn: Callable[[Tensor, Any], Tensor], *, differentiable: bool = False) -> None:
        self.fn, self.differentiable = fn, differentiable

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        return self.fn(samples, prompts)


def as_reward(reward: RewardFunction | Callable[[Tensor, Any], Tensor]) -> RewardFunction:
    """The reward itself; a plain function as a black box."""
    return cast("RewardFunction", reward if hasattr(reward, "differentiable") else Reward(reward))


def begin_scores(reward: RewardFunction, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
    """Begins to score; calling the result waits for the scores. Only a `Background` reward works meanwhile."""
    if isinstance(reward, Background):
        return reward.begin(samples, prompts)
    scores = reward(samples, prompts)
    return lambda: scores


def _fingerprint(samples: Tensor) -> list[int]:
    """Numbers that are others as soon as any bit of the samples is, however it was written: torch counts not all writes."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[samples.element_size()]
    with torch.no_grad():
        bits = samples.detach().reshape(-1).view(width)
        odd = torch.arange(1, 2 * min(len(bits), PART) + 1, 2, device=bits.device)  # so that no single bit is lost modulo 2^64
        return [int((part.long() * odd[: len(part)]).sum()) for part in bits.split(PART)]


PART = 2**20
"""Numbers of a fingerprint that are taken at a time."""


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Restores what torch has one of for a whole process; RewardError where it was changed within."""
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
        after = torch.get_default_dtype(), torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(before[0])
        torch.set_grad_enabled(before[1])
    for name, old, new in zip(("default dtype", "grad mode"), before, after, strict=True):
        if old != new:
            raise RewardError(
                f"changes torch's {name} from {old} to {new} for the whole process; set it back before it returns"
            )


def guarded(name: str, step: Callable[[], Any]) -> Any:
    """The step's result; RewardError with the cause whatever it raises, a call of sys.exit too, but for an interrupt."""
    try:
        with _as_it_was():
            return step()
    except RewardError as error:
        raise RewardError(f"{name}: {one_line(error, most=LONGEST)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise RewardError(f"{name}: raised {type(error).__name__}: {one_line(error, most=LONGEST)}") from error


def check_graph(name: str, scores: Tensor) -> Tensor:
    """The scores; RewardError where a reward that says it is differentiable gave none that gradients flow through."""
    if torch.is_grad_enabled() and not scores.requires_grad:
        raise RewardError(
            f"{name}: says it is differentiable, and no gradient reaches the samples; keep the graph in it, or leave"
            " differentiable out"
        )
    return scores


class CountedReward:
    """A reward as a run uses it: every row is counted in `queries`, images in and scores out are checked (RewardError)."""

    def __init__(self, reward: RewardFunction | Callable[[Tensor, Any], Tensor], *, name: str = "reward") -> None:
        if not callable(reward):
            raise UserError(
                f"{name}: must be a function of (samples, prompts), or a Reward (got {one_line(repr(reward), most=60)})"
            )
        self.reward = as_reward(reward)
        self.name, self.queries = name, 0
        self.spend: Callable[[int], None] | None = None
        """Asked for leave before each question, with its rows: it counts them, or raises RewardError."""
        self.differentiable = self.reward.differentiable

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        return self.begin(samples, prompts)()

    def begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
        """Begins to score; calling the result waits for the checked scores. Only a `Background` reward works meanwhile."""
        self.queries += len(samples)
        scores, count, device = self._begin(samples, prompts), len(samples), samples.device  # not the samples: scores may wait
        return lambda: self._finite(self._one_each(guarded(self.name, scores), count, device))

    def probe(self, samples: Tensor, prompts: Prompts) -> None:
        """Scores without counting; RewardError where the reward does not fit such samples. Any numbers will do."""
        with torch.no_grad():
            self._one_each(guarded(self.name, self._begin(samples, prompts)), len(samples), samples.device)

    def _begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Any]:
        if is_images(samples):
            try:
                check_range(samples, where=self.name)
            except ValueError as error:
                raise RewardError(f"{error}, in the model's decode=") from error
        if self.spend is not None:
            self.spend(len(samples))
        before = _fingerprint(samples)
        scores = guarded(self.name, partial(begin_scores, self.reward, samples, prompts))
        if _fingerprint(samples) != before:
            raise RewardError(
                f"{self.name}: changes its samples in place, which are measured after it; begin with samples.clone()"
            )
        return scores

    @property
    def rows(self) -> int | None:
        """Samples to score at a time while other work goes on; None where it does not work in the background."""
        return self.reward.rows if isinstance(self.reward, Background) and self.reward.rows < EVERY else None

    def begin_decoded(self, x0: Tensor, decode: Callable[[Tensor], Tensor], prompts: Prompts) -> Callable[[], Tensor]:
        """Begins to score decode(x0), in the background part by part while the next is decoded; see `begin`."""
        if not len(x0):  # of a process without rows: nobody is asked
            return lambda: x0.flatten(1).sum(1).float()
        rows = self.rows or len(x0)
        parts = range(0, len(x0), rows)
        begun = [self.begin(decode(x0[i : i + rows]), None if prompts is None else prompts[i : i + rows]) for i in parts]
        return lambda: torch.cat([scores() for scores in begun])

    def _one_each(self, scores: Any, count: int, device: torch.device) -> Tensor:
        if isinstance(scores, np.ndarray) and scores.dtype == object:
            scores = scores.tolist()
        if not isinstance(scores, Tensor):
            try:
                scores = torch.as_tensor(scores, dtype=torch.float32, device=device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise RewardError(f"{self.name}: must return one number a sample, got {type(scores).__name__}") from error
        if scores.shape != (count,):
            wanted, got = f"({count},)", tuple(scores.shape)
            raise RewardError(f"{self.name}: must return one number a sample, shape {wanted}, got shape {got}")
        odd = {"complex": scores.is_complex(), "quantized": scores.is_quantized, "sparse": scores.layout != torch.strided}
        odd["meta"] = scores.is_meta and device.type != "meta"
        for kind, there in odd.items():
            if there:
                raise RewardError(
                    f"{self.name}: must return plain real numbers, got a {kind} tensor; convert it before it returns"
                )
        if not (self.differentiable and torch.is_grad_enabled()):
            scores = scores.detach()
        return scores.to(device, torch.float32)

    def _finite(self, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).sum())
            raise RewardError(f"{self.name}: {bad} of {len(scores)} values are NaN or infinite; return finite numbers")
        return scores
