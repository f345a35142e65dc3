"""Text-to-image alignment of the shipped shapes: share of prompts followed, by the exact program, at equal budget.

    python -m benchmarks.shapes                                # results/shapes.csv: three seeds; resumes
    python -m benchmarks.shapes --only base                    # the pretrained model alone, with and without guidance
    python -m benchmarks.shapes --iterations 1 --n 48 --output /tmp/shapes.csv    # does it run?
    python -m benchmarks figures                               # results/shapes_frontier.png from the CSV

Accuracy is the share of pictures that are their prompt's scene in every respect; prompts that ask for things which no
training prompt named are measured apart. Nothing is guided but the base where it says so, and under guidance 2 only the first
seed's runs. All black-box trainers draw 1,280 pictures, ask the program once for each, and leave times below 0.1 to the
pretrained model. Those that follow the learned scorer's gradient draw 2,560.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from _harness import Figures, arguments, built, run_jobs

BATCH, SHOWN = 64, 12
BLACK_BOX, LEARNED = ["reward.name=shapes", "train.lr=3e-3"], ["reward.name=shapes_scorer"]
TRAINERS: dict[str, tuple[int, list[str]]] = {
    "score_action": (20, BLACK_BOX),
    "ram": (20, [*BLACK_BOX, "algorithm={name: ram, beta: 0.05, each: 4}"]),
    "nft": (20, [*BLACK_BOX, "algorithm={name: nft}"]),
    "ddpo": (20, [*BLACK_BOX, "algorithm={name: ddpo, minibatches: 4}", "sampler.grid=scheduler"]),
    "dpok": (20, [*BLACK_BOX, "algorithm={name: dpok, beta: 0.01, minibatches: 4}", "sampler.grid=scheduler"]),
    "sqdf, scorer": (
        40,
        [*LEARNED, "algorithm.name=sqdf", "algorithm.beta=3", "algorithm.x0_steps=3", "algorithm.updates=4",
         "algorithm.rows=80", "train.lr=1e-3"],
    ),
    "draft, scorer": (
        40,
        [*LEARNED, "algorithm.name=draft", "algorithm.last=null", "algorithm.beta=0.3", "train.lr=2e-3"],
    ),
}  # fmt: skip
GUIDED = (1.0, 2.0, 3.0)
POINTS = 2
KEPT = ("reward", "held_out.shapes", "held_out.shapes_se", "held_out.shapes_scorer", "diversity", "vendi")


def run(trainer: str, settings: list[str], iterations: int, seed: int, n: int, guidance: float, *, pictures: Path) -> Figures:
    """A run, or without iterations the base under this guidance: figures on the training prompts and on the unseen ones."""
    fixed = [
        f"train.batch={BATCH}", f"train.seed={seed}", f"evaluation.n={n}", "sampler.guidance=1",
        "train.held_out_rows=64", "evaluation.held_out=[{name: shapes, correct: true}, {name: shapes_scorer}]",
    ]  # fmt: skip
    tuner = built("shapes", *fixed, *settings, f"train.iterations={max(1, iterations)}")
    if not iterations:
        return measured(tuner, n, guidance, reference=True)
    curve, every = [], max(1, iterations // POINTS)
    for metrics in tuner:
        if metrics["iteration"] % every == 0:
            done = {"iteration": metrics["iteration"], "pictures": metrics["iteration"] * BATCH}
            curve.append(done | accuracy_and_kl(tuner, n // 2))
    figures = tuner.counts() | measured(tuner, n, guidance)
    if seed == 0:
        picture(tuner, seed, pictures / f"shapes_{trainer.partition(',')[0]}.png")
        figures["guided"] = measured(tuner, n, 2.0)
    return figures | {"kl_nats": curve[-1]["kl_nats"], "kl_nats_se": curve[-1]["kl_nats_se"], "curve": curve}


def measured(tuner: Any, n: int, guidance: float, *, reference: bool = False) -> Figures:
    """Figures of the tuned model or the base under this guidance, by set of prompts."""
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.training.evaluation import measure

    sampler = tuner.evaluation.sampler(tuner.sampler).model_copy(update={"guidance": guidance})
    out = {}
    for kind, name in (("seen", "shapes"), ("unseen", "shapes_unseen")):
        figures, _ = measure(
            tuner.model, sampler, tuner.reward, tuner.held_out,
            n=n, prompts=prompt_list(name), seed=tuner.evaluation.seed, reference=reference,
        )  # fmt: skip
        out[kind] = {key: figures[key] for key in KEPT}
    return out


def accuracy_and_kl(tuner: Any, n: int) -> Figures:
    """Accuracy on the training prompts and KL of the averaged weights as they are, at the evaluation's steps."""
    from scoreaction.training.evaluation import measure, measure_kl

    queries, seed, sampler = tuner.reward.queries, tuner.evaluation.seed, tuner.evaluation.sampler(tuner.sampler)
    figures, _ = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=n, prompts=tuner.prompts, seed=seed)
    tuner.reward.queries = queries
    return {"accuracy": figures["held_out.shapes"], **measure_kl(tuner.model, sampler, n // 2, tuner.prompts, seed)}


def picture(tuner: Any, seed: int, path: Path) -> None:
    """Base and tuned model from the same noise."""
    import scoreaction as sa
    from scoreaction.report.figures import pairs_figure

    prompts, sampler = tuner.prompts[:: len(tuner.prompts) // SHOWN][:SHOWN], tuner.evaluation.sampler(tuner.sampler)
    chosen = {
        "n": SHOWN,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "solver": sampler.solver,
        "seed": seed,
        "prompts": prompts,
    }
    before, after = (sa.sample(tuner.model, **chosen, reference=reference).numpy() for reference in (True, False))
    pairs_figure(before, after, prompts).savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__ or "", "shapes")
    parser.add_argument("--n", type=int, default=480, help="pictures of a measurement")
    options = parser.parse_args()
    jobs: dict[str, Figures] = {
        f"base, guidance {g:g}": {
            "trainer": f"base, guidance {g:g}", "settings": [], "iterations": 0, "seed": 0, "n": options.n, "guidance": g,
        }
        for g in GUIDED
    } | {
        f"{trainer}/seed{seed}": {
            "trainer": trainer, "settings": settings, "iterations": iterations, "seed": seed, "n": options.n, "guidance": 1.0,
        }
        for seed in range(3)
        for trainer, (iterations, settings) in TRAINERS.items()
    }  # fmt: skip
    run_jobs(partial(run, pictures=options.output.parent), jobs, options)


if __name__ == "__main__":
    main()
