"""Wall time of a training iteration against the network work in it, on the digits model.

    python -m benchmarks.overhead         # results/overhead.csv; the median ratio of one run

Bare is the time inside forwards of policy, reference, critic, surrogate and reward, and inside backwards, summed within the
same iterations, so that a noisy machine slows both alike. What is left is sampler, bookkeeping and optimiser.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

WARM_UP, COUNTED = 1, 5


class Stopwatch:
    """Adds up the time inside wrapped calls; a call inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


@contextmanager
def watched(tuner: Any) -> Iterator[Stopwatch]:
    """Times every network and reward of a tuner, and autograd."""
    watch = Stopwatch()
    backward, grad = torch.autograd.backward, torch.autograd.grad
    networks = [tuner.model.net, tuner.model.reference_net, *tuner.learner.networks.values()]
    for network in {id(network): network for network in networks}.values():
        network.forward = watch.wrap(network.forward)
    tuner.model.decode = watch.wrap(tuner.model.decode)
    tuner.reward.reward = _Timed(tuner.reward.reward, watch)
    torch.autograd.backward, torch.autograd.grad = watch.wrap(backward), watch.wrap(grad)
    try:
        yield watch
    finally:
        torch.autograd.backward, torch.autograd.grad = backward, grad


class _Timed:
    def __init__(self, reward: Any, watch: Stopwatch) -> None:
        self.differentiable, self.score = reward.differentiable, watch.wrap(reward.__call__)

    def __call__(self, samples: torch.Tensor, conditions: Any) -> torch.Tensor:
        return self.score(samples, conditions)


def measured(algorithm: str) -> Figures:
    """Wall time over bare time of the counted iterations."""
    tuner = built("digits", f"algorithm.name={algorithm}", "evaluation.held_out=[]", f"train.iterations={WARM_UP + COUNTED}")
    ratios = []
    with watched(tuner) as watch:
        steps = iter(tuner)
        for iteration in range(WARM_UP + COUNTED):
            watch.seconds = 0.0
            began = time.perf_counter()
            next(steps)
            if iteration >= WARM_UP:
                ratios.append((time.perf_counter() - began) / watch.seconds)
    return {"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


if __name__ == "__main__":
    parser = arguments(__doc__ or "", "overhead")
    parser.set_defaults(processes=1)
    jobs = {name: {"algorithm": name} for name in ("score_action", "sqdf", "draft", "ddpo", "dpok")}
    run_jobs(measured, jobs, parser.parse_args())
