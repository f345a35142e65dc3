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
        [*BLACK_BOX, "algorithm.estimator=likelihood_ratio", "algorithm.look_ahead=none", "algorithm.beta=0.01",
         "algorithm.hold_below=0.1", "algorithm.gae_lambda=1", "algorithm.critic_lr=3e-4", "algorithm.updates=4",
         "train.lr=3e-3"],
    ),
    "ddpo": (78, [*BLACK_BOX, "algorithm.name=ddpo", "algorithm.minibatches=4", "train.lr=3e-3"]),
    "dpok": (78, [*BLACK_BOX, "algorithm.name=dpok", "algorithm.beta=0.01", "algorithm.minibatches=4", "train.lr=3e-3"]),
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
POINTS, LEVELS = 9, (0.55, 0.6, 0.65, 0.7, 0.75)


def job(settings: list[str], seed: int, n: int, guidance: float | None = None, picture: str | None = None) -> dict[str, Any]:
    """A run, or with `guidance` the base under it: accuracy on the training prompts and on the unseen ones."""
    from scoreaction.recipes.build import build
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.recipes.recipe import load_recipe
    from scoreaction.report.figures import pairs_figure
    from scoreaction.sampling.draw import draw
    from scoreaction.training.evaluation import measure, measure_kl

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

    def seen_so_far() -> dict[str, float]:
        """Accuracy on the training prompts and KL of the averaged weights as they are, at the evaluation's steps."""
        queries, seed = tuner.reward.queries, tuner.evaluation.seed
        found = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=n, prompts=prompts["seen"], seed=seed)[0]
        tuner.reward.queries = queries
        return {"accuracy": found["held_out.shapes"], **measure_kl(tuner.model, sampler, n // 2, prompts["seen"], seed)}

    way, every = [], max(1, tuner.train.iterations // POINTS)
    for metrics in tuner:
        if metrics["iteration"] % every == 0:
            way.append({"iteration": metrics["iteration"], "pictures": metrics["iteration"] * BATCH, **seen_so_far()})
    out: dict[str, Any] = {"way": way, "summary": tuner.summary(), "tuned": figures(reference=False, strength=1.0)}
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
    results = run_jobs(job, jobs, options)
    report(results)
    if "base, guidance 1" in results and any("way" in result for result in results.values()):
        figure(results, str(options.output.with_name(f"{options.output.stem}_frontier.png")))


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
        keys = (("kl_nats", 1), ("reward_queries", 0), ("model_evaluations", 0))
        cells += [cell([run["summary"][key] for run in runs], digits) if tuned else "-" for key, digits in keys]
        rows.append([name, str(len(runs)), *cells])
    header = ["trainer", "seeds", "accuracy %", "unseen %", "guided, accuracy %", "unseen %", "diversity", "KL"]
    print(table([*header, "queries", "evaluations"], rows))


def kl_at(way: list[dict[str, float]], level: float, base: float) -> float | None:
    """KL when training first reached this accuracy, between the points that were measured; None where it never did."""
    before = {"kl_nats": 0.0, "accuracy": base}
    for point in way:
        if point["accuracy"] >= level:
            share = (level - before["accuracy"]) / (point["accuracy"] - before["accuracy"])
            return before["kl_nats"] + share * (point["kl_nats"] - before["kl_nats"])
        before = point
    return None


def figure(results: dict[str, dict[str, Any]], path: str) -> None:
    """Accuracy against KL along training, a line a run; prints the KL at which each trainer has the same accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from scoreaction.report.figures import COLOURS

    base = results["base, guidance 1"]["base"]["seen"]["held_out.shapes"]
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for name, result in results.items():
        if "way" in result:
            runs.setdefault(name.partition("/")[0], []).append(result["way"])
    drawn, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    rows = []
    for colour, (name, ways) in zip(COLOURS, runs.items(), strict=False):
        for i, way in enumerate(ways):
            line = [(0.0, 100 * base), *((point["kl_nats"], 100 * point["accuracy"]) for point in way)]
            axes.plot(*zip(*line, strict=True), "o-", color=colour, ms=3.5, lw=1.3, label=None if i else name)
        found = [[kl_at(way, level, base) for way in ways] for level in LEVELS]
        rows.append([name, *("-" if None in values else cell([v for v in values if v is not None], 1) for values in found)])
    axes.set(xlabel="KL to the base model (nats)", ylabel="prompts followed (%)", xscale="symlog", xlim=(0, None))
    axes.set_title("Prompts followed against KL while training, one line a seed", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    drawn.savefig(path, dpi=110)
    print(table(["KL when first at", *(f"{level:.0%}" for level in LEVELS)], rows))


if __name__ == "__main__":
    main()
