"""Jobs with a name each, run in parallel processes, kept in one JSON file; what the file holds is not run again."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def arguments(description: str, default: str) -> argparse.ArgumentParser:
    """The options every benchmark has: where its JSON is, how many processes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=RESULTS / default)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="run the jobs whose name contains this")
    return parser


def run_jobs(
    function: Callable[..., dict[str, Any]], jobs: dict[str, dict[str, Any]], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Runs `function(**arguments)` for each named job that the JSON lacks; returns all results, saved after each.

    Each has a process of its own, so that its peak memory is its own too. A job that fails is said and left out; the
    others go on.
    """
    path: Path = options.output
    done = json.loads(path.read_text()) if path.exists() else {}
    todo = {name: job for name, job in jobs.items() if name not in done and options.only in name}
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=_one_thread, max_tasks_per_child=1) as pool:
        futures = {pool.submit(function, **job): name for name, job in todo.items()}
        for count, future in enumerate(as_completed(futures), 1):
            name = futures[future]
            if future.exception() is not None:
                print(f"[{time.time() - began:6.0f} s] {count}/{len(todo)} {name} FAILED: {future.exception()!r}", flush=True)
                continue
            done[name] = {"job": todo[name], **future.result()}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
            os.replace(part, path)
            print(f"[{time.time() - began:6.0f} s] {count}/{len(todo)} {name}", flush=True)
    return {name: done[name] for name in jobs if name in done}


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)


def cell(values: list[float], digits: int = 3) -> str:
    """`mean ± standard error`, the bare value of a single run; a run that ended in numbers that are none makes it so."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def step_grid(rows: dict[str, list[dict[str, Any]]], what: str, steps: list[int], first: str, second: str) -> str:
    """A run's figures over samplers: a line a solver, a column a step count, `first (second)` in each cell."""
    body = []
    for name, grid in rows.items():
        for solver, eta in dict.fromkeys((at["solver"], at["eta"]) for at in grid):
            mine = {at["steps"]: at for at in grid if (at["solver"], at["eta"]) == (solver, eta)}
            body.append([name, f"{solver}, eta {eta:g}", *(f"{mine[n][first]:.2f} ({mine[n][second]:.2f})" for n in steps)])
    return table([what, "solver", *(f"{n} steps" for n in steps)], body)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
