"""The budget of an expensive reward: every question is counted before it is asked, and refused where it would be too many."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

from scoreaction.disk import write_whole
from scoreaction.rewards import RewardError


class Budget:
    """At most `limit` questions, whoever asks: rounds, measuring, steering, and again after an interruption.

    The count is in the file `path`, on disk before a question is asked, and shared by the processes that see the file; without
    a path it is in memory. shared: True where several processes ask, of which only the first makes the file.

    >>> budget = Budget(10, None)
    >>> budget.spend(7)
    >>> budget.left
    3
    """

    def __init__(self, limit: int, path: Path | None, *, shared: bool = False) -> None:
        self.limit, self.path, self.shared = limit, path, shared
        self._count = 0
        self._lock = nullcontext() if path is None else FileLock(path.with_name(f".{path.name}.lock"), thread_local=False)

    @property
    def count(self) -> int:
        """The questions so far. RewardError where their count cannot be read."""
        if self.path is None or not self.path.exists():
            return self._count
        try:
            return int(json.loads(self.path.read_text(encoding="utf-8"))["asked"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f"online.budget: {self.path} cannot be read, so nobody knows how many questions are asked; mend it"
            ) from error

    @property
    def left(self) -> int:
        """The questions that may still be asked."""
        return self.limit - self.count

    def check_plan(self, rounds: int, measuring: dict[str, int], n: int) -> None:
        """ValueError where a run asks more than the limit: in its rounds, and by part when it is measured on n samples."""
        needed = rounds + sum(measuring.values())
        if self.limit < needed:
            parts = ", ".join(f"{count:,} of {name}" for name, count in measuring.items())
            raise ValueError(
                f"online.budget: {self.limit:,} questions do not pay for the {rounds:,} of all rounds and for measuring at the"
                f" end ({parts}); raise it to {needed}, or lower evaluation.n, which is {n:,}"
            )

    def begin(self, answers: int) -> None:
        """Begins the count, in the first process: at least the answers that a log of questions has."""
        with self._lock:
            self._write(max(self.count, answers))

    def check(self, n: int) -> None:
        """RewardError where n more questions are more than are left; nothing is counted."""
        count = self.count
        if count + n > self.limit:
            raise RewardError(
                f"online.budget: {n} more questions would pass it, {count} of {self.limit} are asked; raise it to {count + n}"
            )

    def spend(self, n: int) -> None:
        """Counts n questions that are about to be asked; RewardError, and none is counted, where they are too many."""
        if self.shared and (self.path is None or not self.path.exists()):
            raise RewardError(
                f"online.budget: several processes count their questions in a run folder, and one does not see"
                f" {self.path or 'any'}; give all of them one (output=), or leave the budget out"
            )
        with self._lock:
            self.check(n)
            self._write(self.count + n)

    def _write(self, count: int) -> None:
        self._count = count
        if self.path is not None:
            write_whole(self.path, json.dumps({"asked": count}) + "\n")
