"""Truth: the log of a run, pixels, and the clock: a run is seen while it goes on, and its pictures are as large as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from commanding import TINY
from PIL import Image
from twins import accepts, close, same

from scoreaction.cli import main
from scoreaction.commands import progress
from scoreaction.commands.progress import Measuring, Reporter
from scoreaction.commands.runs import follow, runs_below
from scoreaction.errors import UserError
from scoreaction.report.sample_figures import save_pictures, save_samples

COMMAND = ["train", "mixture", *TINY, "train.iterations=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "deep" / "one"
    assert main([*COMMAND, "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_the_first_sign_of_life_comes_before_torch(tmp_path: Path) -> None:
    """Truth: the clock of a process of its own; twin: the second sign, which needs torch."""
    command = [sys.executable, "-m", "scoreaction", *COMMAND, "--output", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    began, times = time.monotonic(), {}
    for line in process.stdout:
        times.setdefault(line.strip(), time.monotonic() - began)
    assert process.wait() == 0
    signs = list(times)[:4]
    assert signs == ["mixture  loading", "run  1 process on cpu", "run  building model and rewards", "run  iteration 1 of 4"]
    accepts(lambda seconds: _less(seconds, times[signs[1]]), times[signs[0]], the_second=times[signs[1]])


def _less(one: float, other: float) -> None:
    assert one < other


def test_lines_come_by_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line at once, after 20 seconds, and at the end; twin: one for each tenth of the iterations."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    reporter = Reporter("title", total=100, done=0)
    for iteration in range(1, 101):
        clock[0] += 1.0
        reporter({"iteration": iteration, "reward_mean": 1.0, "kl_nats": 0.5, "seconds": clock[0]})
    said = [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().out.splitlines()]
    same(said, [1, 21, 41, 61, 81, 100], by_tenths=list(range(10, 101, 10)))
    with Measuring("title") as measuring:
        for drawn in range(50):
            clock[0] += 1.0
            measuring(f"base model, {drawn} samples")
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()] == ["0", "20", "40"]


@pytest.mark.slow
def test_samples_are_drawn_while_a_run_goes_on(tmp_path: Path) -> None:
    """Every second iteration, of the same noise, and the run is what it would have been; twin: without."""

    def trained(name: str, *more: str) -> tuple[set[str], str]:
        assert main([*COMMAND, *more, "--output", str(tmp_path / name)]) == 0
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        drawn = {path.name for path in (tmp_path / name / "samples").glob("*.png")}
        return drawn, json.dumps([{**line, "seconds": 0} for line in lines])

    drawn, lines = trained("shown", "train.show_every=2")
    quiet, truth = trained("quiet")
    same(drawn, {"000002.png", "000004.png"}, without=quiet)
    assert lines == truth


def test_runs_are_listed_and_nothing_that_they_name_is_imported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "stranger")
    recipe = (run / "recipe.yaml").read_text().replace("name: gaussian_mixture", "name: no.such_module")
    (tmp_path / "stranger" / "recipe.yaml").write_text(recipe)
    (tmp_path / "stranger" / "summary.json").unlink()
    os.utime(tmp_path / "stranger" / "metrics.jsonl", (time.time() - 7200, time.time() - 7200))
    shutil.copytree(run, tmp_path / "own")
    rows = runs_below(tmp_path)

    def check(rows: list[dict[str, str]]) -> None:
        assert [row["run"] for row in rows] == ["own", "stranger"]
        assert [row["last line"] for row in rows] == ["done", "stopped 2 h ago"]
        assert [row["iterations"] for row in rows] == ["4/4", "4/4"]
        assert [row["model"] for row in rows] == ["gaussian_mixture", "no.such_module"]

    accepts(check, rows, oldest_first=rows[::-1])
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["runs", str(tmp_path / "own" / "samples")]) == 2
    with pytest.raises(UserError, match="no such folder"):
        runs_below(tmp_path / "nowhere")


def test_runs_without_a_folder_are_those_below_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the guide prints the command: no argument. Twin: what it says where there is no folder `runs`."""

    def said(exit_code: int) -> str:
        assert main(["runs"]) == exit_code
        captured = capsys.readouterr()
        return captured.out + captured.err

    def lists(text: str) -> None:
        assert "gaussian_mixture" in text

    monkeypatch.chdir(tmp_path)
    missing = said(2)
    shutil.copytree(run, tmp_path / "runs" / "mine")
    accepts(lists, said(0), missing=missing)


def test_a_run_is_followed_to_its_end(run: Path, tmp_path: Path) -> None:
    """Lines that come while it is followed, each once; twin: the log as it was at the beginning."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    log, summary = (folder / "metrics.jsonl").read_text(), (folder / "summary.json").read_text()
    lines = log.splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    (folder / "summary.json").unlink()

    def go_on() -> None:
        time.sleep(0.1)
        for part in (lines[2] + lines[3][:20], lines[3][20:] + "".join(lines[4:])):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(part)
            time.sleep(0.1)
        (folder / "summary.json").write_text(summary)

    thread = threading.Thread(target=go_on)
    thread.start()
    said = [line.split()[0] for line in follow(folder, pause=0.02)]
    thread.join()
    same(said, ["2/4", "3/4", "4/4", "done:"], at_the_beginning=["2/4", "done:"])
    assert main(["watch", str(folder)]) == 0
    with pytest.raises(UserError, match="no run in it yet"):
        next(follow(tmp_path))


def test_pictures_are_written_at_full_size_with_their_prompts(tmp_path: Path) -> None:
    """Truth: the pixels; twin: another picture's."""
    pictures = np.random.default_rng(0).random((3, 3, 40, 56)).astype(np.float32)
    save_pictures(tmp_path, pictures, ["a red circle", "../../etc/passwd", "\x1b ü $\\frac"])
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000-a-red-circle.png", "001-etc-passwd.png", "002-ü-frac.png"]
    read = [np.asarray(Image.open(file), dtype=np.float64).transpose(2, 0, 1) / 255 for file in files]
    close(read[1], pictures[1], atol=0.5 / 255 + 1e-6, another=pictures[0])
    save_pictures(tmp_path / "gray", pictures[:1, :1], None)
    assert Image.open(tmp_path / "gray" / "000.png").mode == "L"


@pytest.mark.slow
def test_a_sheet_makes_no_picture_smaller(tmp_path: Path) -> None:
    """Stripes one pixel wide can be told apart on it; twin: a sheet of ten in a row, 61 pixels each."""
    stripes = np.zeros((6, 3, 512, 512), np.float32)
    stripes[..., ::2] = 1.0
    save_samples(tmp_path / "samples.png", stripes, None)
    sheet = np.asarray(Image.open(tmp_path / "samples.png").convert("L"), dtype=np.float64)

    def sharp(sheet: np.ndarray) -> None:
        assert np.abs(np.diff(sheet, axis=1)).mean() > 40

    small = np.asarray(Image.fromarray(sheet.astype(np.uint8)).resize((620, 300)), dtype=np.float64)
    accepts(sharp, sheet, ten_in_a_row=small)


@pytest.mark.slow
def test_sample_writes_each_picture(tmp_path: Path) -> None:
    small = ["train.iterations=1", "train.batch=4", "sampler.steps=2", "evaluation={n: 4, steps: 2, held_out: []}"]
    assert main(["train", "digits", "algorithm.name=ddpo", *small, "--output", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--n", "3", "--prompt", "seven", "--output", str(tmp_path / "drawn")]) == 0
    names = sorted(path.name for path in (tmp_path / "drawn" / "pictures").iterdir())
    same(names, [f"00{i}-seven.png" for i in range(3)], of_another=["000-1.png"])
