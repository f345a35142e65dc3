"""The runs below a folder at a glance, and one that is followed while it goes on; nothing that they name is imported."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from scoreaction.commands.progress import figures_of
from scoreaction.errors import UserError, one_line
from scoreaction.report.numbers import number
from scoreaction.report.parts import reward_name
from scoreaction.training.run_folder import RunFolder, check_folder, read_description, read_json_lines, read_summary
from scoreaction.types import Values

QUIET = 600.0
"""Seconds without a line after which a run is taken to have stopped."""


def runs_below(folder: Path) -> list[Values]:
    """A row for each run below a folder, the one that was written to last first. UserError where there is none."""
    remedy = "give the folder that your runs lie in"
    check_folder(folder, remedy)
    places = [path.parent for path in folder.rglob("metrics.jsonl") if RunFolder(path.parent).description.is_file()]
    if not places:
        raise UserError(f"{folder}: no run below it (no metrics.jsonl with a recipe beside it); {remedy}")
    newest = sorted(places, key=lambda place: RunFolder(place).metrics_path.stat().st_mtime, reverse=True)
    return [_row(place, folder) for place in newest]


def _row(place: Path, below: Path) -> Values:
    values, summary = read_description(place)[0], read_summary(place)
    records = read_json_lines(RunFolder(place).metrics_path)
    last = records[-1] if records else {}
    ago = time.time() - RunFolder(place).metrics_path.stat().st_mtime
    state = "done" if summary is not None else f"{_ago(ago)} ago" if ago < QUIET else f"stopped {_ago(ago)} ago"
    return {
        "run": one_line(place.relative_to(below)) if place != below else ".",
        "model": one_line(values["model"]["name"], most=40),
        "reward": one_line(reward_name(values), most=40),
        "algorithm": one_line(values["algorithm"]["name"], most=40),
        "iterations": f"{last.get('iteration', 0)}/{values['train']['iterations']}",
        "reward now": number((summary or {}).get("reward_tuned", last.get("reward_mean"))),
        "KL (nats)": number((summary or {}).get("kl_nats", last.get("kl_nats")), 3),
        "last line": state,
    }


def _ago(seconds: float) -> str:
    """A duration in its largest unit.

    >>> _ago(5), _ago(200), _ago(10_000), _ago(300_000)
    ('5 s', '3 min', '2 h', '3 d')
    """
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def follow(folder: Path, *, pause: float = 1.0) -> Iterator[str]:
    """The lines of a run as they come, from the last that is there, until it is finished. UserError where there is no run."""
    remedy = "give the folder that train was started with as --output"
    check_folder(folder, remedy)
    place = RunFolder(folder)
    if not place.description.is_file():
        raise UserError(f"{folder}: no run in it yet; {remedy}")
    total, seen = read_description(folder)[0]["train"]["iterations"], None
    while True:
        finished = place.complete
        records = read_json_lines(place.metrics_path)
        first = len(records) - 1 if seen is None else min(seen, len(records))
        for record in records[max(first, 0) :]:
            yield f"{record['iteration']}/{total}  {figures_of(record)}  {record['seconds']:.0f} s"
        seen = len(records)
        if finished:
            yield "done: its summary is written"
            return
        time.sleep(pause)
