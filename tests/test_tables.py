"""Truth: the CSV files. Pages show what they hold; no file mixes the code of two commits unless it is told to."""

from __future__ import annotations

import doctest
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from twins import accepts

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import _records  # noqa: E402
import _tables  # noqa: E402
from _exact_tables import QUOTED  # noqa: E402
from _harness import arguments, run_jobs, to_run  # noqa: E402
from _records import RESULTS, commit, flat, parsed, read, write  # noqa: E402
from exact import jobs  # noqa: E402
from tables import BLOCK, PAGES, TABLES, filled, markdown, run_names  # noqa: E402

NAMED = {page: [match[1] for match in BLOCK.findall(page.read_text(encoding="utf-8"))] for page in PAGES}
JOBS = {name: {"text": name} for name in ("a", "b", "c")}


def row(name: str, commit: str) -> dict[str, str]:
    return {"name": name, "figure": "1", "commit": commit, "version": "0.1.0", "date": "2026-11-29"}


@pytest.mark.parametrize("page", [page for page in PAGES if NAMED[page]], ids=lambda page: page.stem)
def test_a_page_shows_what_the_results_hold(page: Path) -> None:
    """Twins: the last figure of each table with another last digit."""
    text = page.read_text(encoding="utf-8")
    written = filled(text)

    def shows(text: str) -> None:
        assert text == written, f"{page.name}: python -m benchmarks tables"

    def mistyped(name: str) -> str:
        start = text.index(f"<!-- table: {name} -->")
        digit = list(re.finditer(r"\d(?= %? ?[|])", text[start : text.index("<!-- end -->", start)]))[-1].start() + start
        return f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}"

    accepts(shows, text, **{name: mistyped(name) for name in NAMED[page]})


def raised(key: str, text: str) -> str:
    """A tenth more, where it is a figure and no setting."""
    figure = re.fullmatch(r"-?\d*\.\d+", text) and key not in ("beta", "eta")
    return f"{1.1 * float(text):.6g}" if figure else text


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_from_its_file(name: str, tmp_path: Path) -> None:
    """Twin: a copy of the files in which every figure of the table's benchmark is a tenth larger."""
    larger = tmp_path / "larger"
    for folder in (tmp_path / "same", larger):
        shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    for file in larger.glob(f"{TABLES[name][0]}*.csv"):
        write(file, [{key: raised(key, text) for key, text in run.items()} for run in read(file)])

    def holds(folder: Path) -> None:
        assert markdown(name, folder) == markdown(name)

    accepts(holds, tmp_path / "same", larger=larger)


def test_every_table_of_the_results_page_is_written_by_the_command() -> None:
    """Twin: a table that stands outside the markers."""

    def written(text: str) -> None:
        assert not re.search(r"^\|", BLOCK.sub("", text), re.M)

    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    accepts(written, text, by_hand=f"{text}\n| trainer | reward |\n")
    with pytest.raises(KeyError, match="nowhere"):
        filled("<!-- table: nowhere -->\n<!-- end -->")


def test_runs_of_unknown_versions_are_marked(tmp_path: Path) -> None:
    """Twin: the same runs with a commit."""
    for file in RESULTS.glob("exact*.csv"):
        shutil.copy(file, tmp_path)
    rows = [{**row, "commit": "unknown"} for row in read(tmp_path / "exact.csv")]
    write(tmp_path / "exact.csv", rows)

    def marked(text: str) -> None:
        lines = [line for line in text.splitlines() if "| 25 |" in line]
        assert all("†" in line for line in lines)
        assert "version of the code that was not recorded" in text

    unknown = markdown("readme", tmp_path)
    write(tmp_path / "exact.csv", [{**row, "commit": "abc1234", "version": "0.1.0"} for row in rows])
    accepts(marked, unknown, known=markdown("readme", tmp_path))
    assert "Measured with 0.1.0 at abc1234." in markdown("readme", tmp_path)


def test_a_table_names_the_runs_to_measure_again() -> None:
    """README's table: seven trainers of four or five seeds, at 25 steps of the mixture. Twin: the runs of another table."""

    def quoted(names: list[str]) -> None:
        runs = {trainer: [f"mixture/{trainer}/25/seed{seed}" for seed in range(5)] for trainer in QUOTED}
        assert set(names) <= set(sum(runs.values(), [])) & set(jobs())
        assert all(len(set(names) & set(own)) >= 4 for own in runs.values())

    accepts(quoted, run_names("readme"), other=run_names("exact_sqdf"))


def test_six_digits_come_back_and_commits_stay_text() -> None:
    """Twin: a commit of digits only is read as a number."""
    shown = flat({"kl": 1.23456789, "n": 12345678, "nested": {"eta": 0.5}, "none": None, "commit": "1234567"})
    assert shown == {"kl": "1.23457", "n": "12345678", "nested.eta": "0.5", "none": "", "commit": "1234567"}

    def come_back(values: dict[str, object]) -> None:
        assert values == {"kl": 1.23457, "n": 12345678, "nested.eta": 0.5, "none": None, "commit": "1234567"}

    accepts(come_back, parsed(shown), number={**parsed(shown), "commit": int(shown["commit"])})


@pytest.mark.parametrize("module", [_records, _tables], ids=lambda module: module.__name__)
def test_the_examples_of_the_harness_hold(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def options(tmp_path: Path, *words: str) -> Any:
    return arguments("", "trial").parse_args(["--output", str(tmp_path / "trial.csv"), "--processes", "1", *words])


def chosen(tmp_path: Path, rows: list[dict[str, str]], *words: str, now: str = "new", select: Any = to_run) -> list[str]:
    return [*select(JOBS, rows, options(tmp_path, *words), now)]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    """Twins: all jobs each time; the jobs that are there."""
    new = row("a", "new")

    def resumes(select: Any) -> None:
        assert chosen(tmp_path, [], select=select) == ["a", "b", "c"]
        assert chosen(tmp_path, [new], select=select) == ["b", "c"]
        assert chosen(tmp_path, [new], "--again", select=select) == ["b", "c"]
        assert chosen(tmp_path, [new], "--only", "a", "b", select=select) == ["b"]
        assert chosen(tmp_path, [row(name, "old") for name in JOBS], select=select) == [], "nothing to run mixes nothing"

    accepts(resumes, to_run, anew=lambda jobs, *_: jobs, there=lambda jobs, rows, *_: [row["name"] for row in rows])


def test_commits_are_not_mixed(tmp_path: Path) -> None:
    """Rows of another commit, or of an unknown one, are refused beside new ones, unless they are replaced or let stay."""
    for now, old in (("new", "old"), ("new", "unknown"), ("unknown", "unknown"), ("new+", "new")):
        rows = [row("a", old), row("b", old)]
        with pytest.raises(SystemExit, match=r"2 rows of other commits .*--again.*--mix"):
            chosen(tmp_path, rows, now=now)
        assert chosen(tmp_path, rows, "--mix", now=now) == ["c"]
        assert chosen(tmp_path, rows, "--again", now=now) == ["a", "b", "c"], "none is left of the other commit"
        with pytest.raises(SystemExit, match="1 rows of other commits"):
            chosen(tmp_path, rows, "--again", "--only", "a", now=now)
        assert chosen(tmp_path, rows, "--again", "--mix", "--only", "a", now=now) == ["a"]


def test_the_commit_is_that_of_the_code(tmp_path: Path) -> None:
    """Twins: a tree that was changed; a commit that changes no code."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True).stdout

    assert commit(tmp_path) == "unknown"
    git("init", "-q")
    for name, text in (("src/code.py", "1"), ("results/exact.csv", "1")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
        git("add", "-A")
        git("commit", "-qm", name)
    code, last = git("log", "--format=%h", "--reverse").split()
    assert commit(tmp_path) == code != last
    (tmp_path / "results/exact.csv").write_text("2")
    assert commit(tmp_path) == code
    (tmp_path / "src/code.py").write_text("2")
    assert commit(tmp_path) == f"{code}+"


def measured(text: str) -> dict[str, object]:
    """A job that fails in one case."""
    if text == "b":
        raise ValueError("no figure")
    return {"figure": 1 / 3, "curve": [{"i": i} for i in range(100)]}


@pytest.mark.long
def test_a_run_leaves_a_line_and_at_most_25_points_of_its_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job in a process of its own; one that fails is named, and the others are saved with the code's commit."""
    run_jobs(measured, JOBS, options(tmp_path, "--mix"))
    assert "b FAILED: ValueError('no figure')" in capsys.readouterr().out
    rows, points = read(tmp_path / "trial.csv"), read(tmp_path / "trial_curves.csv")
    assert [(of["name"], of["figure"], of["commit"]) for of in rows] == [(name, "0.333333", commit()) for name in "ac"]
    for name in "ac":
        curve = [int(point["i"]) for point in points if point["name"] == name]
        assert len(curve) == 25
        assert (curve[0], curve[-1]) == (0, 99)
