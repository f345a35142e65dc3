"""Work of a training iteration on the shapes beside what its mathematics needs: evaluations, CPU time, peak memory.

    python -m benchmarks.work                    # results/work.csv and a table; some minutes on one core
    python -m benchmarks.work --stage counts     # results/work_counts.csv and a table: evaluations alone, a minute

`NEEDS` has the evaluations that a trainer's equations ask for, a network call being of 32 rows everywhere. *Done* is what the
run's counters say. *Bare* are exactly the needed calls with nothing around them: sampling steps without a graph, policy and
reference forwards and backwards, decoder and reward. Both are timed in turns in one run, in CPU seconds, of which the critics'
and surrogates' own updates are a part that no bare call has. Memory is counted tensor by tensor, beyond the built run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _harness import Figures, arguments, built, in_stage, run_jobs
from torch import Tensor

COUNTED = 2
BATCH, STEPS, UPDATES, ROWS = 32, 12, 4, 32
POINTS = UPDATES * ROWS
LATE = 3
"""The quarter of the steps that ReFL draws one of."""


class Needs(NamedTuple):
    """Rows of calls: the policy's without a graph and with one, the reference's without and with one, decoder and reward."""

    sampled: int = BATCH * STEPS
    learned: int = 0
    reference: int = 0
    differentiated: int = 0
    scored: int = 0
    sloped: int = 0


EVERY = BATCH * STEPS
DENSE = BATCH * (STEPS - 1)  # the last step has no noise and no density; the reference acts in it
STAGES, INNER = 4, 2
NEEDS = {
    # KL to go from every state: the reference there
    "score_action": Needs(learned=POINTS, reference=EVERY - POINTS, differentiated=POINTS, scored=BATCH),
    "score_action, likelihood_ratio": Needs(learned=EVERY, reference=EVERY, scored=BATCH),
    "ddpo": Needs(learned=DENSE, scored=BATCH),
    "dpok": Needs(learned=DENSE, reference=DENSE, scored=BATCH),
    "vard": Needs(learned=POINTS, reference=EVERY, scored=BATCH),
    "sqdf": Needs(learned=POINTS, differentiated=POINTS, scored=BATCH, sloped=POINTS),
    "adjoint_matching": Needs(learned=POINTS, differentiated=EVERY, sloped=BATCH),
    # a stage: the reference's KL; twice a look ahead, its gradient and two updates; the target of its value. A third of the
    # looks ahead of the last stage's three steps are at the data, a call in all
    "pi_ft": Needs(
        sampled=EVERY + STAGES * ROWS * (INNER + 1),
        learned=STAGES * ROWS * INNER * 2,
        reference=STAGES * ROWS * 2,
        differentiated=STAGES * ROWS * INNER - ROWS,
        scored=BATCH + STAGES * ROWS * 2,
        sloped=STAGES * ROWS * INNER,
    ),
    # the last steps run once, with their graph
    "draft-1": Needs(sampled=EVERY - BATCH, learned=BATCH, sloped=BATCH),
    "draft-12": Needs(sampled=0, learned=EVERY, sloped=BATCH),
    "draft-lv": Needs(sampled=EVERY - BATCH, learned=3 * BATCH, sloped=3 * BATCH),
    # as far as the step that is drawn, whose evaluation has the graph: N - 1 - (late - 1)/2 before it
    "refl": Needs(sampled=BATCH * (STEPS - 1 - (LATE - 1) // 2), learned=BATCH, sloped=BATCH),
}
POINTWISE = f"rows: {ROWS}, updates: {UPDATES}"
SETTINGS = {
    "score_action": POINTWISE,
    "score_action, likelihood_ratio": "estimator: likelihood_ratio, look_ahead: none",
    "vard": POINTWISE,
    "sqdf": POINTWISE,
    "adjoint_matching": POINTWISE,
    "pi_ft": f"rows: {ROWS}, stages: {STAGES}, inner: {INNER}, updates: 2",
    "draft-12": "last: null",
    "draft-lv": "low_variance: 2",
}


def bare(tuner: Any, needs: Needs, x: Tensor, prompt: Tensor) -> None:
    """Makes the needed calls."""
    learner, t = tuner.learner, torch.full((ROWS,), 0.5, dtype=torch.float64)
    parameters = [*tuner.model.parameters.values()]

    def repeat(rows: int, call: Callable[[], Any]) -> None:
        for _ in range(rows // ROWS):
            call()

    def sloped(of: Callable[[Tensor], Tensor], by: list[Any] | None = None) -> None:
        leaf = x.detach().requires_grad_(by is None)
        torch.autograd.grad(of(leaf).sum(), leaf if by is None else by)

    with torch.no_grad():
        repeat(needs.sampled, lambda: learner.policy(x, t, prompt))
        repeat(needs.reference, lambda: learner.pretrained(x, t, prompt))
        repeat(needs.scored, lambda: tuner.collector.score(x, prompt))
    repeat(needs.learned, lambda: sloped(lambda x: learner.policy(x, t, prompt).x0, parameters))
    repeat(needs.differentiated, lambda: sloped(lambda x: learner.pretrained(x, t, prompt).x0))
    repeat(needs.sloped, lambda: sloped(lambda x: tuner.collector.score(x, prompt)))


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds."""
    began = time.process_time()
    call()
    return time.process_time() - began


def critics_watched(tuner: Any) -> list[float]:
    """A list to which the CPU seconds of every update of a network other than the policy are added."""
    seconds, backward = [], tuner.optimisation._backward

    def watched(update: Any, iteration: int) -> Any:
        began = time.process_time()
        figures = backward(update, iteration)
        if update.network != "policy":
            seconds.append(time.process_time() - began)
        return figures

    tuner.optimisation._backward = watched
    return seconds


def run_of(algorithm: str, iterations: int) -> Any:
    """The run whose iterations are counted and timed."""
    reward = "shapes_scorer" if NEEDS[algorithm].sloped else "shapes"
    sizes = [f"train.batch={BATCH}", f"train.max_rows={ROWS}", f"train.iterations={iterations}", "evaluation.held_out=[]"]
    sizes += ["sampler.off_below=0"]  # as `NEEDS` has it: the policy acts in every step
    name, settings = algorithm.partition(",")[0].partition("-")[0], SETTINGS.get(algorithm, "")
    return built("shapes", f"reward={{name: {reward}}}", f"algorithm={{name: {name}, {settings}}}", *sizes)


def beside_needs(algorithm: str, forward: int, backward: int) -> Figures:
    """Evaluations that were made, all and with a graph, beside those that are needed."""
    needs = NEEDS[algorithm]
    return {
        "needed": sum(needs[:4]),
        "done": forward,
        "needed_backward": needs.learned + needs.differentiated,
        "done_backward": backward,
    }


def counted(algorithm: str) -> Figures:
    """Evaluations of an iteration."""
    tuner = run_of(algorithm, 1)
    next(iter(tuner))
    return beside_needs(algorithm, tuner.model.evaluations.forward, tuner.model.evaluations.backward)


def measured(algorithm: str) -> Figures:
    """Evaluations and CPU seconds of an iteration, the median of a few, and the peak memory of the first."""
    from scoreaction.commands._live_memory import LiveMemory

    needs, tuner = NEEDS[algorithm], run_of(algorithm, 1 + COUNTED)
    steps, evaluations = iter(tuner), tuner.model.evaluations
    x, prompt = torch.randn(ROWS, *tuner.model.shape), torch.arange(ROWS) % len(tuner.prompts)
    peaks = []
    for call in (lambda: next(steps), lambda: bare(tuner, needs, x, prompt)):
        with LiveMemory() as memory:
            call()
        peaks.append(memory.peak / 2**20)
    critics, whole, calls, learned = critics_watched(tuner), [], [], []
    for _ in range(COUNTED):
        critics.clear()
        calls.append(timed(lambda: bare(tuner, needs, x, prompt)))
        before = evaluations.forward, evaluations.backward
        whole.append(timed(lambda: next(steps)))
        done = evaluations.forward - before[0], evaluations.backward - before[1]
        learned.append(sum(critics))
    ratios = [a / b for a, b in zip(whole, calls, strict=True)]
    without = [(a - c) / b for a, b, c in zip(whole, calls, learned, strict=True)]
    return beside_needs(algorithm, *done) | {
        "cpu_seconds": statistics.median(whole),
        "bare_seconds": statistics.median(calls),
        "cpu_over_bare": statistics.median(ratios),
        "without_critics": statistics.median(without),
        "mib": peaks[0],
        "bare_mib": peaks[1],
    }


if __name__ == "__main__":
    parser = arguments(__doc__ or "", "work")
    parser.set_defaults(processes=1)
    parser.add_argument("--stage", choices=["counts", "main"], default="main")
    options = parser.parse_args()
    if options.stage == "counts":
        in_stage(options)
    run_jobs(counted if options.stage == "counts" else measured, {name: {"algorithm": name} for name in NEEDS}, options)
