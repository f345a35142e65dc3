"""Truth: the needs of the recipe that has the settings already."""

from __future__ import annotations

from dataclasses import replace

import pytest
from twins import close, same

pytest.importorskip("transformers")

from scoreaction.commands._way_out import Needs, _half_scorers
from scoreaction.commands.plan import differentiable, measure_costs, needs_of, skeleton_of, watch_iteration
from scoreaction.recipes.recipe import Recipe, load_recipe
from scoreaction.rewards import clip

SMALL = ["algorithm.name=ddpo", "train.batch=4", "sampler.steps=2", "evaluation.held_out=[{name: clip}]"]


def needs(recipe: Recipe) -> Needs:
    """Those of a recipe whose encoders of texts are larger than all else."""
    skeleton = replace(skeleton_of(recipe), encoder_bytes=5 * 2**30)
    watch = watch_iteration(recipe, skeleton.model, gradient=differentiable(recipe))
    return needs_of(recipe, skeleton, watch, measure_costs(recipe, skeleton, watch), 1)


def test_smaller_scorers_leave_the_encoders_of_texts_what_they_need() -> None:
    """Scorers and encoders are not there at once, so that fewer bytes of the first save none. Twin: scorers alone."""
    recipe, half = (load_recipe("mixture", [*SMALL, *more]) for more in ([], ["evaluation.held_out.0.dtype=bf16"]))
    before, after = needs(recipe), needs(half)
    ((settings, found),) = _half_scorers(recipe, skeleton_of(recipe), before, {})
    same(settings, ["evaluation.held_out.0.dtype=bf16"], none=[])
    close(found.total, after.total, atol=0, scorers_alone=before.total - 2 * clip.PARAMETERS)
    close(found.total, before.total, atol=0, scorers_alone=before.total - 2 * clip.PARAMETERS)
    same(found.worst, "encoding the prompts, beyond trajectories and scorers", without=replace(found, encoders=0).worst)
