"""Steered samples of a model, what they are worth, and how far a policy is from the optimum that steering knows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.solvers import GridName, SolverName
from scoreaction.errors import UserError
from scoreaction.networks.model import Model
from scoreaction.rewards import CountedReward
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.rewards._reward import check_graph
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.sampling.draw import check_asked, distinct_prompts, sampler_of, spread_prompts
from scoreaction.sampling.known import Known, Likelihood, check_known
from scoreaction.sampling.sampler import Sampler, act
from scoreaction.sampling.steer import Steered, steer_x0
from scoreaction.sampling.steering import Method, Returns, Steering
from scoreaction.sampling.trajectory import trajectory
from scoreaction.sampling.walks import Score
from scoreaction.training.evaluation import NESTED, check_certificate, measure, refuse_diverged, standard_error
from scoreaction.training.exact_task import ExactTask
from scoreaction.training.rehearsal import certified
from scoreaction.training.run import Run
from scoreaction.types import RewardFunction
from scoreaction.world import ALONE, World


def scoring(model: Model, reward: CountedReward) -> Score:
    """The scores of samples before decoding, as steering asks for them."""

    def begin(x0: Tensor, texts: list[Any] | None) -> Callable[[], Tensor]:
        scores = reward.begin_decoded(x0, model.decode, texts)
        return lambda: check_graph(reward.name, scores())

    return begin


def settled(
    model: Model, steering: Steering, reward: CountedReward, sampler: Sampler, beta: float, *, tuned: bool = True
) -> Steering:
    """The settings with every default in its place; UserError where model, reward or sampler cannot give what they need."""
    try:
        check_known(model, steering.known)
        return steering.settled(differentiable=reward.differentiable, sampler=sampler, beta=beta, tuned=tuned)
    except ValueError as error:
        raise UserError(str(error)) from error


def chunk_of(model: Model) -> int:
    """Samples at a time: as many as fit a modest memory."""
    return max(16, min(8192, 2**21 // math.prod(model.shape)))


def steer(
    model: Model,
    reward: RewardFunction | Callable[[Tensor, Any], Tensor] | None,
    *,
    n: int,
    method: Method = "auto",
    particles: int | None = None,
    beta: float | None = None,
    select: str | None = None,
    target: str = "model",
    draws: int | None = None,
    every: int = 1,
    ess: float = 0.5,
    returns: Returns = "one",
    known: Known | None = None,
    steps: int | None = None,
    eta: float = 1.0,
    solver: SolverName | None = None,
    seed: int = 0,
    guidance: float | None = None,
    grid: GridName | None = None,
    prompts: list[Any] | None = None,
    reference: bool = False,
) -> Steered:
    """n samples of a model, the tuned one or with `reference` the base, steered towards a reward without training.

    reward: `fn(samples, prompts) -> (n,)` or a `Reward`, None where a part of the sample is `known`; the keys from method to
    known are those of `Steering`, and the rest is as in `sample`. The result has `x0` (n, *shape), before decoding, its
    `prompts` and `figures` with what it took:
    `model.decode(result.x0)` are the samples. ValueError, with the remedy, for settings that do not go together.

    >>> import scoreaction as sa
    >>> model = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    >>> steered = steer(model, lambda x, prompts: x[:, 0], n=3, beta=0.5, particles=4, steps=5)
    >>> steered.x0.shape, steered.figures["queries_per_sample"]
    (torch.Size([3, 2]), 24.0)
    """
    check_asked(model, n, prompts)
    sampler = sampler_of(model, steps=steps, eta=eta, solver=solver, guidance=guidance, grid=grid)
    chosen: dict[str, Any] = {"method": method, "particles": particles, "beta": beta, "select": select, "target": target}
    if reward is None and known is None:
        raise ValueError("reward: steering needs one, or known=, a part of the sample")
    counted = CountedReward(reward or (lambda samples, prompts: samples.new_zeros(len(samples))))
    steering = Steering(**chosen, draws=draws, every=every, ess=ess, returns=returns, known=known)
    return steer_x0(
        model, sampler, settled(model, steering, counted, sampler, 0.0, tuned=not reference), scoring(model, counted),
        n=n, prompts=prompts or model.prompts, seed=seed, reference=reference, chunk=chunk_of(model),
    )  # fmt: skip


def steered(
    run: Run,
    sampler: Sampler,
    steering: Steering,
    *,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    reference: bool = False,
    progress: Callable[[int], None] = lambda drawn: None,
) -> Steered:
    """n steered samples of a run's model by its reward; ValueError where they do not go with the settings."""
    chosen = settled(run.model, steering, run.reward, sampler, run.beta, tuned=not reference)
    if isinstance(run.reward.reward, WeightedSum) and run.reward.reward.unsettled:  # its scale is the pretrained model's
        many = run.evaluation.n
        measure(run.model, sampler, run.reward, {}, n=many, prompts=prompts, seed=seed, reference=True, world=run.world)
    return steer_x0(
        run.model, sampler, chosen, scoring(run.model, run.reward), n=n, prompts=prompts, seed=seed, reference=reference,
        chunk=chunk_of(run.model), world=run.world, progress=progress,
    )  # fmt: skip


def steered_figures(
    run: Run,
    sampler: Sampler,
    steering: Steering,
    *,
    n: int | None,
    prompts: list[Any] | None,
    seed: int,
    reference: bool = False,
    progress: Callable[[int], None] = lambda drawn: None,
) -> tuple[dict[str, Any], Tensor]:
    """Reward, held-out rewards and diversity of steered samples, on exact tasks their distance, costs; and the samples.

    n None is as many as one measurement draws trajectories for. Keys end in `_steered` where those of a summary end in
    `_tuned`. The samples are this process's, decoded.
    """
    result = steered(
        run, sampler, steering, n=n or steering.sample_count(run.evaluation.n), prompts=prompts, seed=seed,
        reference=reference, progress=progress,
    )  # fmt: skip
    n = len(result.x0)
    measured, samples = measure(
        run.model, sampler, run.reward, run.held_out, n=n, prompts=prompts, seed=seed, reference=reference,
        chunk=chunk_of(run.model), world=run.world, drawn=result.x0, clusters=run.clusters,
    )  # fmt: skip
    for nested in NESTED:
        measured.pop(nested, None)
    figures: dict[str, Any] = {"n_steered": n}
    for name, value in measured.items():
        figures[f"{name.removesuffix('_se')}_steered{'_se' if name.endswith('_se') else ''}"] = value
    task = ExactTask.of(run.model, run.reward.reward, run.beta)
    if steering.known is not None:
        likelihood = Likelihood.of(run.model, steering.known)
        figures["known_error"] = likelihood.error(run.model.decode(result.x0))
        vectors = isinstance(run.model.law, Mixture)
        task = ExactTask.of(run.model, QuadraticReward(likelihood.quadratic()), 1.0) if vectors else None
    if task is not None:
        figures["distance_steered"] = task.distance(lambda _: result.x0, n, seed, repeats=1)
        figures["distance_steered_floor"] = task.floor(n, seed)
    return figures | result.figures, samples


@torch.no_grad()
def certificate(
    model: Model,
    sampler: Sampler,
    reward: CountedReward,
    beta: float,
    *,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    world: World = ALONE,
) -> dict[str, float]:
    """`gap_nats`: KL of the averaged policy's chain to the optimal one's, with its standard error, and log Z with its own.

    `log Z - (E r - beta KL)/beta`, r and the chain KL of the policy and Z that of the pretrained chain under exp(r/beta), by
    twisted or plain sequential Monte Carlo: zero for the optimum of this chain and positive for all others, whether the
    optimum is known or not. With prompts the mean over them. Where the sampler is deterministic (or looks back) the chain is
    that of DDIM on the same grid, at eta 1 where eta is 0. ValueError without beta.
    """
    check_certificate(model)
    if not beta:
        raise ValueError(
            "evaluation.certificate: the algorithm has no beta, and without one there is no optimum; set evaluation.beta"
        )
    noisy = sampler.noisy()
    n, m, groups = certified(n, len(prompts or [None]))
    spread = spread_prompts(prompts, n)
    texts, prompt = distinct_prompts(spread, n)
    conditions, own = model.conditions(texts), world.stripe(n)
    begin = scoring(model, reward)

    def gains() -> Tensor:
        parts = [torch.empty(0, dtype=torch.float64)]
        with model.averaged(), model.uncounted():
            for rows in own.split(chunk_of(model)):
                x0, kl = _ends(model, noisy, partial(act, model, noisy), conditions, prompt[rows], RowNoise(seed, rows))
                refuse_diverged("tuned", "samples", x0)
                scores = begin(x0, None if spread is None else [spread[row] for row in rows.tolist()])()
                parts.append((scores.double() / beta - kl.double()).cpu())
        return torch.cat(parts)

    gain = world.gather(world.together(gains), n)
    steering = settled(model, Steering(particles=m), reward, noisy, beta, tuned=False)
    pretrained = steer_x0(
        model, noisy, steering, begin, n=groups, prompts=prompts, seed=seed, reference=True, chunk=chunk_of(model), world=world
    )
    log_z, error = pretrained.figures["log_z"], pretrained.figures["log_z_se"]
    gap = {"gap_nats": log_z - float(gain.mean()), "gap_nats_se": math.hypot(error, standard_error(gain))}
    return gap | {"log_z": log_z, "log_z_se": error}


def _ends(
    model: Model, sampler: Sampler, policy: Any, conditions: Any, prompt: Tensor, noise: RowNoise
) -> tuple[Tensor, Tensor]:
    """x0 of the policy's chain, and its chain KL (rows,); in a step without noise, which has no density, the reference acts."""
    source, solver = model.noise(noise, conditions, prompt), sampler.find()
    x, kl = model.start(len(prompt), source), torch.zeros(len(prompt), dtype=torch.float64)
    predict = partial(policy, conditions=conditions, prompt=prompt)
    visits = trajectory(
        predict, model.process, x, sampler.times(model.process), solver=solver, eta=sampler.eta, generator=source
    )
    for visit in visits:
        pretrained = model.reference(visit.x, visit.t, conditions, prompt=prompt, guidance=sampler.guidance)
        step = solver.step(model.process, predict, pretrained, visit.x, visit.t, visit.s, sampler.eta, None)
        x = visit.x_next
        if bool(model.process.has_density(visit.s)):
            kl += visit.transition.kl(step).double().cpu()
        else:
            x = step.sample()
    return x, kl
