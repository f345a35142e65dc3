"""Tables of trainers on pictures: digits, shapes and glyphs."""

from __future__ import annotations

from collections.abc import Sequence

from _tables import Results, Run, Table, cell, of

DIGITS = ("score_action", "ddpo, lr 1e-4", "ddpo, lr 3e-4", "dpok")
GRADIENTS = ("score_action", "sqdf", "draft-1", "draft-lv", "refl", "ddpo, KL")
ABLATIONS = ("sqdf", *(f"ablation, {part}" for part in
             ("sqdf published", "no discount", "no consistency model", "no buffer")))  # fmt: skip
END = {"reward": "reward_tuned", "KL": "kl_nats", "legibility": "held_out.legibility_tuned", "diversity": "diversity_tuned",
       "Vendi": "vendi_tuned"}  # fmt: skip
SPENT = {"queries": "reward_queries", "evaluations": "model_evaluations", "seconds": "seconds"}


def _base(table: Table, runs: Sequence[Run], *blank: str) -> None:
    """The pretrained model's row, from the runs that measured it."""
    figures = [of(runs[:1], key.replace("_tuned", "_base"), 2) if key.endswith("_tuned") else "0" for key in END.values()]
    table.add(runs[:1], "*pretrained*", *blank, *figures, *("" for _ in SPENT))


def digits_end(results: Results, trainers: Sequence[str], by: str = "trainer", digits: int = 2) -> Table:
    """The end of the runs, the pretrained model first."""
    table = Table(by, "seeds", *END, *SPENT)
    _base(table, results.where(**{by: trainers[0]}) if trainers else results.runs, "")
    for name, runs in results.groups(by, trainers or None).items():
        figures = [of(runs, key, digits) for key in END.values()] + [of(runs, key, 0) for key in SPENT.values()]
        table.add(runs, name, str(len(runs)), *figures)
    return table


def kinds(results: Results) -> Table:
    """The end of each trainer's run on networks of each kind, and the largest KL on the way; the pretrained model first."""
    table = Table("trainer", "network", "seeds", *END, "largest KL", "queries", "evaluations")
    figures = [of(results.runs[:1], key.replace("_tuned", "_base"), 2) for key in END.values() if key.endswith("_tuned")]
    table.add(results.runs[:1], "*pretrained*", "", "", figures[0], "0", *figures[1:], "0", "0", "0")
    for trainer, every in results.groups("trainer").items():
        for network in ("v", "eps", "x0", "x0, off below 0.06"):
            runs = [run for run in every if run["network"] == network]
            if not runs:
                continue
            cells = [of(runs, key, 2) for key in (*END.values(), "kl_most")]
            spent = [of(runs, key, 0) for key in ("reward_queries", "model_evaluations")]
            table.add(runs, trainer, network, str(len(runs)), *cells, *spent)
    return table


def digits_reached(results: Results, level: int) -> Table:
    """The policies when an iteration's mean reward first reached a level."""
    keys = {"reward": 2, "held_out.legibility": 3, "diversity": 2, "vendi": 3, "kl_nats": 1, "queries": 0, "evaluations": 0}
    table = Table("trainer", "seeds there", "reward", "legibility", "diversity", "Vendi", "KL", "queries", "evaluations")
    for name, runs in results.groups("trainer", DIGITS).items():
        there = [run for run in runs if run[f"reached.{level}.reward"] is not None]
        if there:
            cells = (of(there, f"reached.{level}.{key}", digits) for key, digits in keys.items())
            table.add(there, name, f"{len(there)} of {len(runs)}", *cells)
    return table


def gradients(results: Results, trainers: Sequence[str], betas: Sequence[float]) -> Table:
    """Trainers at each beta, the pretrained model first."""
    table = Table("trainer", "beta", "seeds", *END, *SPENT)
    _base(table, results.where(trainer=trainers[0]), "", "")
    for trainer in trainers:
        for beta in betas:
            runs = results.where(trainer=trainer, beta=beta)
            if runs:
                figures = [of(runs, key, 2) for key in END.values()] + [of(runs, key, 0) for key in SPENT.values()]
                table.add(runs, trainer, f"{beta:g}", str(len(runs)), *figures)
    return table


def online_rounds(results: Results) -> Table:
    """What the oracle answered on average, round by round."""
    rounds = max(len(curve) for curve in results.curves.values())
    table = Table("trainer", *(f"round {i + 1}" for i in range(rounds)))
    for name, runs in results.groups("trainer").items():
        table.add(
            runs, name, *(cell([results.curves[run["name"]][i]["oracle_mean"] for run in runs], 2) for i in range(rounds))
        )
    return table


BLACK_BOX = (
    "score_action",
    "score_action, trust 12, rate 1e-2",
    "ram",
    "nft",
    "nft, lag 0.5, rate 1e-2",
    "awm",
    "awm, rate 1e-2",
    "ddpo",
    "ddpo, clip 0.03",
    "grpo",
    "dpok",
)
SHAPES = ("base, guidance 1", "base, guidance 2", "base, guidance 3", *BLACK_BOX, "sqdf, scorer", "draft, scorer")
LEVELS = (0.55, 0.6, 0.65, 0.7, 0.75)


def shapes(results: Results) -> Table:
    """Accuracy on training and unseen prompts, of the base and of each trainer, with KL, diversity and cost."""
    table = Table("trainer", "seeds", "accuracy %", "unseen %", "guided, accuracy %", "guided, unseen %", "diversity", "KL",
                  "queries", "evaluations")  # fmt: skip
    for name, runs in results.groups("trainer", SHAPES).items():
        accuracy = [
            cell([None if (share := run[f"{kind}.held_out.shapes"]) is None else 100 * share for run in runs], 1)
            for kind in ("seen", "unseen", "guided.seen", "guided.unseen")
        ]
        figures = {"seen.diversity": 2, "kl_nats": 1, "reward_queries": 0, "model_evaluations": 0}
        table.add(runs, name, str(len(runs)), *accuracy, *(of(runs, key, digits) for key, digits in figures.items()))
    return table


def kl_at(curve: Sequence[Run], level: float, base: float) -> float | None:
    """KL when training first reached this accuracy, between the points that were measured; None if it never did.

    >>> kl_at([{"kl_nats": 2.0, "accuracy": 0.6}, {"kl_nats": 4.0, "accuracy": 0.8}], 0.7, 0.5)
    3.0
    """
    before: Run = {"kl_nats": 0.0, "accuracy": base}
    for point in curve:
        if point["accuracy"] >= level:
            share = (level - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return round(before["kl_nats"] + share * (point["kl_nats"] - before["kl_nats"]), 6)
        before = point
    return None


def shapes_kl(results: Results) -> Table:
    """The KL at which each trainer first has the same accuracy."""
    (base,) = results.where(trainer="base, guidance 1")
    table = Table("KL when first at", *(f"{level:.0%}" for level in LEVELS))
    for name, runs in results.groups("trainer", BLACK_BOX).items():
        reached = [
            [kl_at(results.curves[run["name"]], level, base["seen.held_out.shapes"]) for run in runs] for level in LEVELS
        ]
        table.add(runs, name, *("-" if None in values else cell(values, 1) for values in reached))
    return table


def shapes_tuned(results: Results) -> Table:
    """Single runs of trainers by their settings: prompts followed in %, and the KL in nats, half way and at the end."""
    table = Table("trainer", "seed", "640 pictures", "1,280 pictures")
    for run in results.runs:
        cells = (f"{100 * run[f'{at}accuracy']:.1f} at {run[f'{at}kl_nats']:.1f}" for at in ("half.", ""))
        table.add([run], run["trainer"], f"{run['seed']:.0f}", *cells)
    return table


GLYPHS = ("base, guidance 1", "base, guidance 2", "base, guidance 3", "nft", "score_action, forward", "score_action", "ddpo")


def glyphs(results: Results) -> Table:
    """Texts and characters that are read right, of the base and of each trainer, on training and on unseen texts."""
    table = Table("trainer", "seeds", "texts right %", "unseen, texts right %", "characters %", "unseen, characters %",
                  "diversity", "KL", "queries", "evaluations")  # fmt: skip
    for name, runs in results.groups("trainer", GLYPHS).items():
        shares = [
            within([100 * run[f"{kind}.{key}"] for run in runs], [100 * run[f"{kind}.{key}_se"] for run in runs])
            for key in ("held_out.ocr", "reward")
            for kind in ("seen", "unseen")
        ]
        figures = {"seen.diversity": 2, "kl_nats": 1, "reward_queries": 0, "model_evaluations": 0}
        table.add(runs, name, str(len(runs)), *shares, *(of(runs, key, digits) for key, digits in figures.items()))
    return table


def within(values: Sequence[float], errors: Sequence[float]) -> str:
    """Mean and standard error over runs; of one run the standard error of its pictures.

    >>> within([40.0], [2.0]), within([1.0, 3.0], [9.0, 9.0])
    ('40.0 ± 2.0', '2.0 ± 1.0')
    """
    return cell(values, 1) if len(values) > 1 else f"{values[0]:.1f} ± {errors[0]:.1f}"
