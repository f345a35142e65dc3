"""Recipes: the parts of a run, read from YAML and overrides, and checked key by key.

Values come from, each over the one before: the defaults in the code, the model's `DEFAULTS`, the recipe file, the
overrides. Whatever is wrong is a `UserError`: one line that names the dotted key.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from scoreaction import catalog
from scoreaction.catalog import Kind
from scoreaction.errors import UserError
from scoreaction.recipes.data_files import DataFile
from scoreaction.recipes.prompts import PromptValue, read_prompts
from scoreaction.recipes.text import KEYS, assign, parse_override, read_recipe, suits, without_rewards
from scoreaction.recipes.traits import Traits, traits_of
from scoreaction.recipes.trust import is_own, refuse_far_prompts, refuse_untrusted
from scoreaction.recipes.validation import C, check, check_finite, refuse_unknown
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steering import Steering
from scoreaction.settings import Key, dotted
from scoreaction.training.best_weights import check_metric
from scoreaction.training.distillation import Distill
from scoreaction.training.evaluation import Evaluation
from scoreaction.training.online import Online
from scoreaction.training.optimizer import Train
from scoreaction.training.pretraining import Pretrain
from scoreaction.training.students import Student
from scoreaction.types import Values
from scoreaction.yaml_text import dump_yaml


class Share(BaseModel):
    """A reward's share of a sum: its weight; `normalise` first brings it to mean 0 and deviation 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weight: float = 1.0
    normalise: bool = False


@dataclass(frozen=True)
class Block:
    """A named part of a recipe: its module, its checked settings and, for a reward in a list, its share of the sum."""

    name: str
    module: ModuleType
    traits: Traits
    config: BaseModel
    share: Share | None = None

    def defaults(self) -> Values:
        """Of a model: the settings of other sections that suit it."""
        own = {} if self.traits.suited is None else self.traits.suited(self.config)
        general = copy.deepcopy(self.traits.defaults)
        return general | {name: {**general.get(name, {}), **values} for name, values in own.items()}

    def dump(self) -> Values:
        """The block as it stands in a recipe, every setting written out."""
        share = {} if self.share is None else self.share.model_dump()
        return {"name": self.name, **self.config.model_dump(mode="json", exclude={"name"}), **share}


class EarlyStop(BaseModel):
    """Stop when `metric` (higher is better) has not risen for `patience` iterations."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    metric: str = "reward_mean"
    patience: int = Field(50, ge=1)


class Recipe(BaseModel):
    """The parts of a run, resolved: every key has its value."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    model: Block
    reward: Block | tuple[Block, ...]
    algorithm: Block
    sampler: Sampler
    train: Train
    prompts: str | list[PromptValue] | None
    evaluation: Evaluation
    held_out: tuple[Block, ...]
    early_stop: EarlyStop | None
    online: Online | None
    distill: Distill | None = None
    steer: Steering | None = None
    data: DataFile | None = None
    student: Student | None = None
    critic: Block | None = None
    pretrain: Pretrain | None = None

    @property
    def rewards(self) -> tuple[Block, ...]:
        """The rewards that are trained on: one, or the parts of a sum."""
        return (self.reward,) if isinstance(self.reward, Block) else self.reward

    def values(self) -> Values:
        """The recipe as plain values, every default written out."""
        reward = self.reward.dump() if isinstance(self.reward, Block) else [block.dump() for block in self.reward]
        return {
            "model": self.model.dump(),
            "reward": reward,
            "algorithm": self.algorithm.dump(),
            "critic": None if self.critic is None else self.critic.dump(),
            "sampler": self.sampler.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
            "prompts": self.prompts,
            "evaluation": {**self.evaluation.model_dump(mode="json"), "held_out": [b.dump() for b in self.held_out]},
            "early_stop": None if self.early_stop is None else self.early_stop.model_dump(mode="json"),
            "online": None if self.online is None else self.online.model_dump(mode="json"),
            "distill": None if self.distill is None else self.distill.model_dump(mode="json"),
            "steer": None if self.steer is None else self.steer.model_dump(mode="json"),
            "data": None if self.data is None else self.data.model_dump(mode="json"),
            "student": None if self.student is None else self.student.model_dump(mode="json"),
            "pretrain": None if self.pretrain is None else self.pretrain.model_dump(mode="json"),
        }


SECTIONS: dict[str, type[BaseModel]] = {
    "sampler": Sampler, "train": Train, "evaluation": Evaluation, "early_stop": EarlyStop, "online": Online, "distill": Distill,
    "steer": Steering, "data": DataFile, "student": Student, "pretrain": Pretrain,
}  # fmt: skip
"""The sections of a recipe beside the blocks with a name."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, trust: bool | None = None, rewards: bool = True) -> Recipe:
    """The recipe of that shipped name or YAML file with `key=value` overrides, checked and resolved.

    trust: whether the file may name modules, whose code then runs, and any file of prompts; None trusts the modules of a
    shipped recipe and of one in the working folder. Overrides are the user's own word, and always trusted. UserError, one
    line that names the key or the file, for whatever is wrong. rewards False: without them, so that no module of theirs is
    imported, for what is only drawn from.

    >>> load_recipe("mixture", ["algorithm.beta=0.2"]).algorithm.config.beta
    0.2
    """
    values, path = read_recipe(name_or_path)
    values = values if rewards else without_rewards(values)
    if not (is_own(path) if trust is None else trust):
        refuse_untrusted(values, path)
    if not trust and path not in catalog.recipes().values():
        refuse_far_prompts(values, path)
    beta = _algorithm_beta(values)
    assignments = [parse_override(text) for text in overrides]
    for key, value in sorted(assignments, key=lambda pair: pair[0][-1] != "name"):  # names first: they say what is known
        assign(values, key, value)
    if beta and _algorithm_beta(values) is None and isinstance(values.setdefault("evaluation", {}), dict):
        values["evaluation"].setdefault("beta", beta)  # an algorithm without beta is measured against the recipe's optimum
    return resolve(values, folder=path.parent)


def _algorithm_beta(values: Values) -> Any:
    algorithm = values.get("algorithm")
    return algorithm.get("beta") if isinstance(algorithm, dict) else None


def optimum_beta(recipe: Recipe) -> float | None:
    """The beta of the optimum that a recipe's run is measured against: `evaluation.beta`, else the algorithm's own."""
    return recipe.evaluation.beta or recipe.algorithm.dump().get("beta")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `load_recipe` gives the same recipe back.

    >>> from scoreaction.yaml_text import parse_yaml
    >>> recipe = load_recipe("mixture")
    >>> resolve(parse_yaml(dump(recipe), where="here")) == recipe
    True
    """
    return dump_yaml(recipe.values())


def resolve(values: Values, *, folder: Path = Path()) -> Recipe:
    """Checks a recipe's values and writes every default out; text files are looked for in `folder` too."""
    values = copy.deepcopy(values)
    refuse_unknown(values, KEYS, sections=SECTIONS)
    check_finite(values, ())
    for key in ("model", "reward", "algorithm"):
        if values.get(key) is None:
            raise UserError(f"{key}: is required, for example {key}: {{name: {next(iter(catalog.files(key)), 'x')}}}")
    model = block_of("model", values["model"], ("model",))
    defaults = model.defaults()
    sections = {name: _overlay(defaults.get(name), values.get(name), name) for name in ("sampler", "train", "evaluation")}
    held_out = _rewards(sections["evaluation"].pop("held_out", None) or [], ("evaluation", "held_out"))
    train = check(Train, sections["train"], ("train",))
    stop, online = values.get("early_stop"), values.get("online")
    early_stop = None if stop is None else check(EarlyStop, stop, ("early_stop",))
    stops_by = None if early_stop is None else early_stop.metric
    for key, metric in (("train.select", train.select), ("early_stop.metric", stops_by)):
        check_metric(metric, numbered(block.name for block in held_out), key=key)
    return Recipe(
        model=model,
        reward=_rewards(values["reward"], ("reward",)) if isinstance(values["reward"], list) else _one_reward(values["reward"]),
        algorithm=_algorithm(values["algorithm"], defaults.get("algorithm", {})),
        sampler=check(Sampler, sections["sampler"], ("sampler",)),
        train=train,
        prompts=read_prompts(values["prompts"] if "prompts" in values else defaults.get("prompts"), folder),
        evaluation=_absolute(check(Evaluation, sections["evaluation"], ("evaluation",))),
        held_out=held_out,
        early_stop=early_stop,
        online=None if online is None else check(Online, online, ("online",)),
        distill=None if values.get("distill") is None else distill_settings(model, values["distill"]),
        steer=None if values.get("steer") is None else _absolute(check(Steering, values["steer"], ("steer",))),
        student=None if values.get("student") is None else check(Student, values["student"], ("student",)),
        data=None if values.get("data") is None else _absolute(check(DataFile, values["data"], ("data",))),
        critic=None if values.get("critic") is None else block_of("critic", values["critic"], ("critic",)),
        pretrain=None if values.get("pretrain") is None else pretrain_settings(values["pretrain"]),
    )


def pretrain_settings(values: Any) -> Pretrain:
    """The checked settings of a recipe's section `pretrain`; a relative path that is here becomes absolute."""
    return _absolute(check(Pretrain, values, ("pretrain",)))


def distill_settings(model: Block, changes: Any = None) -> Distill:
    """The settings for a consistency model of this model: those that suit the model, with changes."""
    return check(Distill, _overlay(model.traits.defaults.get("distill"), changes, "distill"), ("distill",))


def _overlay(below: Values | None, above: Any, key: str) -> Values:
    """The settings below with those above over them."""
    if not isinstance(above, dict | None):
        raise UserError(f"{key}: must be a mapping of settings (got {above!r})")
    return {**(below or {}), **(above or {})}


def block_of(kind: Kind, values: Any, at: Key, *, weighted: bool = False) -> Block:
    """Finds the module a block names and checks its settings; paths that are here become absolute, for a run to find them."""
    if isinstance(values, str):
        values = {"name": values}
    if not isinstance(values, dict) or "name" not in values:
        example = next(iter(catalog.files(kind)), f"my_package.{kind}s")
        raise UserError(f"{dotted(at)}: must be a mapping with a name, for example {{name: {example}}}")
    name, settings = values["name"], {key: value for key, value in values.items() if key != "name"}
    module = catalog.find(kind, name, key=dotted((*at, "name")))
    traits = traits_of(module, key=dotted((*at, "name")))
    share = check(Share, {key: settings.pop(key) for key in Share.model_fields if key in settings}, at) if weighted else None
    if kind == "reward" and "reward" in module.Config.model_fields and "reward" in settings:  # a reward around another
        settings["reward"] = block_of(kind, settings["reward"], (*at, "reward")).dump()
    return Block(name, module, traits, _absolute(check(module.Config, settings, at, name=name)), share)


def _absolute(config: C) -> C:
    """The settings with relative paths that are here made absolute, those of settings within them too."""
    here: dict[str, Any] = {
        key: type(path)(Path(path).absolute()) for key, path in relative_paths(config).items() if os.path.exists(path)
    }
    here |= {key: _absolute(value) for key, value in config if isinstance(value, BaseModel)}
    return config.model_copy(update=here)


def relative_paths(config: BaseModel) -> dict[str, str | Path]:
    """The settings that may be a relative path: each `Path`, and of the texts those that are a path or the id of a hub.

    Not the name of a table that ships, whatever else has that name.
    """
    paths = {key: value for key, value in config if isinstance(value, Path) or (key in PATHS and isinstance(value, str))}
    return {key: path for key, path in paths.items() if not Path(path).is_absolute() and str(path) not in catalog.tables()}


PATHS = ("path", "head", "tokenizer")


def _one_reward(values: Any) -> Block:
    for key in Share.model_fields if isinstance(values, dict) else ():
        if key in values:
            raise UserError(f"reward.{key}: a single reward has no {key}; make reward a list of blocks to weigh them")
    return block_of("reward", values, ("reward",))


def _rewards(values: Any, at: Key) -> tuple[Block, ...]:
    if not isinstance(values, list) or (at == ("reward",) and not values):
        raise UserError(
            f"{dotted(at)}: must be a list of rewards, for example [{{name: {next(iter(catalog.files('reward')))}}}]"
        )
    weighted = at == ("reward",)
    return tuple(block_of("reward", value, (*at, i), weighted=weighted) for i, value in enumerate(values))


def _algorithm(values: Any, defaults: Values) -> Block:
    """A model's defaults count for the algorithms that they suit."""
    name = values.get("name") if isinstance(values, dict) else values
    if isinstance(name, str):
        known = catalog.find("algorithm", name, key="algorithm.name").Config.model_fields
        own = values if isinstance(values, dict) else {"name": name}
        values = {**{key: value for key, value in defaults.items() if suits(key, known)}, **own}
    return block_of("algorithm", values, ("algorithm",))


def numbered(names: Iterable[str]) -> Iterator[str]:
    """The names, numbered where one comes twice.

    >>> list(numbered(["ink", "jpeg", "ink"]))
    ['ink', 'jpeg', 'ink_2']
    """
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"
