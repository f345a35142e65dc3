"""Work that is served over HTTP: the scores of a reward, or the texts of a writer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from scoreaction.rewards import CountedReward, RewardError
from scoreaction.rewards._reward import guarded
from scoreaction.rewards._wire import WireError, answer, checked_texts, read_question, read_wish, texts_answer
from scoreaction.types import RewardFunction


class Served(Protocol):
    """Work that questions are posted to; it is asked by one thread at a time.

    kind and name: what a report of its health calls it; path: where it is asked.
    """

    kind: ClassVar[str]
    path: ClassVar[str]
    name: str

    @property
    def rows(self) -> int:
        """Samples that it was asked about."""

    def read(self, body: bytes, *, most: int) -> Callable[[torch.device], bytes]:
        """The work of a question of at most so many samples (WireError): the body of its answer, on a device (RewardError)."""


class Scores:
    """A reward that is served."""

    kind: ClassVar[str] = "reward"
    path: ClassVar[str] = "/score"

    def __init__(self, name: str, reward: RewardFunction) -> None:
        self.name, self.reward = name, CountedReward(reward, name=name)

    @property
    def rows(self) -> int:
        """Samples that it has scored."""
        return self.reward.queries

    def read(self, body: bytes, *, most: int) -> Callable[[torch.device], bytes]:
        """As `Served.read`."""
        samples, prompts = read_question(body, most=most)
        return lambda device: answer(self.reward(samples.to(device), prompts).cpu())


class Texts:
    """A writer that is served: `writer(samples, prompts, n)` gives n texts for each prompt, of which it sees a sample."""

    kind: ClassVar[str] = "writer"
    path: ClassVar[str] = "/write"

    def __init__(self, name: str, writer: Callable[[Tensor, list[str], int], Any]) -> None:
        self.name, self.writer, self.rows = name, writer, 0

    def read(self, body: bytes, *, most: int) -> Callable[[torch.device], bytes]:
        """As `Served.read`."""
        samples, prompts, n = read_wish(body, most=most)
        return lambda device: texts_answer(self._written(samples.to(device), prompts, n))

    def _written(self, samples: Tensor, prompts: list[str], n: int) -> list[list[str]]:
        self.rows += len(prompts)
        answer = guarded(self.name, partial(self.writer, samples, prompts, n))
        try:
            return checked_texts(answer, prompts, n)
        except WireError as error:
            raise RewardError(f"{self.name}: {error}") from error
