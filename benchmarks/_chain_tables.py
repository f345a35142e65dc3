"""Tables of policy gradients on the chain: hints, windows and branches, rewards that come late, moved noise."""

from __future__ import annotations

from _tables import Results, Run, Table, number, of

FIGURES = {
    "mixture": {"reward_tuned": 3, "kl_nats": 2, "objective": 3, "distance_to_optimum": 2},
    "digits": {"reward_tuned": 2, "kl_nats": 2, "held_out.legibility_tuned": 3, "diversity_tuned": 2},
    "shapes": {"reward_tuned": 3, "kl_nats": 2, "held_out.shapes_tuned": 3, "held_out.shapes_base": 3},
}
HEADS = {
    "mixture": ("reward", "KL", "reward - beta KL", "distance"),
    "digits": ("reward", "KL", "legibility", "diversity"),
    "shapes": ("reward", "KL", "accuracy", "before training"),
}
COSTS = {"reward_queries": 0, "model_evaluations": 0}
BUDGETS = ("reward_queries", "model_evaluations")


def hint(results: Results, task: str, queries: str, evaluations: str) -> Table:
    """The share of samples with the reward, and the KL, at equal queries and at equal evaluations."""
    table = Table("dead groups", "seeds", f"share at {queries} rewards", "KL", f"share at {evaluations} evaluations", "KL",
                  "hint's KL")  # fmt: skip
    points = _points(results, task)
    for form in dict.fromkeys(point["form"] for point in points):
        own = [[p for p in points if p["form"] == form and (p["budget"] or b) == b] for b in BUDGETS]
        figures = (of(seeds, key, digits) for seeds in own for key, digits in (("success", 3), ("kl_nats", 2)))
        name = f"*{form}*" if form == "base" else form
        table.add(_of_task(results, task), name, str(len(own[0])), *figures, of(own[1], "hint_kl_nats", 2))
    return table


def hrf(results: Results, task: str) -> Table:
    """What trainers with and without windows came to, with their costs."""
    table = Table("trainer", "seeds", *HEADS[task], "queries", "evaluations")
    points = [point for point in _points(results, task) if point["delay"] == 0]
    for trainer in dict.fromkeys(point["trainer"] for point in points):
        own = [point for point in points if point["trainer"] == trainer]
        cells = (of(own, key, digits) for key, digits in (FIGURES[task] | COSTS).items())
        table.add(_of_task(results, task), trainer, str(len(own)), *cells)
    return table


def delays(results: Results, task: str) -> Table:
    """What the trainers came to whose rewards come late, each from as many batches."""
    table = Table("trainer", "delay", "seeds", *HEADS[task])
    points = _points(results, task)
    late = {point["trainer"] for point in points if point["delay"] > 0}
    for trainer, delay in dict.fromkeys((p["trainer"], p["delay"]) for p in points if p["trainer"] in late):
        own = [point for point in points if (point["trainer"], point["delay"]) == (trainer, delay)]
        cells = (of(own, key, digits) for key, digits in FIGURES[task].items())
        table.add(_of_task(results, task), trainer, number(delay, 0), str(len(own)), *cells)
    table.rows.sort(key=lambda row: row[0])
    return table


def hypernoise(results: Results, task: str, queries: str, evaluations: str) -> Table:
    """What moved noise and tuned steps came to at equal queries and at equal evaluations."""
    figures = {key: digits for key, digits in FIGURES[task].items() if key not in ("objective", "diversity_tuned")}
    heads = [name for name in HEADS[task] if name not in ("reward - beta KL", "diversity")]
    heads[0] = f"reward at {queries} rewards"
    table = Table("trainer", "seeds", *heads, f"reward at {evaluations} evaluations", *heads[1:])
    for trainer, runs in Results(_of_task(results, task)).groups("trainer").items():
        points = [point for run in runs for point in results.curves[run["name"]]]
        own = [[point for point in points if point["budget"] == budget] for budget in BUDGETS]
        table.add(runs, trainer, str(len(runs)), *(of(seeds, key, digits) for seeds in own for key, digits in figures.items()))
    return table


def _of_task(results: Results, task: str) -> list[Run]:
    return [run for run in results.runs if run["name"].startswith(f"{task}/")]


def _points(results: Results, task: str) -> list[Run]:
    return [point for run in _of_task(results, task) for point in results.curves[run["name"]]]
