"""Tables of controls that are learned from labels."""

from __future__ import annotations

from _tables import Results, Table, cell, of

DRAWN = {"plain": "", "guided": ", guidance 2"}
KEYS = ("distance_to_optimum", "distance_floor", "distance_oracle", "kl_nats", "optimum_kl_nats")
SHARES = ("accuracy", "macro_f1", "followed", "old_followed")


def mixture(results: Results) -> Table:
    """The labels of the mixture: distance over the larger of floor and oracle, and KL beside the optimum's."""
    table = Table("label", "seeds", "distance / max(floor, oracle)", "KL", "KL of the optimum")
    runs = results.where(task="mixture")
    for label in ("0", "1", "2"):
        own = {key: [run[f"by_label.{label}.{key}"] for run in runs] for key in KEYS}
        best = map(max, own["distance_floor"], own["distance_oracle"])
        ratios = [away / near for away, near in zip(own["distance_to_optimum"], best, strict=True)]
        table.add(runs, label, str(len(runs)), cell(ratios, 2), cell(own["kl_nats"], 3), cell(own["optimum_kl_nats"], 3))
    return table


def sizes(results: Results) -> Table:
    """The new control of shapes, before and after, by the guidance it is drawn with."""
    table = Table("", "seeds", "size %", "macro-F1 %", "prompts followed %", "old prompts followed %", "diversity")
    for kind, how in DRAWN.items():
        for task, name in (("pretrained", "*pretrained*"), ("size", "tuned")):
            runs = results.where(task=task)
            shares = (cell([100 * run[f"{kind}.{share}"] for run in runs], 1) for share in SHARES)
            table.add(runs, name + how, str(len(runs)), *shares, of(runs, f"{kind}.diversity", 2))
    return table
