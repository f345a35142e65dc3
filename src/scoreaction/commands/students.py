"""A few-step student of a run's tuned policy: the distillation, its folder, and what it kept beside plain solvers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreaction.commands.distill import iterated
from scoreaction.commands.evaluate import Opened, open_run
from scoreaction.commands.signals import Signals
from scoreaction.disk import check_writable, write_whole
from scoreaction.errors import Failed, Interrupted, UserError
from scoreaction.networks.model import Model
from scoreaction.recipes.build import build, named
from scoreaction.recipes.recipe import Recipe
from scoreaction.recipes.validation import check
from scoreaction.sampling.draw import draw_x0, spread_prompts
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.evaluation import NESTED, measure, measure_kl
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.run_folder import STUDENT, RunFolder
from scoreaction.training.students import Student, StudentDistiller
from scoreaction.training.summary import finite
from scoreaction.training.token_task import exact_task
from scoreaction.types import Values

TEACHER_STEPS = 50
"""Steps of the teacher that a student is measured against."""
COMPARED = 1024
"""Samples at most whose distance to the teacher's own is measured."""


def distill_run(run: Path, folder: Path, *, steps: int | None, overrides: Sequence[str], trust: bool) -> Values:
    """Makes a student of a run's policy, in a run folder of its own, and measures what it kept: student.json.

    UserError where the input is wrong; Failed or Interrupted where nothing was written.
    """
    foreign = next((text for text in overrides if not text.startswith("student.")), None)
    if foreign is not None:
        raise UserError(f"{foreign}: of a run only student.* can be set; the rest is as it was trained")
    opened = open_run(run, tuned=True, trust=trust, overrides=overrides)
    known = (opened.recipe.student or Student()).model_dump(mode="json")
    settings = check(Student, {**known, "of": str(run.absolute()), **({} if steps is None else {"steps": steps})}, ("student",))
    check_writable(folder, "--output")
    if RunFolder(folder).exists:
        raise UserError(f"--output: {folder} already holds a run; name another folder")
    tuner = opened.tuner
    try:
        with Signals(at_once=True):
            rows = plain_rows(tuner, settings.steps)
            ends = _ends(tuner, rows)
            distiller = StudentDistiller(tuner.model, settings, tuner.sampler, prompts=tuner.prompts, world=tuner.world)
            iterated(distiller, settings.iterations, leads=tuner.world.leads)
            student = placed(opened, settings, folder)
            rows.append(_measured("student", student, student.evaluation.sampler(student.sampler), guided=False))
            rows[-1] |= _rms(student, student.evaluation.sampler(student.sampler), ends)
            figures = finite({"steps": settings.steps, "of": str(run.absolute()), **kept(rows), "rows": rows})
            student.checkpoint()
            student.summary()
    except KeyboardInterrupt:
        raise Interrupted("stopped while distilling; distill again into another folder") from None
    except ValueError as error:
        raise UserError(named(str(error), "student")) from error
    except RuntimeError as error:
        raise Failed(f"distilling: {error}") from error
    if tuner.world.leads:
        write_whole(folder / STUDENT, json.dumps(figures, indent=2, allow_nan=False) + "\n")
    return figures


def student_recipe(recipe: Recipe, settings: Student, model: Model) -> Recipe:
    """The run's recipe as that of its student: measured by the student's sampler alone, without guidance."""
    chosen = settings.sampling
    guidance = 1.0 if model.true_cfg is None else recipe.sampler.guidance
    own = {"guidance": guidance, "negative_prompt": None, "off_below": 0.0, "grid": chosen["grid"]}
    measured = {name: chosen[name] for name in ("solver", "steps", "eta")} | {"certificate": False}
    changes: dict[str, Any] = {
        "sampler": recipe.sampler.model_copy(update=own),
        "evaluation": recipe.evaluation.model_copy(update=measured),
        "train": recipe.train.model_copy(update={"iterations": settings.iterations, "select": None, "shard": False}),
        "student": settings,
        **dict.fromkeys(("early_stop", "online", "steer")),
    }
    return recipe.model_copy(update=changes)


def placed(opened: Opened, settings: Student, folder: Path) -> Finetuner:
    """The student's run, in its folder, with the weights that its teacher's model now has."""
    student = build(student_recipe(opened.recipe, settings, opened.tuner.model), output=folder, learns=False)
    student.reward.spend = opened.tuner.reward.spend  # of the run's budget
    with torch.no_grad():
        for name, p in student.model.parameters.items():
            p.copy_(opened.tuner.model.parameters[name])
    student.iteration = settings.iterations
    return student


def plain_rows(tuner: Finetuner, steps: int) -> list[Values]:
    """The pretrained model and the policy at many steps, and the policy at few by plain solvers, from one noise."""
    ode = {"eta": 0.0, "solver": "dpmpp_2m"}

    def sampler(**changes: Any) -> Sampler:
        return tuner.sampler.model_copy(update=ode | changes)

    many = sampler(steps=TEACHER_STEPS)
    rows = [_measured("pretrained", tuner, many, reference=True), _measured("teacher", tuner, many)]
    kl = measure_kl(tuner.model, many, tuner.evaluation.n, tuner.prompts, tuner.evaluation.seed, tuner.world)
    rows[1] |= {"kl_nats": kl["kl_nats"]}
    few = [sampler(steps=steps, solver="ddim"), sampler(steps=steps), sampler(steps=2 * steps)]
    return rows + [_measured("policy", tuner, each) for each in few]


def _measured(name: str, tuner: Finetuner, sampler: Sampler, *, reference: bool = False, guided: bool = True) -> Values:
    model, seed = tuner.model, tuner.evaluation.seed
    figures, _ = measure(
        model, sampler, tuner.reward, tuner.held_out,
        n=tuner.evaluation.n, prompts=tuner.prompts, seed=seed, reference=reference, world=tuner.world,
        clusters=tuner.clusters,
    )  # fmt: skip
    for nested in NESTED:
        figures.pop(nested, None)
    twice = guided and tuner.prompts is not None and model.guidance_weight(sampler.guidance) != 1
    cell: Values = {"model": name, "solver": sampler.solver, "steps": sampler.steps}
    cell |= {"evaluations": sampler.steps * sampler.find().evaluations * (2 if twice else 1), **figures}
    task = None if reference else exact_task(model, tuner.reward.reward, tuner.beta)
    return cell if task is None else cell | task.distances(model, sampler, tuner.evaluation.n, seed, tuner.world)


def _ends(tuner: Finetuner, rows: list[Values]) -> Tensor:
    """The ends of the teacher's samples; beside each few-step row its distance to them."""

    def sampler(row: Values) -> Sampler:
        return tuner.sampler.model_copy(update={"eta": 0.0, "solver": row["solver"], "steps": row["steps"]})

    ends = _drawn(tuner, sampler(rows[1]))
    for row in rows[2:]:
        row.update(_rms(tuner, sampler(row), ends))
    return ends


def _drawn(tuner: Finetuner, sampler: Sampler) -> Tensor:
    n = min(COMPARED, tuner.evaluation.n)
    return draw_x0(tuner.model, sampler, n, spread_prompts(tuner.prompts, n), tuner.evaluation.seed, world=tuner.world)


def _rms(tuner: Finetuner, sampler: Sampler, ends: Tensor) -> Values:
    """Root mean square distance, a coordinate, to the teacher's ends of the same noise."""
    return {"rms": float((_drawn(tuner, sampler) - ends).double().square().mean().sqrt())}


def kept(rows: list[Values]) -> Values:
    """The share of the reward's gain, and of the diversity, that the student kept of its teacher's.

    >>> rewards = {"pretrained": 0, "teacher": 4, "student": 3}
    >>> kept([{"model": name, "reward": reward, "diversity": 2.0} for name, reward in rewards.items()])
    {'reward_kept': 0.75, 'diversity_kept': 1.0}
    """
    base, teacher, student = (
        next(row for row in rows if row["model"] == name) for name in ("pretrained", "teacher", "student")
    )
    gain = teacher["reward"] - base["reward"]
    diverse = None if not teacher["diversity"] else student["diversity"] / teacher["diversity"]
    return {"reward_kept": (student["reward"] - base["reward"]) / gain if gain else None, "diversity_kept": diverse}
