"""The verdict on a run or a comparison, in one line: what came out, and what speaks against it."""

from __future__ import annotations

import math
from collections.abc import Callable

from scoreaction.report.numbers import change, held_out_figures, number
from scoreaction.types import Values

EXPLOITED = 4
"""KL, in times the optimum's, from which a policy has left the data behind."""
TELLABLE = 1.25
"""Distance to the optimum, in times what the exact policy or a fresh sample has, that counts as none."""
SURE = 2
"""Standard errors that make a difference."""


def run_verdict(summary: Values) -> str:
    """The verdict on a finished run.

    >>> run_verdict({"reward_base": 0.0, "reward_tuned": 2.0, "reward_base_se": 0.1, "reward_tuned_se": 0.1, "kl_nats": 1.25})
    'the reward rose from 0 to 2 at a KL of 1.25 nats'
    """
    base, tuned = summary["reward_base"], summary["reward_tuned"]
    if None in (base, tuned, summary["kl_nats"]):
        return "the tuned model has no finite figures: it diverged"
    error = math.hypot(summary.get("reward_base_se") or 0.0, summary.get("reward_tuned_se") or 0.0)
    price = f"at a KL of {number(summary['kl_nats'], 3)} nats"
    if tuned == base and not error:  # as of the reward `none`
        return f"every sample has the reward {number(base, 3)}, before and after, which says nothing of the run; {price}"
    if abs(tuned - base) <= SURE * error:
        both = f"{number(base, 3)} before, {number(tuned, 3)} after, give or take {number(SURE * error, 2)}"
        return f"no change of the reward that can be told from chance ({both}), {price}"
    praise = [f"the reward {'rose' if tuned > base else 'fell'} {change(base, tuned)} {price}"]
    if summary.get("objective_gap") is not None:
        praise.append(f"{number(summary['objective_gap'], 2)} below the best possible reward - {summary['beta']:g} x KL")
    elif all(summary.get(f"distance_{what}") is not None for what in ("to_optimum", "floor", "oracle")):
        praise.append(_from_optimum(summary))
    blame = _against(summary)
    return "; ".join([", ".join(praise), *(f"but {text}" for text in blame)])


def _from_optimum(summary: Values) -> str:
    least = max(summary["distance_floor"], summary["distance_oracle"])
    times = summary["distance_to_optimum"] / least
    if times <= TELLABLE:
        return "and the samples are as close to the optimum as can be told"
    return f"and the samples are {number(times, 2)} times as far from the optimum as those of the exact policy"


def _against(summary: Values) -> list[str]:
    """Doubts about a gain: a KL far above the optimum's, samples that became alike or left clusters, a held-out fall."""
    doubts = []
    if exploited(summary):
        doubts.append(
            "the KL is far above the optimum's: it has left the data behind, and the reward is exploited rather than met"
        )
    base, tuned = summary.get("diversity_base"), summary.get("diversity_tuned")
    if base and tuned is not None and tuned < base / 2:
        doubts.append(f"the samples are only {tuned / base:.0%} as diverse as before")
    base, tuned = summary.get("cluster_entropy_base"), summary.get("cluster_entropy_tuned")
    if base is not None and tuned is not None and tuned < base - math.log(2):
        filled = f"{number(math.exp(tuned), 2)} clusters in effect, {number(math.exp(base), 2)} before"
        doubts.append(f"the samples fill {filled}")
    for name, before, after in held_out_figures(summary):
        errors = (summary.get(f"held_out.{name}_{kind}_se") or 0.0 for kind in ("base", "tuned"))
        if before is not None and after is not None and after < before - SURE * math.hypot(*errors):
            doubts.append(f"the held-out {name}, which was only measured, fell {change(before, after)}")
    return doubts


def exploited(figures: Values) -> bool:
    """True where the KL is far above that of the known optimum."""
    kl, best = figures.get("kl_nats"), figures.get("optimum_kl_nats")
    return kl is not None and best is not None and kl > EXPLOITED * best


def comparison_verdict(comparison: Values) -> str:
    """The verdict on a comparison: the best by what the recipe maximises, and whether it can be told from the next.

    Best is closest to the optimum where that is known, else the highest reward - beta x KL where all have one beta, else
    the highest reward.
    """
    groups = comparison["groups"]
    what, key, value = _measure(groups)
    known = sorted((group for group in groups if value(group["mean"]) < math.inf), key=lambda group: value(group["mean"]))
    if not known:
        return "none has finite figures: all diverged"
    best, others = known[0], known[1:]
    text = f"{best['label']} {what} ({_shown(best, key)})"
    lost = [group["label"] for group in groups if group not in known]
    if others:
        text += f"; next is {others[0]['label']} ({_shown(others[0], key)}){_sure(best, others[0], key, value)}"
    bad = [group["label"] for group in known if exploited(group["mean"])]
    if bad:
        verb, whose = ("has", "its reward is") if len(bad) == 1 else ("have", "their rewards are")
        text += f"; {' and '.join(bad)} {verb} left the data behind, and {whose} exploited rather than met"
    return text + (f"; {' and '.join(lost)} diverged" if lost else "")


Cost = Callable[[Values], float]
"""A number that is lowest for the best, infinite where it is not known."""


def _measure(groups: list[Values]) -> tuple[str, str, Cost]:
    """Words for what the best is by, the figure that shows it, and its cost."""
    means = [group["mean"] for group in groups]
    if all("objective_gap" in mean for mean in means):
        return (
            "comes closest to the best possible reward - beta x KL",
            "objective_gap",
            lambda mean: _or_inf(mean, "objective_gap"),
        )
    if all("distance_to_optimum" in mean for mean in means):
        return "is closest to the optimum", "distance_to_optimum", lambda mean: _or_inf(mean, "distance_to_optimum")
    betas = {mean.get("beta") for mean in means}
    beta = betas.pop() if len(betas) == 1 else None
    if beta:
        what = f"has the highest reward - {beta:g} x KL"
        return what, "objective", lambda mean: beta * _or_inf(mean, "kl_nats") + _or_inf(mean, "reward_tuned", -1)
    return "has the highest reward", "reward_tuned", lambda mean: _or_inf(mean, "reward_tuned", -1)


def _or_inf(mean: Values, key: str, sign: int = 1) -> float:
    return math.inf if mean.get(key) is None else sign * mean[key]


def _shown(group: Values, key: str) -> str:
    mean = group["mean"]
    value = number(mean["reward_tuned"] - mean["beta"] * mean["kl_nats"] if key == "objective" else mean[key], 3)
    if key == "distance_to_optimum" or mean.get("kl_nats") is None:
        return value
    return f"{value} at {number(mean['kl_nats'], 3)} nats"


def _sure(best: Values, other: Values, key: str, value: Cost) -> str:
    """Words for how surely the best is told from another, by the standard errors over seeds."""
    if best["n"] < 2 or other["n"] < 2:
        return "; one seed each, so chance is not ruled out"
    keys = ("reward_tuned", "kl_nats") if key == "objective" else (key,)
    scale = {"kl_nats": best["mean"].get("beta") or 0.0}
    errors = [scale.get(name, 1.0) * (group["standard_error"].get(name) or 0.0) for group in (best, other) for name in keys]
    behind, apart = value(other["mean"]) - value(best["mean"]), math.hypot(*errors)
    if behind <= SURE * apart:
        return f", and {best['n']} seeds cannot tell them apart"
    return f", {number(behind / apart, 2)} standard errors behind" if apart else ""
