"""The summary of a run: base and tuned model measured from the same noise, and the files that hold it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from scoreaction.disk import whole, write_whole
from scoreaction.training.clusters import optimum_entropy
from scoreaction.training.evaluation import ExactTask, measure, measure_kl
from scoreaction.training.label_task import label_kls
from scoreaction.training.run import Run
from scoreaction.training.run_folder import sample_arrays
from scoreaction.training.steering import certificate, steered_figures
from scoreaction.training.token_task import exact_task


def summarise(run: Run, progress: Callable[[str], None] = lambda done: None) -> dict[str, Any]:
    """Measures base and tuned model from the same noise; with a folder also writes summary.json, samples/ and model/.

    progress: called with what is done, as it goes.
    """
    chosen = run.evaluation
    chunk = max(16, min(8192, 2**21 // math.prod(run.model.shape)))  # samples at a time: as many as fit a modest memory
    sampler = chosen.sampler(run.sampler)
    counts, queries = run.counts(), run.reward.queries
    run.world.together(lambda: _afford(run))
    figures: dict[str, Any] = {"iterations": run.iteration}
    if run.selection is not None and run.model.selected is not None:
        figures["selected_iteration"] = run.selection.iteration
    prompted: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    labelled: dict[str, dict[str, float]] = {}
    for kind in ("base", "tuned"):
        measured, samples = measure(
            run.model, sampler, run.reward, run.held_out,
            n=chosen.n, prompts=run.prompts, seed=chosen.seed, reference=kind == "base", chunk=chunk, world=run.world,
            progress=partial(_drawn, progress, kind, chosen.n), clusters=run.clusters,
        )  # fmt: skip
        for prompt, mean in measured.pop("by_prompt", {}).items():
            prompted.setdefault(prompt, {})[f"reward_{kind}"] = mean
        for label, read in measured.pop("by_label", {}).items():
            labelled.setdefault(label, {}).update({f"{name}_{kind}": value for name, value in read.items()})
        for cluster, share in measured.pop("by_cluster", {}).items():
            shares.setdefault(cluster, {})[f"share_{kind}"] = share
        for name, value in measured.items():
            figures[f"{name.removesuffix('_se')}_{kind}{'_se' if name.endswith('_se') else ''}"] = value
        kept = min(chosen.n, 4096 if samples.ndim == 2 else 100)
        samples = run.world.gather(samples[: len(run.world.stripe(kept))], kept)
        if run.folder is not None:
            _save_samples(run, kind, samples)
    progress("KL")
    figures |= measure_kl(run.model, sampler, chosen.n, run.prompts, chosen.seed, run.world)
    beta = run.beta
    task = exact_task(run.model, run.reward.reward, beta)
    if task is not None:
        progress("distance to the optimum")
        exact = task.figures(run.model, sampler, chosen.n, chosen.seed, run.world)
        figures |= exact if all(math.isfinite(value) for value in exact.values() if isinstance(value, float)) else {}
        if run.clusters is not None and isinstance(task, ExactTask):
            figures["optimum_cluster_entropy"] = optimum_entropy(task.optimum.law, run.model, run.clusters, chosen.seed)
    if run.steering is not None:
        progress("steering")
        figures |= steered_figures(run, sampler, run.steering, n=None, prompts=run.prompts, seed=chosen.seed)[0]
    if chosen.certificate:
        progress("certificate")
        figures |= certificate(
            run.model, sampler, run.reward, beta, n=chosen.n, prompts=run.prompts, seed=chosen.seed, world=run.world
        )
    run.reward.queries = queries  # measuring is not training
    figures |= {"beta": beta, **counts}
    if prompted:
        figures["prompts"] = [{"prompt": prompt, **means} for prompt, means in prompted.items()]
    for label, nats in label_kls(run, sampler).items() if labelled else ():
        labelled[label]["kl_nats"] = nats
    for label, read in labelled.items():
        figures.setdefault("by_label", {}).setdefault(label, {}).update(read)
    if shares:
        figures["clusters"] = [{"cluster": int(cluster), **both} for cluster, both in shares.items()]
    figures = finite(figures)
    if run.folder is not None:
        run.write_recipe()
    if run.kept:
        run.save(run.folder.model if run.folder is not None else "")  # of the others, which do not write
    if run.folder is not None:
        write_whole(run.folder.summary_path, json.dumps(figures, indent=2, allow_nan=False) + "\n")  # last: where it is, all is
    return figures


def _afford(run: Run) -> None:
    """RewardError where a run's budget does not pay for all of its measurement: none of it is asked then."""
    if run.budget is not None and run.world.leads:
        run.before_asking()
        run.budget.check(sum(part.queries for part in run.measuring().values()))


def _drawn(progress: Callable[[str], None], kind: str, n: int, drawn: int) -> None:
    progress(f"{kind} model, {drawn:,} of {n:,} samples")


def finite(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures with None for numbers that are infinite or undefined, which JSON has not.

    >>> finite({"a": 1.5, "b": math.inf, "c": [{"d": math.nan}]})
    {'a': 1.5, 'b': None, 'c': [{'d': None}]}
    """

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: known(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [known(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return known(figures)


def _save_samples(run: Run, kind: str, samples: Tensor) -> None:
    assert run.folder is not None
    arrays = sample_arrays(samples.cpu().numpy(), run.prompts, run.model.letters)
    with whole(run.folder.samples / f"{kind}.npz") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
