"""Drawing from a finished run, and measuring it over a grid of samplers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scoreaction.commands.steer import steered_cell
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.disk import check_writable, whole, write_whole
from scoreaction.errors import UserError, nearest
from scoreaction.models.pretrained import is_pretrained
from scoreaction.recipes.build import build
from scoreaction.recipes.prompts import prompt_list, read_prompts
from scoreaction.recipes.recipe import Recipe, load_recipe, resolve
from scoreaction.recipes.text import SCORING
from scoreaction.sampling.draw import draw, spread_prompts
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steering import Steering
from scoreaction.training.checkpoints import DAMAGED, load_newest
from scoreaction.training.evaluation import measure, measure_kl
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.run_folder import RunFolder, check_folder, sample_arrays
from scoreaction.training.steering import certificate, chunk_of, steered
from scoreaction.training.summary import finite
from scoreaction.training.token_task import exact_task
from scoreaction.types import Values
from scoreaction.world import World

OWN = "run"
"""The name of a run's own prompts among sets of them."""
PRINTED = "give what train printed after run:"


@dataclass(frozen=True)
class Opened:
    """A run read back from its folder."""

    folder: Path
    recipe: Recipe
    tuner: Finetuner


def open_run(folder: Path, *, tuned: bool, rewards: bool = True, trust: bool = False, overrides: Sequence[str] = ()) -> Opened:
    """Builds the run of a folder and, for the tuned model, loads its newest checkpoint; nothing in the folder changes.

    rewards False: without its rewards, to draw from. trust: whether modules that its recipe names are imported. overrides:
    settings that do not make the run another one.
    """
    check_folder(folder, PRINTED)
    place = RunFolder(folder)
    if place.settings_path.is_file():
        raise UserError(
            f"{folder}: was started from Python, where its network is; there summary() measures it, then sa.load reads"
            " it and sa.sample draws"
        )
    if is_pretrained(folder) and not rewards:
        recipe = bare_recipe(folder)
        return Opened(folder, recipe, build(recipe, rewards=False))
    if is_pretrained(folder):
        raise UserError(f"{folder}: holds a pretrained model; name it in a recipe, model: {{name: pretrained, path: {folder}}}")
    if not place.recipe_path.is_file():
        raise UserError(f"{folder}: not a run folder (no recipe.yaml in it); {PRINTED}")
    recipe = load_recipe(str(place.recipe_path), overrides, trust=trust, rewards=rewards)
    if World.joined(recipe.train.device).size == 1:  # which reads what several trained
        recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"shard": False})})
    tuner = build(recipe, rewards=rewards, learns=False)
    tuner.count_questions(place)
    newest = load_newest(place.saved_checkpoints(), tuner.identity(), besides=() if rewards else SCORING)
    if newest is not None:
        path, state = newest
        try:
            (tuner.load_state if rewards else tuner.load_weights)(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: {DAMAGED}") from error
    elif tuned:
        raise UserError(f"{folder}: no checkpoint yet; train it first, or take --base where there is that option")
    return Opened(folder, recipe, tuner)


def bare_recipe(folder: Path) -> Recipe:
    """A recipe to draw from a pretrained model with, whose reward and algorithm are not used."""
    unused: Values = {"reward": {"name": "linear", "direction": [1.0]}, "algorithm": {"name": "ddpo"}}
    return resolve({"model": {"name": "pretrained", "path": str(folder)}, **unused})


def sampler_with(opened: Opened, *, steps: int | None, solver: str | None, eta: float | None) -> Sampler:
    """The evaluation's sampler with some settings replaced; a solver that takes one eta only gets it."""
    _check(steps=steps, solver=solver, eta=eta)
    sampler = opened.tuner.evaluation.sampler(opened.tuner.sampler)
    chosen = SOLVERS[solver or sampler.solver]
    if eta is None:
        eta = sampler.eta if chosen.takes(sampler.eta) else (0.0 if chosen.noises == "zero" else 1.0)
    changes = {"steps": steps or sampler.steps, "solver": solver or sampler.solver, "eta": eta}
    if not chosen.takes(eta):
        raise UserError(f"--solver: {changes['solver']} takes only eta {ETAS[chosen.noises]} (got {eta:g})")
    changed = sampler.model_copy(update=changes)
    try:
        changed.check(opened.tuner.model)
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('sampler.')}") from error
    return changed


ETAS = {"zero": "0", "positive": "above 0", "one": "1"}


def _check(*, steps: int | None, solver: str | None, eta: float | None) -> None:
    if solver is not None and solver not in SOLVERS:
        raise UserError(f"--solver: unknown solver {solver!r}; {nearest(solver, SOLVERS)}")
    if eta is not None and not 0 <= eta <= 1:
        raise UserError(f"--eta: must be between 0 and 1 (got {eta})")
    if steps is not None and steps < 1:
        raise UserError(f"--steps: must be at least 1 (got {steps})")


def draw_samples(
    opened: Opened,
    output: Path,
    *,
    n: int,
    prompts: Sequence[str] | None,
    steps: int | None,
    solver: str | None,
    eta: float | None,
    seed: int,
    base: bool,
    steering: Steering | None = None,
) -> tuple[Path, Values]:
    """Writes samples.npz (`samples`, and `prompts` where there are any) and samples.png; gives the first's path.

    Pictures are also written each for itself, at full size, into pictures/. With steering also what it took, by name.
    """
    from scoreaction.report.sample_figures import is_pictures, save_pictures, save_samples

    tuner = opened.tuner
    sampler = sampler_with(opened, steps=steps, solver=solver, eta=eta)
    chosen = _prompts(opened, prompts, "--prompt") if prompts else tuner.prompts
    check_writable(output, "--output")
    figures: Values = {}
    if steering is None:
        sample_prompts = spread_prompts(chosen, n)
        drawn = draw(tuner.model, sampler, n, sample_prompts, seed, reference=base, world=tuner.world)
    else:
        result = steered(tuner, sampler, steering, n=n, prompts=chosen, seed=seed, reference=base)
        sample_prompts, figures = result.prompts, result.figures
        with torch.no_grad():
            drawn = torch.cat([tuner.model.decode(part) for part in result.x0.split(chunk_of(tuner.model))])
    samples = drawn.cpu().numpy()
    if not tuner.world.leads:
        return output / "samples.npz", figures
    letters = tuner.model.letters
    arrays = sample_arrays(samples, sample_prompts, letters)
    with whole(output / "samples.npz") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    save_samples(output / "samples.png", samples, sample_prompts, letters)
    if is_pictures(samples):
        save_pictures(output / "pictures", samples, None if sample_prompts is None else list(map(str, sample_prompts)))
    return output / "samples.npz", figures


def evaluate_grid(
    opened: Opened,
    steps: list[int],
    solvers: list[str],
    etas: list[float],
    *,
    n: int | None,
    seed: int | None,
    prompts: Sequence[str] = (OWN,),
    base: bool = False,
    steering: Steering | None = None,
    certified: bool = False,
) -> Values:
    """Measures the tuned model for every solver, eta and step count that go together; writes evaluation.json.

    prompts: shipped sets or files, a row each, `run` for the run's own. base: a row of the pretrained model beside each. With
    steering it is the steered model that is measured. certified: also `gap_nats`, whatever the recipe says.
    """
    tuner = opened.tuner
    check_writable(opened.folder, "RUN")
    for solver, eta, count in itertools.product(solvers, etas, steps):  # what can never be, before anything is measured
        _check(steps=count, solver=solver, eta=eta)
    sets = {name: tuner.prompts if name == OWN else _prompts(opened, name, "--prompts") for name in prompts}
    n = n or tuner.evaluation.n
    seed = tuner.evaluation.seed if seed is None else seed
    rows: list[Values] = []
    skipped: list[Values] = []
    for solver, eta in itertools.product(solvers, etas):
        try:
            for count in steps:
                sampler = sampler_with(opened, steps=count, solver=solver, eta=eta)
                for name, own in sets.items():
                    cell = {"solver": solver, "eta": eta, "steps": count} | ({"prompts": name} if len(sets) > 1 else {})
                    measured = _cells(tuner, sampler, steering, n=n, prompts=own, seed=seed, base=base, certified=certified)
                    rows += [cell | figures for figures in measured]
        except ValueError as error:
            why = str(error).removeprefix("--solver: ").removeprefix("solver ").removeprefix("sampler.")
            skipped.append({"solver": solver, "eta": eta, "why": why})
    if not rows:
        raise UserError(f"--solver: nothing to measure: {skipped[0]['why']}")
    evaluation = {
        "n": n,
        "seed": seed,
        "iteration": tuner.iteration,
        "prompts": list(prompts),
        "grid": rows,
        "skipped": skipped,
    }
    if tuner.world.leads:
        write_whole(opened.folder / "evaluation.json", json.dumps(finite(evaluation), indent=2, allow_nan=False) + "\n")
    return evaluation


def _prompts(opened: Opened, prompts: Sequence[str], option: str) -> list[Any] | None:
    """Prompts other than the run's own, a list, a set or a file; UserError where the model does not take them."""
    model = opened.tuner.model
    if model.encode is None:
        raise UserError(f"{option}: the model {opened.recipe.model.name} takes no prompts; leave it out")
    try:
        others = prompt_list(read_prompts(prompts, Path())) if isinstance(prompts, str) else list(prompts)
        model.conditions(others)
    except ValueError as error:
        raise UserError(f"{option}: {str(error).removeprefix('prompts: ')}") from error
    return others


def _cells(
    tuner: Finetuner,
    sampler: Sampler,
    steering: Steering | None,
    *,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    base: bool,
    certified: bool,
) -> list[Values]:
    """Measures of one sampler on one set of prompts: of the tuned model, and of the base before it."""
    if steering is None:
        tuned = _cell(tuner, sampler, n, prompts, seed)
    else:
        tuned = steered_cell(tuner, sampler, steering, n=n, prompts=prompts, seed=seed)
    if certified or tuner.evaluation.certificate:
        chosen: Values = {"n": n, "prompts": prompts, "seed": seed, "world": tuner.world}
        tuned |= certificate(tuner.model, sampler, tuner.reward, tuner.beta, **chosen)
    if not base:
        return [tuned]
    return [{"model": "base"} | _cell(tuner, sampler, n, prompts, seed, reference=True), {"model": "tuned"} | tuned]


def _cell(
    tuner: Finetuner, sampler: Sampler, n: int, prompts: list[Any] | None, seed: int, *, reference: bool = False
) -> Values:
    model, world = tuner.model, tuner.world
    figures, _ = measure(
        model, sampler, tuner.reward, tuner.held_out, n=n, prompts=prompts, seed=seed, reference=reference, world=world,
        clusters=tuner.clusters,
    )  # fmt: skip
    if reference:
        return figures
    figures |= measure_kl(model, sampler, n, prompts, seed, world)
    task = exact_task(model, tuner.reward.reward, tuner.beta)
    return figures if task is None else figures | task.distances(model, sampler, n, seed, world)
