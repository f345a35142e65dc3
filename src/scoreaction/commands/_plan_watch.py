"""Demands of an iteration: its algorithm is run with networks that do nothing, and their graphs are watched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.commands._live_memory import LiveMemory
from scoreaction.errors import UserError
from scoreaction.networks.model import Model
from scoreaction.recipes.build import algorithm_of, named
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Recipe
from scoreaction.rewards import Reward
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Conditions, Pairs, Samples

Graph = tuple[str, int]
"""The graph of one call: of `policy`, `reference` or `decoder`, and at how many points."""


class Watch:
    """Counts calls and follows the graphs that they leave: which of them are alive at the same time.

    calls and gradients: points by kind, of all calls and of all backwards; moments: the sets of graphs that were alive
    together, one whenever a graph was made; iteration: the counters of the run; off_below: its sampler's.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.gradients: Counter[str] = Counter()
        self.moments: set[tuple[Graph, ...]] = set()
        self.iteration: dict[str, int] = {}
        self.off_below = 0.0
        self._alive: dict[int, Graph] = {}

    def __call__(self, kind: str, y: Tensor, rows: int) -> Tensor:
        """y itself, the result of a call at so many points; its graph is followed until it is freed or computed again."""
        self.calls[kind] += rows
        if not y.requires_grad:
            return y
        mark = torch.empty(1)
        key = max(self._alive, default=0) + 1
        self._alive[key] = kind, rows
        weakref.finalize(mark.untyped_storage(), self._alive.pop, key)
        self.moments.add(tuple(sorted(self._alive.values())))
        return _WatchedIdentity.apply(y, mark, lambda: self.gradients.update({kind: rows}))


class _WatchedIdentity(torch.autograd.Function):
    """The identity, with a tensor that lives as long as the graph keeps what a layer would keep for its backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mark: Tensor, went_back: Callable[[], None]) -> Tensor:
        ctx.save_for_backward(mark)
        ctx.went_back = went_back
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        assert len(ctx.saved_tensors) == 1  # asking for it is what makes a checkpoint compute again
        ctx.went_back()
        return grad, None, None


class _Stub(nn.Module):
    """A network that does nothing but have a parameter."""

    def __init__(self, watch: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 0.5))
        self.watch = watch

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        return self.watch("policy" if self.scale.requires_grad else "reference", self.scale * x)


def doubled(recipe: Recipe, model: Model) -> int:
    """Rows of the network for one point: guidance takes two."""
    return 2 if model.guidance_weight(recipe.sampler.guidance) != 1.0 and recipe.prompts is not None else 1


def _examples(recipe: Recipe, shape: tuple[int, ...]) -> Pairs | Samples | None:
    """Examples of this shape, one a prompt, for an algorithm that learns from them."""
    prompts = prompt_list(recipe.prompts)
    better = torch.full((len(prompts or [None]), *shape), 0.5)
    of: dict[str, Pairs | Samples] = {"pairs": Pairs(better, better / 2, prompts), "samples": Samples(better, prompts)}
    return of.get(algorithm_of(recipe).learns_from)


def watch_iteration(recipe: Recipe, model: Model, *, gradient: bool) -> Watch:
    """Calls of networks, decoder and reward in one iteration, counted by running it with a network that does nothing.

    An online run trains against its proxy, which has a gradient and asks nobody.
    """
    watch, small, each = Watch(), tuple(min(side, 8) for side in model.shape), doubled(recipe, model)
    stub = Model(
        _Stub(lambda kind, y: watch(kind, y, len(y) // each)),  # a function: the reference's copy shares it
        process=model.process,
        predicts=model.predicts,
        shape=small,
        encode=lambda prompts: torch.zeros(len(prompts), 1),
        null=torch.zeros(1, 1),
        decode=lambda x0: watch("decoder", x0, len(x0)).sigmoid(),  # in [0, 1], as images are
        invert=torch.logit,
        true_cfg=model.true_cfg,
        project=None if model.project is None else lambda x0: x0.clamp(-1, 1),
    )
    if stub.true_cfg is not None:
        stub.encode, stub.null = (lambda prompts: {"text": torch.zeros(len(prompts), 1)}), {"text": torch.zeros(1, 1)}
    online = recipe.online is not None
    changes = {"iterations": 1, "reward_delay": 0, "device": "cpu", "precision": "fp32", "optimizer": "adam", "shard": False}
    try:
        tuner = Finetuner(
            stub,
            reward=Reward(lambda samples, prompts: samples.flatten(1).mean(1), differentiable=gradient or online),
            algorithm=algorithm_of(recipe),
            sampler=recipe.sampler,
            train=recipe.train.model_copy(update=changes),
            prompts=prompt_list(recipe.prompts),
            evaluation=recipe.evaluation,
            recipe="",  # a run that is only tried
            data=_examples(recipe, small),
        )
    except ValueError as error:
        raise UserError(named(str(error), "recipe")) from error
    watch.off_below = tuner.sampler.acts_from
    watch.calls.clear()  # what was tried when it was built is no part of an iteration
    metrics = next(iter(tuner))
    if online:
        metrics["reward_queries"] = 0
    watch.iteration = {key: metrics[key] for key in ("model_evaluations", "model_backward_rows", "reward_queries")}
    return watch


THROUGH = "the reward's gradient"
"""The pass in which the gradient of a reward goes through the decoder."""


@dataclass(frozen=True)
class Cost:
    """Cost of a pass at `rows` points: bytes that its graph keeps and at the peak, operations forward and backward."""

    rows: int
    kept: int
    peak: int
    forward: int
    backward: int


def cost_of(mode: Any, rows: int, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any] = lambda out: None) -> Cost:
    """The cost of a forward pass and, where there is one, of its backward."""
    memory = LiveMemory()
    with mode, memory:
        out = forward()
        kept, operations = memory.live, memory.flops
        backward(out)
    return Cost(rows, kept, memory.peak, operations, memory.flops - operations)


def peaks(watch: Watch, costs: dict[str, Cost]) -> dict[str, int]:
    """The peak of everything that is done one after the other, by name.

    That of graphs which are alive together is what all of them keep, and what the backward of one adds to it.
    """
    passes = {"sampling": costs["sampling"].peak, "a picture": costs["a picture"].peak}
    alive = {graphs: Counter(graphs) for graphs in watch.moments}
    for graphs, counts in alive.items():
        if any(counts < more for more in alive.values()):
            continue  # on the way to more
        kinds = {kind for kind, _ in graphs}
        learns, judged = "policy" in kinds, "decoder" in kinds
        name = "an update" if learns else THROUGH if judged else "the reference's gradient"
        shares = [(costs[kind], rows / costs[kind].rows) for kind, rows in graphs]
        kept, adds = sum(c.kept * share for c, share in shares), max((c.peak - c.kept) * share for c, share in shares)
        passes[name] = max(passes.get(name, 0), round(kept + adds))
    return passes
