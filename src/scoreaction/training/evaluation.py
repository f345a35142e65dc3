"""Measuring a policy: samples, reward, KL, diversity, and on exact tasks the distance to the optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.solvers import SolverName
from scoreaction.networks.adapters import replaced
from scoreaction.networks.model import Model
from scoreaction.networks.noise_map import noise_kl
from scoreaction.networks.sharding import distributed_as, whole
from scoreaction.rewards import CountedReward
from scoreaction.rewards._weighted import settle
from scoreaction.sampling.draw import distinct_prompts, no_samples, spread_prompts, x0_in_parts
from scoreaction.sampling.prompt_path import PromptPath
from scoreaction.sampling.rollout import Rollout, roll_out, unflattened
from scoreaction.sampling.sampler import Sampler, follow
from scoreaction.settings import Settings
from scoreaction.tasks.clusters import Clusters
from scoreaction.training.clusters import cluster_figures
from scoreaction.training.confusion import Confusion
from scoreaction.training.errors import TrainingError
from scoreaction.types import Conditions
from scoreaction.world import ALONE, World


class Evaluation(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of the measurement of a run: n samples, their sampler and seed; rewards that are only reported.

    beta: that of the optimum to which distances are measured, by default the algorithm's. certificate: also measure
    `gap_nats`, how far the policy is from the optimum, known or not; it costs about 3 min(n, 4096) trajectories, and as many
    times steps queries of the reward. clusters: a file of `scoreaction cluster`: also measure `cluster_entropy`, in nats, of
    the shares in which samples fall into its clusters.
    """

    n: int = Field(8192, ge=2)
    solver: SolverName = "ddim"
    steps: int = Field(200, ge=1, le=10_000)
    eta: float = Field(1.0, ge=0, le=1)
    seed: int = Field(1234, ge=0, lt=2**32)
    beta: float | None = Field(None, gt=0)
    held_out: list[dict[str, Any]] = []
    certificate: bool = False
    clusters: Path | None = None

    @classmethod
    def of(cls, model: Model) -> Evaluation:
        """The settings that suit a model."""
        return cls(**{name: value for name, value in model.sampling.items() if name in cls.model_fields})

    def sampler(self, training: Sampler) -> Sampler:
        """The sampler to measure with: grid, guidance and `off_below` as in training."""
        return Sampler(**{**training.model_dump(), "solver": self.solver, "steps": self.steps, "eta": self.eta})


def standard_error(values: Tensor) -> float:
    """`std/sqrt(n)`."""
    return float(values.double().std() / math.sqrt(len(values)))


def kl_samples(n: int, steps: int, size: int) -> int:
    """The number of the n samples on which the KL is measured: their trajectories are kept, so fewer where they are large.

    >>> kl_samples(64, 30, 4 * 128 * 128), kl_samples(64, 30, 2)
    (4, 64)
    """
    return max(2, min(n, 2**23 // (steps * size)))


def check_certificate(model: Model) -> None:
    """ValueError where a model's policy has no stochastic chain that the optimal one's can be compared with, or is shared."""
    if model.sharded:
        raise ValueError(
            "evaluation.certificate: steers the pretrained model, and steering does not share a network; set it or train.shard"
            " to false"
        )
    if model.moves_noise:
        raise ValueError("evaluation.certificate: is of a stochastic chain, which forgets moved noise; set it to false")
    if model.chooser is not None:
        raise ValueError("evaluation.certificate: is of a policy of steps, and this one chooses prompts; set it to false")


def refuse_diverged(model: str, what: str, values: Tensor) -> None:
    """TrainingError where something of a model is not finite: no figure of it means anything."""
    if not bool(torch.isfinite(values).all()):
        remedy = "check its weights" if model == "pretrained" else "lower train.lr, or raise algorithm.beta, and train again"
        raise TrainingError(f"the {what} of the {model} model are not finite; {remedy}")


@torch.no_grad()
def rounding_floor(
    model: Model, sampler: Sampler, conditions: Conditions, rollout: Rollout, seed: int, *, rows: int, world: World
) -> float:
    """The KL of rounding alone: path KL in nats of the policy to itself with its weights changed by a relative 1e-4.

    Two predictions in half precision round apart as soon as a weight differs, by an amount that grows with the dimensions
    and with guidance. Smaller figures than this one say nothing. rows: the first trajectories of all, on which it is measured.
    Of a policy that moves the noise it is the KL of the noise, before it has learned to move any.
    """
    n, own = rollout.size[0], len(world.stripe(rows))
    if rollout.noise is not None:
        z, noise = rollout.noise[:own] / model.process.prior_std, RowNoise(seed, world.stripe(rows))
        v = noise.normal(z.shape, torch.float32).to(z)
        with model.uncounted(), replaced(model.parameters, _nearby(model, seed)):
            return float(world.gather(noise_kl(model, z, v, conditions, rollout.prompt[:own]), rows).mean())
    x, t = rollout.x[:n, :own].flatten(0, 1), rollout.times[:n].repeat_interleave(own)
    predict = partial(model.predict, x, t, conditions, prompt=rollout.prompt[:own].repeat(n), guidance=sampler.guidance)
    with model.uncounted():
        plain = predict()
        with replaced(model.parameters, _nearby(model, seed)):
            moved = predict()
    moved, plain = unflattened(moved, n), unflattened(plain, n)
    path, _ = model.kls(sampler.find(), rollout.acted, rollout.x[:n, :own], moved, plain, sampler.eta or 1.0)
    return float(world.gather(path, rows).mean())


def _nearby(model: Model, seed: int) -> dict[str, Tensor]:
    """The trained weights changed by a relative 1e-4."""
    generator, others = torch.Generator().manual_seed(seed), {}
    for name, p in model.parameters.items():
        size = float(whole(p.square().mean()).sqrt())
        noise = distributed_as(torch.randn(p.shape, generator=generator).to(p.device, p.dtype), p)
        others[name] = p + noise * (1e-4 * size or 1e-5)
    return others


@torch.no_grad()
def measure_kl(
    model: Model, sampler: Sampler, n: int, prompts: list[Any] | None, seed: int, world: World = ALONE
) -> dict[str, float]:
    """Path and chain KL of the averaged policy to its reference on this sampler's grid, with standard errors.

    Where the sampler is deterministic (or looks back) the KL is that of DDIM on the same grid, at eta 1 where eta is 0. Of a
    policy that moves the noise it is that of the noise, which is that of the paths.
    """
    n = kl_samples(n, 1 if model.moves_noise else sampler.steps, model.size)
    distinct, prompt = distinct_prompts(spread_prompts(prompts, n), n)
    conditions, own = model.conditions(distinct), world.stripe(n)
    more: dict[str, Tensor] = {}
    with model.averaged(), model.uncounted():
        if model.moves_noise:
            noise = RowNoise(seed, own)
            z, v = (noise.normal((len(own), *model.shape), torch.float32).to(model.device) for _ in range(2))
            path = chain = world.gather(noise_kl(model, z, v, conditions, prompt[own]), n)
        else:
            path, chain, more = _path_kls(model, sampler.noisy(), conditions, prompt[own], RowNoise(seed, own), world, n)
    refuse_diverged("tuned", "KLs", path)
    figures = {"kl_nats": float(path.mean()), "kl_nats_se": standard_error(path), "kl_chain_nats": float(chain.mean())}
    return figures | {name: float(values.mean()) for name, values in more.items()}


def _path_kls(
    model: Model, noisy: Sampler, conditions: Conditions, prompt: Tensor, source: RowNoise, world: World, n: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Path and chain KL of the policy on this sampler's paths, (n,) each, and that of its choices; prompt: the own ones."""
    noise = model.noise(source, conditions, prompt)
    policy = follow(model, noisy, conditions, prompt, noise)
    rollout = roll_out(model, noisy, policy, prompt, noise, times=noisy.times(model.process))
    states = rollout.steps().states
    flat = model.reference(states.x, states.t, conditions, prompt=states.prompt, guidance=noisy.guidance)
    compared = replace(rollout, pretrained=unflattened(flat, rollout.size[0])).compared()
    path, chain = model.kls(noisy.find(), rollout.acted, *compared, noisy.eta)
    more = {"kl_choice_nats": world.gather(policy.kl, n)} if isinstance(policy, PromptPath) else {}
    return world.gather(path, n), world.gather(chain, n), more


def by_prompt(prompts: list[Any] | None, values: Tensor) -> dict[str, float]:
    """The mean of the values of each prompt, in the order in which the prompts come first; empty without prompts.

    >>> by_prompt(["a", "b", "a"], torch.tensor([1.0, 5.0, 3.0]))
    {'a': 2.0, 'b': 5.0}
    """
    values_of: dict[str, list[float]] = {}
    for prompt, value in zip(prompts or [], values.tolist(), strict=prompts is not None):
        values_of.setdefault(str(prompt), []).append(value)
    return {prompt: sum(own) / len(own) for prompt, own in values_of.items()}


@torch.no_grad()
def diversity(model: Model, samples: Tensor, groups: Tensor, *, world: World = ALONE) -> dict[str, float]:
    """Mean pairwise distance, and Vendi score, of samples of one prompt, averaged over prompts that have two.

    Empty where no prompt has: then neither is known. groups: the numbers of all samples' prompts; samples: the own of them.
    Distances are Euclidean ones of features; of tokens edit distances.

    The Vendi score is `exp(-sum l log l)` over the eigenvalues l of K/n, K the similarities, cosines of features or of tokens
    those of edits (see `likeness.by_edits`): the effective number of different samples, at most 256 a prompt (of
    tokens 64; Friedman and Dieng 2023, arXiv 2210.02410).
    """
    at_most = model.likeness.at_most
    chosen = [rows[:at_most] for rows in ((groups == group).nonzero().flatten() for group in groups.unique()) if len(rows) > 1]
    if not chosen:
        return {}
    rows = torch.cat(chosen)
    own = rows[rows % world.size == world.rank]
    seen = world.together(
        lambda: torch.cat([model.features(samples[part // world.size]).double() for part in own.split(at_most)])
    )
    every, distances, scores = world.merged(seen, own, len(groups)), [], []
    for rows in chosen:
        distance, similarity = model.likeness.of(every[rows])
        distances.append(float(distance.sum()) / (len(rows) * (len(rows) - 1)))
        spectrum = torch.linalg.eigvalsh(similarity / len(rows)).clamp(min=1e-15)
        scores.append(float(torch.exp(-(spectrum * spectrum.log()).sum())))
    return {"diversity": sum(distances) / len(distances), "vendi": sum(scores) / len(scores)}


NESTED = ("by_prompt", "by_cluster", "by_label")
"""Figures of a measurement that are tables."""


def measure(
    model: Model,
    sampler: Sampler,
    reward: CountedReward,
    held_out: dict[str, CountedReward],
    *,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    reference: bool = False,
    chunk: int = 8192,
    world: World = ALONE,
    progress: Callable[[int], None] | None = None,
    drawn: Tensor | None = None,
    clusters: Clusters | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Reward, held-out rewards and diversity of the averaged policy (or the reference), and this process's decoded samples.

    With prompts also `by_prompt`, the mean reward of each; diversity is None where no prompt has two samples; with clusters
    `cluster_entropy` and `by_cluster`, the share of each; with a held-out judge of labels `macro_f1` and `by_label`. What is
    drawn is scored while more is drawn, where the reward works in the background. progress: called with the number so far.
    drawn (n, *shape): samples before decoding that were drawn already, in place of the model's.
    """
    spread = spread_prompts(prompts, n)
    judges = {"reward": reward, **{f"held_out.{name}": judge for name, judge in held_out.items()}}
    parts: list[Tensor] = []
    confusion = Confusion.of(held_out)
    counts = torch.zeros(0 if clusters is None else len(clusters), dtype=torch.long)
    begun: dict[str, list[Callable[[], Tensor]]] = {name: [] for name in judges}

    def parts_of() -> Iterable[tuple[Tensor, Tensor]]:
        if drawn is None:
            return x0_in_parts(model, sampler, spread, seed, world.stripe(n), reference=reference, chunk=chunk)
        return ((rows, drawn[rows]) for rows in world.stripe(n).split(chunk) if len(rows))

    def begin() -> None:
        for rows, x0 in parts_of():
            refuse_diverged("pretrained" if reference else "tuned", "samples", x0)
            parts.append(model.decode(x0))
            if clusters is not None:
                counts.add_(clusters.assign(parts[-1], model, x0).bincount(minlength=len(clusters)).cpu())
            if progress is not None:
                progress(int(rows[-1]) + 1)
            texts = None if spread is None else [spread[row] for row in rows.tolist()]
            for name, judge in judges.items():
                begun[name].append(judge.begin(parts[-1], texts))
            if confusion is not None:
                confusion.add(parts[-1], texts)
        if not parts:  # fewer samples than processes
            parts.append(no_samples(model))
            for waiting in begun.values():
                waiting.append(lambda: torch.empty(0, device=model.device))

    with torch.no_grad():
        world.together(begin, sends=model.sharded)
        for judge in judges.values():
            settle(judge.reward, world, n)
        own = world.together(lambda: {name: torch.cat([wait() for wait in waiting]) for name, waiting in begun.items()})
        scores = {name: world.gather(values, n) for name, values in own.items()}
    samples, rewards = torch.cat(parts), scores.pop("reward")
    groups = torch.arange(n) % (len(prompts) if prompts else 1)
    figures: dict[str, Any] = {"reward": float(rewards.double().mean()), "reward_se": standard_error(rewards)}
    figures |= {"diversity": None, "vendi": None} | diversity(model, samples, groups, world=world)
    for name, values in scores.items():
        figures |= {name: float(values.double().mean()), f"{name}_se": standard_error(values)}
    if clusters is not None:
        figures |= cluster_figures(counts, world)
    if confusion is not None:
        figures |= confusion.figures(world)
    if spread is not None:
        figures["by_prompt"] = by_prompt(spread, rewards)
    return figures, samples
