"""Signs of life of a run: a bar on a terminal, plain lines elsewhere, by the time that has passed."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from scoreaction.types import Values
from scoreaction.world import World

SECONDS = 20.0
"""Seconds between two plain lines, but for the first and the last."""


def say(title: str, text: str) -> None:
    """A line about the step that begins now; of several processes the first speaks."""
    if World.current().leads:
        print(f"{title}  {text}", flush=True)


def figures_of(metrics: Values) -> str:
    """The figures of an iteration that are worth a line; of an online run also those of its rounds.

    >>> figures_of({"reward_mean": 1.0, "kl_nats": 0.25, "seconds": 2.0})
    'reward 1.000  KL 0.250 nats'
    >>> figures_of({"reward_mean": 1.0, "kl_nats": None, "round": 2.0, "oracle_mean": 0.5, "reward_queries": 640})
    'proxy 1.000  KL ? nats  round 2: oracle 0.500, 640 answers used'
    """
    reward, kl = (_known(metrics.get(key)) for key in ("reward_mean", "kl_nats"))
    if "oracle_mean" not in metrics:
        return f"reward {reward}  KL {kl} nats"
    rounds = (
        f"round {metrics['round']:.0f}: oracle {_known(metrics['oracle_mean'])}, {metrics['reward_queries']:,} answers used"
    )
    return f"proxy {reward}  KL {kl} nats  {rounds}"


def _known(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


class Reporter:
    """Shows how a run goes: a bar on a terminal's stderr, otherwise a line on stdout now and then."""

    def __init__(self, title: str, *, total: int, done: int) -> None:
        console = Console(stderr=True)
        self.title, self.total, self.last = title, total, float("-inf")
        self.live = console.is_terminal and World.current().leads
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self.live,
        )
        self.task: TaskID = self.progress.add_task(title, total=total, completed=done, figures="")

    def note(self, text: str) -> None:
        """Shows the step that goes on within an iteration."""
        self.progress.update(self.task, figures=text)
        if not self.live and time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            say(self.title, text)

    def __call__(self, metrics: Values) -> None:
        figures, iteration, now = figures_of(metrics), metrics["iteration"], time.monotonic()
        self.progress.update(self.task, completed=iteration, figures=figures)
        if not self.live and (now - self.last >= SECONDS or iteration == self.total):
            self.last = now
            say(self.title, f"{iteration}/{self.total}  {figures}  {metrics['seconds']:.0f} s")


class Measuring(AbstractContextManager["Measuring"]):
    """Shows how measuring goes: a status on a terminal's stderr, otherwise a line on stdout now and then."""

    def __init__(self, title: str) -> None:
        self.title, self.last = title, float("-inf")
        console = Console(stderr=True)
        live = console.is_terminal and World.current().leads
        self.status = console.status(Text(f"{title}  measuring")) if live else None

    def __enter__(self) -> Measuring:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, done: str) -> None:
        if self.status is not None:
            self.status.update(Text(f"{self.title}  measuring: {done}"))
        elif time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            say(self.title, f"measuring: {done}")
