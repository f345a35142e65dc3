"""Running a recipe in a folder: opening and resuming it, the loop with its progress, early stop and interruption."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from scoreaction.commands.launch import described
from scoreaction.commands.progress import Measuring, Reporter, say
from scoreaction.commands.signals import Signals
from scoreaction.disk import check_writable, refuse_closed
from scoreaction.errors import Failed, Interrupted, UserError, one_line
from scoreaction.networks.memory import OUT_OF_MEMORY, is_out_of_memory
from scoreaction.recipes.build import algorithm_of, build
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import EarlyStop, Recipe, load_recipe
from scoreaction.recipes.trust import named_modules
from scoreaction.report.numbers import limit_of_policy
from scoreaction.sampling.draw import draw, spread_prompts
from scoreaction.training.checkpoints import DAMAGED
from scoreaction.training.checks import device_of
from scoreaction.training.errors import TrainingError
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.identity import difference, flattened
from scoreaction.training.run_folder import RunFolder, read_description, read_json_lines, read_summary
from scoreaction.types import Values
from scoreaction.world import OtherProcess, World, is_lost_peer


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuses a folder that this run may not have: a file, a comparison, another run, one whose recipe differs."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; name a folder")
    refuse_closed(folder, "--output")
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
    raise UserError(
        f"{key}: this run has {before!r}, not {after!r}; resume it unchanged, by its recipe {saved}, or name another --output"
    )


def _resumed(recipe: Recipe, folder: Path, world: World) -> Recipe:
    """The recipe with what others gave the algorithm of the folder's run when it began."""
    there = world.leads and RunFolder(folder).recipe_path.exists()
    saved = world.broadcast(world.together(lambda: read_description(folder)[0]["algorithm"] if there else None))
    if not isinstance(saved, dict):
        return recipe
    block = replace(recipe.algorithm, config=algorithm_of(recipe).resumed(saved))
    return recipe.model_copy(update={"algorithm": block})


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
        if self.rule is None or self.rule.metric not in metrics:  # diversity where no prompt came twice, late rewards at first
            return False
        if metrics[self.rule.metric] > self.best:
            self.best, self.since = metrics[self.rule.metric], 0
            return False
        self.since += 1
        return self.since >= self.rule.patience


def run(recipe: Recipe, folder: Path, *, resume: bool, title: str | None = None) -> Values:
    """Trains a recipe in a folder, or goes on with it, and measures it; a finished run is left as it is.

    Returns the summary. UserError where the input is wrong, Failed where the run is, Interrupted after Ctrl-C with the
    state saved.
    """
    world = World.joined(recipe.train.device)
    recipe = _resumed(recipe, folder, world) if resume else recipe
    world.together(lambda: claim(folder, recipe, resume=resume) if world.leads else None)
    title = one_line(title or folder.name)
    prompts = 0 if recipe.prompts is None else len(prompt_list(recipe.prompts) or [])
    say(title, described(world, str(device_of(recipe.train))))
    say(title, "building model and rewards" + (f", encoding {prompts} prompts" if prompts else ""))
    tuner, place = build(recipe, output=folder), RunFolder(folder)
    if recipe.sampler.off_below is None and tuner.sampler.off_below:
        say(title, f"{limit_of_policy(tuner.sampler.off_below)} (sampler.off_below, by default of a network that predicts x0)")
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
            say(title, f"iteration {tuner.iteration + 1} of {recipe.train.iterations}")
            reporter = Reporter(title, total=recipe.train.iterations, done=tuner.iteration)
            _iterate(tuner, place, stopper, signals, reporter)
        signals.at_once = True
        if world.any(signals.requested):
            raise Interrupted(STOPPED)
        return _measured(tuner, title, signals)


NOTHING = "in each all rewards were equal, or fp16 overflowed; scoreaction doctor says more"


def learned_nothing(folder: Path) -> bool:
    """True if the log of a run has iterations, and each of them was skipped."""
    logged = read_json_lines(RunFolder(folder).metrics_path)
    return bool(logged) and all("skipped" in metrics for metrics in logged)


def _iterate(tuner: Finetuner, place: RunFolder, stopper: Stopper, signals: Signals, reporter: Reporter) -> None:
    if tuner.rounds is not None:
        tuner.rounds.progress = reporter.note
    with reporter.progress:
        iterations = iter(tuner)
        while True:
            signals.waiting = f"iteration {tuner.iteration + 1} of {tuner.train.iterations}"
            try:
                if not _step(tuner, iterations, stopper, signals, reporter):
                    return
            except Interrupted:
                raise
            except KeyboardInterrupt:
                raise Interrupted(f"stopped within iteration {tuner.iteration + 1}; {_saved_state(place)}") from None
            except TrainingError as error:
                raise Failed(f"{error}; {_saved_state(place)}") from error
            except (Exception, SystemExit) as error:
                raise Failed(f"iteration {tuner.iteration + 1}: {_cause(error)}; {_saved_state(place)}") from error


def _step(tuner: Finetuner, iterations: Iterator[Values], stopper: Stopper, signals: Signals, reporter: Reporter) -> bool:
    """One iteration, with what is shown of it; False where it was the last one. Interrupted where the run is asked to stop."""
    metrics = next(iterations, None)
    if metrics is None:
        return False
    reporter(metrics)
    if tuner.train.show_every is not None and tuner.iteration % tuner.train.show_every == 0:
        show(tuner)
    if tuner.world.any(signals.requested):  # one process may hear of it an iteration before another
        tuner.checkpoint()
        raise Interrupted(f"stopped after iteration {tuner.iteration}, state saved")
    if stopper(metrics):
        tuner.checkpoint()
        return False
    return True


def _cause(error: BaseException) -> str:
    """The line of an error, with the remedy where memory ran out."""
    if isinstance(error, Failed | OtherProcess):
        return str(error)
    if is_lost_peer(error):
        vars(error)["shared"] = True
        return "another process ended"
    if is_out_of_memory(error) and OUT_OF_MEMORY not in str(error):
        return f"{error}; lower train.max_rows or train.batch, or set train.precision to bf16 (scoreaction plan says what fits)"
    return f"{type(error).__name__}: {error}"


def _saved_state(place: RunFolder) -> str:
    """The state that is saved when an iteration was cut off: not its own, which is of no use."""
    newest = place.newest_checkpoint()
    return "nothing was saved yet" if newest is None else f"the state after iteration {int(newest.name)} is saved"


def show(tuner: Finetuner) -> None:
    """Draws a few samples of the policy as it is, of the same noise each time: samples/ITERATION.png."""
    from scoreaction.report.sample_figures import is_pictures, save_samples

    n = SHOWN if len(tuner.model.shape) > 1 else 512
    prompts = spread_prompts(tuner.prompts, n)
    samples = draw(tuner.model, tuner.sampler, n, prompts, tuner.evaluation.seed, world=tuner.world).cpu().numpy()
    if tuner.folder is None or tuner.journal is None:  # of another process than the first
        return
    path = tuner.folder.samples / f"{tuner.iteration:06d}.png"
    save_samples(path, samples, None if prompts is None else list(map(str, prompts)), tuner.model.letters)
    if is_pictures(samples):
        tuner.journal.show(samples.clip(0, 1), tuner.iteration)


SHOWN = 16
"""Pictures that are drawn while a run goes on."""


STOPPED = "stopped while measuring; training is done and saved"


def _measured(tuner: Finetuner, title: str, signals: Signals) -> Values:
    try:
        with Measuring(title) as progress:
            return tuner.summary(progress)
    except KeyboardInterrupt:
        raise Interrupted(STOPPED) from None
    except (Exception, SystemExit) as error:
        if signals.requested and is_lost_peer(error):  # of which one process hears first
            raise Interrupted(STOPPED) from None
        raise Failed(f"measuring: {_cause(error)}") from error
