"""Online black-box optimisation of handwritten digits: few noisy answers of an oracle, four rounds, several trainers.

    python benchmarks/online.py                        # results/online.json: 1,536 queries, three seeds; resumes
    python benchmarks/online.py --published            # 15,360 queries in the published rounds, one seed
    python benchmarks/online.py --quick --only dpok    # does it run? tiny, kept apart

The oracle answers with Gaussian noise, as large as the spread of the pretrained model's rewards; what is reported is without
it, and asks no counted query. The proxy sees pixels: the model's own features are those of the held-out judge.
"""

from __future__ import annotations

from typing import Any

from _harness import arguments, cell, run_jobs, table

ROUNDS, PUBLISHED, QUICK = [256, 384, 384, 512], [1024, 2048, 4096, 8192], [16, 24]
PER_ROUND = 10
ORACLES = {
    "ink": ["reward={name: ink, differentiable: false}", "online.noise_std=1.0"],
    "jpeg": ["reward={name: jpeg, prefer: small}", "online.noise_std=0.02"],
    "classifier": ["reward={name: classifier}", "online.noise_std=0.5"],
}
TRAINERS: dict[str, list[str]] = {
    "sqdf, bootstrap": ["algorithm.name=sqdf", "algorithm.beta=0.1", "online.proxy=ensemble"],
    "sqdf, ucb": ["algorithm.name=sqdf", "algorithm.beta=0.1", "online.proxy=ucb", "online.optimism=1.0"],
    "draft-lv, bootstrap (as SEIKO)": [  # on the grid that the sweep of gradients.py found for it
        "algorithm.name=draft", "algorithm.low_variance=2", "algorithm.beta=0.1", "sampler.grid=uniform", "train.lr=1e-4",
        "online.proxy=ensemble", "online.optimism=1.0",
    ],
    "dpok, bootstrap": ["algorithm.name=dpok", "algorithm.beta=0.1", "online.proxy=ensemble"],
    "score_action, bootstrap": ["algorithm.name=score_action", "algorithm.beta=0.1", "online.proxy=ensemble"],
}  # fmt: skip


def train(trainer: str, settings: list[str], oracle: str, seed: int, rounds: list[int], each: int, n: int) -> dict[str, Any]:
    """One run: its summary, and for each round what the oracle said and how far the proxy was from it."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    fixed = [
        *ORACLES[oracle], f"online.rounds={rounds}", f"train.iterations={len(rounds) * each}", f"train.seed={seed}",
        "online.features=samples", "train.schedule=constant", f"evaluation.n={n}", "evaluation.steps=20",
    ]  # fmt: skip
    tuner = build(load_recipe("digits", [*fixed, *settings]))
    curve = list(tuner)
    keys = ("round", "oracle_mean", "proxy_error", "proxy_std", "reward_queries", "kl_nats", "held_out.legibility", "diversity")
    return {
        "summary": tuner.summary(),
        "rounds": [{key: curve[i][key] for key in keys if key in curve[i]} for i in range(0, len(curve), each)],
    }


def main() -> None:
    parser = arguments(__doc__ or "", "online.json")
    parser.add_argument("--oracle", choices=list(ORACLES), default="ink")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    kind = "_quick" if options.quick else "_published" if options.published else ""
    which = "" if options.oracle == "ink" else f"_{options.oracle}"
    options.output = options.output.with_name(f"{options.output.stem}{which}{kind}.json")
    rounds = QUICK if options.quick else PUBLISHED if options.published else ROUNDS
    jobs = {
        f"{trainer}/seed{seed}": {
            "trainer": trainer, "settings": settings, "oracle": options.oracle, "seed": seed, "rounds": rounds,
            "each": 1 if options.quick else PER_ROUND, "n": 20 if options.quick else 300,
        }
        for seed in range(1 if options.quick or options.published else 3)
        for trainer, settings in TRAINERS.items()
    }  # fmt: skip
    report(run_jobs(train, jobs, options))


def report(results: dict[str, dict[str, Any]]) -> None:
    """Prints the end of the runs, and what the oracle answered round by round, means over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        groups.setdefault(result["job"]["trainer"], []).append(result)
    keys = ["reward_base", "reward_tuned", "held_out.legibility_tuned", "diversity_base", "diversity_tuned", "kl_nats"]
    header = [
        "trainer",
        "seeds",
        "base reward",
        "reward",
        "legibility",
        "base diversity",
        "diversity",
        "KL",
        "queries",
        "seconds",
    ]
    rows, answers = [], []
    for trainer, runs in groups.items():
        found = [run["summary"] for run in runs]
        cells = [cell([f[key] for f in found]) for key in keys]
        rows.append([trainer, str(len(runs)), *cells, str(found[0]["reward_queries"]), cell([f["seconds"] for f in found], 0)])
        rounds = zip(*(run["rounds"] for run in runs), strict=True)
        answers.append([trainer, *(cell([r["oracle_mean"] for r in same]) for same in rounds)])
    print(table(header, rows))
    if answers:
        print("\nMean answer of the oracle, round by round:")
        print(table(["trainer", *(f"round {i}" for i in range(1, len(answers[0])))], answers))


if __name__ == "__main__":
    main()
