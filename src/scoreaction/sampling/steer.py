"""Steering: samples of the tilted law `p(x0) exp(r(x0)/beta)/Z`, drawn without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.noise import RowNoise
from scoreaction.networks.model import Model
from scoreaction.sampling.draw import distinct_prompts, spread_prompts
from scoreaction.sampling.particles import categorical, systematic, uniform
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steering import BY_WEIGHTS, Steering
from scoreaction.sampling.steering_methods import ended
from scoreaction.sampling.walks import Score, Walk, Walked
from scoreaction.world import ALONE, World


@dataclass(frozen=True)
class Steered:
    """Steered samples before decoding, x0 (n, *shape), with their prompts, and what they cost.

    figures: `evaluations_per_sample` and `backward_per_sample`, rows of the network (guidance by an unconditional half counts
    two), and `queries_per_sample` of the reward; `kl_steered_nats`, what steering moves the law by, where `kl_steered_is_bound`
    at most. With weights also `ess_min`, the least effective share of particles on the way, and `log_z` of the tilted law with
    its standard error over groups, the mean over prompts.
    """

    x0: Tensor
    prompts: list[Any] | None
    figures: dict[str, Any]


def refuse_shared(model: Model) -> None:
    """ValueError for a network that processes share: they walk groups of their own, by calls of their own."""
    if model.sharded:
        raise ValueError("train.shard: steering does not share a network; set it to false, and the processes share the groups")


def check_steered(model: Model) -> None:
    """ValueError for a policy that particles cannot follow, or a network that they cannot share."""
    refuse_shared(model)
    if model.chooser is not None:
        raise ValueError(
            "steer: this policy chooses prompts along whole paths, which particles leave; steer the pretrained model,"
            " or set steer to null"
        )


@torch.no_grad()
def steer_x0(
    model: Model,
    sampler: Sampler,
    steering: Steering,
    score: Score,
    *,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    reference: bool = False,
    chunk: int = 8192,
    world: World = ALONE,
    progress: Callable[[int], None] = lambda drawn: None,
) -> Steered:
    """n samples by settled settings; the prompts are spread over them, and the pretrained model is steered with `reference`.

    Same seed, same samples, whatever the number of processes: groups have noise of their own, and are dealt whole. `returns:
    all` rounds n up to whole groups. progress: called with the number of groups done.
    """
    if reference:
        refuse_shared(model)
    else:
        check_steered(model)
    m, everything = steering.particles or 1, steering.returns == "all"
    groups = steering.group_count(n, len(prompts or [None]))
    texts, prompt = distinct_prompts(spread_prompts(prompts, groups), groups)
    own = world.stripe(groups)
    counts = [0, 0, 0]

    def walked() -> list[Walked]:
        conditions, ends = model.conditions(texts), []
        with model.averaged(), model.uncounted():
            for part in own.split(max(1, chunk // m)):
                walk = Walk(
                    model, sampler, steering, score, conditions=conditions, texts=texts, prompt=prompt[part],
                    noise=RowNoise(seed, part), reference=reference,
                )  # fmt: skip
                end = ended(walk)
                ends.append(end if everything else _one_each(end, RowNoise(seed + 1, part)))
                counts[2] += walk.queries
                progress(int(part.max()) + 1 if len(part) else 0)  # none where there are fewer groups than processes
            counts[:2] = [model.evaluations.forward, model.evaluations.backward]
        return ends

    ends = world.together(walked)
    whole = Walked(*(world.gather(torch.cat(parts), groups) for parts in zip(*map(_fields, ends), strict=True)))
    x0 = _returned(whole, prompt, steering, seed)
    together = world.reduced([float(count) for count in counts], "sum")
    names = ("evaluations_per_sample", "backward_per_sample", "queries_per_sample")
    figures = {name: count / len(x0) for name, count in zip(names, together, strict=True)}
    return Steered(x0, spread_prompts(prompts, len(x0)), figures | _figures(whole, prompt, steering))


def _fields(end: Walked) -> list[Tensor]:
    return [*vars(end).values()]


def _one_each(end: Walked, noise: RowNoise) -> Walked:
    """One particle of each group, by its weights; the rewards become their weighted mean."""
    chosen = categorical(end.log_weights, uniform(len(end.log_z), noise))
    rows = torch.arange(len(chosen))
    mean = (torch.softmax(end.log_weights, 1) * end.rewards).sum(1, keepdim=True)
    x0 = end.x0[rows.to(end.x0.device), chosen.to(end.x0.device)][:, None]
    return Walked(x0, torch.zeros_like(mean), end.log_z, mean, end.kl, end.shares)


def _returned(whole: Walked, prompt: Tensor, steering: Steering, seed: int) -> Tensor:
    """The samples, (n, *shape), that of row i for the prompt that `spread_prompts` has there."""
    groups, m = whole.log_weights.shape
    if steering.returns == "one":
        return whole.x0[:, 0]
    rows = torch.arange(groups * m)
    source = rows.clone()
    total = whole.log_z[:, None] + torch.log_softmax(whole.log_weights, 1)
    generator = torch.Generator().manual_seed(seed)
    # row i of `all` has the prompt of group i % groups: groups are a multiple of the prompts
    at, prompt_at = (rows % groups) * m + rows // groups, prompt[rows % groups]
    for number in prompt.unique():
        same = at[prompt_at == number]
        drawn = systematic(total.flatten()[same][None], torch.rand(1, generator=generator, dtype=torch.float64))[0]
        source[prompt_at == number] = same[drawn][torch.randperm(len(same), generator=generator)]
    return whole.x0.flatten(0, 1)[source.to(whole.x0.device)]


def _figures(whole: Walked, prompt: Tensor, steering: Steering) -> dict[str, Any]:
    """log Z, the least effective share, and the KL, means over prompts."""
    if steering.method not in BY_WEIGHTS:
        exact = steering.method == "guidance" or (steering.method == "best_of" and steering.select == "argmax")
        return {"kl_steered_nats": float(whole.kl.mean()), "kl_steered_is_bound": not exact}
    assert steering.beta is not None
    rewards = (torch.softmax(whole.log_weights, 1) * whole.rewards).sum(1)
    figures: dict[str, Any] = {"ess_min": float(whole.shares.mean(0).min())}
    log_z, variance, kl = [], [], []
    for number in prompt.unique():
        own = prompt == number
        value, error = log_mean_exp(whole.log_z[own])
        kl.append(float((torch.softmax(whole.log_z[own], 0) * rewards[own]).sum()) / steering.beta - value)
        log_z.append(value)
        variance.append(error**2)
    figures["log_z"] = sum(log_z) / len(log_z)
    figures["log_z_se"] = math.sqrt(sum(variance)) / len(variance)
    return figures | {"kl_steered_nats": sum(kl) / len(kl), "kl_steered_is_bound": False}


def log_mean_exp(values: Tensor) -> tuple[float, float]:
    """`log mean exp(values)` and its standard error, `std/(mean sqrt(n))` of the exponentials; NaN for a single one.

    >>> [round(x, 4) for x in log_mean_exp(torch.tensor([0.0, 0.0]))]
    [0.0, 0.0]
    """
    largest = values.max()
    scaled = torch.exp(values.double() - largest)
    error = scaled.std() / scaled.mean() / math.sqrt(len(scaled)) if len(scaled) > 1 else torch.tensor(math.nan)
    return float(largest + scaled.mean().log()), float(error)
