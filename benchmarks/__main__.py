"""python -m benchmarks [tables | figures]: without a word, what there is to run."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from _records import RESULTS


def benchmarks() -> dict[str, str]:
    """The benchmarks by name, with the first line of each."""
    helpers = ("tables.py", "figures.py")
    files = [file for file in sorted(Path(__file__).parent.glob("*.py")) if file.name[0] != "_" and file.name not in helpers]
    return {file.stem: (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0] for file in files}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measured runs, their tables and figures.")
    commands = parser.add_subparsers(dest="command")
    tables = commands.add_parser("tables", help="write the tables of README and docs from results/*.csv")
    tables.add_argument("--check", action="store_true", help="only name the pages that differ")
    figures = commands.add_parser("figures", help="draw the figures of the docs from results/*.csv")
    figures.add_argument("--output", type=Path, default=RESULTS, help="folder")
    options = parser.parse_args()
    if options.command == "tables":
        from tables import write_pages

        stale = write_pages(check=options.check)
        return 1 if options.check and stale else 0
    if options.command == "figures":
        from figures import draw_all

        print(*draw_all(options.output), sep="\n")
        return 0
    parser.print_help()
    print("\nbenchmarks, run as `python -m benchmarks.NAME`:\n")
    for name, line in benchmarks().items():
        print(f"  {name:<12} {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
