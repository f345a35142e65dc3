"""The figures of the docs that show measured runs, drawn from the CSV files: `python -m benchmarks figures`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from _picture_tables import GRADIENTS, SHAPES
from _records import RESULTS
from _tables import Results, mean_and_error


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
    """Accuracy against KL along training, a line a run."""
    import matplotlib.pyplot as plt

    from scoreaction.report.figures import COLOURS

    (base,) = results.where(trainer="base, guidance 1")
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    trained = [(name, runs) for name, runs in results.groups("trainer", SHAPES).items() if runs[0]["name"] in results.curves]
    for colour, (name, runs) in zip(COLOURS, trained, strict=False):
        for i, run in enumerate(runs):
            line = [(0.0, 100 * base["seen.held_out.shapes"])]
            line += [(point["kl_nats"], 100 * point["accuracy"]) for point in results.curves[run["name"]]]
            axes.plot(*zip(*line, strict=True), "o-", color=colour, ms=3.5, lw=1.3, label=None if i else name)
    axes.set(xlabel="KL to the base model (nats)", ylabel="prompts followed (%)", xlim=(0, None))
    axes.set_title("Prompts followed against KL while training, one line a seed", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Results], Any]]] = {
    "gradients_frontier": ("gradients", gradients_frontier),
    "shapes_frontier": ("shapes", shapes_frontier),
}


def draw_all(folder: Path) -> list[Path]:
    """Writes every figure into the folder as NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    for name, (benchmark, function) in FIGURES.items():
        function(Results.of(RESULTS / f"{benchmark}.csv")).savefig(folder / f"{name}.png", dpi=110)
    return [folder / f"{name}.png" for name in FIGURES]
