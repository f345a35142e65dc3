"""Running a recipe in a folder: opening and resuming it, the loop with its progress, early stop and interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from scoreaction.commands.launch import described
from scoreaction.commands.signals import Signals
from scoreaction.disk import check_writable
from scoreaction.errors import Failed, Interrupted, UserError, one_line
from scoreaction.networks.memory import OUT_OF_MEMORY, is_out_of_memory
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import EarlyStop, Recipe, load_recipe
from scoreaction.recipes.trust import named_modules
from scoreaction.rewards import RewardError
from scoreaction.training.checkpoints import DAMAGED
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.identity import difference, flattened
from scoreaction.training.optimizer import TrainingError
from scoreaction.training.run_folder import RunFolder, read_description, read_json_lines, read_summary
from scoreaction.types import Values
from scoreaction.world import OtherProcess, World


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses a folder that this run may not have: a file, a comparison, another run, one whose recipe differs."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; name a folder")
    if (folder / "comparison.json").exists():
        raise UserError(f"--output: {folder} holds a comparison; name another folder")
    place = RunFolder(folder)
    if place.exists and not resume:
        raise UserError(f"--output: {folder} already holds a run; add --resume to go on with it, or name another folder")
    if place.holds_no_run:
        raise UserError(f"--output: {folder} holds files with the names of a run's, and no recipe; name another folder")
    if place.settings_path.exists():
        raise UserError(f"--output: {folder} holds a run that was started from Python; go on with it there, by resume()")
    saved = place.recipe_path
    if not saved.exists():
        return
    now = recipe.values()
    known = named_modules(read_description(folder)[0]) <= named_modules(now)  # imported already, by the recipe that was given
    changed = difference(flattened(load_recipe(str(saved), trust=known).values()), flattened(now))
    if changed is None:
        return
    key, before, after = changed
    if key == "train.iterations":
        raise UserError(f"{key}: this run has {before}; it can be raised, not lowered (got {after})")
    raise UserError(f"{key}: this run has {before!r}, not {after!r}; resume it unchanged, or name another --output")


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


class Reporter:
    """Shows how a run goes: a bar on a terminal's stderr, otherwise about ten plain lines on stdout."""

    def __init__(self, title: str, *, total: int, done: int, silent: bool = False) -> None:
        console = Console(stderr=True, quiet=silent)
        self.title, self.total, self.every = title, total, max(1, total // 10)
        self.live, self.silent = console.is_terminal and not silent, silent
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
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
        if not self.live and not self.silent and (iteration % self.every == 0 or iteration == self.total):
            print(f"{self.title}  {iteration}/{self.total}  {figures}  {metrics['seconds']:.0f} s", flush=True)


def run(recipe: Recipe, folder: Path, *, resume: bool, title: str | None = None) -> Values:
    """Trains a recipe in a folder, or goes on with it, and measures it; a finished run is left as it is.

    Returns the summary. UserError where the input is wrong, Failed where the run is, Interrupted after Ctrl-C with the
    state saved.
    """
    world = World.joined(recipe.train.device)
    world.together(lambda: claim(folder, recipe, resume=resume) if world.leads else None)
    title = one_line(title or folder.name)
    tuner = build(recipe, output=folder)
    place, where = RunFolder(folder), described(world, tuner.model.device)
    if world.leads:
        print(f"{title}  {where}", flush=True)
    with ExitStack() as stack:
        world.together(lambda: stack.enter_context(locked(place)) if world.leads else None)
        signals = stack.enter_context(Signals(world=world))
        if resume:
            try:
                tuner.resume()
            except OtherProcess:
                raise
            except (RuntimeError, KeyError, TypeError) as error:
                raise UserError(f"{place.newest_checkpoint()}: {DAMAGED}") from error
        stopper = Stopper(recipe.early_stop)
        known = world.broadcast(read_json_lines(place.metrics_path) if world.leads else [])
        summary = world.broadcast(read_summary(folder) if world.leads and place.complete else None)
        stopped = any([stopper(metrics) for metrics in known]) if tuner.iteration else False
        finished = stopped or tuner.iteration >= recipe.train.iterations
        if finished and summary is not None:
            return summary
        if world.leads:
            place.summary_path.unlink(missing_ok=True)
        if not finished:
            reporter = Reporter(title, total=recipe.train.iterations, done=tuner.iteration, silent=not world.leads)
            _iterate(tuner, stopper, signals, reporter)
        signals.at_once = True
        return _measured(tuner, title)


NOTHING = "in each all rewards were equal, or fp16 overflowed; scoreaction doctor says more"


def learned_nothing(folder: Path) -> bool:
    """True if the log of a run has iterations, and each of them was skipped."""
    logged = read_json_lines(RunFolder(folder).metrics_path)
    return bool(logged) and all("skipped" in metrics for metrics in logged)


def _iterate(tuner: Finetuner, stopper: Stopper, signals: Signals, reporter: Reporter) -> None:
    with reporter.progress:
        iterations = iter(tuner)
        while True:
            signals.waiting = f"iteration {tuner.iteration + 1} of {tuner.train.iterations}"
            try:
                metrics = next(iterations)
            except StopIteration:
                return
            except KeyboardInterrupt:
                raise Interrupted(f"stopped within iteration {tuner.iteration + 1}; {_saved_state(tuner)}") from None
            except TrainingError as error:
                raise Failed(f"{error}; {_saved_state(tuner)}") from error
            except (Exception, SystemExit) as error:
                raise Failed(f"iteration {tuner.iteration + 1}: {_cause(error)}; {_saved_state(tuner)}") from error
            reporter(metrics)
            if stopper(metrics):
                tuner.checkpoint()
                return
            if tuner.world.any(signals.requested):  # one process may hear of it an iteration before another
                tuner.checkpoint()
                raise Interrupted(f"stopped after iteration {tuner.iteration}, state saved")


def _cause(error: BaseException) -> str:
    """The line of an error, with the remedy where memory ran out."""
    if isinstance(error, TrainingError | RewardError | OtherProcess):
        return str(error)
    if is_out_of_memory(error) and OUT_OF_MEMORY not in str(error):
        return f"{error}; lower train.max_rows or train.batch, or set train.precision to bf16 (scoreaction plan says what fits)"
    return f"{type(error).__name__}: {error}"


def _saved_state(tuner: Finetuner) -> str:
    """The state that is saved when an iteration was cut off: not its own, which is of no use."""
    newest = None if tuner.folder is None else tuner.folder.newest_checkpoint()
    return "nothing was saved yet" if newest is None else f"the state after iteration {int(newest.name)} is saved"


def _measured(tuner: Finetuner, title: str) -> Values:
    console = Console(stderr=True, quiet=not tuner.world.leads)
    if not console.is_terminal and tuner.world.leads:
        print(f"{title}  measuring", flush=True)
    try:
        with console.status(Text(f"{title}  measuring")):
            return tuner.summary()
    except KeyboardInterrupt:
        raise Interrupted("stopped while measuring; training is done and saved") from None
    except (Exception, SystemExit) as error:
        raise Failed(f"measuring: {_cause(error)}") from error
