"""Tables of trainers on random tasks, and on one that nothing was tuned on: who ends where, and what was taken back."""

from __future__ import annotations

import math
import statistics

from _tables import Results, Run, Table, cell, number, of

VARIED = ", varied"
"""How the names of runs on random tasks end whose settings are not as drawn."""


def _over(run: Run) -> float:
    """A run's distance over the larger of floor and oracle."""
    return run["distance_to_optimum"] / max(run["distance_floor"], run["distance_oracle"])


def _as_drawn(results: Results) -> dict[str, list[Run]]:
    """The runs on random tasks of each trainer, without those with other settings."""
    every = results.groups("trainer").items()
    return {trainer: [run for run in runs if not run["name"].endswith(VARIED)] for trainer, runs in every}


def stability(results: Results) -> Table:
    """Runs on random tasks: how many went to their end, how far they are from the optimum, and what they moved at once.

    Trainers that ran on more tasks than another are shown on those that all have, too.
    """
    table = Table(
        "trainer", "tasks", "diverged", "median ratio", "nine of ten", "worst", "most nats an iteration", "taken back"
    )
    drawn = _as_drawn(results)
    shared = set.intersection(*({run["task"] for run in runs} for runs in drawn.values()))
    on_shared = {trainer: [run for run in runs if run["task"] in shared] for trainer, runs in drawn.items()}
    fewer = {f"{trainer}, shared tasks": runs for trainer, runs in on_shared.items() if len(runs) < len(drawn[trainer])}
    for trainer, runs in (drawn | fewer).items():
        ratios = sorted(_over(run) if run["finished"] else math.inf for run in runs)
        nine = ratios[math.ceil(0.9 * len(ratios)) - 1]
        figures = [
            number(value, 2) for value in (statistics.median(ratios), nine, ratios[-1], max(r["most_moved"] for r in runs))
        ]
        back = f"{sum(run['taken_back'] > 0 for run in runs)} runs"
        table.add(runs, trainer, str(len(runs)), str(sum(not run["finished"] for run in runs)), *figures, back)
    return table


def stability_worst(results: Results, count: int = 6) -> Table:
    """The runs of each trainer that end farthest from the optimum."""
    drawn = {"process": "process", "reward": "shape", "dim.": "dimension", "modes": "modes", "least weight": "least_weight",
             "beta": "beta", "steps": "steps", "batch": "batch", "rate": "lr"}  # fmt: skip
    table = Table("run", "ratio", "KL", "its optimum", "reward", "its optimum ", *drawn)
    for runs in _as_drawn(results).values():
        for run in sorted((run for run in runs if run["finished"]), key=_over, reverse=True)[:count]:
            figures = [number(run[key], 2) for key in ("kl_nats", "optimum_kl_nats", "reward_tuned", "optimum_reward")]
            texts = (f"{run[key]:.2g}" if isinstance(run[key], float) else str(run[key]) for key in drawn.values())
            table.add([run], run["name"], number(_over(run), 2), *figures, *texts)
    return table


def stability_varied(results: Results) -> Table:
    """Runs on some of the random tasks with other settings, beside those with the settings as drawn."""
    settings = {"steps": "steps", "batch": "batch", "rate": "lr", "iterations": "iterations"}
    table = Table("task", "trainer", "ratio", "KL", "its optimum", *settings, "ratio as drawn")
    before = {run["name"]: run for run in results.runs}
    for run in results.runs:
        drawn = before.get(run["name"].removesuffix(VARIED))
        if run["name"].endswith(VARIED) and drawn is not None and run["finished"] and drawn["finished"]:
            figures = [number(value, 2) for value in (_over(run), run["kl_nats"], run["optimum_kl_nats"])]
            texts = [f"{run[key]:.2g}" if isinstance(run[key], float) else str(run[key]) for key in settings.values()]
            table.add([run], str(run["task"]), run["trainer"], *figures, *texts, number(_over(drawn), 2))
    return table


def stability_unseen(results: Results) -> Table:
    """Runs on one task that nothing was tuned on, mean over seeds."""
    table = Table("steps", "iterations", "seeds", "diverged", "ratio", "farthest", "reward", "KL", "most nats", "taken back")
    for steps, runs in results.groups("steps").items():
        ended, back = [run for run in runs if run["finished"]], sum(run["taken_back"] > 0 for run in runs)
        ratios = [_over(run) for run in ended]
        figures = [cell(ratios, 2), number(max(ratios, default=math.inf), 2), of(ended, "reward_tuned"), of(ended, "kl_nats")]
        most = number(max(run["most_moved"] for run in runs), 2)
        counts = [str(runs[0]["iterations"]), str(len(runs)), str(len(runs) - len(ended))]
        table.add(runs, str(steps), *counts, *figures, most, f"{back} runs")
    return table
