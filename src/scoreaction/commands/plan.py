"""What a recipe will need before it is started: parameters, memory, network evaluations, time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.commands._live_memory import LiveMemory
from scoreaction.commands._plan_watch import Graph, Watch, doubled, watch_iteration
from scoreaction.errors import UserError
from scoreaction.networks.conditions import map_conditions
from scoreaction.networks.model import Model
from scoreaction.recipes.build import LOCAL, named
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Recipe, numbered
from scoreaction.training.evaluation import kl_samples
from scoreaction.training.optimizer import ROWS
from scoreaction.types import Conditions, Values

GIB = 2**30
RESERVE = 2 * GIB
"""For CUDA itself and what its allocator cannot use."""
SUSTAINED = 50e12
"""Floating-point operations a second that times are given at."""
BLACK_BOXES = ("http",)
"""Rewards that are not in this process: they have no gradient, and no weights here."""


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
    watch = watch_iteration(recipe, sized.model, gradient=gradient)
    costs = measure_costs(recipe, sized, watch)
    resident = resident_bytes(recipe, sized)
    later = resident["trajectories"] + sum(scorer_bytes(recipe).values())  # neither is on the device while texts are encoded
    passes = peaks(watch, costs) | {
        "encoding the prompts, beyond trajectories and scorers": max(sized.encoder_bytes - later, 0)
    }
    worst = max(passes, key=lambda name: passes[name])
    each = doubled(recipe, sized.model)
    point, picture = costs["sampling"].forward / (recipe.train.max_rows or ROWS), costs["a picture"].forward
    flops = watch.iteration["model_evaluations"] / each * point + watch.calls["decoder"] * picture
    flops += sum(count * costs[kind].backward / costs[kind].rows for kind, count in watch.gradients.items())
    points = _measured_points(recipe, sized.model)
    measuring = points * point + 2 * recipe.evaluation.n * picture
    return {
        "parameters": sized.parameters,
        "trained": sum(p.numel() for p in sized.model.parameters.values()),
        "resident": resident,
        "passes": passes,
        "total": sum(resident.values()) + passes[worst] + RESERVE,
        "worst": worst,
        "iteration": watch.iteration,
        "iterations": recipe.train.iterations,
        "pictures": watch.calls["decoder"],
        "picture_flops": picture,
        "measuring": points * each,
        "flops": flops,
        "measuring_flops": measuring,
        "hours": (flops * recipe.train.iterations + measuring) / SUSTAINED / 3600,
        "rows": (recipe.train.max_rows or ROWS) * each,
    }


def _sized(recipe: Recipe) -> Sized:
    if recipe.model.name == "diffusers":
        from scoreaction.models.pipelines.skeleton import skeleton

        bones = skeleton(recipe.model.config)  # type: ignore[arg-type]
        return Sized(bones.model, bones.conditions or None, bones.parameters, bones.mode, bones.vae_bytes, bones.encoder_bytes)
    model = recipe.model.module.build(recipe.model.config)
    prompts = prompt_list(recipe.prompts)
    conditions = None if prompts is None else model.conditions(prompts[:1])
    frozen = sum(p.numel() for p in model.net.parameters() if not p.requires_grad)
    return Sized(model, conditions, {"network": frozen + sum(p.numel() for p in model.parameters.values())}, nullcontext())


def differentiable(recipe: Recipe) -> bool:
    """Whether the reward has a gradient, without loading scorers: those that are not ours are taken to have one."""
    return all(
        block.module.build(block.config).differentiable if block.name in LOCAL else block.name not in BLACK_BOXES
        for block in recipe.rewards
    )


def scorer_bytes(recipe: Recipe) -> dict[str, int]:
    """Weights of the reward and of what is held out, by name, as published: of those whose file says how many `PARAMETERS`."""
    width = {"fp32": 4, "bf16": 2, "fp16": 2}
    blocks = [*recipe.rewards, *recipe.held_out]
    return {
        name: vars(block.module)["PARAMETERS"] * width[block.config.model_dump().get("dtype", "fp32")]
        for name, block in zip(numbered(block.name for block in blocks), blocks, strict=True)
        if "PARAMETERS" in vars(block.module)
    }


def _measured_points(recipe: Recipe, model: Model) -> int:
    """Points at which networks are asked to measure base and tuned model at the end, and the KL between them."""
    chosen = recipe.evaluation
    return 2 * chosen.steps * (chosen.n + kl_samples(chosen.n, chosen.steps, model.shape))


# Memory and operations


@dataclass(frozen=True)
class Cost:
    """Of a pass at `rows` points: bytes that its graph keeps and at the peak, operations forward and backward."""

    rows: int
    kept: int
    peak: int
    forward: int
    backward: int


def _cost(mode: Any, rows: int, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any] = lambda out: None) -> Cost:
    memory = LiveMemory()
    with mode, memory:
        out = forward()
        kept, operations = memory.live, memory.flops
        backward(out)
    return Cost(rows, kept, memory.peak, operations, memory.flops - operations)


def measure_costs(recipe: Recipe, sized: Sized, watch: Watch) -> dict[str, Cost]:
    """One pass of each kind, with fake tensors: those with a graph at the most points at which the algorithm has one."""
    model, mode, guidance = sized.model, sized.mode, recipe.sampler.guidance
    model.max_rows = None
    largest = dict(sorted(graph for graphs in watch.moments for graph in graphs))  # of a kind the last, with the most points

    def inputs(rows: int) -> tuple[Tensor, Tensor, Conditions]:
        t = torch.full((rows,), 0.5, dtype=torch.float64)
        with mode:
            return torch.zeros(rows, *model.shape), t, map_conditions(lambda c: torch.cat([c] * rows), sized.conditions)

    def with_graph(kind: str, rows: int) -> Cost:
        x, t, told = inputs(rows)
        if kind == "policy":
            return _cost(mode, rows, lambda: model.predict(x, t, told, guidance=guidance).eps, learn)
        x.requires_grad_(True)
        ask = (lambda: model.decode(x)) if kind == "decoder" else lambda: model.reference(x, t, told, guidance=guidance).x0
        return _cost(mode, rows, ask, lambda out: torch.autograd.grad(out.sum(), x))

    def learn(out: Tensor) -> None:
        out.square().sum().backward()
        for parameter in model.parameters.values():
            parameter.grad = None

    with _at_precision(recipe, model):
        costs = {kind: with_graph(kind, rows) for kind, rows in largest.items()}
        with torch.no_grad():
            x, t, told = inputs(recipe.train.max_rows or ROWS)
            costs["sampling"] = _cost(mode, len(x), lambda: model.predict(x, t, told, guidance=guidance).eps)
            costs["a picture"] = _cost(mode, 1, lambda: model.decode(x[:1]))
    return costs


def peak_together(graphs: Iterable[Graph], costs: dict[str, Cost]) -> int:
    """The peak while these graphs are alive: what all of them keep, and what the backward of one adds to it."""
    kept = adds = 0.0
    for kind, rows in graphs:
        cost = costs[kind]
        kept += cost.kept * rows / cost.rows
        adds = max(adds, (cost.peak - cost.kept) * rows / cost.rows)
    return round(kept + adds)


def peaks(watch: Watch, costs: dict[str, Cost]) -> dict[str, int]:
    """The peak of everything that is done one after the other, by name."""
    found = {"sampling": costs["sampling"].peak, "a picture": costs["a picture"].peak}
    alive = {graphs: Counter(graphs) for graphs in watch.moments}
    for graphs, mine in alive.items():
        if any(mine < more for more in alive.values()):
            continue  # on the way to more
        kinds = {kind for kind, _ in graphs}
        learns, judged = "policy" in kinds, "decoder" in kinds
        name = "an update" if learns else "the reward's gradient" if judged else "the reference's gradient"
        found[name] = max(found.get(name, 0), peak_together(graphs, costs))
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
    scorers = scorer_bytes(recipe)
    return {
        "frozen weights": frozen + sized.vae_bytes,
        "trained weights, gradient, Adam, average": round(trained * (2 + moments + recipe.train.ema)),
        "encoded prompts": each * (len(prompts) + (recipe.train.max_rows or ROWS)),
        "trajectories": states,
    } | ({f"scorers: {', '.join(scorers)}": sum(scorers.values())} if scorers else {})
