"""Tables of what a frozen model is told, and of control with delay."""

from __future__ import annotations

from _tables import Results, Table, of

UNSTABLE = 1e3
"""An average cost of a controller that does not hold the system."""
FORMS = ("plain", "fixed", "fixed by prompt", "prompt_loop, untrained", "prompt_loop, blind", "prompt_loop")


def control(results: Results) -> Table:
    """Average costs of controllers whose state is seen late."""
    table = Table("delay", "seeds", "optimum", "predictor", "windows", "windows over predictor", "stale")
    for late, runs in results.groups("delay").items():
        names = ("optimum", "predictor", "windows", "over_predictor")
        away = max(run["stale"] for run in runs) > UNSTABLE
        figures = (of(runs, name, 3) for name in names)
        table.add(runs, str(late), str(len(runs)), *figures, "runs away" if away else of(runs, "stale", 3))
    return table


CONTROLLERS = {"present": "policy, present state", "predictor": "policy, predictor", "predictor_critic": "critic, predictor",
               "windows": "critic, windows", "stale": "policy, stale state"}  # fmt: skip


def pendulum(results: Results) -> Table:
    """Mean returns of controllers whose state is seen late, how good candidates and windows are, and CPU times of an action."""
    table = Table("delay", "episodes", *CONTROLLERS.values(), "distinct of 32 actions", "error of drawn windows",
                  "CPU ms, predictor", "windows")  # fmt: skip
    runs = [run for run in results.runs if not run.get("particles")]
    for late in dict.fromkeys(run["delay"] for run in runs):
        these = [run for run in runs if run["delay"] == late]
        own = [point for run in these for point in results.curves[run["name"]]]
        more = (of(own, "distinct", 0), of(these, "drawn_miss", 2))
        spent = (of(own, "predictor_critic_ms", 1), of(own, "windows_ms", 0))
        table.add(these, str(late), str(len(own)), *(of(own, name, 0) for name in CONTROLLERS), *more, *spent)
    return table


def candidates(results: Results) -> Table:
    """Mean returns without delay by windows of fewer particles or steps, and how many actions these choose among."""
    table = Table("particles", "steps", "episodes", "distinct of 32 actions", "critic, windows")
    for run in sorted((run for run in results.runs if run.get("particles")), key=lambda run: (run["steps"], run["particles"])):
        own = results.curves[run["name"]]
        cells = (of(own, "distinct", 0), of(own, "windows", 0))
        table.add([run], str(run["particles"]), str(run["steps"]), str(len(own)), *cells)
    return table


def prompt_loop(results: Results) -> Table:
    """Mean reward and prompts followed of what a model is told, on a line and on shapes."""
    table = Table("task", "told", "seeds", "reward", "prompts followed", "KL of the choices")
    points = [point for curve in results.curves.values() for point in curve]
    for task, form in sorted({(p["task"], p["form"]) for p in points}, key=lambda pair: (pair[0], FORMS.index(pair[1]))):
        own = [point for point in points if (point["task"], point["form"]) == (task, form)]
        figures = (of(own, "reward", 3), of(own, "followed", 3), of(own, "kl_choice_nats", 2))
        table.add(results.runs, task, form, str(len(own)), *figures)
    return table
