"""Digits with differentiable rewards: SQDF against reward back-propagation and policy gradients, at most 5,000 queries a run.

    python -m benchmarks.gradients --stage tune     # results/gradients_tune.csv: learning rates and grids, one seed
    python -m benchmarks.gradients                  # results/gradients.csv: frontiers over beta, SQDF's ablations; resumes
    python -m benchmarks figures                    # results/gradients_frontier.png from the CSV

Ten sampling steps, guidance 2, reward `ink` with its gradient (and `classifier` for SQDF and DRaFT-LV). Every method is run at
three betas and is charged the path KL; at equal reward: KL, diversity (feature distance, Vendi) and held-out legibility.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, in_stage, run_jobs, summary

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


def train(trainer: str, settings: list[str], seed: int) -> Figures:
    """The summary of one run."""
    tuner = built("digits", *settings, f"train.seed={seed}", "evaluation.n=200", "evaluation.steps=20")
    for _ in tuner:
        pass
    return summary(tuner)


def jobs(stage: str) -> dict[str, Figures]:
    """All runs by name."""

    def job(trainer: str, settings: list[str], seed: int) -> Figures:
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
    runs = {
        f"{trainer}/beta {beta}/seed{seed}": job(trainer, [*settings, f"algorithm.beta={beta}"], seed)
        for seed in range(3)
        for beta in BETAS
        for trainer, settings in TRAINERS.items()
    }
    for seed in range(5):
        for trainer in ("sqdf", "draft-lv"):
            runs[f"{trainer}/beta 0.1/seed{seed}"] = job(trainer, [*TRAINERS[trainer], "algorithm.beta=0.1"], seed)
    for seed in range(3):
        for name, changes in ABLATIONS.items():
            consistency = ["model.consistency=shipped"] if "algorithm.x0_hat=consistency" in changes else []
            settings = [*TRAINERS["sqdf"], "algorithm.beta=0.1", *changes, *consistency]
            runs[f"ablation, {name}/beta 0.1/seed{seed}"] = job(f"ablation, {name}", settings, seed)
        for trainer in ("sqdf", "draft-lv"):
            settings = [*TRAINERS[trainer], "algorithm.beta=0.1", "reward.name=classifier"]
            runs[f"classifier, {trainer}/beta 0.1/seed{seed}"] = job(f"classifier, {trainer}", settings, seed)
    return runs


def main() -> None:
    parser = arguments(__doc__ or "", "gradients")
    parser.add_argument("--stage", choices=["tune", "main"], default="main")
    options = parser.parse_args()
    if options.stage == "tune":
        in_stage(options)
    run_jobs(train, jobs(options.stage), options)


if __name__ == "__main__":
    main()
