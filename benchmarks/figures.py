"""The figures of the docs that show measured runs, drawn from the CSV files: `python -m benchmarks figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _picture_tables import GRADIENTS, SHAPES
from _prompt_tables import CONTROLLERS
from _records import RESULTS
from _tables import Results, Run, mean_and_error


def gradients_frontier(results: Results) -> Any:
    """Reward against KL, diversity and legibility: a line a trainer, a point a beta."""
    import matplotlib.pyplot as plt

    labels = {"kl_nats": "KL to the pretrained model (nats)", "diversity_tuned": "diversity (feature distance)",
              "held_out.legibility_tuned": "held-out legibility"}  # fmt: skip
    betas = (0.03, 0.1, 0.3)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for number, trainer in enumerate(GRADIENTS):
            points = [runs for beta in betas if (runs := results.where(trainer=trainer, beta=beta))]
            x, dx = zip(*(mean_and_error([run[key] for run in runs]) for runs in points), strict=True)
            y, dy = zip(*(mean_and_error([run["reward_tuned"] for run in runs]) for runs in points), strict=True)
            axis.errorbar(x, y, dy, dx, marker="o", capsize=2, color=f"C{number}", label=trainer)
        axis.set(xlabel=label, ylabel="reward (ink)")
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Digits that become bolder: three betas a trainer ({', '.join(map(str, betas))}), bars of one standard error"
    )
    return figure


def shapes_frontier(results: Results) -> Any:
    """Accuracy against KL, pictures drawn and network evaluations along training: means over seeds, with standard errors."""
    import matplotlib.pyplot as plt
    import numpy as np

    from scoreaction.report.axes import COLOURS

    (base,) = results.where(trainer="base, guidance 1")
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), sharey=True, layout="constrained")
    trained = [(name, runs) for name, runs in results.groups("trainer", SHAPES).items() if runs[0]["name"] in results.curves]
    looks = [(colour, style) for style in ("o-", "s--") for colour in COLOURS]
    for (colour, style), (name, runs) in zip(looks, trained, strict=False):
        lines = np.array([_along(run, results.curves[run["name"]], base["seen.held_out.shapes"]) for run in runs])
        *costs, accuracy = lines.mean(0).T
        error = lines[..., -1].std(0, ddof=1) / len(runs) ** 0.5 if len(runs) > 1 else None
        for axis, cost in zip(axes, costs, strict=True):
            axis.errorbar(cost, accuracy, error, fmt=style, color=colour, ms=4, lw=1.5, elinewidth=1, label=name)
    for axis, label in zip(
        axes, ("KL to the base model (nats)", "pictures drawn", "network evaluations (thousands)"), strict=True
    ):
        axis.set(xlabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("prompts followed (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    title = "Prompts followed while training: means over seeds with standard errors, further up and to the left is better"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _along(run: Run, curve: Sequence[Run], base: float) -> list[tuple[float, float, float, float]]:
    """KL, pictures, thousands of evaluations and accuracy in % from the base on; iterations cost alike."""
    each = run["model_evaluations"] / run["iterations"] / 1000
    return [(0.0, 0.0, 0.0, 100 * base)] + [
        (point["kl_nats"], point["pictures"], each * point["iteration"], 100 * point["accuracy"]) for point in curve
    ]


SHOWN = ("base", "guidance", "twisted 4", "svdd 16", "smc 16", "smc 16, weighted", "best of 16, drawn", "score_action, trained",
         "sqdf, corrected, trained", "sqdf, trained", "dpok, trained")  # fmt: skip


def steering_or_training(results: Results) -> Any:
    """Distance to the optimum against network evaluations a sample, training shared by all samples, for few and for many."""
    import matplotlib.pyplot as plt

    best = mean_and_error([point["distance"] for point in results.points if point["method"] == "oracle"])[0]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharex=True, sharey=True, layout="constrained")
    for axis, n in zip(axes, (1_000, 100_000), strict=True):
        for i, name in enumerate(SHOWN):
            rows = [point for point in results.points if point["method"] == name]
            costs = [row["evaluations_per_sample"] + (row.get("training_evaluations") or 0) / n for row in rows]
            y, dy = mean_and_error([row["distance"] for row in rows])
            shape = "s" if "trained" in name else "o"
            axis.errorbar(sum(costs) / len(costs), y, dy, fmt=shape, color=f"C{i % 10}", capsize=2, ms=7, label=name)
        axis.axhline(best, color="0.5", lw=1, ls="--", label="the exact optimal policy")
        axis.set(xscale="log", yscale="log", xlabel="network evaluations a sample, training included")
        axis.set_title(f"{n:,} samples", loc="left")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the optimum (sliced W2)")
    axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Steering (circles) or training (squares): the mixture, bars of one standard error over three seeds")
    return figure


def steering_shapes(results: Results) -> Any:
    """Prompts followed against evaluations a sample: methods on the pretrained model and on the tuned one."""
    import matplotlib.pyplot as plt

    from scoreaction.report.axes import COLOURS

    points = results.points
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    lines = [(model, family) for model in ("pretrained", "tuned") for family in ("best of", "svdd", "smc")]
    for i, (model, family) in enumerate(lines):
        names = [
            p["method"] for p in points if p["model"] == model and (p["method"] == "plain" or p["method"].startswith(family))
        ]
        line = []
        for name in dict.fromkeys(name for name in names if "every" not in name):
            rows = [p for p in points if (p["model"], p["method"]) == (model, name)]
            cost = mean_and_error([row["evaluations_per_sample"] for row in rows])[0]
            line.append((cost, *mean_and_error([100 * row["followed"] for row in rows])))
        x, y, dy = zip(*sorted(line), strict=True)
        style = "o-" if model == "pretrained" else "s--"
        axes.errorbar(x, y, dy, fmt=style, color=COLOURS[i % 3], ms=4, lw=1.3, capsize=2, label=f"{family}, {model} model")
    axes.set(xscale="log", xlabel="network evaluations a picture", ylabel="prompts followed (%)")
    axes.set_xticks([12, 24, 48, 96, 192], ["12", "24", "48", "96", "192"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(
        f"Steered and tuned: prompts followed, bars of one standard error over {len(results.runs)} seeds", loc="left"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def control_returns(results: Results) -> Any:
    """Return on Pendulum-v1 against the delay, a line a controller."""
    import matplotlib.pyplot as plt

    names = [run["name"] for run in results.runs if not run.get("particles")]
    points = [point for name in names for point in results.curves[name]]
    delays = sorted({point["delay"] for point in points})
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, (name, label) in enumerate(CONTROLLERS.items()):
        means = [mean_and_error([point[name] for point in points if point["delay"] == late]) for late in delays]
        y, dy = zip(*means, strict=True)
        places = [place + 0.06 * (i - 2) for place in range(len(delays))]
        axes.errorbar(places, y, dy, marker="o", ms=4, capsize=2, color=f"C{i}", label=label)
    axes.set(xlabel="delay of the state (steps of 0.05 s)", ylabel="return of 200 steps")
    axes.set_xticks(range(len(delays)), [str(late) for late in delays])
    axes.set_title(f"Pendulum-v1, {len(points) // len(delays)} episodes, bars of one standard error", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Results], Any]]] = {
    "control_returns": ("control", control_returns),
    "gradients_frontier": ("gradients", gradients_frontier),
    "shapes_frontier": ("shapes", shapes_frontier),
    "steering_or_training": ("steering", steering_or_training),
    "steering_shapes": ("steering_shapes", steering_shapes),
}


def draw_all(folder: Path) -> list[Path]:
    """Writes every figure into the folder as NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    for name, (benchmark, function) in FIGURES.items():
        function(Results.of(RESULTS / f"{benchmark}.csv")).savefig(folder / f"{name}.png", dpi=110)
    return [folder / f"{name}.png" for name in FIGURES]
