"""Tables of measured runs in Markdown: what a file holds, means with their standard errors, and which code they are of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _records import UNKNOWN, curves_path, parsed, read

Run = dict[str, Any]
Cells = list[str]
MARK = "†"


@dataclass
class Results:
    """The runs of a file, and the curve of each by its name."""

    runs: list[Run]
    curves: dict[str, list[Run]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Results:
        """Reads NAME.csv and NAME_curves.csv."""
        out = cls([parsed(row) for row in read(path)])
        for row in read(curves_path(path)):
            out.curves.setdefault(row["name"], []).append(parsed(row))
        return out

    @property
    def points(self) -> list[Run]:
        """The points of all curves, in the file's order."""
        return [point for curve in self.curves.values() for point in curve]

    def where(self, **values: Any) -> list[Run]:
        """The runs that have these values, in the file's order."""
        return [run for run in self.runs if all(run[key] == value for key, value in values.items())]

    def groups(self, key: str, names: Iterable[str] | None = None) -> dict[str, list[Run]]:
        """The runs by a column, in the order of these names; every value of it if there are none."""
        chosen = dict.fromkeys(run[key] for run in self.runs) if names is None else names
        return {name: runs for name in chosen if (runs := self.where(**{key: name}))}


class Table:
    """A Markdown table whose rows know the runs they are from; `mark` is the column where unknown versions are marked."""

    def __init__(self, *header: str, mark: int = 0) -> None:
        self.header, self.mark = list(header), mark
        self.rows: list[Cells] = []
        self.runs: list[Run] = []

    def add(self, runs: Sequence[Run], *cells: str) -> None:
        """A row; it is marked if the version of one of its runs is not known."""
        unknown = any(run["commit"] == UNKNOWN for run in runs)
        self.rows.append([f"{text} {MARK}" if unknown and i == self.mark else text for i, text in enumerate(cells)])
        self.runs += runs

    def markdown(self) -> str:
        """The table, and below it the code that its runs are of."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n" + "".join(f"\n{n}\n" for n in self.notes())

    def notes(self) -> list[str]:
        """What is known of the code behind the figures."""
        unknown = {run["date"] or "" for run in self.runs if run["commit"] == UNKNOWN}
        known = {(run["version"], run["commit"]) for run in self.runs if run["commit"] != UNKNOWN}
        latest = f", {max(unknown).removeprefix('<=')} at the latest" if unknown and all(unknown) else ""
        out = [f"{MARK} Measured with a version of the code that was not recorded{latest}."] if unknown else []
        return out + ([f"Measured with {', '.join(f'{v} at {c}' for v, c in sorted(known))}."] if known else [])


def number(value: float, digits: int, *, beside: float | None = None) -> str:
    """So many decimals, fewer where the number (or the one that it stands beside) is large.

    >>> [number(value, 3) for value in (0.12345, 123.456, 23456.7, 3.9e6, math.inf)]
    ['0.123', '123.5', '23457', '3.9e+06', 'not finite']
    """
    if not math.isfinite(value):
        return "not finite"
    size = abs(value if beside is None else beside)
    if size >= 1e6:
        return f"{value:.1e}"
    return f"{value:.{0 if size >= 1e3 else min(digits, 1) if size >= 1e2 else digits}f}"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    n = len(values)
    mean = sum(values) / n
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)


def cell(values: Sequence[float | None], digits: int = 3) -> str:
    """`mean ± standard error`, a single number if all are equal, `-` if there is none.

    >>> cell([1.0, 3.0], 1), cell([2.0], 1), cell([]), cell([1.0, math.inf])
    ('2.0 ± 1.0', '2.0', '-', 'not finite')
    """
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    if not all(map(math.isfinite, there)):
        return "not finite"
    mean, error = mean_and_error(there)
    return number(mean, digits) + (f" ± {number(error, digits, beside=mean)}" if len(set(there)) > 1 else "")


def of(runs: Sequence[Run], key: str, digits: int = 3) -> str:
    """The cell of one figure over runs."""
    return cell([run.get(key) for run in runs], digits)
