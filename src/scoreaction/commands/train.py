"""Running a recipe in a folder: opening and resuming it, the loop with its progress, early stop and interruption."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scoreaction.errors import Failed, Interrupted, UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import EarlyStop, Recipe, load_recipe
from scoreaction.training.checkpoints import DAMAGED
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.optimizer import TrainingError
from scoreaction.training.run_folder import RunFolder, check_writable, read_json_lines, read_summary
from scoreaction.types import Values


def flattened(values: Any, key: str = "") -> Values:
    """Nested values by dotted key.

    >>> flattened({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c.0': 2}
    """
    if isinstance(values, dict) and values:
        return {k: v for name, inner in values.items() for k, v in flattened(inner, f"{key}.{name}" if key else name).items()}
    if isinstance(values, list) and values:
        return {k: v for i, inner in enumerate(values) for k, v in flattened(inner, f"{key}.{i}").items()}
    return {key: values}


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses a folder that this run may not have: a file, a comparison, another run, one whose recipe differs."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; name a folder")
    if (folder / "comparison.json").exists():
        raise UserError(f"--output: {folder} holds a comparison; name another folder")
    place = RunFolder(folder)
    if place.exists and not resume:
        raise UserError(f"--output: {folder} already holds a run; add --resume to go on with it, or name another folder")
    if place.settings_path.exists():
        raise UserError(f"--output: {folder} holds a run that was started from Python; go on with it there, by resume()")
    saved = place.recipe_path
    if not saved.exists():
        return
    old, new = flattened(load_recipe(str(saved)).values()), flattened(recipe.values())
    for key in [*old, *(key for key in new if key not in old)]:
        before, now = old.get(key), new.get(key)
        if key == "train.iterations" and before is not None and now is not None:
            if now < before:
                raise UserError(f"{key}: this run has {before}; it can be raised, not lowered (got {now})")
        elif before != now:
            raise UserError(f"{key}: this run has {before!r}, not {now!r}; resume it unchanged, or name another --output")


@contextmanager
def locked(place: RunFolder) -> Iterator[None]:
    """The folder's lock; UserError where another run has it or the folder cannot be written."""
    check_writable(place.path, "--output")
    with ExitStack() as stack:
        try:
            stack.enter_context(place.locked())
        except ValueError as error:
            raise UserError(f"--{error}") from error
        yield


@dataclass
class Stopper:
    """True once the early-stop metric has not risen for `patience` iterations in which it was known."""

    rule: EarlyStop | None
    best: float = float("-inf")
    since: int = 0

    def __call__(self, metrics: Values) -> bool:
        if self.rule is None or self.rule.metric not in metrics:  # diversity lacks where no prompt was drawn twice
            return False
        if metrics[self.rule.metric] > self.best:
            self.best, self.since = metrics[self.rule.metric], 0
            return False
        self.since += 1
        return self.since >= self.rule.patience


FORCING = (signal.SIGINT, signal.SIGTERM)
ASKING = [signal.Signals[name] for name in ("SIGHUP", "SIGUSR1") if name in signal.Signals.__members__]
"""Of a lost terminal, often twice, which nohup ignores; and of Slurm before its limit."""


@dataclass
class Signals(AbstractContextManager["Signals"]):
    """Signals that ask the loop to stop after this iteration; a second Ctrl-C or SIGTERM stops at once."""

    requested: bool = False
    at_once: bool = False
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heard = [*FORCING, *(number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN)]
            self._before = {number: signal.signal(number, self._receive) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.at_once or (self.requested and number in FORCING):
            raise KeyboardInterrupt
        self.requested = True


class Reporter:
    """Shows how a run goes: a bar on a terminal's stderr, otherwise about ten plain lines on stdout."""

    def __init__(self, title: str, *, total: int, done: int) -> None:
        console = Console(stderr=True)
        self.title, self.total, self.every = title, total, max(1, total // 10)
        self.live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self.live,
        )
        self.task: TaskID = self.progress.add_task(title, total=total, completed=done, figures="")

    def __call__(self, metrics: Values) -> None:
        figures = f"reward {metrics['reward_mean']:.3f}  KL {metrics['kl_nats']:.3f} nats"
        iteration = metrics["iteration"]
        self.progress.update(self.task, completed=iteration, figures=figures)
        if not self.live and (iteration % self.every == 0 or iteration == self.total):
            print(f"{self.title}  {iteration}/{self.total}  {figures}  {metrics['seconds']:.0f} s", flush=True)


def run(recipe: Recipe, folder: Path, *, resume: bool, title: str | None = None) -> Values:
    """Trains a recipe in a folder, or goes on with it, and measures it; a finished run is left as it is.

    Returns the summary. UserError where the input is wrong, Failed where the run is, Interrupted after Ctrl-C with the
    state saved.
    """
    claim(folder, recipe, resume=resume)
    tuner = build(recipe, output=folder)
    place = tuner.folder
    assert place is not None
    with locked(place), Signals() as signals:
        if resume:
            try:
                tuner.resume()
            except (RuntimeError, KeyError, TypeError) as error:
                raise UserError(f"{place.newest_checkpoint()}: {DAMAGED}") from error
        stopper = Stopper(recipe.early_stop)
        stopped = any([stopper(metrics) for metrics in read_json_lines(place.metrics_path)]) if tuner.iteration else False
        finished = stopped or tuner.iteration >= recipe.train.iterations
        summary = read_summary(folder)
        if finished and summary is not None:
            return summary
        place.summary_path.unlink(missing_ok=True)
        if not finished:
            _iterate(
                tuner, stopper, signals, Reporter(title or folder.name, total=recipe.train.iterations, done=tuner.iteration)
            )
        signals.at_once = True
        return _measured(tuner, title or folder.name)


NOTHING = "in each all rewards were equal, or fp16 overflowed; scoreaction doctor says more"


def learned_nothing(folder: Path) -> bool:
    """True if the log of a run has iterations, and each of them was skipped."""
    logged = read_json_lines(RunFolder(folder).metrics_path)
    return bool(logged) and all("skipped" in metrics for metrics in logged)


def _iterate(tuner: Finetuner, stopper: Stopper, signals: Signals, reporter: Reporter) -> None:
    with reporter.progress:
        iterations = iter(tuner)
        while True:
            try:
                metrics = next(iterations)
            except StopIteration:
                return
            except KeyboardInterrupt:
                raise Interrupted(f"stopped within iteration {tuner.iteration + 1}; {_saved_state(tuner)}") from None
            except TrainingError as error:
                raise Failed(f"{error}; {_saved_state(tuner)}") from error
            except Exception as error:
                raise Failed(
                    f"iteration {tuner.iteration + 1}: {type(error).__name__}: {error}; {_saved_state(tuner)}"
                ) from error
            reporter(metrics)
            if stopper(metrics):
                tuner.checkpoint()
                return
            if signals.requested:
                tuner.checkpoint()
                raise Interrupted(f"stopped after iteration {tuner.iteration}, state saved")


def _saved_state(tuner: Finetuner) -> str:
    """The state that is saved when an iteration was cut off: not its own, which is of no use."""
    newest = None if tuner.folder is None else tuner.folder.newest_checkpoint()
    return "nothing was saved yet" if newest is None else f"the state after iteration {int(newest.name)} is saved"


def _measured(tuner: Finetuner, title: str) -> Values:
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title}  measuring", flush=True)
    try:
        with console.status(f"{title}  measuring"):
            return tuner.summary()
    except KeyboardInterrupt:
        raise Interrupted("stopped while measuring; training is done and saved") from None
    except Exception as error:
        raise Failed(f"measuring: {type(error).__name__}: {error}") from error
