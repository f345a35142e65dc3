"""What a recipe will need before it is started: parameters, memory, network evaluations, time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.algorithms._learner import Algorithm
from scoreaction.conditions import map_conditions
from scoreaction.config import LOCAL, Block, Recipe, named, prompt_list
from scoreaction.finetuner import Finetuner
from scoreaction.live_memory import LiveMemory
from scoreaction.model import Model
from scoreaction.rewards import Reward
from scoreaction.shelf import UserError
from scoreaction.types import Conditions

Values = dict[str, Any]

GIB = 2**30
RESERVE = 2 * GIB
"""For CUDA itself and what its allocator cannot use."""
SUSTAINED = 50e12
"""Floating-point operations a second that times are given at."""
BLACK_BOXES = ("http",)
"""Rewards that are not in this process: they have no gradient."""


@dataclass(frozen=True)
class Sized:
    """A model to be planned, with what else will be on the device; mode is that of its fake tensors, if they are."""

    model: Model
    conditions: Conditions
    parameters: dict[str, int]
    mode: Any
    vae_bytes: int = 0
    encoder_bytes: int = 0


def plan(recipe: Recipe) -> Values:
    """The figures of `scoreaction plan`; bytes, counts and floating-point operations. UserError as for `build`."""
    try:
        sized = _sized(recipe)
    except (ValueError, OSError) as error:
        raise UserError(named(str(error), "model")) from error
    gradient = differentiable(recipe)
    counts = count_iteration(recipe, sized.model, gradient=gradient)
    passes = measure_passes(recipe, sized, gradient=gradient)
    resident = resident_bytes(recipe, sized)
    needs = {name: found.peak for name, found in passes.items()} | {"encoding the prompts": sized.encoder_bytes}
    worst = max(needs, key=lambda name: needs[name])
    rows = recipe.train.max_rows * _doubled(recipe, sized.model)
    forward, both = passes["sampling"].flops / rows, passes["an update"].flops / rows
    flops = counts["model_evaluations"] * forward + counts["model_backward_rows"] * max(both - forward, 0)
    return {
        "parameters": sized.parameters,
        "trained": sum(p.numel() for p in sized.model.parameters.values()),
        "resident": resident,
        "passes": needs,
        "total": sum(resident.values()) + needs[worst] + RESERVE,
        "worst": worst,
        "iteration": counts,
        "iterations": recipe.train.iterations,
        "measuring": _measuring(recipe, sized.model),
        "flops": flops,
        "hours": flops * recipe.train.iterations / SUSTAINED / 3600,
        "rows": rows,
        "reward_gradient": gradient,
    }


def _sized(recipe: Recipe) -> Sized:
    if recipe.model.name == "diffusers":
        from scoreaction.models._skeleton import skeleton

        bones = skeleton(recipe.model.config)  # type: ignore[arg-type]
        return Sized(bones.model, bones.conditions or None, bones.parameters, bones.mode, bones.vae_bytes, bones.encoder_bytes)
    model = recipe.model.module.build(recipe.model.config)
    prompts = prompt_list(recipe.prompts)
    conditions = None if prompts is None else model.conditions(prompts[:1])
    frozen = sum(p.numel() for p in model.net.parameters() if not p.requires_grad)
    return Sized(model, conditions, {"network": frozen + sum(p.numel() for p in model.parameters.values())}, nullcontext())


def differentiable(recipe: Recipe) -> bool:
    """Whether the reward has a gradient, without loading scorers: those that are not ours are taken to have one."""
    blocks = (recipe.reward,) if isinstance(recipe.reward, Block) else recipe.reward
    return all(
        block.module.build(block.config).differentiable if block.name in LOCAL else block.name not in BLACK_BOXES
        for block in blocks
    )


# Network evaluations


class _Still(nn.Module):
    """A network that does nothing but have a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.5))

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        return self.scale * x


def count_iteration(recipe: Recipe, model: Model, *, gradient: bool) -> Values:
    """What one iteration asks of networks and reward: counted, by running it with a network that does nothing."""
    small = tuple(min(side, 8) for side in model.shape)
    prompts = prompt_list(recipe.prompts)
    still = Model(
        _Still(),
        process=model.process,
        predicts=model.predicts,
        shape=small,
        encode=lambda asked: torch.zeros(len(asked), 1),
        null=torch.zeros(1, 1),
        true_cfg=model.true_cfg,
    )
    if still.true_cfg is not None:
        still.encode, still.null = (lambda asked: {"text": torch.zeros(len(asked), 1)}), {"text": torch.zeros(1, 1)}
    algorithm = recipe.algorithm.config
    assert isinstance(algorithm, Algorithm)
    changes = {"iterations": 1, "device": "cpu", "precision": "fp32", "optimizer": "adam"}
    try:
        tuner = Finetuner(
            still,
            reward=Reward(lambda samples, asked: samples.flatten(1).mean(1), differentiable=gradient),
            algorithm=algorithm,
            sampler=recipe.sampler,
            train=recipe.train.model_copy(update=changes),
            prompts=prompts,
            evaluation=recipe.evaluation,
        )
    except ValueError as error:
        raise UserError(named(str(error), "recipe")) from error
    metrics = next(iter(tuner))
    return {key: metrics[key] for key in ("model_evaluations", "model_backward_rows", "reward_queries")}


def _doubled(recipe: Recipe, model: Model) -> int:
    """Rows of the network for one point: guidance takes two."""
    weight = recipe.sampler.guidance if model.true_cfg is None else model.true_cfg
    return 2 if weight != 1.0 and recipe.prompts is not None else 1


def _measuring(recipe: Recipe, model: Model) -> int:
    """Rows that measuring base and tuned model takes at the end, without the KL's."""
    return 2 * recipe.evaluation.n * recipe.evaluation.steps * _doubled(recipe, model)


# Memory


def measure_passes(recipe: Recipe, sized: Sized, *, gradient: bool) -> dict[str, LiveMemory]:
    """Peak memory and operations of what is done at most `max_rows` points at a time."""
    model, rows = sized.model, recipe.train.max_rows
    t = torch.full((rows,), 0.5, dtype=torch.float64)
    guidance = recipe.sampler.guidance
    with sized.mode:
        x = torch.zeros(rows, *model.shape)
        conditions = map_conditions(lambda c: torch.cat([c] * rows), sized.conditions)
    model.max_rows = None
    found = {name: LiveMemory() for name in ("sampling", "an update", "a picture")}
    with _at_precision(recipe, model):
        with torch.no_grad(), sized.mode, found["sampling"]:
            model.predict(x, t, conditions, guidance=guidance)
        with sized.mode, found["an update"]:
            model.predict(x, t, conditions, guidance=guidance).eps.square().sum().backward()
            for parameter in model.parameters.values():
                parameter.grad = None
    with torch.no_grad(), sized.mode, found["a picture"]:
        model.decode(x[:1])
    if gradient:
        found["the reward's gradient"] = LiveMemory()
        with _at_precision(recipe, model), sized.mode, found["the reward's gradient"]:
            y = x.clone().requires_grad_(True)
            look = model.decode(model.reference(y, t, conditions, guidance=guidance).x0)
            torch.autograd.grad(look.sum(), y)
    return found


@contextmanager
def _at_precision(recipe: Recipe, model: Model) -> Iterator[None]:
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.train.precision]
    if dtype is not None:
        model.autocast = partial(torch.autocast, "cpu", dtype=dtype)
    try:
        yield
    finally:
        model.autocast = nullcontext


def resident_bytes(recipe: Recipe, sized: Sized) -> dict[str, int]:
    """What stays on the device throughout."""
    model = sized.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters.values())
    frozen = sum(p.numel() * p.element_size() for p in model.net.parameters() if not p.requires_grad)
    if model.reference_net is not model.net:
        frozen += sum(p.numel() * p.element_size() for p in model.reference_net.parameters())
    moments = {"adam": 2.0, "adam8bit": 0.5}[recipe.train.optimizer]
    prompts = prompt_list(recipe.prompts) or []
    texts = sized.conditions.values() if isinstance(sized.conditions, dict) else [sized.conditions]
    each = sum(c.numel() * c.element_size() for c in texts if c is not None)
    states = recipe.train.batch * (7 * recipe.sampler.steps + 1) * math.prod(model.shape) * 4
    return {
        "frozen weights": frozen + sized.vae_bytes,
        "trained weights, gradient, Adam, average": round(trained * (2 + moments + recipe.train.ema)),
        "encoded prompts": each * (len(prompts) + recipe.train.batch),
        "trajectories": states,
    }
