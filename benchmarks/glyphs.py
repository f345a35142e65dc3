"""Text in pictures: the share of texts that an OCR network reads as they were asked for, at equal budget.

    python -m benchmarks.glyphs                                # results/glyphs.csv; resumes
    python -m benchmarks.glyphs --only base                    # the pretrained model alone, with and without guidance
    python -m benchmarks.glyphs --iterations 1 --n 48 --output /tmp/glyphs.csv    # does it run?

Right is a picture that reads as its prompt in every character; texts that were not trained on are measured apart. Nothing is
guided but the base where it says so. All trainers draw 1,280 pictures, eight of a text, and have each read once. Needs rapidocr
and onnxruntime.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from _harness import Figures, arguments, built, run_jobs

BATCH = 64
TRAINERS: dict[str, list[str]] = {
    "nft": ["algorithm={name: nft, baseline: group}"],
    "score_action, forward": ["algorithm={name: score_action, estimator: forward, beta: 0.08, each: 10}"],
    "ddpo": ["algorithm={name: ddpo, baseline: group}"],
    "score_action": ["algorithm={name: score_action}"],
}
ITERATIONS, POINTS = 20, 2
GUIDED = (1.0, 2.0, 3.0)
SHOWN = 6
KEPT = ("reward", "reward_se", "held_out.ocr", "held_out.ocr_se", "diversity", "vendi")


def run(trainer: str, settings: list[str], iterations: int, seed: int, n: int, guidance: float, *, pictures: Path) -> Figures:
    """A run, or without iterations the base under this guidance: figures on the training texts and on the unseen ones."""
    fixed = [f"train.batch={BATCH}", f"train.seed={seed}", f"evaluation.n={n}", "sampler.guidance=1", "train.held_out_rows=64"]
    tuner = built("glyphs", *fixed, *settings, f"train.iterations={max(1, iterations)}")
    if not iterations:
        return measured(tuner, n, guidance, reference=True)
    curve, every = [], max(1, iterations // POINTS)
    for metrics in tuner:
        if metrics["iteration"] % every == 0:
            done = {"iteration": metrics["iteration"], "pictures": metrics["iteration"] * BATCH}
            curve.append(done | accuracy_and_kl(tuner, n // 2))
    figures = tuner.counts() | measured(tuner, n, guidance)
    if seed == 0:
        picture(tuner, trainer, seed, pictures / f"glyphs_{trainer.replace(', ', '_')}.png")
    return figures | {"kl_nats": curve[-1]["kl_nats"], "kl_nats_se": curve[-1]["kl_nats_se"], "curve": curve}


def measured(tuner: Any, n: int, guidance: float, *, reference: bool = False) -> Figures:
    """Figures of the tuned model or the base under this guidance, by set of texts."""
    from scoreaction.recipes.prompts import prompt_list
    from scoreaction.training.evaluation import measure

    sampler = tuner.evaluation.sampler(tuner.sampler).model_copy(update={"guidance": guidance})
    out = {}
    for kind, name in (("seen", "glyphs"), ("unseen", "glyphs_unseen")):
        figures, _ = measure(
            tuner.model, sampler, tuner.reward, tuner.held_out,
            n=n, prompts=prompt_list(name), seed=tuner.evaluation.seed, reference=reference,
        )  # fmt: skip
        out[kind] = {key: figures[key] for key in KEPT}
    return out


def accuracy_and_kl(tuner: Any, n: int) -> Figures:
    """Share of training texts that are right and KL of the averaged weights as they are, at the evaluation's steps."""
    from scoreaction.training.evaluation import measure, measure_kl

    queries, seed, sampler = tuner.reward.queries, tuner.evaluation.seed, tuner.evaluation.sampler(tuner.sampler)
    figures, _ = measure(tuner.model, sampler, tuner.reward, tuner.held_out, n=n, prompts=tuner.prompts, seed=seed)
    tuner.reward.queries = queries
    return {"accuracy": figures["held_out.ocr"], **measure_kl(tuner.model, sampler, n // 2, tuner.prompts, seed)}


def picture(tuner: Any, trainer: str, seed: int, path: Path) -> None:
    """Base and tuned model from the same noise, with the share of its characters that is read above each picture."""
    import matplotlib.pyplot as plt

    import scoreaction as sa

    prompts, sampler = tuner.prompts[:: len(tuner.prompts) // SHOWN][:SHOWN], tuner.evaluation.sampler(tuner.sampler)
    chosen = {
        "n": SHOWN,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "solver": sampler.solver,
        "seed": seed,
        "prompts": prompts,
    }
    rows = {"pretrained": True, f"after {trainer.partition(',')[0]}": False}
    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(11, 2.6), layout="constrained")
    for line, (label, reference) in zip(axes, rows.items(), strict=True):
        samples = sa.sample(tuner.model, **chosen, reference=reference)
        for axis, sample, prompt, right in zip(line, samples, prompts, tuner.reward.reward(samples, prompts), strict=True):
            axis.imshow(sample[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"asked for {prompt}: {float(right):.0%}", fontsize=9, color="C2" if right == 1 else "C3")
        line[0].set_ylabel(label, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = arguments(__doc__ or "", "glyphs")
    parser.add_argument("--n", type=int, default=256, help="pictures of a measurement")
    options = parser.parse_args()
    jobs: dict[str, Figures] = {
        f"base, guidance {g:g}": {
            "trainer": f"base, guidance {g:g}", "settings": [], "iterations": 0, "seed": 0, "n": options.n, "guidance": g,
        }
        for g in GUIDED
    } | {
        f"{trainer}/seed{seed}": {
            "trainer": trainer, "settings": settings, "iterations": ITERATIONS, "seed": seed, "n": options.n, "guidance": 1.0,
        }
        for seed in range(3)
        for trainer, settings in TRAINERS.items()
    }  # fmt: skip
    run_jobs(partial(run, pictures=options.output.parent), jobs, options)


if __name__ == "__main__":
    main()
