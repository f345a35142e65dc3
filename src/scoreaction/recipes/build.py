"""From a recipe to what it describes: its model, its rewards, its run. Whatever does not fit is a `UserError` of one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scoreaction.algorithms._learner import Algorithm
from scoreaction.errors import UserError
from scoreaction.networks.model import Model
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Block, Recipe, block_of, dump, numbered
from scoreaction.recipes.text import KEYS, assign, parse_override
from scoreaction.rewards import Reward
from scoreaction.rewards._weighted import Part, WeightedSum
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Conditions, RewardFunction, Values

LOCAL = ("linear", "quadratic", "ink", "classifier", "legibility", "jpeg", "shapes", "shapes_scorer")
"""Our rewards that answer at once, on this machine."""


def _made(block: Block, key: str) -> Any:
    """What a block builds; its refusals are the user's errors."""
    try:
        return block.module.build(block.config)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise UserError(f'{key}: {block.name} needs the package {package}: pip install "scoreaction[all]"') from error
    except (ValueError, OSError) as error:
        raise UserError(named(str(error), key)) from error
    except Exception as error:
        if "." not in block.name:
            raise
        raise UserError(f"{key}: build of {block.name} raised {type(error).__name__}: {error}") from error


def _part(block: Block, key: str) -> Part:
    assert block.share is not None
    return Part(_made(block, key), weight=block.share.weight, normalise=block.share.normalise)


def build_reward(name: str, overrides: Sequence[str]) -> RewardFunction:
    """A reward of the shelf or of the user's, with `key=value` settings. UserError for whatever is wrong."""
    values: Values = {"reward": {"name": name}}
    for text in overrides:
        key, value = parse_override(text)
        assign(values, ["reward", *key], value)
    return _made(block_of("reward", values["reward"], ("reward",)), "reward")


def named(message: str, key: str) -> str:
    """The message with the key it is about in front, unless it begins with a key of the recipe."""
    first = message.partition(":")[0].partition(".")[0]
    return message if first in KEYS or message.startswith("--") else f"{key}: {message}"


def build_parts(values: Values) -> tuple[Model, RewardFunction]:
    """The model and the single reward of a recipe's values. UserError where they cannot be built."""
    return _made(block_of("model", values["model"], ("model",)), "model"), _made(
        block_of("reward", values["reward"], ("reward",)), "reward"
    )


def build_model(recipe: Recipe) -> Model:
    """The recipe's model, as it is before training. UserError where prompts or device do not fit it."""
    with torch.random.fork_rng(devices=[]):  # a run's networks begin the same whatever was drawn before
        torch.manual_seed(recipe.train.seed)
        model: Model = _made(recipe.model, "model")
    if recipe.prompts is not None and model.encode is None:
        raise UserError(f"prompts: the model {recipe.model.name} takes no prompts; leave them out (prompts: null)")
    _check_device(recipe.train.device)
    return model


def _unasked(samples: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    raise RuntimeError("this run was built to draw from, without its rewards")


def build(recipe: Recipe, output: str | Path | None = None, *, judged: bool = True) -> Finetuner:
    """The run that a recipe describes. UserError where its parts do not fit one another, with the remedy.

    Not judged: a run to draw from, which needs none of its rewards' weights.
    """
    reward: RewardFunction = Reward(_unasked, differentiable=True)
    held_out = [reward for _ in recipe.held_out]
    if judged:
        if isinstance(recipe.reward, Block):
            reward = _made(recipe.reward, "reward")
        else:
            reward = WeightedSum([_part(block, f"reward.{i}") for i, block in enumerate(recipe.reward)])
        held_out = [_made(block, f"evaluation.held_out.{i}") for i, block in enumerate(recipe.held_out)]
    model = build_model(recipe)  # after the rewards: what they lack is said before gigabytes of model are fetched
    algorithm = recipe.algorithm.config
    if not isinstance(algorithm, Algorithm):
        raise UserError(f"algorithm.name: Config of {recipe.algorithm.name} is no scoreaction.algorithms._learner.Algorithm")
    try:
        tuner = Finetuner(
            model,
            reward=reward,
            algorithm=algorithm,
            sampler=recipe.sampler,
            train=recipe.train,
            prompts=prompt_list(recipe.prompts),
            output=output,
            evaluation=recipe.evaluation,
            held_out=dict(zip(numbered(block.name for block in recipe.held_out), held_out, strict=True)),
            recipe=dump(recipe),
            online=recipe.online,
        )
    except ValueError as error:
        raise UserError(named(str(error), "recipe")) from error
    if judged:
        _probe(tuner, recipe)
    return tuner


def _check_device(name: str) -> None:
    if name == "auto":
        return
    try:
        float(torch.zeros((), device=name))  # meta makes tensors, and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"train.device: {name!r} cannot be used here; take auto, cpu or, with a GPU, cuda") from error


def _probe(tuner: Finetuner, recipe: Recipe) -> None:
    """Asks our own rewards, which refuse samples of the wrong kind with a ValueError, before anything is run."""
    model, prompts = tuner.model, None if tuner.prompts is None else tuner.prompts[:1] * 2
    asked: dict[str, RewardFunction] = {}
    if isinstance(recipe.reward, Block):
        if recipe.reward.name in LOCAL:
            asked["reward"] = tuner.reward.reward
    elif isinstance(tuner.reward.reward, WeightedSum):
        parts = zip(recipe.reward, tuner.reward.reward.parts, strict=True)
        asked = {f"reward.{i}": part.reward for i, (block, part) in enumerate(parts) if block.name in LOCAL}
    for i, (block, judge) in enumerate(zip(recipe.held_out, tuner.held_out.values(), strict=True)):
        if block.name in LOCAL:
            asked[f"evaluation.held_out.{i}"] = judge.reward
    with torch.no_grad():
        samples = model.decode(torch.zeros(2, *model.shape, device=model.device)) if asked else torch.zeros(2)
        for key, reward in asked.items():
            try:
                reward(samples, prompts)
            except ValueError as error:
                raise UserError(f"{key}: does not fit the model {recipe.model.name}: {error}") from error
