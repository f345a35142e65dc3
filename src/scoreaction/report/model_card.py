"""The README of a run's model/ folder: how to load it, the figures it reached, its recipe and some samples."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from scoreaction.algorithms._learner import Algorithm
from scoreaction.disk import write_whole
from scoreaction.models import Card
from scoreaction.recipes.recipe import Recipe, dump
from scoreaction.report.curve_figures import title_of
from scoreaction.report.numbers import before_and_after, limit_of_policy, number, with_error
from scoreaction.training.run_folder import MODEL_DESCRIPTION, RunFolder

SHOWN = 16
"""Samples in the picture."""


def write_card(folder: Path, recipe: Recipe, figures: dict[str, Any]) -> Path:
    """Writes README.md, and samples.png where pictures can be drawn, into model/ of a finished run."""
    from scoreaction.report.sample_figures import is_pictures, save_samples

    place = RunFolder(folder)
    tuned = place.samples / "tuned.npz"
    picture = ""
    if tuned.is_file():
        with np.load(tuned) as arrays:
            samples, prompts = arrays["samples"][:SHOWN], arrays["prompts"][:SHOWN].tolist() if "prompts" in arrays else None
        if is_pictures(samples) and importlib.util.find_spec("matplotlib"):
            save_samples(place.model / "samples.png", samples, prompts)
            picture = "\n![samples of the tuned model](samples.png)\n"
    off_below, described = recipe.sampler.acts_from, place.model / MODEL_DESCRIPTION
    if described.is_file():  # with the time that its model settled
        off_below = json.loads(described.read_text(encoding="utf-8"))["sampler"]["off_below"]
    card = Card({}, [], ["import scoreaction as sa", 'model = sa.load("this folder")'])
    config = recipe.algorithm.config
    # other libraries know no such weights
    ours_alone = isinstance(config, Algorithm) and (config.moves_noise or config.chooses_prompts)
    if recipe.model.traits.card is not None and not ours_alone:
        card = recipe.model.traits.card(recipe.model.config, place.model, off_below) or card
    tags = {"tags": ["scoreaction", recipe.algorithm.name, *card.tags]}
    settings = dump(recipe)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))  # longer than any that a prompt holds
    header, text = yaml.safe_dump(card.header | tags, sort_keys=False), f"\n## Recipe\n\n{fence}yaml\n{settings}{fence}\n"
    write_whole(place.model / "README.md", f"---\n{header}---\n\n{_body(recipe, figures, card, off_below)}{picture}{text}")
    return place.model / "README.md"


def _body(recipe: Recipe, figures: dict[str, Any], card: Card, off_below: float) -> str:
    judged = " + ".join(block.name for block in recipe.rewards)
    rows = [f"| {title_of(key)} | {base} | {tuned} |" for key, base, tuned in before_and_after(figures)]
    table = ["| | base | tuned |", "| --- | --- | --- |", *rows]
    table.append(f"| KL to the base (nats) | 0 | {with_error(figures['kl_nats'], figures.get('kl_nats_se'))} |")
    lines = [
        f"# {recipe.model.name} fine-tuned for {judged}",
        "",
        f"Fine-tuned with `{recipe.algorithm.name}` for {figures['iterations']} iterations: "
        f"{number(figures['reward_queries'])} rewards, {number(figures['model_evaluations'])} network evaluations.",
        f"Measured on {recipe.evaluation.n} samples, {recipe.evaluation.solver}, {recipe.evaluation.steps} steps, eta"
        f" {recipe.evaluation.eta:g}, guidance {recipe.sampler.guidance:g}.",
        *([f"{limit_of_policy(off_below).capitalize()}."] if off_below else []),
        "",
        *table,
        "",
        "```python",
        *card.code,
        "```",
    ]
    return "\n".join(lines) + "\n"
