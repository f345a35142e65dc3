"""Signals that ask a command to stop: Ctrl-C, a closed terminal, a machine that shuts down, a queue's limit."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from scoreaction.world import ALONE, World

FORCING = (signal.SIGINT, signal.SIGTERM)
ASKING = [signal.Signals[name] for name in ("SIGHUP", "SIGUSR1") if name in signal.Signals.__members__]
"""Of a lost terminal, often twice, which nohup ignores; and of Slurm before its limit."""


def heard() -> list[int]:
    """The signals that ask a command to stop; one that the shell lets be ignored, as nohup does, is left so."""
    return [*FORCING, *(number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN)]


def answer(text: str) -> None:
    """Says a line on stderr from within a signal handler, at once; a lost terminal is no matter."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


@dataclass
class Signals(AbstractContextManager["Signals"]):
    """Signals that ask the loop to stop after this iteration; a second Ctrl-C or SIGTERM stops at once.

    The first is answered at once, with what it waits for. `at_once` it stops what goes on. In a world of several a second one
    does not force: the launcher passes each on, often twice, and has a limit of its own.
    """

    requested: bool = False
    at_once: bool = False
    waiting: str = "this iteration"
    world: World = ALONE
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in heard()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        alone = self.world.size == 1
        if self.at_once and (alone or not self.requested) or (alone and self.requested and number in FORCING):
            self.requested = True
            raise KeyboardInterrupt
        if not self.requested and self.world.leads:
            forced = "; Ctrl-C stops at once" if alone else ""
            answer(f"{signal.Signals(number).name}: stopping after {self.waiting}, which is then saved{forced}")
        self.requested = True
