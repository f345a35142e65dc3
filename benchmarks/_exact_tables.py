"""Tables of trainers on tasks whose optimum is known, tokens among them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from _tables import Cells, Results, Run, Table, cell, mean_and_error, number, of

EXACT = ("score_action", "sqdf", "sqdf, corrected", "sqdf, chain", "vard", "pi_ft", "adjoint_matching", "dpok",
         "draft, K = N, KL", "draft, K = N", "draft-1", "refl, KL", "ddpo")  # fmt: skip
VALUES_ALONE = ("score_action, surrogate", "score_action, forward", "score_action, ratio", "ram", "awm", "nft", "dpok", "ddpo")
QUOTED = ("score_action", "sqdf, corrected", "sqdf", "vard", "adjoint_matching", "dpok", "ddpo")
TASKS = ("mixture", "mixture16", "linear_quadratic")
Plan = list[tuple[str, str, int]]


def _optimum(results: Results, task: str) -> tuple[Run, float]:
    """A run that knows the task's optimum, and the larger of floor and oracle, each a mean over the runs' measurements."""
    runs = [run for run in results.where(task=task) if run["distance_floor"] is not None]
    return runs[0], max(statistics.fmean(run[key] for run in runs) for key in ("distance_floor", "distance_oracle"))


def _ratio(runs: Sequence[Run], bar: float) -> str:
    return cell([run["distance_to_optimum"] / bar for run in runs], 2)


def _costs(runs: Sequence[Run]) -> Cells:
    """Mean network evaluations and seconds."""
    evaluations, seconds = (mean_and_error([run[key] for run in runs])[0] for key in ("model_evaluations", "seconds"))
    return [f"{evaluations / 1e6:.1f} M", f"{seconds:.0f}"]


def exact(results: Results, plan: Plan) -> Table:
    """Distance, reward, KL and costs of trainers at step counts, each task's optimum first."""
    table = Table("task", "trainer", "steps", "seeds", "distance", "ratio", "reward", "KL", "evaluations", "seconds", mark=1)
    for task in dict.fromkeys(task for task, _, _ in plan if results.where(task=task)):
        known, bar = _optimum(results, task)
        optimum = [number(value, 3) for value in (known["optimum_reward"], known["optimum_kl_nats"])]
        table.add([], task, "*optimum*", "", "", f"{bar:.3f}", "", *optimum, "", "")
        for trainer, steps in [(trainer, steps) for at, trainer, steps in plan if at == task]:
            runs = results.where(task=task, trainer=trainer, steps=steps)
            figures = [of(runs, "distance_to_optimum"), _ratio(runs, bar), of(runs, "reward_tuned"), of(runs, "kl_nats")]
            if runs:
                table.add(runs, task, trainer, str(steps), str(len(runs)), *figures, *_costs(runs))
    return table


def readme(results: Results) -> Table:
    """Seven trainers on the mixture at 25 steps, beside the optimum."""
    table = Table("trainer", "steps", "distance / max(floor, oracle)", "reward", "KL (nats)", "evaluations", "seconds")
    known, bar = _optimum(results, "mixture")
    table.add([], "*optimum*", "", "1", number(known["optimum_reward"], 3), number(known["optimum_kl_nats"], 3), "", "")
    for trainer in QUOTED:
        runs = results.where(task="mixture", trainer=trainer, steps=25)
        if runs:
            figures = _ratio(runs, bar), of(runs, "reward_tuned"), of(runs, "kl_nats")
            table.add(runs, trainer, "25", *figures, *_costs(runs))
    return table


def samplers(
    results: Results, trainers: Sequence[str], steps: Sequence[int], first: str, second: str, only: Any = None
) -> Table:
    """Policies of seed 0 under other samplers: a row a solver, a column a step count, `first (second)` in each cell."""
    table = Table("trained with", "solver", *(f"{n} steps" for n in steps))
    runs = [run for run in results.runs if run["name"] in results.curves and run["trainer"] in trainers]
    for run in sorted(runs, key=lambda run: (trainers.index(run["trainer"]), run.get("steps"))):
        curve = results.curves[run["name"]]
        name = f"{run['trainer']}, {run['steps']} steps" if "steps" in run else run["trainer"]
        for solver, at in dict.fromkeys((point["solver"], point["eta"]) for point in curve):
            if only in (None, (solver, at)):
                shown = {p["steps"]: p for p in curve if (p["solver"], p["eta"]) == (solver, at)}
                cells = [f"{number(shown[n][first], 2)} ({number(shown[n][second], 2)})" for n in steps]
                table.add([run], name, f"{solver}, eta {at:g}", *cells)
    return table


def measurement(results: Results) -> Table:
    """One policy's distances to the optimum, each measured with a set of samples of its own."""
    (run,), (curve,) = results.runs, results.curves.values()
    table = Table("policy", "sets of samples", "smallest", "mean", "largest", "deviation", "its own estimate")
    values = [point["distance_to_optimum"] for point in curve]
    own = statistics.fmean(point["distance_to_optimum_se"] for point in curve)
    figures = (min(values), statistics.fmean(values), max(values), statistics.stdev(values), own)
    table.add([run], run["name"], str(len(values)), *(number(value, 3) for value in figures))
    return table


def steering(results: Results) -> Table:
    """Reward, distance and costs of each method of steering, and of trained policies, mean over seeds."""
    table = Table("method", "seeds", "reward", "distance", "evaluations", "backward", "queries", "training", "log Z")
    points = results.points
    for method in dict.fromkeys(point["method"] for point in points):
        seeds = [point for point in points if point["method"] == method]
        costs = (of(seeds, f"{key}_per_sample", 0) for key in ("evaluations", "backward", "queries"))
        name = f"*{method}*" if method in ("optimum", "oracle", "base") else method
        learned = [point["training_evaluations"] for point in seeds if point.get("training_evaluations")]
        training = f"{sum(learned) / len(learned) / 1e6:.1f} M" if learned else "-"
        cells = (of(seeds, "reward"), of(seeds, "distance"), *costs, training, of(seeds, "log_z"))
        table.add(results.runs, name, str(len(seeds)), *cells)
    return table


SCHEDULES = ("ddpm", "ddpm, crooked", "sd", "sd, crooked", "vp", "cosine", "cosine, cut", "ve", "flow")
KINDS = ("eps", "velocity", "x0", "edm")
OWN = "own optimum"


def parametrisations(results: Results) -> Table:
    """Mean distances on networks of each kind over that on the v network, and that after `of`."""
    table = Table("trainer", *SCHEDULES)
    trainers = [name for name in results.groups("trainer") if name != OWN]
    for trainer, every in results.groups("trainer", trainers).items():
        cells = []
        for schedule in SCHEDULES:
            name, crooked = schedule.removesuffix(", crooked"), schedule.endswith("crooked")
            runs = [run for run in every if run["schedule"] == name and bool(run["error"]) == crooked]
            if not runs:
                cells.append("")
                continue
            distances = {kind: [run["distance"] for run in runs if run["kind"] == kind] for kind in ("v", *KINDS)}
            v = statistics.fmean(distances.pop("v"))
            cells.append(f"{' / '.join(_over_v(own, v) for own in distances.values() if own)} of {number(v, 2)}")
        table.add(every, trainer, *cells)
    return table


def own_optima(results: Results) -> Table:
    """Distance of the optimum of a crooked network's own law: where it errs to some alpha/sigma only, and in fewer steps."""
    keys = {"errs to 4": "to_4", "to 20": "to_20", "at all times": "distance", "at all times, 12 steps": "steps_12"}
    table = Table("network", "schedule", *keys)
    for schedule in ("ddpm", "sd"):
        for kind in ("v", "eps", "x0"):
            runs = results.where(trainer=OWN, schedule=schedule, kind=kind)
            table.add(runs, kind, schedule, *(of(runs, key, 2) for key in keys.values()))
    return table


def to_own(results: Results) -> Table:
    """Distances of trained policies to the optimum of a crooked network's own law, in the steps of training and in 50."""
    table = Table(
        "trainer", "network", "seeds", "to its own, 12 steps", "to its own, 50 steps", "to that of the data, 50 steps"
    )
    for trainer, every in results.groups("trainer").items():
        for kind in ("v", "x0"):
            runs = [run for run in every if run["kind"] == kind and run.get("own_12") is not None]
            if runs:
                table.add(runs, trainer, kind, str(len(runs)), *(of(runs, key, 2) for key in ("own_12", "own_50", "distance")))
    return table


def _over_v(distances: Sequence[float], v: float) -> str:
    """The mean of distances over that on the v network, in bold beyond twice."""
    ratio = statistics.fmean(distances) / v
    return f"**{number(ratio, 1)}**" if ratio > 2 else number(ratio, 2)


def off_below(results: Results) -> Table:
    """Distance of the gated optimal policy over that of the larger of floor and oracle, its reward and its KL, by task."""
    times = [point["off_below"] for point in results.curves["mixture"]]
    table = Table("task", "", "optimum", *(f"{t:g}" for t in times))
    for task in TASKS:
        (run,), curve = results.where(task=task), results.curves[task]
        bar = max(run["floor"], curve[0]["distance"])
        table.add([run], task, "ratio", "", *(number(point["distance"] / bar, 2) for point in curve))
        for name, key in (("reward", "reward"), ("KL (nats)", "kl_nats")):
            table.add([run], "", name, number(run[f"optimum_{key}"], 2), *(number(point[key], 2) for point in curve))
    return table


def tokens(results: Results) -> Table:
    """Trainers on a Markov chain: what is missing to the optimum, KL and costs, the optimum first."""
    table = Table("trainer", "seeds", "gap", "TV to the optimum", "reward", "KL (nats)", "queries", "evaluations", "seconds")
    runs = results.runs
    best = [number(runs[0][key], 3) for key in ("optimum_reward", "optimum_kl_nats")]
    table.add([], "*optimum*", "", "0", "0", *best, "", "", "")
    for trainer, own in results.groups("trainer").items():
        figures = [of(own, key) for key in ("objective_gap", "distance_to_optimum", "reward_tuned", "kl_nats")]
        spent = [of(own, key, 0) for key in ("reward_queries", "model_evaluations", "seconds")]
        table.add(own, trainer, str(len(own)), *figures, *spent)
    return table


def causal(results: Results) -> Table:
    """Sampling of a causal network with and without what it keeps."""
    table = Table("length", "CPU s, kept", "CPU s, whole passes", "ratio")
    for run in sorted(results.runs, key=lambda run: run["length"]):
        table.add(
            [run],
            str(run["length"]),
            *(number(run[key], 2) for key in ("kept_seconds", "whole_seconds")),
            number(run["ratio"], 1),
        )
    return table


def q_learning(results: Results) -> Table:
    """Each trainer on each task, mean over seeds, the optimum first."""
    table = Table("task", "trainer", "seeds", "reward", "KL (nats)", "distance", "floor, oracle", "queries", "evaluations")
    for task, runs in results.groups("task").items():
        best = [number(runs[0][key], 3) for key in ("optimum_reward", "optimum_kl_nats")]
        table.add([], task, "*optimum*", "", *best, "0", "", "", "")
        for trainer in dict.fromkeys(run["trainer"] for run in runs):
            own = [run for run in runs if run["trainer"] == trainer]
            figures = [of(own, key) for key in ("reward_tuned", "kl_nats", "distance_to_optimum")]
            bounds = ", ".join(of(own, f"distance_{key}").partition(" ")[0] for key in ("floor", "oracle"))
            spent = [of(own, key, 0) for key in ("reward_queries", "model_evaluations")]
            table.add(own, task, trainer, str(len(own)), *figures, bounds, *spent)
    return table


def clusters(results: Results) -> Table:
    """A reward and the same reward that keeps shares, each with its optimum, after the base."""
    optima = {"linear": (2.098, 1.229, 0.383, 1.47, 0.0003), "keep_clusters": (0.225, 0.225, 1.386, 4.0, 0.25)}
    table = Table("", "seeds", "linear reward", "KL (nats)", "cluster entropy", "effective clusters", "rarest", "queries")
    table.add([], "*base*", "", "0", "0", "1.386", "4.00", "0.2500", "")
    for arm, (reward, kl, entropy, effective, least) in optima.items():
        best = [number(value, 3) for value in (reward, kl, entropy)]
        table.add([], f"*optimum of {arm}*", "", *best, number(effective, 2), number(least, 4), "")
        runs = results.where(arm=arm)
        figures = [of(runs, key) for key in ("linear", "kl_nats", "cluster_entropy_tuned")]
        table.add(
            runs, arm, str(len(runs)), *figures, of(runs, "effective", 2), of(runs, "least_share", 4), of(runs, "queries", 0)
        )
    return table
