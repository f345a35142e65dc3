"""Work of training, measured in the process that does it, TRL's or ours alike."""

from __future__ import annotations

import threading
import time
from typing import Any

import psutil

PERIOD = 0.01


class Watch:
    """CPU and wall seconds and the largest memory since it began, beyond what the process held then; looks every 10 ms."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._held = self._most = self._process.memory_info().rss
        self._cpu, self._wall, self._spent = time.process_time(), time.perf_counter(), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(PERIOD):
            self._most = max(self._most, self._process.memory_info().rss)
            self._spent = time.thread_time()

    def figures(self) -> dict[str, Any]:
        """So far; the seconds that looking takes are not counted."""
        return {
            "cpu_seconds": time.process_time() - self._cpu - self._spent,
            "seconds": time.perf_counter() - self._wall,
            "memory_mib": (self._most - self._held) / 2**20,
        }

    def end(self) -> None:
        """Stops looking."""
        self._ended.set()
        self._thread.join()
