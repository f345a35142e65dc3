"""Building from a recipe: its model, its rewards, its run; and loading the model that a run saved.

Parts that do not fit are a `UserError` of one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.algorithms._learner import Algorithm
from scoreaction.algorithms._writer import PromptWriter
from scoreaction.errors import UserError, missing
from scoreaction.models.pretrained import is_pretrained
from scoreaction.networks.critic import Critic
from scoreaction.networks.model import Model
from scoreaction.recipes.data_files import read_data
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Block, Recipe, block_of, dump, load_recipe, numbered, relative_paths
from scoreaction.recipes.text import KEYS, assign, parse_override
from scoreaction.rewards import CountedReward, Reward, RewardError
from scoreaction.rewards._images import check_range, is_images
from scoreaction.rewards._weighted import Part, WeightedSum
from scoreaction.training.checks import check_device
from scoreaction.training.examples import Unread
from scoreaction.training.export import load_described, load_weights
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Pairs, Prompts, RewardFunction, Samples, Values


@dataclass(frozen=True)
class Scorer:
    """A reward of a recipe: the key of its block, the block and what it builds."""

    key: str
    block: Block
    reward: RewardFunction


def build_block(block: Block, key: str) -> Any:
    """The model or reward of a block. UserError, with its key or that of the wrong setting, where it refuses."""
    try:
        return block.module.build(block.config)
    except ImportError as error:
        raise UserError(f"{key}: {block.name} {missing(error.name or str(error))}") from error
    except (ValueError, OSError) as error:
        raise UserError(keyed(str(error), key, block)) from error
    except (Exception, SystemExit) as error:
        if "." not in block.name:
            raise
        raise UserError(f"{key}: build of {block.name} raised {type(error).__name__}: {error}") from error


def _scorers(recipe: Recipe) -> tuple[list[Scorer], list[Scorer]]:
    """The rewards that are trained on and those that are held out."""
    keys = ["reward"] if isinstance(recipe.reward, Block) else [f"reward.{i}" for i in range(len(recipe.reward))]
    trained = dict(zip(keys, recipe.rewards, strict=True))
    held_out = {f"evaluation.held_out.{i}": block for i, block in enumerate(recipe.held_out)}
    first, second = ([Scorer(k, b, build_block(b, k)) for k, b in blocks.items()] for blocks in (trained, held_out))
    return first, second


def _total(scorers: list[Scorer]) -> RewardFunction:
    """The one reward, or the weighted sum of those that have a share."""
    parts = [Part(s.reward, weight=s.block.share.weight, normalise=s.block.share.normalise) for s in scorers if s.block.share]
    return WeightedSum(parts) if parts else scorers[0].reward


def build_reward(name: str, overrides: Sequence[str]) -> RewardFunction:
    """A reward of the shelf or of the user's, with `key=value` settings. UserError for whatever is wrong."""
    values: Values = {"reward": {"name": name}}
    for text in overrides:
        key, value = parse_override(text)
        assign(values, ["reward", *key], value)
    return build_block(block_of("reward", values["reward"], ("reward",)), "reward")


def build_writer(name: str, overrides: Sequence[str]) -> PromptWriter:
    """A writer of prompts of the user's, with `key=value` settings. UserError for whatever is wrong."""
    values: Values = {"name": name}
    for text in overrides:
        key, value = parse_override(text)
        assign(values, key, value)
    writer = build_block(block_of("writer", values, ("writer",)), "writer")
    if not callable(writer):
        raise UserError(f"writer: build(config) of {name} must return a function (got {type(writer).__name__})")
    return writer


def named(message: str, key: str) -> str:
    """The message with the key it is about in front, unless it begins with a key of the recipe."""
    first = message.partition(":")[0].partition(".")[0]
    return message if first in KEYS or message.startswith("--") else f"{key}: {message}"


def keyed(message: str, key: str, block: Block) -> str:
    """The message with the block's key in front, or with that of the setting it begins with; with what its path begins at."""
    if any(str(path) in message for path in relative_paths(block.config).values()):
        message += f" (a relative path begins at {Path.cwd()})"
    setting = message.partition(":")[0].strip()
    return f"{key}.{message}" if setting in type(block.config).model_fields else named(message, key)


def build_model(recipe: Recipe) -> Model:
    """The recipe's model, as it is before training. UserError where prompts or device do not fit it."""
    with torch.random.fork_rng(devices=[]):  # a run's networks begin the same whatever was drawn before
        torch.manual_seed(recipe.train.seed)
        model: Model = build_block(recipe.model, "model")
    if recipe.critic is not None:
        model.critic = build_block(recipe.critic, "critic")
    if recipe.prompts is not None and model.encode is None:
        raise UserError(f"prompts: the model {recipe.model.name} takes no prompts; leave them out (prompts: null)")
    if recipe.train.device != "auto":
        check_device(recipe.train.device, key="train.device")
    return model


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm; UserError for a class that is none."""
    config = recipe.algorithm.config
    if not isinstance(config, Algorithm):
        raise UserError(f"algorithm.name: Config of {recipe.algorithm.name} must derive from scoreaction.algorithms.Algorithm")
    return config


def _no_reward(samples: Tensor, prompts: Prompts) -> Tensor:
    raise RuntimeError("this run was built to draw from, without its rewards")


def _data(recipe: Recipe) -> Pairs | Samples | None:
    return None if recipe.data is None else read_data(recipe.data.path)


def build(recipe: Recipe, output: str | Path | None = None, *, rewards: bool = True, learns: bool = True) -> Finetuner:
    """The run that a recipe describes. UserError where its parts do not fit one another, with the remedy.

    rewards False: a run to draw from, which needs none of its rewards' weights, and is whole in every process. learns False:
    one to measure, which needs none of its data. Without an output folder it is only to be tried or drawn from: nobody is
    asked for what an algorithm has others write before training.
    """
    reward: RewardFunction = Reward(_no_reward, differentiable=True)
    names = list(numbered(block.name for block in recipe.held_out))
    held_out = dict.fromkeys(names, reward)
    trained, only_measured = _scorers(recipe) if rewards else ([], [])
    if rewards:
        reward = _total(trained)
        held_out = dict(zip(names, (scorer.reward for scorer in only_measured), strict=True))
    model = build_model(recipe)  # after the rewards: what they lack is named before gigabytes of model are fetched
    try:
        tuner = Finetuner(
            model,
            reward=reward,
            algorithm=algorithm_of(recipe),
            sampler=recipe.sampler,
            train=recipe.train if rewards else recipe.train.model_copy(update={"shard": False}),
            prompts=prompt_list(recipe.prompts),
            output=output,
            evaluation=recipe.evaluation,
            held_out=held_out,
            recipe=dump(recipe),
            online=recipe.online,
            steer=recipe.steer if rewards else None,
            data=_data(recipe) if rewards and learns else Unread(),
        )
    except ValueError as error:
        raise UserError(named(str(error), "recipe")) from error
    if tuner.algorithm != recipe.algorithm.config:  # which was settled with others, and is saved as it was
        settled = replace(recipe.algorithm, config=tuner.algorithm)
        tuner.recipe = dump(recipe.model_copy(update={"algorithm": settled}))
    if recipe.student is not None and recipe.student.of is not None:
        model.student = recipe.student.sampling
    if recipe.critic is not None and not any(isinstance(net, Critic) for net in tuner.learner.networks.values()):
        raise UserError(f"critic: {recipe.algorithm.name} has none here; leave it out, or take score_action, vard or pi_ft")
    oracle = recipe.online is not None
    free = [s for s in only_measured if _free(s.block, oracle=False)]
    if tuner.budget is None:
        free = [s for s in trained if _free(s.block, oracle=oracle)] + free
    _probe(tuner, recipe, free)
    return tuner


def _free(block: Block, *, oracle: bool) -> bool:
    """True where a reward may be probed: by the PROBE of its file, else wherever it is not an oracle."""
    return not oracle if block.traits.probe is None else block.traits.probe


def _probe(tuner: Finetuner, recipe: Recipe, scorers: Sequence[Scorer]) -> None:
    """Scores two samples of noise with each reward: one that does not fit is refused before anything is written."""
    if not scorers:
        return
    model, prompts = tuner.model, None if tuner.prompts is None else (tuner.prompts * 2)[:2]
    noise = model.example(2, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        samples = model.decode(noise)
        if is_images(samples):
            check_range(samples, where=f"model: the decode= of {recipe.model.name}")
        for scorer in scorers:
            try:
                CountedReward(scorer.reward, name=scorer.key).probe(samples, prompts)
            except RewardError as error:
                raise UserError(_misfit(error, scorer, recipe.model.name)) from error


def _misfit(error: RewardError, scorer: Scorer, model: str) -> str:
    """The line for a reward that refused or failed at the probe: with the key of its setting where it names one."""
    message = str(error).removeprefix(f"{scorer.key}: ")
    name = scorer.block.name
    refusal = message.removeprefix("raised ValueError: ").removeprefix(f"reward {name}: ")
    setting = keyed(refusal, scorer.key, scorer.block)
    return (
        setting if setting.startswith(f"{scorer.key}.") else f"{scorer.key}: {name} does not fit the model {model}: {refusal}"
    )


def load(path: str | Path, *, net: nn.Module | Model | None = None, trust: bool = False) -> Model:
    """The tuned model that `Finetuner.save` or a run folder holds, with its reference: the inverse of `save`.

    Of a folder that `scoreaction pretrain` wrote it is the pretrained model. A run of a recipe is rebuilt from it. A network
    of your own is rebuilt where its class is imported and its attributes are plain values; where only the class is not, pass
    one of its kind as `net`, else one with its pretrained weights. Where the model encodes or decodes by functions of yours,
    pass the whole `Model` as it was before training: it is filled.
    trust: whether modules that the run's recipe names are imported: their code runs, so only of folders from people you trust.
    Those of rewards are not asked for: none is built. ValueError says what is missing.
    """
    folder = Path(path)
    if is_pretrained(folder):
        return build_block(block_of("model", {"name": "pretrained", "path": str(folder)}, ("model",)), "model")
    if (folder / "model").is_dir():
        folder = folder / "model"
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        return load_described(folder, net)
    model = build(load_recipe(str(recipe), trust=trust, rewards=False), rewards=False).model
    load_weights(model, folder)
    return model
