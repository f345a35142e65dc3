"""The tables of README and docs, written from the CSV files between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _records import RESULTS, ROOT
from _tables import Cells, Results, Run, Table, cell, mean_and_error, number, of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)

# exact tasks

EXACT = ("score_action", "sqdf", "sqdf, corrected", "sqdf, chain", "vard", "pi_ft", "adjoint_matching", "dpok",
         "draft, K = N, KL", "draft, K = N", "draft-1", "refl, KL", "ddpo", "score_action, surrogate", "score_action, ratio",
         "score_action, forward", "ram", "nft", "awm")  # fmt: skip
QUOTED = ("score_action", "sqdf, corrected", "sqdf", "vard", "adjoint_matching", "dpok", "ddpo")
TASKS = ("mixture", "mixture16", "linear_quadratic")
Plan = list[tuple[str, str, int]]


def _optimum(results: Results, task: str) -> tuple[Run, float]:
    """A run that knows the task's optimum, and the larger of floor and oracle."""
    run = next(run for run in results.where(task=task) if run["distance_floor"] is not None)
    return run, max(run["distance_floor"], run["distance_oracle"])


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


def _over(run: Run) -> float:
    """A run's distance over the larger of floor and oracle."""
    return run["distance_to_optimum"] / max(run["distance_floor"], run["distance_oracle"])


def stability(results: Results) -> Table:
    """Runs on random tasks: how many went to their end, how far they are from the optimum, and what they moved at once."""
    table = Table(
        "trainer", "tasks", "diverged", "median ratio", "nine of ten", "worst", "most nats an iteration", "taken back"
    )
    for trainer, runs in results.groups("trainer").items():
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
    for runs in results.groups("trainer").values():
        for run in sorted((run for run in runs if run["finished"]), key=_over, reverse=True)[:count]:
            figures = [number(run[key], 2) for key in ("kl_nats", "optimum_kl_nats", "reward_tuned", "optimum_reward")]
            texts = (f"{run[key]:.2g}" if isinstance(run[key], float) else str(run[key]) for key in drawn.values())
            table.add([run], run["name"], number(_over(run), 2), *figures, *texts)
    return table


# digits

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


# shapes

BLACK_BOX = ("score_action", "ram", "nft", "ddpo", "dpok")
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


# estimators, predictors, costs

CASES = [(process, eta) for process in ("vp", "flow") for eta in (1, 0.5)]
PREDICTORS = {"tweedie": "posterior mean (one DDIM step)", "ddim 2": "2 DDIM steps", "ddim 4": "4 DDIM steps",
              "consistency": "consistency model", "corrected": "learned correction"}  # fmt: skip
SMALL_TRIALS = {"pathwise": (1.03, 0.064), "likelihood_ratio": (1.31, 0.48), "ddpo": (3.4, 1.58)}


def estimators_gradient(results: Results) -> Table:
    """Policy gradients and the difference of two policies with the exact value, beside the closed form."""
    table = Table("case", "quantity", "25 steps", "100 steps", "400 steps", "closed form")
    for process, eta in CASES:
        for kind, keys in (("gradient", (".th0", ".th1")), ("difference", ("",))):
            for estimator in ("pathwise", "likelihood_ratio") if kind == "gradient" else (None,):
                runs = sorted(results.where(kind=kind, process=process, eta=eta, estimator=estimator), key=lambda r: r["steps"])
                for key in keys:
                    what = f"dJ/d{key[1:]}, {estimator}" if key else "J(new) - J(old)"
                    cells = [f"{run[f'mean{key}']:.4f} ± {run[f'error{key}']:.4f}" for run in runs]
                    table.add(runs, f"{process}, eta {eta}", what, *cells, f"{runs[0][f'truth{key}']:.4f}")
    return table


def estimators_value(results: Results) -> Table:
    """The learned value's errors over the spread of the rewards."""
    table = Table("case", "untrained", "trained", "standard error", "mean error")
    for process, eta in CASES:
        runs = results.where(kind="value", process=process, eta=eta)
        keys = ("untrained", "error", "standard_error", "mean_error")
        table.add(runs, f"{process}, eta {eta}", *(f"{100 * run[key]:.1f} %" for run in runs for key in keys))
    return table


def estimators_spread(results: Results) -> Table:
    """sd/mean of a one-trajectory gradient of both parameters."""
    cases = [f"{process}, eta {eta}" for process, eta in CASES]
    table = Table("estimator", "dimensions", *cases, "first small trials")
    for estimator, noted in SMALL_TRIALS.items():
        for dimensions, note in zip((1, 256), noted, strict=True):
            runs = [run for p, eta in CASES for run in results.where(kind="spread", process=p, eta=eta, dimensions=dimensions)]
            table.add(runs, estimator, str(dimensions), *(f"{run[f'{estimator}.both']:.3g}" for run in runs), f"{note:g}")
    return table


def soft_q(results: Results, task: str) -> Table:
    """Error of the soft Q's gradient, by predictor and time."""
    times = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    table = Table("predictor", *(f"t = {t}" for t in times))
    for key, name in PREDICTORS.items():
        (run,) = results.where(task=task, predictor=key)
        table.add([run], name, *(number(run[f"gradient.{t}"], 2) for t in times))
    return table


def steering(results: Results) -> Table:
    """Reward, distance and costs of each method of steering, mean over seeds."""
    table = Table("method", "seeds", "reward", "distance", "evaluations", "backward", "queries", "log Z")
    points = {point["method"]: [] for curve in results.curves.values() for point in curve}
    for curve in results.curves.values():
        for point in curve:
            points[point["method"]].append(point)
    for method, seeds in points.items():
        costs = (of(seeds, f"{key}_per_sample", 0) for key in ("evaluations", "backward", "queries"))
        name = f"*{method}*" if method in ("optimum", "oracle", "base") else method
        table.add(results.runs, name, str(len(seeds)), of(seeds, "reward"), of(seeds, "distance"), *costs, of(seeds, "log_z"))
    return table


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


def parametrisations(results: Results) -> Table:
    """Mean distance on the v network, and the same trainer's on other kinds over it; in brackets the largest KL on the way."""
    kinds = ("eps", "x0", "velocity")
    table = Table("schedule", "trainer", "seeds", "optimal policy", "v", *(f"{kind} / v" for kind in kinds))
    order = ("ddpm", "sd", "vp", "cosine", "ve", "flow")
    for schedule, error in sorted(
        {(run["schedule"], run["error"]) for run in results.runs}, key=lambda at: (order.index(at[0]), at)
    ):
        for trainer in dict.fromkeys(run["trainer"] for run in results.where(schedule=schedule, error=error)):
            runs = results.where(schedule=schedule, error=error, trainer=trainer)
            own, cells = statistics.fmean(run["v.distance"] for run in runs), []
            for kind in ("v", *kinds):
                there = [run[f"{kind}.distance"] for run in runs if run.get(f"{kind}.distance") is not None]
                scale = 1.0 if kind == "v" else own
                most = max((run[f"{kind}.kl_most"] for run in runs if there), default=None)
                cells.append(f"{number(statistics.fmean(there) / scale, 2)} ({number(most, 1)})" if there else "")
            oracle = number(statistics.fmean(run["oracle"] for run in runs), 2)
            table.add(runs, f"{schedule}, crooked" if error else schedule, trainer, str(len(runs)), oracle, *cells)
    return table


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


def adjoints(results: Results) -> Table:
    """Mean of the lean adjoint along the gradient of the value, and its second moment, at three times."""
    table = Table("task", "steps", *(f"{when}: {what}" for when in ("t = 1", "halfway", "last") for what in ("mean", "moment")))
    for run in sorted(results.runs, key=lambda run: (TASKS.index(run["task"]), run["steps"])):
        curve = results.curves[run["name"]]
        shown = [(f"{p['along']:.2f} ± {p['error']:.2f}", number(p["moment"], 1)) for p in (curve[0], curve[4], curve[-1])]
        table.add([run], run["task"], str(run["steps"]), *(text for pair in shown for text in pair))
    return table


def consistency(results: Results) -> Table:
    """Error of each predictor of the clean sample, by time."""
    table = Table("model", "predictor", *(f"t = {point['t']:.1g}" for point in results.curves["mixture"]))
    for name, keys in (("mixture", [*PREDICTORS][:4]), ("mixture, leap 1", ["consistency"]), ("digits", [*PREDICTORS][:4])):
        for key in keys:
            text = PREDICTORS[key] + (", `leap: 1`" if "leap" in name else "")
            points = (number(point[key], 3) for point in results.curves[name])
            table.add(results.where(name=name), name.split(",")[0], text, *points)
    return table


def plain(results: Results, columns: dict[str, tuple[str, int]], by: str = "algorithm") -> Table:
    """A row a run, these columns with so many decimals."""
    table = Table(by, *columns)
    for run in results.runs:
        table.add([run], run[by], *(of([run], key, digits) for key, digits in columns.values()))
    return table


def _at(task: str, trainers: Sequence[str]) -> Plan:
    return [(task, trainer, steps) for trainer in trainers for steps in (10, 25, 50)]


_over_steps = partial(samplers, steps=(5, 10, 25, 50, 200), first="distance", second="reward")
_plain_digits = partial(digits_end, trainers=())
_classifier = ("classifier, sqdf", "classifier, draft-lv")
_memory = {"10 steps": ("mib_10", 1), "200 steps": ("mib_200", 1), "states and predictions of 190 more steps": ("states", 1)}
_pipelines = {"evaluations": ("model_evaluations", 0), "rows backward": ("model_backward_rows", 0), "seconds": ("seconds", 0),
              "over networks": ("over_networks", 3), "peak GiB": ("peak_gib", 1)}  # fmt: skip
_processes = {"CPU s of one": ("alone", 1), "of each of two": ("each", 1), "efficiency": ("efficiency", 2)}
_counts = {"evaluations needed": ("needed", 0), "done": ("done", 0), "with a graph needed": ("needed_backward", 0),
           "done ": ("done_backward", 0), "all done over needed": ("done_over_needed", 2)}  # fmt: skip
_work = {**_counts, "CPU s": ("cpu_seconds", 1), "over bare": ("cpu_over_bare", 2),
         "without critics": ("without_critics", 2), "MiB": ("mib", 0), "bare ": ("bare_mib", 0)}  # fmt: skip


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


TABLES: dict[str, tuple[str, Callable[[Results], Table]]] = {
    "readme": ("exact", readme),
    "exact_score_action": ("exact", partial(exact, plan=_at("mixture", EXACT[:1]) + _at("mixture16", EXACT[:1]))),
    "exact_policy_gradients": ("exact", partial(exact, plan=_at("mixture", ("ddpo", "dpok")))),
    "exact_sqdf": ("exact", partial(exact, plan=_at("mixture", EXACT[1:4]))),
    "exact": ("exact", partial(exact, plan=[(task, trainer, 25) for task in TASKS for trainer in EXACT])),
    "exact_samplers": ("exact", partial(_over_steps, trainers=["score_action"])),
    "exact_samplers_chain": ("exact", partial(_over_steps, trainers=["ddpo", "dpok"], only=("ddim", 1))),
    "stability": ("stability", stability),
    "stability_worst": ("stability", stability_worst),
    "soft_q_mixture": ("soft_q", partial(soft_q, task="mixture")),
    "soft_q_linear_quadratic": ("soft_q", partial(soft_q, task="linear_quadratic")),
    "parametrisations": ("parametrisations", parametrisations),
    "off_below": ("off_below", off_below),
    "adjoints": ("adjoints", adjoints),
    "steering": ("steering", steering),
    "hint": ("hint", hint),
    "q_learning": ("q_learning", q_learning),
    "digits": ("digits", partial(digits_end, trainers=DIGITS)),
    "digits_13": ("digits", partial(digits_reached, level=13)),
    "digits_14": ("digits", partial(digits_reached, level=14)),
    "digits_samplers": (
        "digits",
        partial(samplers, trainers=DIGITS, steps=(5, 10, 25, 50), first="reward", second="held_out.legibility"),
    ),
    "digits_tune": ("digits_tune", partial(_plain_digits, by="name")),
    "gradients": ("gradients", partial(gradients, trainers=GRADIENTS, betas=(0.03, 0.1, 0.3))),
    "gradients_ablations": ("gradients", partial(gradients, trainers=ABLATIONS, betas=(0.1,))),
    "gradients_classifier": ("gradients", partial(gradients, trainers=_classifier, betas=(0.1,))),
    "gradients_tune": ("gradients_tune", partial(_plain_digits, by="name")),
    "online": ("online", _plain_digits),
    "online_rounds": ("online", online_rounds),
    "online_published": ("online_published", _plain_digits),
    "online_published_rounds": ("online_published", online_rounds),
    "estimators_gradient": ("estimators", estimators_gradient),
    "estimators_spread": ("estimators", estimators_spread),
    "estimators_value": ("estimators", estimators_value),
    "consistency": ("consistency", consistency),
    "shapes": ("shapes", shapes),
    "shapes_kl": ("shapes", shapes_kl),
    "overhead": ("overhead", partial(plain, columns={"wall time over network time": ("ratio_median", 3)})),
    "memory": ("memory", partial(plain, columns=_memory)),
    "processes": ("processes", partial(plain, columns=_processes, by="name")),
    "tokens": ("tokens", tokens),
    "causal": ("causal", causal),
    "work": ("work", partial(plain, columns=_work)),
    "work_counts": ("work_counts", partial(plain, columns=_counts)),
    "pipelines": ("pipelines", partial(plain, columns=_pipelines)),
}
"""Each table by its name: the benchmark whose files it is from, and what makes it of them."""


def markdown(name: str, folder: Path = RESULTS) -> str:
    """A table by its name, from the files of a folder. KeyError where there is none of that name."""
    benchmark, function = TABLES[name]
    return function(Results.of(folder / f"{benchmark}.csv")).markdown()


def run_names(name: str, folder: Path = RESULTS) -> list[str]:
    """The runs that a table shows."""
    benchmark, function = TABLES[name]
    return [run["name"] for run in function(Results.of(folder / f"{benchmark}.csv")).runs]


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with its tables as the files of a folder have them."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{markdown(match[2], folder)}\n{match[3]}", page)


def write_pages(*, check: bool) -> int:
    """Brings the tables of all pages up to date, or with `check` only names the pages that are not; how many those are."""
    stale = {
        page: text for page in PAGES if (text := filled(page.read_text(encoding="utf-8"))) != page.read_text(encoding="utf-8")
    }
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)}: {'is not what the results say' if check else 'written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return len(stale)


def print_tables(path: Path, benchmark: str) -> None:
    """The tables of a benchmark from one file of its runs, as far as its runs are there."""
    results = Results.of(path)
    for name, (source, function) in TABLES.items():
        if source == benchmark:
            try:
                table = function(results)
            except (LookupError, StopIteration, ValueError) as error:
                print(f"\n{name}: not all of its runs are there ({error!r})")
            else:
                print(f"\n{name}\n\n{table.markdown()}" if table.runs else f"\n{name}: none of its runs are there")
