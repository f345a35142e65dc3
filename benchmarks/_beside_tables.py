"""Tables of what is done beside training: steering on shapes, students, pairs, certificates; and of another library."""

from __future__ import annotations

import math

from _tables import Results, Run, Table, cell, of


def steering_shapes(results: Results) -> Table:
    """Prompts followed, diversity and costs of methods on the pretrained and on the tuned model."""
    table = Table("model", "method", "seeds", "prompts followed", "diversity", "queries", "evaluations")
    points = results.points
    for model, method in dict.fromkeys((point["model"], point["method"]) for point in points):
        own = [point for point in points if (point["model"], point["method"]) == (model, method)]
        digits = {"followed": 3, "diversity": 2, "queries_per_sample": 0, "evaluations_per_sample": 0}
        table.add(results.runs, model, method, str(len(own)), *(of(own, key, n) for key, n in digits.items()))
    return table


def students(results: Results) -> Table:
    """A student beside its teacher and plain solvers; `kept` is the share of the teacher's gain in prompts followed."""
    table = Table("model", "solver", "seeds", "evaluations", "prompts followed", "kept %", "reward", "diversity")
    points = [{**point, "kept": _kept(curve, point)} for curve in results.curves.values() for point in curve]
    for row in dict.fromkeys((point["model"], point["solver"], point["evaluations"]) for point in points):
        own = [point for point in points if (point["model"], point["solver"], point["evaluations"]) == row]
        digits = {"evaluations": 0, "held_out.shapes": 3, "kept": 1, "reward": 3, "diversity": 2}
        table.add(results.runs, row[0], row[1], str(len(own)), *(of(own, key, n) for key, n in digits.items()))
    return table


def _kept(curve: list[Run], point: Run) -> float:
    base, teacher = (next(p["held_out.shapes"] for p in curve if p["model"] == name) for name in ("pretrained", "teacher"))
    return 100 * (point["held_out.shapes"] - base) / (teacher - base)


def pairs(results: Results) -> Table:
    """DPO beside Score as Action on digits: what each came to by the reward's answers that it had."""
    digits = {"answers": 0, "reward_tuned": 2, "kl_nats": 1, "held_out.legibility_tuned": 3, "diversity_tuned": 2}
    table = Table("trainer", "seeds", "answers", "reward", "KL", "legibility", "diversity")
    runs = results.where(task="digits")
    for trainer in dict.fromkeys(run["trainer"] for run in runs):
        own = [run for run in runs if run["trainer"] == trainer]
        table.add(own, trainer, str(len(own)), *(of(own, key, n) for key, n in digits.items()))
    return table


def certificates(results: Results) -> Table:
    """The measured gap beside the known one, means over seeds; the errors are those that each run says itself.

    What the closed form of log Z says of the exact optimum is what steps leave of 0; it is taken off the others.
    """
    table = Table("task", "policy", "seeds", "certificate (nats)", "known (nats)", "apart by standard errors")
    for task in TASKS:
        steps, steps_se = _mean(results.where(task=task, trainer=POLICIES[0]), "known")
        for policy in POLICIES:
            runs = results.where(task=task, trainer=policy)
            (gap, gap_se), (known, known_se) = _mean(runs, "gap_nats"), _mean(runs, "known")
            known, known_se = (0.0, 0.0) if policy == POLICIES[0] else (known - steps, math.hypot(known_se, steps_se))
            apart = (gap - known) / math.hypot(gap_se, known_se)
            known_text = f"{known:.3f} ± {known_se:.3f}" if known_se else "0"
            table.add(runs, task, policy, str(len(runs)), f"{gap:.3f} ± {gap_se:.3f}", known_text, f"{apart:.1f}")
    return table


def _mean(runs: list[Run], key: str) -> tuple[float, float]:
    return sum(run[key] for run in runs) / len(runs), sum(run[f"{key}_se"] ** 2 for run in runs) ** 0.5 / len(runs)


TASKS = ("mixture", "mixture16", "linear_quadratic")
POLICIES = ("optimum", "score_action", "sqdf", "dpok")


PATHS, STEPS = 64, 12
NEEDED = {"DDPO": PATHS * (2 * STEPS - 1), "DRaFT-1": PATHS * STEPS, "DRaFT-12": PATHS * STEPS}
"""Evaluations that an iteration cannot do without: a path's steps, and of DDPO all but the noiseless last once more."""


def beside_trl(results: Results) -> Table:
    """Evaluations of an iteration of TRL's trainers and of ours at the same settings, needed and done, CPU time and memory."""
    table = Table("method", "needed", "library", "repeats", "done", "CPU s", "over TRL's", "MiB")
    for method, runs in results.groups("method").items():
        trl = [run["cpu_seconds"] for run in runs if run["library"] == "TRL"]
        for library in dict.fromkeys(run["library"] for run in runs):
            own = [run for run in runs if run["library"] == library]
            ratio = sum(run["cpu_seconds"] for run in own) / len(own) / (sum(trl) / len(trl))
            cells = of(own, "evaluations", 0), of(own, "cpu_seconds", 2), f"{ratio:.2f}", of(own, "memory_mib", 0)
            table.add(own, method, str(NEEDED[method]), library, str(len(own)), *cells)
    return table


def trl_trained(results: Results) -> Table:
    """Trainers of ours and of TRL on the shapes by pictures drawn: prompts followed, KL, costs; the rest at the end alone."""
    table = Table("trainer", "seeds", "pictures", "accuracy %", "unseen %", "reward", "diversity", "KL", "evaluations", "CPU s")
    for method, runs in sorted(results.groups("method").items(), key=lambda group: not group[0].startswith("ours")):
        last = max(point["pictures"] for run in runs for point in results.curves[run["name"]])
        for pictures in dict.fromkeys(point["pictures"] for run in runs for point in results.curves[run["name"]]):
            points = [p for run in runs for p in results.curves[run["name"]] if p["pictures"] == pictures]
            end = ["", "", ""]
            if pictures == last:
                unseen = cell([100 * run["unseen.held_out.shapes"] for run in runs], 1)
                end = [unseen, of(runs, "seen.reward", 2), of(runs, "seen.diversity", 1)]
            accuracy = cell([100 * point["accuracy"] for point in points], 1)
            costs = of(points, "kl_nats", 1), of(points, "evaluations", 0), of(points, "cpu_seconds", 0)
            table.add(
                runs,
                method if method.startswith("ours") else f"TRL, {method}",
                str(len(runs)),
                str(pictures),
                accuracy,
                *end,
                *costs,
            )
    return table


def trl_tuned(results: Results) -> Table:
    """Single runs of TRL's trainers by rate and setting: prompts followed in %, and the KL in nats."""
    rates = sorted({run["lr"] for run in results.runs})
    table = Table("TRL's trainer", *(f"rate {rate:g}" for rate in rates))
    runs: dict[str, dict[float, Run]] = {}
    for run in results.runs:
        _, _, setting = run["name"].rpartition("/")[2].partition(", ")
        runs.setdefault(f"{run['method']}, {setting}".rstrip(", "), {})[run["lr"]] = run
    for trainer, own in sorted(runs.items()):
        cells = (f"{100 * own[r]['seen.held_out.shapes']:.1f} at {own[r]['kl_nats']:.1f}" if r in own else "-" for r in rates)
        table.add(list(own.values()), trainer, *cells)
    return table
