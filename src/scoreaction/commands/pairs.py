"""Drawing pairs of a recipe's pretrained model and labelling them by its reward: data for preference learning."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoreaction.disk import check_writable, whole
from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import Recipe
from scoreaction.rewards import CountedReward
from scoreaction.sampling.draw import draw, spread_prompts
from scoreaction.training.checks import refuse_uncounted
from scoreaction.types import Prompts, Values

ROWS = 256
"""Samples that are scored at a time."""


def prefers_first(rewards: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Choice of the first of each pair with probability `sigmoid((r_1 - r_2)/temperature)`, rewards (2, n); the better at 0.

    Bradley and Terry 1952. Equal rewards are chosen by a coin.

    >>> prefers_first(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 0.0, torch.Generator()).tolist()
    [True, False]
    """
    gap = rewards[0].double() - rewards[1].double()
    chance = torch.sigmoid(gap / temperature) if temperature > 0 else (torch.sign(gap) + 1) / 2
    return torch.rand(len(gap), generator=generator, dtype=torch.float64) < chance.cpu()


def make_pairs(recipe: Recipe, path: Path, *, n: int, temperature: float, seed: int) -> Values:
    """Writes n pairs, drawn by the sampler of the evaluation, into an .npz, and gives their figures; equal pairs are left out.

    The file has winner, loser, reward_winner, reward_loser, and prompts where the run has any: both of a pair have one prompt.
    """
    if path.suffix != ".npz":
        raise UserError(f"--output: {path} must be the name of an .npz file")
    if os.path.isdir(path):
        raise UserError(f"--output: {path} is a folder; name a file")
    if temperature < 0:
        raise UserError(f"--temperature: must be 0 or more (got {temperature:g})")
    check_writable(path.parent, "--output")
    tuner = build(recipe, learns=False)
    refuse_uncounted(tuner.budget, "pairs")
    prompts, world = spread_prompts(tuner.prompts, n), tuner.world
    twice = None if prompts is None else [*prompts, *prompts]
    sampler = tuner.evaluation.sampler(tuner.sampler)
    samples = draw(tuner.model, sampler, 2 * n, twice, seed, reference=True, world=world)
    own = world.stripe(2 * n)
    scores = world.together(lambda: _scores(tuner.reward, samples[own], twice and [twice[i] for i in own.tolist()]))
    rewards = world.gather(scores, 2 * n).unflatten(0, (2, n)).cpu()
    samples = samples.unflatten(0, (2, n)).cpu()
    first = prefers_first(rewards, temperature, torch.Generator().manual_seed(seed))
    keep = (samples[0] != samples[1]).flatten(1).any(1)
    if not bool(keep.any()):
        raise UserError("--n: all pairs have two equal samples, which prefer nothing; draw more")
    order = torch.stack([torch.where(first, 0, 1), torch.where(first, 1, 0)])[:, keep]
    chosen, scored = samples[order, keep.nonzero().flatten()], rewards[order, keep.nonzero().flatten()]
    if world.leads:
        arrays = {"winner": chosen[0], "loser": chosen[1], "reward_winner": scored[0], "reward_loser": scored[1]}
        kept = {} if prompts is None else {"prompts": np.array([str(prompts[i]) for i in keep.nonzero().flatten().tolist()])}
        with whole(path) as file:
            np.savez_compressed(file, **{name: part.numpy() for name, part in arrays.items()}, **kept)  # type: ignore[arg-type]
    return {
        "pairs": int(keep.sum()),
        "equal": int((~keep).sum()),
        "reward_winner": float(scored[0].mean()),
        "reward_loser": float(scored[1].mean()),
        "agreement": float((scored[0] > scored[1]).double().mean()),
        "queries": 2 * n,
    }


def _scores(reward: CountedReward, samples: Tensor, prompts: Prompts) -> Tensor:
    if not len(samples):  # of a process without rows: nobody is asked
        return samples.flatten(1).sum(1).float()
    parts = torch.arange(len(samples)).split(ROWS)
    with torch.no_grad():
        return torch.cat([reward(samples[rows], prompts and [prompts[i] for i in rows.tolist()]) for rows in parts])


def lines_of(figures: Values, temperature: float) -> str:
    """The figures in two lines.

    >>> known = {"pairs": 9, "equal": 1, "reward_winner": 0.5, "reward_loser": 0.25, "agreement": 0.75, "queries": 20}
    >>> print(lines_of(known, 0.1))
    9 pairs (1 of equal samples left out), 20 rewards: winners 0.5, losers 0.25
    the winner has the higher reward in 75 % of them; their optimum at beta b is p_pre exp(r/(0.1 b))
    """
    left = f" ({figures['equal']} of equal samples left out)" if figures["equal"] else ""
    means = f"winners {figures['reward_winner']:.4g}, losers {figures['reward_loser']:.4g}"
    law = f"their optimum at beta b is p_pre exp(r/({temperature:g} b))" if temperature else "the better always wins"
    return (
        f"{figures['pairs']} pairs{left}, {figures['queries']} rewards: {means}\n"
        f"the winner has the higher reward in {100 * figures['agreement']:.0f} % of them; {law}"
    )
