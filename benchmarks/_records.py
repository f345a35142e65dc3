"""Measured runs as CSV: NAME.csv has a line a run, NAME_curves.csv the points of its curve, six significant digits.

Beside each run stand the commit that made it, the package's version and the date. A `+` behind the commit is a tree that had
been changed; `unknown` is a run from before commits were recorded, and its date is then the latest it can be of.
"""

from __future__ import annotations

import csv
import os
import subprocess
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
CODE = ("src", "benchmarks")
"""What decides the figures: other files may change between runs, and their commits too."""
STAMP = ("commit", "version", "date")
UNKNOWN = "unknown"
POINTS = 25

Row = dict[str, str]


def curves_path(path: Path) -> Path:
    """The file of the curves that belong to a file of runs."""
    return path.with_name(f"{path.stem}_curves.csv")


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[Row]) -> None:
    """Replaces the file by these rows, all at once; the columns are those of any row, the stamp last."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in STAMP]
    columns += [key for key in STAMP if any(key in row for row in rows)]
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def cell_text(value: Any) -> str:
    """A value as it stands in the file: floats with six significant digits, lists with blanks between.

    >>> [cell_text(value) for value in (1 / 3, 1234567, None, [1.0, 2], "ddim")]
    ['0.333333', '1234567', '', '1 2', 'ddim']
    """
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return " ".join(map(cell_text, value))
    return "" if value is None else str(value)


def flat(values: dict[str, Any]) -> Row:
    """Nested values as columns.

    >>> flat({"seed": 0, "unseen": {"reward": 0.5}})
    {'seed': '0', 'unseen.reward': '0.5'}
    """
    row: Row = {}
    for key, value in values.items():
        row |= (
            {f"{key}.{name}": text for name, text in flat(value).items()}
            if isinstance(value, dict)
            else {key: cell_text(value)}
        )
    return row


def parsed(row: Row) -> dict[str, Any]:
    """The values of a row: numbers where they are numbers, None where nothing stands.

    >>> parsed({"steps": "25", "kl_nats": "1.289", "leap": "", "commit": "1234567"})
    {'steps': 25, 'kl_nats': 1.289, 'leap': None, 'commit': '1234567'}
    """
    return {key: text if key in STAMP else _value(text) for key, text in row.items()}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def thinned(curve: list[dict[str, Any]], points: int = POINTS) -> list[dict[str, Any]]:
    """At most so many points of a curve, evenly spread, the first and the last among them.

    >>> [point["i"] for point in thinned([{"i": i} for i in range(100)], 4)]
    [0, 33, 66, 99]
    """
    if len(curve) <= points:
        return curve
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]


def code_stamp() -> Row:
    """Commit of the code in this checkout, version of the package, today."""
    spec = find_spec("scoreaction")
    assert spec is not None, "scoreaction is not installed"
    assert spec.origin is not None
    if not Path(spec.origin).is_relative_to(ROOT / "src"):
        raise SystemExit(f"scoreaction is imported from {spec.origin}, which is not this checkout: its commit is not known")
    return {"commit": commit(), "version": version("scoreaction"), "date": date.today().isoformat()}


def commit(root: Path = ROOT) -> str:
    """The last commit that changed the code, with a `+` where the tree differs from it; `unknown` without git."""
    try:
        last = _git(root, "log", "-1", "--format=%h", "--", *CODE)
        return (last + ("+" if _git(root, "status", "--porcelain", "--", *CODE) else "")) or UNKNOWN
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()
