"""Steering a recipe's pretrained model, or the tuned model of a run: samples, measures and a summary in a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scoreaction.disk import check_writable, whole, write_whole
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import Recipe, dump
from scoreaction.recipes.validation import check
from scoreaction.sampling.draw import spread_prompts
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steering import Steering
from scoreaction.training.checks import refuse_uncounted
from scoreaction.training.evaluation import NESTED, measure
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.run_folder import RunFolder, sample_arrays
from scoreaction.training.steering import certificate, chunk_of, settled, steered_figures
from scoreaction.training.summary import finite
from scoreaction.types import Values
from scoreaction.world import World

FREE = ("steer", "evaluation")
"""Sections of a run's recipe that steering may change: they do not make it another run."""


def chosen_steering(
    block: Steering | None,
    *,
    method: str | None,
    particles: int | None,
    beta: float | None,
    target: str | None,
    named: str = "--method",
) -> Steering:
    """The settings of the recipe's block with those of the options; `named` is the one that names the method."""
    own = {} if block is None else block.model_dump(exclude_defaults=True)
    options = {"method": method, "particles": particles, "beta": beta, "target": target}
    changes = {key: value for key, value in options.items() if value is not None}
    try:
        return check(Steering, own | changes, ("steer",))
    except UserError as error:
        key = str(error).partition(":")[0].removeprefix("steer.")
        option = named if key == "method" else f"--{key}"
        raise UserError(f"{option}{str(error).removeprefix(f'steer.{key}')}" if key in changes else str(error)) from error


def steering_of(
    recipe: Recipe, method: str | None, particles: int | None, beta: float | None, target: str | None
) -> Steering | None:
    """The steering that the options of `sample` and `evaluate` ask for, None without `--steer`, which the others need.

    Of the recipe's block, when it names another method, beta and what is known alone count: these commands cannot change its
    other keys.
    """
    if method is None:
        for option, value in (("--particles", particles), ("--beta", beta), ("--target", target)):
            if value is not None:
                raise UserError(f"{option}: is a setting of steering; add --steer METHOD, for example --steer auto")
        return None
    block = recipe.steer
    if block is not None and method not in (block.method, "auto") and block.method != "auto":
        block = Steering(beta=block.beta, known=block.known)
    return chosen_steering(block, method=method, particles=particles, beta=beta, target=target, named="--steer")


def check_overrides(overrides: Sequence[str]) -> None:
    """UserError for a setting that would make a run another one."""
    for text in overrides:
        if text.partition("=")[0].partition(".")[0] not in FREE:
            raise UserError(
                f"{text.partition('=')[0]}: a run keeps its own; set keys of {' and '.join(FREE)}, or name a recipe"
            )


def alone_or_whole(recipe: Recipe) -> Recipe:
    """The recipe with networks that every process has whole: steering deals groups, and shares no network."""
    World.joined(recipe.train.device)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"shard": False})})


def steered_cell(
    tuner: Finetuner, sampler: Sampler, steering: Steering, *, n: int, prompts: list[Any] | None, seed: int
) -> Values:
    """A cell of an evaluation: the tuned model, steered, under this sampler."""
    figures, _ = steered_figures(tuner, sampler, steering, n=n, prompts=prompts, seed=seed)
    return {key.replace("_steered_se", "_se").removesuffix("_steered"): value for key, value in figures.items()}


def steer_run(recipe: Recipe, tuner: Finetuner, folder: Path, steering: Steering, *, n: int | None, base: bool) -> Values:
    """Measures the model as it is and steered, from the evaluation's sampler and seed, and writes both into the folder.

    recipe.yaml, summary.json, samples/*.npz and samples.png. base: the pretrained model, else the tuned one. UserError, with
    nothing written, where settings, reward and sampler do not go together.
    """
    world, chosen = tuner.world, tuner.evaluation
    sampler = chosen.sampler(tuner.sampler)
    if base:
        refuse_uncounted(tuner.budget, "steer")
    try:
        steering = settled(tuner.model, steering, tuner.reward, sampler, tuner.beta, tuned=not base)
    except ValueError as error:
        raise UserError(str(error).replace("sampler.eta", "evaluation.eta")) from error
    place = RunFolder(folder)
    if world.leads and (folder.is_file() or place.exists):
        raise UserError(f"--output: {folder} already holds a run or is a file; name another folder")
    check_writable(folder, "--output")
    kind = "base" if base else "tuned"
    n = n or steering.sample_count(chosen.n)
    plain, samples = measure(
        tuner.model, sampler, tuner.reward, tuner.held_out, n=chosen.n, prompts=tuner.prompts, seed=chosen.seed,
        reference=base, chunk=chunk_of(tuner.model), world=world, clusters=tuner.clusters,
    )  # fmt: skip
    for nested in NESTED:
        plain.pop(nested, None)
    figures: Values = {"method": steering.method, "particles": steering.particles, "beta": steering.beta}
    for name, value in plain.items():
        figures[f"{name.removesuffix('_se')}_{kind}{'_se' if name.endswith('_se') else ''}"] = value
    more, steered = steered_figures(
        tuner, sampler, steering, n=n, prompts=tuner.prompts, seed=chosen.seed, reference=base, progress=_groups(n, world)
    )
    figures |= more
    if chosen.certificate and not base:
        figures |= certificate(
            tuner.model, sampler, tuner.reward, tuner.beta, n=chosen.n, prompts=tuner.prompts, seed=chosen.seed, world=world
        )
    kept = {kind: _kept(world, samples, chosen.n), "steered": _kept(world, steered, more["n_steered"])}
    if not world.leads:
        return figures
    _write(place, recipe.model_copy(update={"steer": steering}), finite(figures), kept, tuner)
    return figures


def _groups(n: int, world: World) -> Any:
    return (lambda done: print(f"steered {done:,} of {n:,}", flush=True)) if world.leads else (lambda done: None)


def _kept(world: World, own: Tensor, n: int) -> Tensor:
    """The first samples of all processes, (at most 4096 or 100 pictures, *shape)."""
    kept = min(n, 4096 if own.ndim == 2 else 100)
    return world.gather(own[: len(world.stripe(kept))], kept)


def _write(place: RunFolder, recipe: Recipe, figures: Values, kept: dict[str, Tensor], run: Finetuner) -> None:
    from scoreaction.report.sample_figures import save_samples

    for kind, tensors in kept.items():
        samples = tensors.cpu().numpy()
        texts = None if run.prompts is None else [str(prompt) for prompt in spread_prompts(run.prompts, len(samples)) or []]
        arrays = sample_arrays(samples, texts, run.model.letters)
        with whole(place.samples / f"{kind}.npz") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        save_samples(place.samples / f"{kind}.png", samples, texts, run.model.letters)
    write_whole(place.recipe_path, dump(recipe))
    write_whole(place.summary_path, json.dumps(figures, indent=2, allow_nan=False) + "\n")


def costs(figures: Values) -> str:
    """A line about what steering took, and what it says of the law."""
    parts = [
        f"{figures['evaluations_per_sample']:,.0f} network evaluations",
        f"{figures['queries_per_sample']:,.0f} reward queries a sample",
    ]
    if figures["backward_per_sample"]:
        parts.insert(1, f"{figures['backward_per_sample']:,.0f} of them with gradient")
    if "log_z" in figures:
        error = figures["log_z_se"]
        parts.append(f"log Z {figures['log_z']:.4g}" + (f" ± {error:.2g}" if math.isfinite(error) else ""))
        parts.append(f"least effective share {figures['ess_min']:.2f}")
    bound = "at most " if figures["kl_steered_is_bound"] else ""
    return ", ".join([*parts, f"KL {bound}{figures['kl_steered_nats']:.3g} nats"])
