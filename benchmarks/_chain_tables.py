"""Tables of policy gradients on the chain: hints, windows and branches, rewards that come late."""

from __future__ import annotations

from _tables import Results, Run, Table, number, of

FIGURES = {"reward_tuned": 3, "kl_nats": 2, "objective": 3, "distance_to_optimum": 2}
COSTS = {"reward_queries": 0, "model_evaluations": 0}


def hint(results: Results) -> Table:
    """The share of samples with the rare reward, and the KL, at equal queries and at equal evaluations."""
    table = Table("dead groups", "seeds", "share at 1,920 rewards", "KL", "share at 40,000 evaluations", "KL", "hint's KL")
    points = [point for curve in results.curves.values() for point in curve]
    for form in dict.fromkeys(point["form"] for point in points):
        own = [
            [p for p in points if p["form"] == form and (p["budget"] or b) == b]
            for b in ("reward_queries", "model_evaluations")
        ]
        figures = (of(seeds, key, digits) for seeds in own for key, digits in (("success", 3), ("kl_nats", 2)))
        table.add(
            results.runs, f"*{form}*" if form == "base" else form, str(len(own[0])), *figures, of(own[1], "hint_kl_nats", 2)
        )
    return table


def hrf(results: Results) -> Table:
    """What trainers with and without windows came to, with their costs."""
    table = Table("trainer", "seeds", "reward", "KL", "reward - beta KL", "distance", "queries", "evaluations")
    points = [point for point in _points(results) if point["delay"] == 0]
    for trainer in dict.fromkeys(point["trainer"] for point in points):
        own = [point for point in points if point["trainer"] == trainer]
        table.add(results.runs, trainer, str(len(own)), *(of(own, key, digits) for key, digits in (FIGURES | COSTS).items()))
    return table


def delays(results: Results) -> Table:
    """What the trainers came to whose rewards come late, each from as many batches."""
    table = Table("trainer", "delay", "seeds", "reward", "KL", "reward - beta KL", "distance")
    points = _points(results)
    late = {point["trainer"] for point in points if point["delay"] > 0}
    for trainer, delay in dict.fromkeys((p["trainer"], p["delay"]) for p in points if p["trainer"] in late):
        own = [point for point in points if (point["trainer"], point["delay"]) == (trainer, delay)]
        cells = (of(own, key, digits) for key, digits in FIGURES.items())
        table.add(results.runs, trainer, number(delay, 0), str(len(own)), *cells)
    table.rows.sort(key=lambda row: row[0])
    return table


def _points(results: Results) -> list[Run]:
    return [point for curve in results.curves.values() for point in curve]
