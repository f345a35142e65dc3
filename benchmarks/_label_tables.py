"""The table of a control that is learned from labels."""

from __future__ import annotations

from _tables import Results, Table, cell, of

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
