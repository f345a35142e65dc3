"""Tables of values and gradients against the exact ones: estimators, the soft Q, adjoints, consistency models."""

from __future__ import annotations

from _exact_tables import TASKS
from _tables import Results, Table, number

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
