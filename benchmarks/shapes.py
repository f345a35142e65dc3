"""Text-to-image alignment of the shipped shapes: share of prompts followed, by the exact program, at equal budget.

    python benchmarks/shapes.py --stage tune    # results/shapes_tune.json: settings, one seed each
    python benchmarks/shapes.py                 # results/shapes.json: three seeds at the chosen settings; resumes

At most 5,000 pictures a run, one query each. Accuracy is the share of pictures that are their prompt's scene in every respect;
prompts that ask for things which no training prompt named are measured apart.
"""

from __future__ import annotations

from typing import Any

from _harness import arguments, cell, run_jobs, table

ITERATIONS, BATCH = 78, 64  # 4,992 pictures
BLACK_BOX, LEARNED = ["reward.name=shapes"], ["reward.name=shapes_scorer"]
CHOSEN: dict[str, list[str]] = {
    "score_action": ["algorithm.name=score_action", *BLACK_BOX],
    "ddpo": ["algorithm.name=ddpo", *BLACK_BOX],
    "sqdf, scorer": ["algorithm.name=sqdf", *LEARNED],
    "draft, scorer": ["algorithm.name=draft", *LEARNED],
}
SWEEP: dict[str, list[list[str]]] = {
    "score_action": [
        [*CHOSEN["score_action"], *settings]
        for settings in (
            ["algorithm.estimator=likelihood_ratio", "algorithm.beta=0.03"],
            ["algorithm.estimator=pathwise", "algorithm.beta=0.03"],
            ["algorithm.estimator=pathwise", "algorithm.beta=0.1"],
        )
    ],
    "ddpo": [[*CHOSEN["ddpo"], f"train.lr={lr}"] for lr in ("3e-4", "1e-3")],
}


def train(trainer: str, settings: list[str], seed: int, iterations: int, n: int) -> dict[str, Any]:
    """One run: its summary on the training prompts, base and tuned on the unseen ones, and the metrics of each iteration."""
    from scoreaction.config import build, load_recipe, prompt_list
    from scoreaction.evaluation import measure

    fixed = [
        f"train.iterations={iterations}", f"train.batch={BATCH}", f"train.seed={seed}", f"evaluation.n={n}",
        "train.held_out_rows=64", "evaluation.held_out=[{name: shapes, correct: true}, {name: shapes_scorer}]",
    ]  # fmt: skip
    tuner = build(load_recipe("shapes", [*settings, *fixed]))
    curve = [metrics for metrics in tuner]
    out: dict[str, Any] = {"curve": curve, "summary": tuner.summary()}
    sampler, unseen = tuner.evaluation.sampler(tuner.sampler), prompt_list("shapes_unseen")
    for kind in ("base", "tuned"):
        found, _ = measure(
            tuner.model, sampler, tuner.reward, tuner.held_out,
            n=n, prompts=unseen, seed=tuner.evaluation.seed, reference=kind == "base",
        )  # fmt: skip
        out[f"unseen_{kind}"] = found
    return out


def main() -> None:
    parser = arguments(__doc__ or "", "shapes.json")
    parser.add_argument("--stage", choices=["tune", "main"], default="main")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of each run")
    options = parser.parse_args()
    tune = options.stage == "tune"
    if tune:
        options.output = options.output.with_name("shapes_tune.json")
        jobs = {
            f"{trainer}/{' '.join(settings)}": {
                "trainer": trainer, "settings": settings, "seed": 100, "iterations": options.iterations, "n": 192,
            }
            for trainer, sweep in SWEEP.items()
            for settings in sweep
        }  # fmt: skip
    else:
        jobs = {
            f"{trainer}/seed{seed}": {
                "trainer": trainer, "settings": settings, "seed": seed, "iterations": options.iterations, "n": 480,
            }
            for seed in range(3)
            for trainer, settings in CHOSEN.items()
        }  # fmt: skip
    report(run_jobs(train, jobs, options), by_settings=tune)


def report(results: dict[str, dict[str, Any]], *, by_settings: bool) -> None:
    """Prints accuracy on training and unseen prompts, base and tuned, with KL, diversity and cost."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        groups.setdefault(name if by_settings else result["job"]["trainer"], []).append(result)
    rows = []
    for name, runs in groups.items():
        summaries = [run["summary"] for run in runs]
        keys = ("held_out.shapes_base", "held_out.shapes_tuned")
        cells = [cell([100 * s[key] for s in summaries], 1) for key in keys]
        cells += [cell([100 * run[f"unseen_{kind}"]["held_out.shapes"] for run in runs], 1) for kind in ("base", "tuned")]
        cells += [cell([s[key] for s in summaries]) for key in ("kl_nats", "diversity_base", "diversity_tuned")]
        cells += [cell([s[key] for s in summaries], 0) for key in ("reward_queries", "model_evaluations", "seconds")]
        rows.append([name, str(len(runs)), *cells])
    header = ["trainer", "seeds", "accuracy % base", "tuned", "unseen % base", "tuned", "KL", "diversity base", "tuned"]
    print(table([*header, "queries", "evaluations", "seconds"], rows))


if __name__ == "__main__":
    main()
