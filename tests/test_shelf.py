"""Truth: the contract of a shelf. Every file on it is tried the day it appears, and a user's own is treated as ours are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_lm
import torch
from twins import accepts

import scoreaction as sa
from scoreaction.catalog import files, find
from scoreaction.errors import UserError
from scoreaction.recipes.build import build_block
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import block_of, resolve
from scoreaction.recipes.traits import Traits, traits_of
from scoreaction.rewards import CountedReward, Reward, RewardError
from scoreaction.rewards._images import is_images
from scoreaction.tasks.clusters import Clusters
from scoreaction.types import RewardFunction

BATCH = 6


def example(kind: Any, name: str) -> Any:
    """The block of a file with its `EXAMPLE`; weights of the hub are replaced by a folder's."""
    settings = traits_of(find(kind, name, key=kind), key=kind).example
    if name == "masked_lm":
        settings = settings | {"path": str(tiny_lm.folder("esm"))}
    return block_of(kind, {"name": name, **settings}, (kind,))


def has(kind: Any, trait: Callable[[Traits], bool]) -> list[str]:
    return [name for name in files(kind) if trait(traits_of(find(kind, name, key=kind), key=kind))]


WITHOUT_WEIGHTS = has("model", lambda traits: traits.skeleton is not None)
WHOLE = [name for name in files("model") if name not in WITHOUT_WEIGHTS]
SCORERS = has("reward", lambda traits: traits.parameters is not None)
REMOTE = has("reward", lambda traits: traits.probe is False)
LIGHT = [name for name in files("reward") if name not in SCORERS + REMOTE]


LABELLED = "a mixture whose prompts are labels"


@pytest.fixture(autouse=True)
def labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the examples of `label` and `keep_clusters` name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Clusters.fit(torch.randn(60, 2, generator=torch.Generator().manual_seed(0)), 3).write(tmp_path / "clusters.npz")
    np.savez("labelled.npz", samples=np.random.default_rng(0).normal(size=(60, 2)), labels=np.arange(60) % 3)


@cache
def drawn(name: str) -> tuple[sa.Model, torch.Tensor, list[str] | None]:
    """A model of the shelf, samples of any values, and a prompt for each sample."""
    if name == LABELLED:
        model, prompts = sa.gaussian_mixture.build(sa.gaussian_mixture.Config(labels=[0, 1, 0, 2])), ["0", "1", "2"]
    else:
        block = example("model", name)
        model, prompts = build_block(block, "model"), prompt_list(block.traits.defaults.get("prompts"))
    values = model.example(BATCH, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, model.decode(values), None if prompts is None else (prompts * BATCH)[:BATCH]


# Rewards


def of_one_sample(reward: RewardFunction, samples: torch.Tensor, prompts: list[str] | None) -> None:
    """One finite number a sample, which no other sample changes; a gradient just where the reward has one."""
    try:
        scores = CountedReward(reward)(samples, prompts)
    except RewardError as error:
        raise AssertionError(error) from error
    order = [2, 0, 1]
    alone = CountedReward(reward)(samples[order], None if prompts is None else [prompts[i] for i in order])
    assert torch.allclose(alone, scores[order], rtol=1e-4, atol=1e-5), "another batch gives other scores"
    flows = False  # not to tokens
    if samples.is_floating_point():
        leaf = samples.clone().requires_grad_(True)
        flows = torch.as_tensor(reward(leaf, prompts)).requires_grad
    assert flows == reward.differentiable, "a gradient flows just where it says so"


def in_one_range(reward: RewardFunction, samples: torch.Tensor, prompts: list[str] | None) -> None:
    """The reward itself refuses images in [-1, 1], also where nothing stands before it."""
    if is_images(samples):
        try:
            reward(2 * samples - 1, prompts)
        except ValueError:
            return
        raise AssertionError("images in [-1, 1] are scored")


@pytest.mark.parametrize("name", LIGHT)
def test_a_reward_keeps_the_contract(name: str) -> None:
    """On every model of the shelf that it fits, of which there is one. Twins: scores by rank, a gradient cut off, no check."""
    reward, fits = build_block(example("reward", name), "reward"), 0
    for model_name in [*WHOLE, LABELLED]:
        _, samples, prompts = drawn(model_name)
        try:
            CountedReward(reward).probe(samples[:2], None if prompts is None else prompts[:2])
        except RewardError:
            continue
        fits += 1
        accepts(
            lambda found, samples=samples, prompts=prompts: of_one_sample(found, samples, prompts),
            reward,
            by_rank=Reward(
                lambda x, p: reward(x, p).argsort().argsort().float() + len(x), differentiable=reward.differentiable
            ),
            lying=Reward(reward, differentiable=not reward.differentiable),
            summed=Reward(lambda x, p: reward(x, p).sum(), differentiable=reward.differentiable),
        )
        in_one_range(reward, samples, prompts)
        if is_images(samples):
            with pytest.raises(AssertionError):
                in_one_range(Reward(lambda x, p: x.sum((1, 2, 3))), samples, prompts)
    assert fits, f"{name} fits no model of the shelf"


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_without_its_weights_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names a setting or what to install. Twin: a light reward is built from its example alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def refused(found: str) -> None:
        with pytest.raises(UserError) as caught:
            build_block(example("reward", found), "reward")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("reward")

    refused(name)
    with pytest.raises(pytest.fail.Exception):
        refused("ink")


# Models


def is_a_model(model: sa.Model, conditions: Any) -> None:
    """A function of each row alone, its own reference, with x = alpha x0 + sigma eps, whose images are in [0, 1]."""
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(2, *model.shape, generator=generator), torch.tensor([0.4, 0.7], dtype=torch.float64)
    with torch.no_grad():
        policy, reference = model.predict(x, t, conditions), model.reference(x, t, conditions)
        alone = model.predict(x[:1], t[:1], None if conditions is None else conditions[:1])
        samples = model.decode(x)
    assert policy.eps.shape == x.shape
    assert torch.equal(policy.eps, reference.eps), "it begins as another than its reference"
    assert torch.allclose(alone.eps, policy.eps[:1], rtol=1e-3, atol=1e-4), "rows are mixed"
    ones = [1] * len(model.shape)
    alpha, sigma = model.process.alpha(t).view(-1, *ones), model.process.sigma(t).view(-1, *ones)
    assert torch.allclose((alpha * policy.x0 + sigma * policy.eps).float(), x, atol=1e-3)
    if is_images(samples):
        assert 0 <= float(samples.min()) <= float(samples.max()) <= 1, "images are not in [0, 1]"


def is_a_model_of_tokens(model: sa.MaskedModel, conditions: Any) -> None:
    """A function of each row alone, its own reference, normalised at every position, whose samples are scored as they are."""
    x, t = model.example(2, torch.Generator().manual_seed(0)), torch.tensor([0.4, 0.7], dtype=torch.float64)
    x[:, ::2] = model.process.mask
    with torch.no_grad():
        policy, reference = model.predict(x, t, conditions).log_prob, model.reference(x, t, conditions).log_prob
        alone = model.predict(x[:1], t[:1], None if conditions is None else conditions[:1]).log_prob
    assert torch.equal(policy, reference), "it begins as another than its reference"
    assert torch.allclose(alone, policy[:1], atol=1e-4), "rows are mixed"
    assert torch.allclose(policy.exp().sum(-1), torch.ones(x.shape), atol=1e-4), "it is not normalised"
    samples = model.decode(model.example(2, torch.Generator().manual_seed(0)))
    if is_images(samples):
        assert 0 <= float(samples.min()) <= float(samples.max()) <= 1, "images are not in [0, 1]"


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_keeps_the_contract(name: str) -> None:
    model, _, prompts = drawn(name)
    conditions = None if prompts is None else model.conditions(prompts[:2])
    if isinstance(conditions, dict):
        conditions = _Rows(conditions)
    holds = is_a_model_of_tokens if isinstance(model, sa.MaskedModel) else is_a_model
    holds(model, conditions)
    raw, net = model.decode, model.net
    try:
        for twin in ("mixed", "in [-1, 1]"):
            if twin == "mixed":
                model.net = _Mixed(net)
            else:
                model.net, model.decode = net, lambda x0: 2 * raw(x0) - 1
            if twin == "mixed" or is_images(raw(model.example(1, torch.Generator().manual_seed(0)))):
                with pytest.raises(AssertionError):
                    holds(model, conditions)
    finally:
        model.net, model.decode = net, raw


class _Rows(dict[str, torch.Tensor]):
    """Conditions by name, of which rows can be taken."""

    def __getitem__(self, key: Any) -> Any:
        return {name: value[key] for name, value in self.items()} if isinstance(key, slice) else super().__getitem__(key)


class _Mixed(torch.nn.Module):
    """A network whose rows depend on one another."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        y = self.net(x, t, cond)
        return y - 0.5 * y.mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_a_skeleton_predicts_without_weights(name: str) -> None:
    """The shape of a prediction, of tensors that take no memory."""
    block = example("model", name)
    assert block.traits.skeleton is not None
    bare = block.traits.skeleton(block.config)
    with bare.mode:
        x = torch.zeros(1, *bare.model.shape)
        found = bare.model.predict(x, torch.full((1,), 0.5, dtype=torch.float64), bare.conditions).eps
    assert found.shape == x.shape
    assert type(found).__name__ == "FakeTensor"
    assert sum(bare.parameters.values()) > sum(p.numel() for p in bare.model.parameters.values()) > 0


@pytest.mark.parametrize("name", files("model"))
def test_the_defaults_of_a_model_are_settings(name: str) -> None:
    """Twin: a misspelt one."""
    values = {"model": example("model", name).dump(), "reward": {"name": "jpeg"}, "algorithm": {"name": "score_action"}}
    recipe = resolve(values)
    for section, settings in recipe.model.traits.defaults.items():
        if section in ("sampler", "train"):
            assert settings.items() <= getattr(recipe, section).model_dump().items()
            with pytest.raises(UserError, match=f"{section}.stepz: unknown key"):
                resolve({**values, section: {"stepz": 3}})


def test_evaluation_refuses_held_out_rewards_by_name_in_python() -> None:
    """Twin: rewards themselves, as held_out=."""
    model = drawn("gaussian_mixture")[0]

    def tuner(**more: Any) -> sa.Finetuner:
        return sa.Finetuner(model, reward=lambda x, p: x[:, 0], algorithm=sa.DDPO(), train=sa.Train(batch=4), **more)

    with pytest.raises(ValueError, match=r"evaluation.held_out: .*held_out=\{name: reward\}"):
        tuner(evaluation=sa.Evaluation(held_out=[{"name": "ink"}]))
    assert list(tuner(held_out={"up": lambda x, p: x[:, 1]}).held_out) == ["up"]
