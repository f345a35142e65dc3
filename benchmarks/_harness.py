"""Jobs with a name each, run in parallel processes, a line a job in a CSV file; what the file holds is not run again."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _records import RESULTS, UNKNOWN, Row, code_stamp, commit, curves_path, flat, read, thinned, write
from tables import TABLES, print_tables, run_names

Figures = dict[str, Any]
"""What a job returns: figures by name, nested ones get dotted names; `curve` is a list of points, kept in a file beside it."""


def arguments(description: str, benchmark: str) -> argparse.ArgumentParser:
    """The options every benchmark has: where its CSV is, which jobs, how many processes, and what to do with older rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{benchmark}.csv")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", default=[""], help="run the jobs whose name contains one of these")
    parser.add_argument("--table", choices=TABLES, metavar="NAME", help="run the jobs whose rows this table of the docs shows")
    parser.add_argument("--again", action="store_true", help="run the jobs anew whose rows are of another commit")
    parser.add_argument("--mix", action="store_true", help="let rows of several commits stand in one file")
    parser.add_argument("--iterations", type=int, help="at most so many a run, for a trial with an --output of its own")
    parser.set_defaults(benchmark=benchmark)
    return parser


def in_stage(options: argparse.Namespace) -> None:
    """Lets the file and its tables be those of a stage of the benchmark, such as NAME_tune.csv."""
    options.output = options.output.with_stem(f"{options.output.stem}_{options.stage}")
    options.benchmark += f"_{options.stage}"


def built(recipe: str, *settings: str) -> Any:
    """The run that `scoreaction train RECIPE SETTINGS` would start."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    return build(load_recipe(recipe, settings))


def summary(tuner: Any) -> Figures:
    """What a run came to, without its table of prompts."""
    return {key: value for key, value in tuner.summary().items() if key != "prompts"}


def to_run(jobs: dict[str, Figures], rows: list[Row], options: argparse.Namespace, now: str) -> dict[str, Figures]:
    """The jobs that have no row yet, and with `--again` those whose row is of another commit than `now`.

    SystemExit where rows of another commit would be left beside theirs, unless `--mix` lets them.
    """
    foreign = {row["name"]: row["commit"] for row in rows if row["commit"] != now or now == UNKNOWN}
    there = {row["name"] for row in rows} - (set(foreign) if options.again else set())
    todo = {name: job for name, job in jobs.items() if name not in there and any(part in name for part in options.only)}
    left = {name: commit for name, commit in foreign.items() if name not in todo}
    if todo and left and not options.mix:
        others = ", ".join(sorted(set(left.values())))
        raise SystemExit(
            f"{options.output.name} has {len(left)} rows of other commits ({others}), this is {now}. "
            "--again runs chosen jobs anew in place of theirs, --mix lets the others stay, --output takes another file."
        )
    return todo


def run_jobs(
    function: Callable[..., Figures], jobs: dict[str, Figures], options: argparse.Namespace, *, alone: bool = True
) -> None:
    """Runs `function(**job)` for each job that the file lacks, and saves after each; prints the tables of the file.

    alone: each has a process of its own, so that its peak memory is its own too; short ones can share those that there are. A
    job that fails is named and left out; the others go on.
    """
    path, stamp = options.output, code_stamp()
    if options.table is not None:
        jobs = {name: jobs[name] for name in run_names(options.table) if name in jobs}
    if options.iterations is not None:
        jobs = _trials(jobs, options)
    todo = to_run(jobs, read(path), options, stamp["commit"])
    path.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    spawn, each = get_context("spawn"), 1 if alone else None
    with ProcessPoolExecutor(options.processes, mp_context=spawn, initializer=_one_thread, max_tasks_per_child=each) as pool:
        futures = {pool.submit(_run, function, job, stamp["commit"]): name for name, job in todo.items()}
        for count, future in enumerate(as_completed(futures), 1):
            name, error = futures[future], future.exception()
            failed = f" FAILED: {error!r}" if error else ""
            print(f"[{time.time() - began:6.0f} s] {count}/{len(todo)} {name}{failed}", flush=True)
            if error is None:
                save(path, name, todo[name] | future.result(), stamp)
    print_tables(path, options.benchmark)


def save(path: Path, name: str, figures: Figures, stamp: Row) -> None:
    """Writes a run into the file, and its curve into the one beside it, in place of an earlier one of that name."""
    values = {key: value for key, value in figures.items() if key != "curve"}
    points = [{"name": name, **flat(point)} for point in thinned(figures.get("curve", []))]
    for file, new in ((curves_path(path), points), (path, [{"name": name, **flat(values), **stamp}])):
        others = [row for row in read(file) if row["name"] != name]
        if others or new:
            write(file, sorted([*others, *new], key=lambda row: row["name"]))


def _trials(jobs: dict[str, Figures], options: argparse.Namespace) -> dict[str, Figures]:
    """The jobs with fewer iterations. SystemExit where they would be mistaken for measured runs."""
    if options.output.parent.resolve() == RESULTS:
        raise SystemExit("--iterations is for trials, which do not belong into results/: give an --output elsewhere")
    if not all("iterations" in job for job in jobs.values()):
        raise SystemExit("--iterations: the runs of this benchmark have their own")
    return {name: {**job, "iterations": min(job["iterations"], options.iterations)} for name, job in jobs.items()}


def _run(function: Callable[..., Figures], job: Figures, now: str) -> Figures:
    """Runs a job, if the code is still the one that its row will name."""
    assert commit() == now, f"the code has changed since the start: {commit()}, no longer {now}"
    return function(**job)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
