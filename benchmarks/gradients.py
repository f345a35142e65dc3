"""Digits with differentiable rewards: SQDF against reward back-propagation and policy gradients, at most 5,000 queries a run.

    python benchmarks/gradients.py --stage tune       # results/gradients_tune.json: learning rates and grids, one seed
    python benchmarks/gradients.py                    # results/gradients.json: frontiers over beta, SQDF's ablations; resumes
    python benchmarks/gradients.py --stage plots      # results/gradients_*.png from what the JSON holds

Ten sampling steps, guidance 2, reward `ink` with its gradient (and `classifier` for SQDF and DRaFT-LV). Every method is run at
three betas and is charged the path KL; at equal reward: KL, diversity (feature distance, Vendi) and held-out legibility.
"""

from __future__ import annotations

from typing import Any

from _harness import RESULTS, arguments, cell, run_jobs, table

BETAS = (0.03, 0.1, 0.3)
UNIFORM = "sampler.grid=uniform"
TRAINERS: dict[str, list[str]] = {  # the best of the sweep; batch and iterations: their queries are below 5,000
    "score_action": ["algorithm.name=score_action", "train.lr=1e-4", "train.batch=64", "train.iterations=7"],
    "sqdf": ["algorithm.name=sqdf", "train.lr=1e-4", "train.batch=64", "train.iterations=7"],
    "draft-1": ["algorithm.name=draft", "train.lr=1e-4", "train.batch=32", "train.iterations=60", "algorithm.rows=80", UNIFORM],
    "draft-lv": [
        "algorithm.name=draft", "algorithm.low_variance=2", "train.lr=1e-4", "train.batch=32", "train.iterations=40",
        "algorithm.rows=80", UNIFORM,
    ],
    "refl": ["algorithm.name=refl", "train.lr=3e-4", "train.batch=32", "train.iterations=60", "algorithm.rows=80", UNIFORM],
    "ddpo, KL": ["algorithm.name=dpok", "train.lr=1e-4", "train.batch=64", "train.iterations=32"],
}  # fmt: skip
ABLATIONS: dict[str, list[str]] = {  # of the published SQDF: discount, consistency model, buffer
    "sqdf published": ["algorithm.discount_rate=5.27", "algorithm.x0_hat=consistency", "algorithm.buffer=256"],
    "no discount": ["algorithm.x0_hat=consistency", "algorithm.buffer=256"],
    "no consistency model": ["algorithm.discount_rate=5.27", "algorithm.buffer=256"],
    "no buffer": ["algorithm.discount_rate=5.27", "algorithm.x0_hat=consistency"],
}
RATES = ("1e-4", "3e-4", "1e-3")
BACKPROP = ("draft-1", "draft-lv", "refl")  # the power grid's last step is at t = 0.03 and teaches little of large shapes


def train(trainer: str, settings: list[str], seed: int) -> dict[str, Any]:
    """One run: its summary and the metrics of each iteration."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    tuner = build(load_recipe("digits", [*settings, f"train.seed={seed}", "evaluation.n=200", "evaluation.steps=20"]))
    curve = [metrics for metrics in tuner]
    return {"summary": tuner.summary(), "curve": curve}


def jobs(stage: str) -> dict[str, dict[str, Any]]:
    """All runs by name."""

    def job(trainer: str, settings: list[str], seed: int) -> dict[str, Any]:
        return {"trainer": trainer, "settings": settings, "seed": seed}

    if stage == "tune":
        return {
            f"{trainer}/lr {lr}{', uniform grid' if grid == 'uniform' else ''}": job(
                trainer, [*settings, "algorithm.beta=0.1", f"train.lr={lr}", f"sampler.grid={grid}"], 100
            )
            for trainer, settings in TRAINERS.items()
            for lr in RATES
            for grid in (("power", "uniform") if trainer in BACKPROP else ("power",))
        }
    found = {
        f"{trainer}/beta {beta}/seed{seed}": job(trainer, [*settings, f"algorithm.beta={beta}"], seed)
        for seed in range(3)
        for beta in BETAS
        for trainer, settings in TRAINERS.items()
    }
    for seed in range(5):
        for trainer in ("sqdf", "draft-lv"):
            found[f"{trainer}/beta 0.1/seed{seed}"] = job(trainer, [*TRAINERS[trainer], "algorithm.beta=0.1"], seed)
    for seed in range(3):
        for name, changes in ABLATIONS.items():
            consistency = ["model.consistency=shipped"] if "algorithm.x0_hat=consistency" in changes else []
            settings = [*TRAINERS["sqdf"], "algorithm.beta=0.1", *changes, *consistency]
            found[f"ablation, {name}/beta 0.1/seed{seed}"] = job(f"ablation, {name}", settings, seed)
        for trainer in ("sqdf", "draft-lv"):
            settings = [*TRAINERS[trainer], "algorithm.beta=0.1", "reward.name=classifier"]
            found[f"classifier, {trainer}/beta 0.1/seed{seed}"] = job(f"classifier, {trainer}", settings, seed)
    return found


FIGURES = (
    "reward_tuned", "kl_nats", "held_out.legibility_tuned", "diversity_tuned", "vendi_tuned", "reward_queries",
    "model_evaluations", "seconds",
)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "", "gradients.json")
    parser.add_argument("--stage", choices=["tune", "main", "plots"], default="main")
    options = parser.parse_args()
    if options.stage == "tune":
        options.output = options.output.with_name("gradients_tune.json")
    if options.stage == "plots":
        options.only = "nothing is run"
    results = run_jobs(train, jobs(options.stage), options)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/seed")[0], []).append(result["summary"])
    rows = [
        [name, str(len(runs)), *(cell([run[key] for run in runs], 0 if run_is_count(key) else 2) for key in FIGURES)]
        for name, runs in groups.items()
    ]
    header = ["trainer", "seeds", "reward", "KL", "legibility", "diversity", "Vendi", "queries", "evaluations", "seconds"]
    print(table(header, rows))
    if options.stage == "plots":
        draw(groups)


def run_is_count(key: str) -> bool:
    """Whether a figure has no decimals."""
    return key in ("reward_queries", "model_evaluations", "seconds")


def draw(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Reward against KL, diversity and legibility: a line a trainer, a point a beta."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from _harness import mean_and_error

    axes_of = {"kl_nats": "KL to the pretrained model (nats)", "diversity_tuned": "diversity (feature distance)",
               "held_out.legibility_tuned": "held-out legibility"}  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, (key, label) in zip(axes, axes_of.items(), strict=True):
        for number, trainer in enumerate(TRAINERS):
            points = [groups[name] for beta in BETAS if (name := f"{trainer}/beta {beta}") in groups]
            if not points:
                continue
            x, dx = zip(*(mean_and_error([run[key] for run in runs]) for runs in points), strict=True)
            y, dy = zip(*(mean_and_error([run["reward_tuned"] for run in runs]) for runs in points), strict=True)
            axis.errorbar(x, y, dy, dx, marker="o", capsize=2, color=f"C{number}", label=trainer)
        axis.set_xlabel(label)
        axis.set_ylabel("reward (ink)")
        axis.grid(alpha=0.3)
    axes[0].set_xscale("log")
    axes[0].legend(frameon=False)
    figure.suptitle(
        f"Digits that become bolder: three betas a trainer ({', '.join(map(str, BETAS))}), bars of one standard error"
    )
    figure.savefig(RESULTS / "gradients_frontier.png", dpi=110)


if __name__ == "__main__":
    main()
