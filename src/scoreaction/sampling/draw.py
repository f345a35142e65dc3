"""Drawing samples of a policy or its reference: same seed, same noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from scoreaction.diffusion.noise import RowNoise, Source, normal
from scoreaction.diffusion.reveals import product_draws
from scoreaction.diffusion.solvers import GridName, SolverName
from scoreaction.errors import check_kind
from scoreaction.networks.lockstep import equal_parts
from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler, act, follow
from scoreaction.sampling.trajectory import trajectory
from scoreaction.types import Predict
from scoreaction.world import ALONE, World


def spread_prompts(prompts: list[Any] | None, n: int) -> list[Any] | None:
    """n prompts, each equally often; if n is less than their number, spread evenly over the list.

    >>> spread_prompts(["a", "b", "c", "d"], 2), spread_prompts(["a", "b"], 3)
    (['a', 'c'], ['a', 'b', 'a'])
    """
    if prompts is None:
        return None
    size = len(prompts)
    return [prompts[i % size if n >= size else i * size // n] for i in range(n)]


def distinct_prompts(prompts: list[Any] | None, n: int) -> tuple[list[Any] | None, Tensor]:
    """The distinct prompts of n samples, so that each is encoded and kept once, and their numbers (n,).

    >>> distinct_prompts(["a", "b", "a"], 3)
    (['a', 'b'], tensor([0, 1, 0]))
    """
    if prompts is None:
        return None, torch.zeros(n, dtype=torch.long)
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return list(numbers), torch.tensor([numbers[prompt] for prompt in prompts])


@torch.no_grad()
def draw_x0(
    model: Model,
    sampler: Sampler,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    *,
    reference: bool = False,
    world: World = ALONE,
) -> Tensor:
    """n samples before decoding, of the averaged weights or the reference; prompts (n,) or None. Same seed, same noise.

    Each sample has noise of its own, so that the first are the same for any n. The processes of a world share the work.
    """
    parts = x0_in_parts(model, sampler, prompts, seed, world.stripe(n), reference=reference)
    return world.gather(torch.cat([x0 for _, x0 in parts] or [no_x0(model)]), n)


def no_x0(model: Model) -> Tensor:
    """The samples before decoding of a process that has none, (0, *shape)."""
    return model.example(1, torch.Generator().manual_seed(0))[:0]


def no_samples(model: Model) -> Tensor:
    """The decoded samples of a process that has none: no rows, of the shape that the others' have."""
    return model.decode(model.example(1, torch.Generator().manual_seed(0)))[:0]


def x0_in_parts(
    model: Model,
    sampler: Sampler,
    prompts: list[Any] | None,
    seed: int,
    rows: Tensor,
    *,
    reference: bool,
    chunk: int = 8192,
) -> Iterator[tuple[Tensor, Tensor]]:
    """These of the samples of `draw_x0`, at most `chunk` of them at a time, after their numbers; prompts are those of all."""
    distinct, prompt = distinct_prompts(prompts, int(rows.max()) + 1 if len(rows) else 0)
    conditions = model.conditions(distinct)
    for part in equal_parts(rows, chunk) if model.sharded else rows.split(chunk):
        noise = model.noise(RowNoise(seed, part), conditions, prompt[part])
        policy = follow(model, sampler, conditions, prompt[part], noise, reference=reference)
        with model.averaged(), model.uncounted():
            x = model.start(len(part), noise)
            x = x if reference else model.moved(x, conditions, prompt=prompt[part])
            x0 = run(model, sampler, policy, len(part), noise, x=x)
        if len(part):
            yield part, x0


def run(model: Model, sampler: Sampler, predict: Predict, n: int, generator: Source, *, x: Tensor | None = None) -> Tensor:
    """n samples before decoding of the policy `predict`, from the states x at t = 1, by default noise."""
    x = model.start(n, generator) if x is None else x
    times = sampler.times(model.process)
    for visit in trajectory(predict, model.process, x, times, solver=sampler.find(), eta=sampler.eta, generator=generator):
        x = visit.x_next
    return x


@torch.no_grad()
def draw(
    model: Model,
    sampler: Sampler,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    *,
    reference: bool = False,
    world: World = ALONE,
) -> Tensor:
    """n samples as rewards see them (decoded), as `draw_x0` draws them."""
    parts = x0_in_parts(model, sampler, prompts, seed, world.stripe(n), reference=reference)
    return world.gather(torch.cat([model.decode(x0) for _, x0 in parts] or [no_samples(model)]), n)


def check_asked(model: Model, n: int, prompts: Any) -> None:
    """ValueError for what is no model, and for a number of samples, or prompts, that none can be drawn of."""
    check_kind("model", model, Model, "sa.Model(...), or the `model` of a Finetuner")
    if n < 1:
        raise ValueError(f"n: must be at least 1 (got {n})")
    if prompts is not None and (isinstance(prompts, str) or not prompts):
        raise ValueError(f"prompts: must be a list of one at least (got {prompts!r})")


def sample(
    model: Model,
    *,
    n: int,
    steps: int | None = None,
    eta: float | None = None,
    solver: SolverName | None = None,
    seed: int = 0,
    guidance: float | None = None,
    grid: GridName | None = None,
    prompts: list[Any] | None = None,
    reference: bool = False,
    threshold: float | None = None,
) -> Tensor:
    """n samples of the tuned model (its averaged weights), or with `reference` of the base; same seed, same noise.

    steps, solver and eta are by default 50 of ddim at 1, of tokens as many as there are positions of one_by_one, of a student
    its own, and of a model whose policy moves the noise eta is 0; guidance, grid and
    prompts are those of the training, of a model that was not trained 1, power and none. The base acts below the `off_below` of
    the training. threshold: of a causal model of tokens, shows several positions an evaluation, see `thresholded`. Prompts are
    repeated over the n samples. Returns (n, *shape), decoded where the model decodes.

    >>> import scoreaction as sa
    >>> model = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    >>> sample(model, n=3, steps=5).shape
    torch.Size([3, 2])
    """
    check_asked(model, n, prompts)
    sampler = sampler_of(model, steps=steps, eta=eta, solver=solver, guidance=guidance, grid=grid)
    prompts = spread_prompts(prompts or model.prompts, n)
    if threshold is not None:
        return thresholded(model, sampler, n, prompts, seed, threshold=threshold, reference=reference)
    return draw(model, sampler, n, prompts, seed, reference=reference)


def sampler_of(
    model: Model,
    *,
    steps: int | None,
    eta: float | None,
    solver: SolverName | None,
    guidance: float | None,
    grid: GridName | None,
) -> Sampler:
    """The sampler of these settings, and of those that suit the model where they are None; ValueError where it cannot step."""
    own = {"guidance": model.guidance if guidance is None else guidance, "grid": grid or model.grid}
    options = {"solver": solver, "steps": steps, "eta": eta}
    chosen = {name: value for name, value in options.items() if value is not None}
    sampler = Sampler(**model.sampling | own | chosen, off_below=model.off_below)
    sampler.check(model)
    return sampler


@torch.no_grad()
def thresholded(
    model: Model,
    sampler: Sampler,
    n: int,
    prompts: list[Any] | None,
    seed: int,
    *,
    threshold: float,
    reference: bool = False,
) -> Tensor:
    """n samples of a causal model, decoded, by fewer evaluations: each shows all positions of a probability above a threshold.

    Where a masked position's most probable token has more than `threshold`, it is shown, and the first masked one in any case;
    its token is drawn. Positions shown together are drawn as if independent: from a threshold of 1 on the law is the model's,
    and further from it the lower. Such a path has no density, so it serves sampling only. CARD (arXiv 2601.22031), decoding.
    ValueError for a model that is not causal, and for a threshold that is not positive.
    """
    if not model.causal:
        raise ValueError("threshold: decodes models whose tokens are predicted from left to right; leave it out")
    if not threshold > 0:
        raise ValueError(f"threshold: must be above 0, and from 1 on it shows one position at a time (got {threshold})")
    texts, prompt = distinct_prompts(prompts, n)
    conditions, noise = model.conditions(texts), RowNoise(seed, torch.arange(n))
    predict: Any = partial(model.reference if reference else partial(act, model, sampler), conditions=conditions, prompt=prompt)
    mask = cast(Any, model.process).mask
    with model.averaged(), model.uncounted():
        x = model.start(n, noise)
        while bool((masked := x == mask).any()):
            log_prob = predict(x, torch.full((n,), float(masked.double().mean()), dtype=torch.float64)).log_prob
            first = masked & (masked.cumsum(1) == 1)
            shown = first | (masked & (log_prob.amax(-1).exp() > threshold))
            uniform = torch.special.ndtr(normal((n, *model.shape), noise).double())[:, None]
            x = torch.where(shown, product_draws(log_prob, uniform.to(x.device))[:, 0], x)
        return model.decode(x)
