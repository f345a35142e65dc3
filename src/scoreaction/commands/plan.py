"""Needs of a recipe before it is started: parameters, memory, network evaluations, time."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from scoreaction.commands._plan_watch import THROUGH, Cost, Watch, cost_of, doubled, peaks, watch_iteration
from scoreaction.commands._way_out import CARD, SCORERS, TRAJECTORIES, Needs, way_out
from scoreaction.errors import UserError
from scoreaction.models import Skeleton
from scoreaction.networks.conditions import map_conditions
from scoreaction.networks.model import Model
from scoreaction.recipes.build import build_block, keyed
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Recipe, numbered, optimum_beta
from scoreaction.rewards import as_reward
from scoreaction.training.checks import check_precision, check_shard
from scoreaction.training.optimizer import ROWS
from scoreaction.training.rehearsal import Demand, measuring_demand
from scoreaction.types import DTYPES, Conditions, Values
from scoreaction.world import World

RESERVE = 2 * 2**30
"""Bytes for CUDA itself and what its allocator cannot use."""
SUSTAINED = 50e12
"""Floating-point operations a second that times are given at."""


def plan(recipe: Recipe, processes: int = 1, *, card: int = CARD) -> Values:
    """The figures of `scoreaction plan`; bytes, counts and floating-point operations. UserError as for `build`.

    Bytes are those of one process of so many, counts and operations those of all; processes share the batch evenly. card:
    bytes of the card that the way out is for.
    """
    if recipe.train.batch % processes:
        raise UserError(f"--processes: {processes} do not share train.batch, which is {recipe.train.batch}, evenly")
    if recipe.train.shard:
        try:
            check_shard(recipe.train, World(0, processes))
        except ValueError as error:
            raise UserError(str(error)) from error
    skeleton = skeleton_of(recipe)
    skeleton.model.refuse_tokens("plan")
    check_precision(skeleton.model, recipe.train.precision)
    gradient = differentiable(recipe)
    watch = watch_iteration(recipe, skeleton.model, gradient=gradient)
    rounds, measured = online_demand(recipe), measured_demand(recipe, skeleton.model, gradient)
    if measured.gradients:  # steering that looks ahead: a part's graphs of network and decoder are alive together
        rows = recipe.train.max_rows or ROWS
        watch.moments.add((("decoder", rows), ("reference", rows)))
    costs = measure_costs(recipe, skeleton, watch)
    needs = needs_of(recipe, skeleton, watch, costs, processes)
    return {
        "processes": processes,
        "parameters": skeleton.parameters,
        "off_below": watch.off_below,
        **memory_figures(recipe, skeleton, needs, costs, card),
        **time_figures(recipe, skeleton, watch, costs, rounds=rounds, measured=measured, processes=processes),
    }


def needs_of(recipe: Recipe, skeleton: Skeleton, watch: Watch, costs: dict[str, Cost], processes: int) -> Needs:
    """The bytes of one process: what stays on its device, and the peaks of what is done one after the other."""
    passes = with_offloaded(peaks(watch, costs), skeleton, recipe)
    return Needs(resident_bytes(recipe, skeleton, processes), passes, RESERVE, skeleton.encoder_bytes)


def memory_figures(recipe: Recipe, skeleton: Skeleton, needs: Needs, costs: dict[str, Cost], card: int) -> Values:
    """The figures of memory, and the way out where a card of so many bytes does not hold it."""
    trained = sum(p.numel() for p in skeleton.model.parameters.values())
    return {
        "gradient_bytes": 4 * trained,
        "trained": trained,
        "resident": needs.resident,
        "prompts": len(prompt_list(recipe.prompts) or []),
        "prompt_bytes": prompt_bytes(skeleton),
        "passes": needs.peaks,
        "worst": needs.worst,
        "total": needs.total,
        "way_out": None if needs.total <= card else way_out(recipe, skeleton, needs, costs, card=card),
    }


def time_figures(
    recipe: Recipe,
    skeleton: Skeleton,
    watch: Watch,
    costs: dict[str, Cost],
    *,
    rounds: Demand,
    measured: Demand,
    processes: int,
) -> Values:
    """The figures of network evaluations, questions, operations and time, of all processes together."""
    rows, each = recipe.train.max_rows or ROWS, doubled(recipe, skeleton.model)
    point, picture = costs["sampling"].forward / rows, costs["a picture"].forward
    flops = watch.iteration["model_evaluations"] / each * point + watch.calls["decoder"] * picture
    flops += sum(count * costs[kind].backward / costs[kind].rows for kind, count in watch.gradients.items())
    extra = rounds + measured
    once = (extra.points + 2 * extra.gradients) * point + extra.queries * picture  # backwards, which are few, as two forwards
    speed = SUSTAINED * processes
    return {
        "iteration": watch.iteration,
        "iterations": recipe.train.iterations,
        "pictures": watch.calls["decoder"],
        "picture_flops": picture,
        "rounds": rounds.queries,
        "rounds_evaluations": rounds.points * each,
        "measuring": measured.points * each,
        "measuring_queries": measured.queries,
        "flops": flops,
        "measuring_flops": once,
        "hours": (flops * recipe.train.iterations + once) / speed / 3600,
        "pictures_a_day": 86400 * recipe.train.batch * speed / flops,
        "rows": rows * each,
    }


def online_demand(recipe: Recipe) -> Demand:
    """The demand of the rounds of an online run: samples that are drawn of the policy, and answers."""
    n = sum(recipe.online.rounds) if recipe.online is not None else 0
    return Demand(n, n, n * recipe.sampler.steps)


def measured_demand(recipe: Recipe, model: Model, gradient: bool) -> Demand:
    """The demand of measuring at the end: base and tuned, the KL between them, steering and a certificate where they are."""
    sampler, steering = recipe.evaluation.sampler(recipe.sampler), recipe.steer
    try:
        if steering is not None:
            steering = steering.settled(differentiable=gradient, sampler=sampler, beta=optimum_beta(recipe))
    except ValueError as error:
        raise UserError(str(error).replace("sampler.", "evaluation.")) from error
    parts = measuring_demand(
        model.process, recipe.evaluation, sampler, steering=steering, prompts=prompt_list(recipe.prompts),
        differentiable=gradient, size=model.size,
    )  # fmt: skip
    return sum(parts.values(), Demand())


def with_offloaded(passes: dict[str, int], skeleton: Skeleton, recipe: Recipe) -> dict[str, int]:
    """The peaks, those that decode with the bytes of an autoencoder that is there only then."""
    decoding = ["a picture"]
    if recipe.model.config.model_dump().get("tiny_decoder") is None:
        decoding.append(THROUGH)
    return {name: size + (skeleton.offloaded_bytes if name in decoding else 0) for name, size in passes.items()}


def skeleton_of(recipe: Recipe) -> Skeleton:
    """The recipe's model without weights, where its file has a `skeleton`; else the model itself."""
    if recipe.model.traits.skeleton is not None:
        try:
            return recipe.model.traits.skeleton(recipe.model.config)
        except (ValueError, OSError) as error:
            raise UserError(keyed(str(error), "model", recipe.model)) from error
    model: Model = build_block(recipe.model, "model")
    prompts = prompt_list(recipe.prompts)
    conditions = None if prompts is None else model.conditions(prompts[:1])
    frozen = sum(p.numel() for p in model.net.parameters() if not p.requires_grad)
    return Skeleton(model, conditions, {"network": frozen + sum(p.numel() for p in model.parameters.values())})


def differentiable(recipe: Recipe) -> bool:
    """True where every reward has a gradient; one whose file has its `PARAMETERS` is not loaded, and taken to have one."""
    light = [block for block in recipe.rewards if block.traits.parameters is None]
    return all(as_reward(build_block(block, "reward")).differentiable for block in light)


def scorer_bytes(recipe: Recipe) -> dict[str, int]:
    """Bytes of the weights of the reward and the held-out rewards, by name: of those whose file has its `PARAMETERS`."""
    blocks = [*recipe.rewards, *recipe.held_out]
    return {
        name: block.traits.parameters * DTYPES[block.config.model_dump().get("dtype", "fp32")].itemsize
        for name, block in zip(numbered(block.name for block in blocks), blocks, strict=True)
        if block.traits.parameters is not None
    }


def measure_costs(recipe: Recipe, skeleton: Skeleton, watch: Watch) -> dict[str, Cost]:
    """One pass of each kind, with fake tensors: those with a graph at the most points at which the algorithm has one."""
    model, mode, guidance = skeleton.model, skeleton.mode, recipe.sampler.guidance
    model.max_rows = None
    largest = dict(sorted(graph for graphs in watch.moments for graph in graphs))  # of a kind the last, with the most points

    def inputs(rows: int) -> tuple[Tensor, Tensor, Conditions]:
        t = torch.full((rows,), 0.5, dtype=torch.float64)
        with mode:
            return torch.zeros(rows, *model.shape), t, map_conditions(lambda c: torch.cat([c] * rows), skeleton.conditions)

    def with_graph(kind: str, rows: int) -> Cost:
        x, t, conditions = inputs(rows)
        if kind == "policy":
            return cost_of(mode, rows, lambda: model.predict(x, t, conditions, guidance=guidance).eps, learn)
        x.requires_grad_(True)
        ask = (
            (lambda: model.decode(x)) if kind == "decoder" else lambda: model.reference(x, t, conditions, guidance=guidance).x0
        )
        return cost_of(mode, rows, ask, lambda out: torch.autograd.grad(out.sum(), x))

    def learn(out: Tensor) -> None:
        out.square().sum().backward()
        for parameter in model.parameters.values():
            parameter.grad = None

    if recipe.train.precision != "fp32":
        model.autocast = partial(torch.autocast, "cpu", dtype=DTYPES[recipe.train.precision])
    costs = {kind: with_graph(kind, rows) for kind, rows in largest.items()}
    with torch.no_grad():
        x, t, conditions = inputs(recipe.train.max_rows or ROWS)
        costs["sampling"] = cost_of(mode, len(x), lambda: model.predict(x, t, conditions, guidance=guidance).eps)
        costs["a picture"] = cost_of(mode, 1, lambda: model.decode(x[:1]))
    return costs


def prompt_bytes(skeleton: Skeleton) -> int:
    """Bytes of one encoded prompt."""
    texts = skeleton.conditions.values() if isinstance(skeleton.conditions, dict) else [skeleton.conditions]
    return sum(c.numel() * c.element_size() for c in texts if c is not None)


def resident_bytes(recipe: Recipe, skeleton: Skeleton, processes: int = 1) -> dict[str, int]:
    """Bytes that stay on the device of one process throughout; with `train.shard` its part of the networks, on one machine.

    A LoRA is whole in every process.
    """
    model = skeleton.model
    trained = sum(p.numel() * p.element_size() for p in model.parameters.values())
    frozen = skeleton.frozen_bytes
    if frozen is None:
        frozen = sum(p.numel() * p.element_size() for p in model.net.parameters() if not p.requires_grad)
    if model.reference_net is not model.net:
        frozen += sum(p.numel() * p.element_size() for p in model.reference_net.parameters())
    moments = {"adam": 2.0, "adam8bit": 0.5}[recipe.train.optimizer]
    prompts = prompt_list(recipe.prompts) or []
    states = recipe.train.batch // processes * (7 * recipe.sampler.steps + 1) * math.prod(model.shape) * 4
    scorers = scorer_bytes(recipe)
    parts = processes if recipe.train.shard else 1
    own = 1 if model.lora is not None else parts
    return {
        "frozen weights": frozen // parts + skeleton.vae_bytes,
        "trained weights, gradient, Adam, average": round(trained * (2 + moments + recipe.train.ema) / own),
        "encoded prompts of a call": prompt_bytes(skeleton) * (recipe.train.max_rows or ROWS) if prompts else 0,
        TRAJECTORIES: states,
    } | ({f"{SCORERS}{', '.join(scorers)}": sum(scorers.values())} if scorers else {})
