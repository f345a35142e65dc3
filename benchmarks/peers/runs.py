"""TRL's DDPO and AlignProp on the shapes, beside what of ours has the same settings, and beside what leads there.

    python -m benchmarks.peers                 # results/peers.csv: three seeds of TRL's and of ours, hours on one core; resumes
    python -m benchmarks.peers --stage tune    # results/peers_tune.csv: TRL's rates, baselines and clips, one seed each
    python -m benchmarks.peers --stage work    # results/peers_work.csv: CPU seconds an iteration at equal settings

TRL 0.12.2 runs in an environment of its own, which the first run makes from
requirements.txt in `--environment`. It loads the shipped weights, with an adapter of the same rank on the same layers,
12 steps, nothing guided, the text encoder's names turned back into those of its time. What it trained is then measured here, as
benchmarks/shapes.py measures ours. `ddpo, masked` leaves out the loss of the last step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from _harness import Figures, arguments, built, in_stage, run_jobs
from _prompted import BATCH, MEASURED
from peers.watch import Watch
from shapes import BLACK_BOX, TASK, TRAINERS

HERE, SOURCE = Path(__file__).parent, Path(__file__).parents[2] / "src"
RANK, STEPS = 16, 12
FIXED = [f"train.batch={BATCH}", "sampler.guidance=1", "train.held_out_rows=64", "reward.name=shapes", *TASK.fixed]
SHAPES = {name: settings for name, (_, settings) in TRAINERS.items()} | {"score_action": [*BLACK_BOX, MEASURED]}
METHODS: dict[str, dict[str, Any]] = {
    "ddpo": {"reward": "program", "rows": 16, "clip": 1e-4, "min_count": 4},
    "ddpo, masked": {"reward": "program", "rows": 16, "clip": 1e-4, "min_count": 4},
    "alignprop": {"reward": "scorer", "last": STEPS},
}
RATES, CHOSEN = (3e-4, 1e-3, 3e-3), {"ddpo": 1e-3, "ddpo, masked": 3e-3, "ddpo, masked, clip 1e-3": 3e-3, "alignprop": 1e-3}
OTHERWISE: dict[str, dict[str, Any]] = {", batch": {"min_count": 0}, ", clip 1e-3": {"clip": 1e-3}}
TRAINED = METHODS | {"ddpo, masked, clip 1e-3": METHODS["ddpo, masked"] | OTHERWISE[", clip 1e-3"]}
TIMED = 4
OURS = ["sampler.off_below=0", "sampler.grid=scheduler", "sampler.steps=12"]
PPO, BACK = [*OURS, "algorithm={name: ddpo, minibatches: 4}"], [*OURS, "reward.name=shapes_scorer"]
WORK: dict[tuple[str, str], tuple[list[str], dict[str, Any] | None]] = {  # settings of ours, or what TRL is told
    ("DDPO", "TRL"): ([], {**METHODS["ddpo"], "method": "ddpo", "lr": 1e-3}),
    ("DDPO", "ours, 16 rows a call"): ([*PPO, "train.max_rows=16"], None),
    ("DDPO", "ours"): (PPO, None),
}
for name, last, held in (("DRaFT-1", 1, 64), ("DRaFT-12", STEPS, 1024)):
    WORK[name, "TRL"] = [], {**METHODS["alignprop"], "last": last, "method": "alignprop", "lr": 1e-3}
    WORK[name, "ours"] = [*BACK, f"algorithm={{name: draft, last: {last}, beta: 0}}", f"train.max_rows={held}"], None
    WORK[name, "ours, checkpoints"] = (
        [
            *BACK,
            f"algorithm={{name: draft, last: {last}, beta: 0, gradient_checkpointing: true}}",
            "train.max_rows=64",
        ],
        None,
    )  # as TRL has it


def environment(folder: Path) -> Path:
    """TRL's Python, made where it is not there yet."""
    python, whole = folder / "bin" / "python", folder / "installed"
    if not whole.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "requirements.txt")], check=True)
        whole.touch()
    return python


def older_pipeline(folder: Path) -> Path:
    """The shipped pipeline as transformers 4 reads it: another tokenizer's class, and the text encoder's names of then."""
    from safetensors.torch import load_file, save_file

    from scoreaction.tasks.shapes.scorer import shipped

    made = folder / "pipeline"
    shutil.copytree(shipped(), made)
    index = made / "model_index.json"
    index.write_text(index.read_text().replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'))
    weights = made / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": value for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    return made


def trained(run: dict[str, Any], folder: Path, python: Path) -> list[Figures]:
    """What TRL counted at the epochs that are kept; their adapters are in the folder."""
    from scoreaction.recipes.prompts import prompt_list

    told = {"rank": RANK, "steps": STEPS, "batch": BATCH, "prompts": prompt_list("shapes"), "folder": str(folder), **run}
    told["pipeline"] = str(older_pipeline(folder))
    settings = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    subprocess.run([str(python), str(HERE / "trl_run.py"), json.dumps(told)], check=True, env=settings, stdout=sys.stderr)
    return json.loads((folder / "figures.json").read_text())


def taken_over(model: Any, file: Path) -> None:
    """Puts TRL's adapter into a model that has one of the same form."""
    from safetensors.torch import load_file

    tensors = {f"core.{name.removeprefix('module.')}": value for name, value in load_file(file).items()}
    assert set(tensors) == set(model.parameters), sorted(set(tensors) ^ set(model.parameters))[:2]
    for name, parameter in model.parameters.items():
        parameter.data.copy_(tensors[name])
    model.average = None


def run(
    method: str, lr: float | None, epochs: int, kept: list[int], seed: int, n: int, *, environment_of: Path, **more: Any
) -> Figures:
    """A run of TRL, measured here at its end; its curve is accuracy and KL at the epochs that are kept."""
    if method.startswith("ours, "):
        return run_of_ours(method, kept, seed, n)
    told = TRAINED[method] | more | {"method": method, "lr": lr, "epochs": epochs, "kept": kept, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counted = trained(told, folder, environment(environment_of))
        tuner, curve = built("shapes", *FIXED, f"evaluation.n={n}"), []
        for figures in counted:
            taken_over(tuner.model, folder / f"epoch{figures['epochs']}.safetensors")
            curve.append(figures | {"pictures": figures["epochs"] * BATCH} | TASK.accuracy_and_kl(tuner, n // 2))
        return counted[-1] | TASK.measured(tuner, n) | {"kl_nats": curve[-1]["kl_nats"], "curve": curve}


def run_of_ours(method: str, kept: list[int], seed: int, n: int, **_: Any) -> Figures:
    """A run of benchmarks/shapes.py, counted and measured as TRL's are: its seconds are those of training alone."""
    settings = [*FIXED, *SHAPES[method.removeprefix("ours, ")], f"train.seed={seed}", f"evaluation.n={n}"]
    tuner, curve = built("shapes", *settings, f"train.iterations={kept[-1]}"), []
    spent, runs = {"cpu_seconds": 0.0, "seconds": 0.0}, iter(tuner)
    for iteration in range(1, kept[-1] + 1):
        watch = Watch()
        metrics = next(runs)
        watch.end()
        spent = {key: value + watch.figures()[key] for key, value in spent.items()}
        if iteration in kept:
            done = {"epochs": iteration, "pictures": iteration * BATCH, "evaluations": tuner.counts()["model_evaluations"]}
            curve.append({**done, "reward": metrics["reward_mean"], **spent, **TASK.accuracy_and_kl(tuner, n // 2)})
    return {**curve[-1], **TASK.measured(tuner, n), "kl_nats": curve[-1]["kl_nats"], "curve": curve}


def timed(method: str, library: str, repeat: int, *, environment_of: Path) -> Figures:
    """CPU seconds and evaluations of an iteration, and the peak of memory beyond the built run, of ours or of TRL."""
    settings, told = WORK[method, library]
    if told is None:
        counted = counted_here([*FIXED, *settings, f"train.iterations={TIMED}", "evaluation.n=2"])
    else:
        with tempfile.TemporaryDirectory() as name:
            run = {**told, "epochs": TIMED, "kept": [1, TIMED], "seed": repeat}
            counted = trained(run, Path(name), environment(environment_of))
    first, last = counted[0], counted[-1]
    each = {key: (last[key] - first[key]) / (TIMED - 1) for key in ("cpu_seconds", "seconds", "evaluations")}
    return each | {"memory_mib": last["memory_mib"]}


def counted_here(settings: list[str]) -> list[Figures]:
    """Iterations of ours, counted as trl_run.py counts TRL's."""
    tuner = built("shapes", *settings)
    watch = Watch()
    figures = [{"evaluations": tuner.counts()["model_evaluations"]} | watch.figures() for _ in tuner]
    watch.end()
    return figures


def jobs_of(stage: str, n: int) -> dict[str, Figures]:
    """The runs of a stage by name."""
    if stage == "work":
        return {
            f"{method}/{library}/{repeat}": {"method": method, "library": library, "repeat": repeat}
            for repeat in range(3)
            for method, library in WORK
        }
    if stage == "tune":
        plain: dict[str, dict[str, Any]] = {"": {}}
        return {
            f"{method}/{lr}{name}": {"method": method, "lr": lr, "epochs": 20, "kept": [20], "seed": 7, "n": 240, **more}
            for method in METHODS
            for lr in RATES
            for name, more in (plain | OTHERWISE if method == "ddpo, masked" else plain).items()
        }
    return {
        f"{method}/seed{seed}": {
            "method": method, "lr": CHOSEN[method], "epochs": 40, "kept": [10, 20, 30, 40], "seed": seed, "n": n,
        }
        for seed in range(3)
        for method in TRAINED
    } | {
        f"ours, {method}/seed{seed}": {
            "method": f"ours, {method}", "lr": None, "epochs": 20, "kept": [10, 20], "seed": seed, "n": n,
        }
        for seed in range(3)
        for method in ("score_action", "nft", "ddpo")
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = arguments(__doc__ or "", "peers")
    parser.add_argument("--stage", choices=["tune", "work", "main"], default="main")
    parser.add_argument(
        "--environment", type=Path, default=HERE.parents[1] / "build" / "trl", help="folder of TRL's environment"
    )
    parser.add_argument("--n", type=int, default=480, help="pictures of a measurement")
    options = parser.parse_args()
    if options.stage != "main":
        in_stage(options)
    environment(options.environment)
    job = timed if options.stage == "work" else run
    run_jobs(partial(job, environment_of=options.environment), jobs_of(options.stage, options.n), options)
