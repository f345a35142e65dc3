"""Checks during a few iterations: trained parameters move, frozen ones do not, figures begin at their known values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.commands.doctor.finding import Finding, apart, judged
from scoreaction.commands.doctor.model import Places, reference_at
from scoreaction.report.numbers import number
from scoreaction.rewards import RewardError
from scoreaction.training.errors import TrainingError
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Prediction, Values


def training_findings(tuner: Finetuner, places: Places, iterations: int) -> Iterator[Finding]:
    """Trains for a few iterations and checks them."""
    model, fresh = tuner.model, tuner.iteration == 0
    trained = {name: p for name, p in model.parameters.items() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    frozen, reference = _fingerprints(tuner), _reference(tuner, places)
    try:
        with _largest_gradients(trained) as gradients:
            records = list(islice(tuner, iterations + tuner.train.reward_delay))
            records = [record for record in records if "kl_nats" in record]  # late rewards are not there at first
    except (TrainingError, RewardError) as error:
        yield Finding("training runs", "wrong", str(error))
        return
    yield from _pace(tuner, records)
    yield _reached(gradients)
    yield _moved(before, trained, gradients)
    yield _froze(frozen, _fingerprints(tuner))
    difference = apart(reference, _reference(tuner, places))
    yield judged(
        "the reference stays",
        difference == 0,
        "to the bit",
        f"it moved by {difference:.1g} standard deviations",
        "it must not share what is trained",
    )
    if fresh and model.chooser is None:  # whose menu is no step of the network's
        yield _begins(records[0]["kl_nats"], half=tuner.half)
    if tuner.train.reward_delay:
        yield _late(tuner.train.reward_delay)
    if tuner.half:
        yield _floor(tuner.learner.kl_floor, ratios="log_ratio" in records[0])
    if any("log_ratio_first" in record for record in records):
        yield from _ratios(records, half=tuner.half)
    yield from _grid(records)


def _reference(tuner: Finetuner, places: Places) -> Prediction:
    with tuner.model.uncounted(), torch.no_grad():
        return reference_at(tuner, places)


def _pace(tuner: Finetuner, records: list[Values]) -> Iterator[Finding]:
    """Time of the whole run, by the iterations after the first where there are any."""
    first, last, later = records[0]["seconds"], records[-1]["seconds"], len(records) - 1
    seconds = (last - first) / later if later else first
    whole = seconds * tuner.train.iterations
    duration = f"{number(whole / 60, 2)} minutes" if whole > 120 else f"{number(whole, 2)} s"
    tried = f"{len(records)} iteration{'s' * (len(records) > 1)}"
    seen = f"{tried}, {number(seconds, 2)} s each: all {tuner.train.iterations} take {duration}"
    yield Finding("training runs", "ok", seen)
    skipped = sum("skipped" in record for record in records)
    if skipped:
        seen = f"{skipped} of {len(records)} did not: all rewards equal, or fp16 overflowed"
        yield Finding("every iteration learns", "note", seen)


def _late(delay: int) -> Finding:
    """Gradients d steps old converge below a step times curvature of `2 sin(pi/(2 (2 d + 1)))`, which is 2 at d = 0."""
    share = math.sin(math.pi / (2 * (2 * delay + 1)))
    seen = f"{delay} iterations: steps are stable up to {number(share, 2)} of what they are without delay"
    return Finding("rewards come late", "note", seen, "lower train.lr as much where the run oscillates")


def _froze(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> Finding:
    changed = [name for name, value in after.items() if value != before[name]]
    return judged(
        "what is frozen stays",
        not changed,
        f"{len(before)} tensors, to the bit",
        f"{len(changed)} tensors changed, {(changed or [''])[0]} among them",
        "train only what requires a gradient",
    )


def _fingerprints(tuner: Finetuner) -> dict[str, tuple[float, float]]:
    """A sum and a sum of squares of each tensor that is not trained, of network, reference and consistency model."""
    trained = {id(p) for p in tuner.model.parameters.values()}
    sums = {}
    nets = {"network": tuner.model.net, "reference": tuner.model.reference_net, "consistency": tuner.model.consistency_net}
    for role, net in nets.items():
        for name, value in [] if net is None else [*net.named_parameters(), *net.named_buffers()]:
            if id(value) not in trained:
                wide = value.detach().double()
                sums[f"{role}.{name}"] = (float(wide.sum()), float(wide.square().sum()))
    return sums


@contextmanager
def _largest_gradients(parameters: dict[str, nn.Parameter]) -> Iterator[dict[str, float]]:
    """The largest absolute gradient that each parameter received meanwhile; 0 where none did."""
    largest = dict.fromkeys(parameters, 0.0)

    def watcher(name: str) -> Any:
        def look(parameter: Tensor) -> None:
            if parameter.grad is not None:
                largest[name] = max(largest[name], float(parameter.grad.abs().max()))

        return look

    handles = [p.register_post_accumulate_grad_hook(watcher(name)) for name, p in parameters.items()]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _reached(gradients: dict[str, float]) -> Finding:
    check, without = "gradients reach all that is trained", [name for name, size in gradients.items() if not size > 0]
    if without:
        return Finding(
            check, "note", f"{len(without)} of {len(gradients)} tensors received none, {without[0]} among them",
            "the network does not use them here; leave them out of what is trained",
        )  # fmt: skip
    return Finding(check, "ok", f"{len(gradients)} tensors")


def _moved(before: dict[str, Tensor], after: dict[str, nn.Parameter], gradients: dict[str, float]) -> Finding:
    check = "what is trained moves"
    moves = torch.tensor([float((after[name].detach() - old).double().norm()) for name, old in before.items()])
    sizes = torch.tensor([float(old.double().norm()) for old in before.values()])
    share = float(moves.norm() / sizes.norm())
    remedy = "steps of this train.lr are lost in rounding: raise it, or keep trained weights in fp32"
    if share < 1e-6:
        return Finding(check, "wrong", f"by {number(share, 2)} of its size, which is rounding", remedy)
    stuck = [name for name, old in before.items() if gradients[name] > 0 and torch.equal(old, after[name].detach())]
    if stuck:
        return Finding(check, "note", f"{len(stuck)} of {len(before)} tensors did not, {stuck[0]} among them", remedy)
    return Finding(check, "ok", f"by {number(share, 2)} of its size")


def _begins(kl: float, *, half: bool) -> Finding:
    check = "the KL begins at 0"
    if half and kl > 1e-2:
        seen = f"{number(kl, 2)} nats, which is rounding: smaller figures mean nothing"
        return Finding(check, "note", seen, "train.precision=fp32 has less")
    wrong = f"{number(kl, 2)} nats before the first update"
    return judged(check, kl <= 1e-2, f"{kl:.1g} nats", wrong, "policy and reference must be asked alike")


def _floor(nats: float, *, ratios: bool) -> Finding:
    """Rounding's own KL: where it is large, a clip on ratios of densities clips noise."""
    check, seen = "figures stand above rounding", f"rounding alone measures {number(nats, 2)} nats"
    if ratios and nats > 0.1:
        return Finding(
            check, "wrong", f"{seen}: ratios of densities are noise", "train.precision=fp32, or fp16, which rounds 8 times less"
        )
    if nats > 0.1:
        remedy = "the trust region and kl_target allow for it; fp32, or fp16, which rounds 8 times less, measures finer"
        return Finding(check, "note", f"{seen}: smaller KLs mean nothing", remedy)
    return Finding(check, "ok", seen)


def _ratios(records: list[Values], *, half: bool) -> Iterator[Finding]:
    """The ratio of densities is 1 until the first update of an iteration, and then it is not."""
    first = max(record["log_ratio_first"] for record in records if "log_ratio_first" in record)
    yield judged(
        "ratios begin at 1",
        first <= (0.5 if half else 1e-2),
        f"log-ratio {first:.1g} before the first update of an iteration, as it must",
        f"log-ratio {number(first, 2)} before the first update of an iteration",
        "a state or a prediction is not what the policy that acted had: look at precision, dropout, and guidance",
    )
    later = max(record.get("log_ratio", 0.0) for record in records)
    clipped = max(record.get("clip_fraction", 0.0) for record in records)
    check = "ratios then leave 1"
    if later <= max(1e-6, first):
        remedy = "with one update an iteration they cannot; with more, raise train.lr"
        yield Finding(check, "note", "they do not in the updates that follow", remedy)
    elif clipped > 0.5:
        yield Finding(check, "note", f"{clipped:.0%} of them are clipped", "lower train.lr, or make fewer updates an iteration")
    else:
        yield Finding(check, "ok", f"largest log-ratio {number(later, 2)}, {clipped:.0%} clipped")


def _grid(records: list[Values]) -> Iterator[Finding]:
    """The chain's KL comes near the path's as the grid grows finer."""
    kl, chain = records[-1]["kl_nats"], records[-1]["kl_chain_nats"]
    if kl > 1e-4:
        check, seen = "the grid is fine enough", f"the chain pays {number(chain / kl, 2)} times the path's KL"
        if chain > 2 * kl:
            yield Finding(check, "note", seen, "more sampler.steps or another sampler.grid; kl_nats is the figure to compare")
        else:
            yield Finding(check, "ok", seen)
