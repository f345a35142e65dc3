"""Online black-box optimisation of handwritten digits: few noisy answers of an oracle, four rounds, several trainers.

    python -m benchmarks.online                        # results/online.csv: 1,536 queries, three seeds; resumes
    python -m benchmarks.online --published            # 15,360 queries in the published rounds, one seed
    python -m benchmarks.online --quick --only dpok    # does it run? tiny, kept apart

The oracle answers with Gaussian noise, as large as the spread of the pretrained model's rewards; what is reported is without
it, and asks no counted query. The proxy sees pixels: the model's own features are those of the held-out judge.
"""

from __future__ import annotations

from _harness import Figures, arguments, built, in_stage, run_jobs, summary

STAGES = {  # answers a round, seeds, iterations a round, samples of a measurement
    "main": ([256, 384, 384, 512], 3, 10, 300),
    "published": ([1024, 2048, 4096, 8192], 1, 10, 300),
    "quick": ([16, 24], 1, 1, 20),
}
KEPT = ("round", "oracle_mean", "proxy_error", "proxy_std", "reward_queries", "kl_nats", "held_out.legibility", "diversity")
ORACLES = {
    "ink": ["reward={name: ink, differentiable: false}", "online.noise_std=1.0"],
    "jpeg": ["reward={name: jpeg, prefer: small}", "online.noise_std=0.02"],
    "classifier": ["reward={name: classifier}", "online.noise_std=0.5"],
}
TRAINERS: dict[str, list[str]] = {
    "sqdf, bootstrap": ["algorithm.name=sqdf", "algorithm.beta=0.1", "online.proxy=ensemble"],
    "sqdf, ucb": ["algorithm.name=sqdf", "algorithm.beta=0.1", "online.proxy=ucb", "online.optimism=1.0"],
    "draft-lv, bootstrap (as SEIKO)": [  # on the grid that the sweep of gradients.py chose for it
        "algorithm.name=draft", "algorithm.low_variance=2", "algorithm.beta=0.1", "sampler.grid=uniform", "train.lr=1e-4",
        "online.proxy=ensemble", "online.optimism=1.0",
    ],
    "dpok, bootstrap": ["algorithm.name=dpok", "algorithm.beta=0.1", "online.proxy=ensemble"],
    "score_action, bootstrap": ["algorithm.name=score_action", "algorithm.beta=0.1", "online.proxy=ensemble"],
}  # fmt: skip


def train(trainer: str, settings: list[str], oracle: str, seed: int, rounds: list[int], each: int, n: int) -> Figures:
    """One run: its summary, and for each round what the oracle answered and how far the proxy was from it."""
    fixed = [
        *ORACLES[oracle], f"online.rounds={rounds}", f"train.iterations={len(rounds) * each}", f"train.seed={seed}",
        "online.features=samples", "train.schedule=constant", f"evaluation.n={n}", "evaluation.steps=20",
    ]  # fmt: skip
    tuner = built("digits", *fixed, *settings)
    curve = list(tuner)
    return summary(tuner) | {"curve": [{key: metrics.get(key) for key in KEPT} for metrics in curve[::each]]}


def main() -> None:
    parser = arguments(__doc__ or "", "online")
    parser.add_argument("--oracle", choices=list(ORACLES), default="ink")
    parser.set_defaults(stage="main")
    for stage in ("published", "quick"):
        parser.add_argument(f"--{stage}", dest="stage", action="store_const", const=stage)
    options = parser.parse_args()
    if options.oracle != "ink":
        options.output = options.output.with_stem(f"{options.output.stem}_{options.oracle}")
    if options.stage != "main":
        in_stage(options)
    rounds, seeds, each, n = STAGES[options.stage]
    jobs = {
        f"{trainer}/seed{seed}": {
            "trainer": trainer, "settings": settings, "oracle": options.oracle, "seed": seed, "rounds": rounds, "each": each,
            "n": n,
        }
        for seed in range(seeds)
        for trainer, settings in TRAINERS.items()
    }  # fmt: skip
    run_jobs(train, jobs, options)


if __name__ == "__main__":
    main()
