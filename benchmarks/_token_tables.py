"""Tables of trainers on tokens whose sequences are too many to enumerate, and on tokens with a held-out judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _tables import Cells, Results, Run, Table, cell, number, of

VARIETY = {"diversity": "diversity", "Vendi": "vendi"}
SPENT = {"queries": "reward_queries", "evaluations": "model_evaluations", "seconds": "seconds"}


def tokens_long(results: Results) -> Table:
    """Trainers on a long chain: what is missing to the optimum from samples, KL and costs, the optimum first."""
    table = Table("trainer", "seeds", "gap", "reward", "KL (nats)", *SPENT)
    first, blank = results.runs[0], ("" for _ in SPENT)
    best = [number(first[key], 3) for key in ("optimum_reward", "optimum_kl_nats")]
    table.add([], "*optimum*", "", "0", *best, *blank)
    for trainer, runs in results.groups("trainer").items():
        figures = [of(runs, key) for key in ("objective_gap", "reward_tuned", "kl_nats")]
        table.add(runs, trainer, str(len(runs)), *figures, *_spent(runs))
    return table


def tokens_judged(results: Results, held_out: Mapping[str, str]) -> Table:
    """Trainers by reward, by what they were to maximise, and by judges nobody trains on; the pretrained model first.

    held_out: columns, and the judges' names in the rows.
    """
    table = Table("trainer", "seeds", "reward", "reward - beta KL", "KL (nats)", *held_out, *VARIETY, *SPENT)
    for name, runs in {"*pretrained*": results.runs[:1], **results.groups("trainer")}.items():
        end = "base" if name == "*pretrained*" else "tuned"
        kl = [0.0 if end == "base" else run["kl_nats"] for run in runs]
        objective = cell([run[f"reward_{end}"] - run["beta"] * nats for run, nats in zip(runs, kl, strict=True)])
        judged = [of(runs, f"held_out.{judge}_{end}") for judge in held_out.values()]
        seeds, spent = ("", ["" for _ in SPENT]) if end == "base" else (str(len(runs)), _spent(runs))
        figures = [of(runs, f"reward_{end}"), objective, cell(kl), *judged, *_variety(runs, end)]
        table.add(runs, name, seeds, *figures, *spent)
    return table


def _variety(runs: Sequence[Run], end: str) -> Cells:
    return [of(runs, f"{key}_{end}", 2) for key in VARIETY.values()]


def _spent(runs: Sequence[Run]) -> Cells:
    return [of(runs, key, 0) for key in SPENT.values()]
