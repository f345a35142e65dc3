"""Tables of controls that are learned from labels."""

from __future__ import annotations

from _tables import Results, Run, Table, cell, of

DRAWN = {"plain": "", "guided": ", guidance 2"}
SHARES = ("accuracy", "macro_f1", "followed", "old_followed")


def sizes(results: Results) -> Table:
    """The new control of shapes, before and after, by the guidance it is drawn with."""
    table = Table("", "seeds", "size %", "macro-F1 %", "prompts followed %", "old prompts followed %", "diversity")
    for kind, how in DRAWN.items():
        for task, name in (("pretrained", "*pretrained*"), ("size", "tuned")):
            runs = results.where(task=task)
            shares = (cell([100 * run[f"{kind}.{share}"] for run in runs], 1) for share in SHARES)
            table.add(runs, name + how, str(len(runs)), *shares, of(runs, f"{kind}.diversity", 2))
    return table


def modes(results: Results) -> Table:
    """The recipe `ctrl` after half of its iterations: distance to the optimum of each label, over the floor."""
    runs = results.where(task="mixture")
    table = Table("", "seeds", "distance to the optimum", "floor", "over floor", "KL", "KL of the optimum")

    def figures(label: str) -> list[str]:
        keys = ("distance_to_optimum", "distance_floor", "over_floor", "kl_nats", "optimum_kl_nats")
        return [of(runs, f"{label}.{key}") for key in keys]

    for label in _labels(runs):
        table.add(runs, f"label {label}", str(len(runs)), *figures(f"by_label.{label}"))
    table.add(runs, "mean", str(len(runs)), *figures("mean"))
    return table


def _labels(runs: list[Run]) -> list[str]:
    return sorted(
        {key.split(".")[1] for run in runs for key, value in run.items() if key[:9] == "by_label." and value is not None}
    )
