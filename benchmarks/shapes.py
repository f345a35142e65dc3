"""Text-to-image alignment of the shipped shapes: share of prompts followed, by the exact program, at equal budget.

    python benchmarks/shapes.py                                # results/shapes.json: three seeds; resumes
    python benchmarks/shapes.py --only base                    # the pretrained model alone, with and without guidance
    python benchmarks/shapes.py --iterations 1 --output /tmp/shapes.json    # does it run?

Accuracy is the share of pictures that are their prompt's scene in every respect; prompts that ask for things which no training
prompt named are measured apart. Nothing is guided but the base where it says so. The black-box trainers draw 4,992 pictures and
ask the program once for each; those that follow the learned scorer's gradient draw 2,560.
"""

from __future__ import annotations

from typing import Any

from _harness import arguments, cell, run_jobs, table

BATCH, SHOWN = 64, 12
BLACK_BOX, LEARNED = ["reward.name=shapes"], ["reward.name=shapes_scorer"]
TRAINERS: dict[str, tuple[int, list[str]]] = {
    "score_action": (
        78,
        [*BLACK_BOX, "algorithm.estimator=likelihood_ratio", "algorithm.look_ahead=none", "algorithm.beta=0.03",
         "algorithm.updates=4", "train.lr=3e-3"],
    ),
    "ddpo": (78, [*BLACK_BOX, "algorithm.name=ddpo", "algorithm.minibatches=4", "train.lr=3e-3"]),
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


def job(settings: list[str], seed: int, n: int, guidance: float | None = None, picture: str | None = None) -> dict[str, Any]:
    """A run, or with `guidance` the base under it: accuracy on the training prompts and on the unseen ones."""
    from scoreaction.config import build, load_recipe, prompt_list
    from scoreaction.evaluation import draw, measure
    from scoreaction.pictures import pairs_figure

    fixed = [
        f"train.batch={BATCH}", f"train.seed={seed}", f"evaluation.n={n}", "sampler.guidance=1",
        "train.held_out_rows=64", "evaluation.held_out=[{name: shapes, correct: true}, {name: shapes_scorer}]",
    ]  # fmt: skip
    tuner = build(load_recipe("shapes", [*fixed, *settings]))
    sampler = tuner.evaluation.sampler(tuner.sampler)
    prompts = {"seen": prompt_list("shapes"), "unseen": prompt_list("shapes_unseen")}

    def figures(*, reference: bool, strength: float) -> dict[str, Any]:
        at = sampler.model_copy(update={"guidance": strength})
        return {
            kind: measure(
                tuner.model, at, tuner.reward, tuner.held_out,
                n=n, prompts=asked, seed=tuner.evaluation.seed, reference=reference,
            )[0]
            for kind, asked in prompts.items()
        }  # fmt: skip

    if guidance is not None:
        return {"base": figures(reference=True, strength=guidance)}
    out: dict[str, Any] = {"curve": list(tuner), "summary": tuner.summary(), "tuned": figures(reference=False, strength=1.0)}
    out["tuned, guided"] = figures(reference=False, strength=2.0)
    if picture is not None:
        shown = prompts["seen"][:: len(prompts["seen"]) // SHOWN][:SHOWN]
        before, after = (
            draw(tuner.model, sampler, SHOWN, shown, seed, reference=reference).numpy() for reference in (True, False)
        )
        pairs_figure(before, after, shown).savefig(picture, dpi=110)
    return out


def main() -> None:
    parser = arguments(__doc__ or "", "shapes.json")
    parser.add_argument("--iterations", type=int, help="of each run, instead of its own")
    parser.add_argument("--n", type=int, default=480, help="pictures of a measurement")
    options = parser.parse_args()
    jobs: dict[str, dict[str, Any]] = {
        f"base, guidance {g:g}": {"settings": [], "seed": 0, "n": options.n, "guidance": g} for g in GUIDED
    }
    for seed in range(3):
        for trainer, (iterations, settings) in TRAINERS.items():
            own = [*settings, f"train.iterations={options.iterations or iterations}"]
            name = trainer.partition(",")[0]
            picture = None if seed else str(options.output.with_name(f"{options.output.stem}_{name}.png"))
            jobs[f"{trainer}/seed{seed}"] = {"settings": own, "seed": seed, "n": options.n, "picture": picture}
    report(run_jobs(job, jobs, options))


def report(results: dict[str, dict[str, Any]]) -> None:
    """Prints accuracy on training and unseen prompts, of the base and of each trainer, with KL, diversity and cost."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/")[0], []).append(result)
    rows = []
    for name, runs in groups.items():
        tuned = "summary" in runs[0]
        cells = [
            cell([100 * run[measured][prompts]["held_out.shapes"] for run in runs], 1) if measured in runs[0] else "-"
            for measured in ("tuned" if tuned else "base", "tuned, guided")
            for prompts in ("seen", "unseen")
        ]
        cells.append(cell([run["tuned" if tuned else "base"]["seen"]["diversity"] for run in runs], 2))
        keys = (("kl_nats", 1), ("reward_queries", 0), ("model_evaluations", 0), ("seconds", 0))
        cells += [cell([run["summary"][key] for run in runs], digits) if tuned else "-" for key, digits in keys]
        rows.append([name, str(len(runs)), *cells])
    header = ["trainer", "seeds", "accuracy %", "unseen %", "guided, accuracy %", "unseen %", "diversity", "KL"]
    print(table([*header, "queries", "evaluations", "seconds"], rows))


if __name__ == "__main__":
    main()
