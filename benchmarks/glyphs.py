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

from _harness import Figures, arguments, run_jobs
from _prompted import MEASURED, Prompted, base_and_trainers, shown

ITERATIONS, SHOWN = 20, 6
TRAINERS: dict[str, tuple[int, list[str]]] = {
    "nft": (ITERATIONS, ["algorithm={name: nft, baseline: group}"]),
    "score_action, forward": (ITERATIONS, [MEASURED]),
    "ddpo": (ITERATIONS, ["algorithm={name: ddpo, baseline: group}"]),
    "score_action": (ITERATIONS, ["algorithm={name: score_action}"]),
}
TASK = Prompted("glyphs", "ocr", ("reward", "reward_se", "held_out.ocr", "held_out.ocr_se", "diversity", "vendi"))


def run(trainer: str, settings: list[str], iterations: int, seed: int, n: int, guidance: float, *, pictures: Path) -> Figures:
    """A run, or without iterations the base under this guidance: figures on the training texts and on the unseen ones."""
    if not iterations:
        return TASK.measured(TASK.built(settings, iterations, seed, n), n, guidance, reference=True)
    tuner, figures = TASK.trained(settings, iterations, seed, n)
    if seed == 0:
        picture(tuner, trainer, seed, pictures / f"glyphs_{trainer.replace(', ', '_')}.png")
    return figures


def picture(tuner: Any, trainer: str, seed: int, path: Path) -> None:
    """Base and tuned model from the same noise, with the share of its characters that is read above each picture."""
    import matplotlib.pyplot as plt

    prompts, before, after = shown(tuner, SHOWN, seed)
    figure, axes = plt.subplots(2, SHOWN, figsize=(11, 2.6), layout="constrained")
    for line, (label, samples) in zip(axes, {"pretrained": before, f"after {trainer}": after}.items(), strict=True):
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
    run_jobs(partial(run, pictures=options.output.parent), base_and_trainers(TRAINERS, options.n), options)


if __name__ == "__main__":
    main()
