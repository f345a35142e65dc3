"""`scoreaction doctor`: checks of a run and a few of its iterations for known mistakes, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from scoreaction.commands.doctor.finding import Finding
from scoreaction.commands.doctor.model import model_findings, sample_points
from scoreaction.commands.doctor.reward import reward_findings
from scoreaction.commands.doctor.training import training_findings
from scoreaction.rewards import RewardError
from scoreaction.training.checks import refuse_uncounted
from scoreaction.training.finetuner import Finetuner

ROWS = 64
"""Trajectories to check model and reward on, at most."""


def examine(tuner: Finetuner, iterations: int = 3) -> Iterator[Finding]:
    """The findings on a run, one after another: its model, its reward, then a few iterations of its training.

    It trains the tuner: build another for the run itself. Each check is a fact that holds for a run in order, whatever
    the task: a network that is random, mixes rows, ignores prompts or predicts something else than it is said to; a reward
    that depends on the batch or whose gradient is not its own; parameters that receive no gradient or do not move, a
    reference that does; ratios that do not begin at 1, a KL that does not begin at 0.

    >>> import scoreaction as sa
    >>> from scoreaction.recipes.build import build
    >>> from scoreaction.recipes.recipe import load_recipe
    >>> small = ["train.batch=32", "sampler.steps=5", "train.iterations=1"]
    >>> found = list(sa.examine(build(load_recipe("mixture", small)), iterations=1))
    >>> {finding.check: finding.verdict for finding in found}["a row's answer is its own"]
    'ok'
    """
    if tuner.iteration >= tuner.train.iterations:
        why = f"all {tuner.iteration} of them are done; examine a tuner that is built anew, or raise it"
        raise ValueError(f"train.iterations: {why}")
    tuner.model.refuse_tokens("doctor")
    refuse_uncounted(tuner.budget, "doctor")
    generator = torch.Generator().manual_seed(tuner.train.seed)
    with tuner.model.uncounted(), torch.no_grad():
        places = sample_points(tuner, min(tuner.train.batch, ROWS), generator)
        findings = list(model_findings(tuner, places, generator))
    yield from findings  # outside of no_grad, which would hold for the caller too
    queries, findings, failure = tuner.reward.queries, [], None
    try:
        with torch.no_grad():
            findings.extend(reward_findings(tuner, places, generator))
    except RewardError as error:
        failure = Finding("the reward answers", "wrong", str(error))
    tuner.reward.queries = queries
    yield from findings
    if failure is None:
        yield from training_findings(tuner, places, iterations)
    else:
        yield failure
