"""One self-contained HTML page about a run, a comparison, or a folder that holds several of them."""

from __future__ import annotations

from pathlib import Path

from scoreaction.disk import check_writable, write_whole
from scoreaction.errors import UserError
from scoreaction.report.comparison import comparison_part
from scoreaction.report.parts import Part
from scoreaction.report.run import run_part
from scoreaction.report.steered import is_steered, steered_part
from scoreaction.report.student import is_student, student_part
from scoreaction.training.run_folder import RunFolder, check_folder

GLOSSARY = {
    "model": "A diffusion or flow model: it starts from pure noise and removes it step by step until a sample is left.",
    "base, tuned": "The pretrained model as it was, and the same model after fine-tuning.",
    "reward": "The score that fine-tuning raises: one number per sample, higher is better.",
    "KL (nats)": "How far the tuned model has moved from the base, over the whole way from noise to sample; 0 is no change."
    " A high reward at a high KL often means that the reward was exploited rather than met.",
    "beta": "The price of KL in units of reward: training maximises reward - beta x KL. A small beta allows large changes.",
    "reward - beta x KL": "What training maximises; the optimum has the highest value there is.",
    "diversity": "The mean distance between two samples of one prompt. If it falls to nothing, the model has collapsed."
    " It is not known where no prompt was drawn twice: then raise evaluation.n to twice the number of prompts.",
    "vendi": "The effective number of different samples (Vendi score): 1 where all are alike.",
    "held-out": "A reward that is measured and never trained on. If it falls while the reward rises, the gain is not real.",
    "optimum": "The best any method can do at this beta: the data law times exp(reward/beta). Known exactly on small tasks.",
    "distance to the optimum": "Sliced Wasserstein distance between samples of the tuned model and of the optimum, of tokens"
    " the total variation of their laws; 0 is equal.",
    "floor": "The distance between two sets of samples of the optimum itself: no method can be told from perfect below it.",
    "oracle": "The distance that the exact optimal policy reaches under the same sampler: what is left is the sampler's error.",
    "steered": "Samples drawn towards a high reward without training: the reward is asked on the way from noise to sample.",
    "gap to the optimum": "KL in nats from the tuned policy to the best possible one, estimated without knowing the optimum.",
    "model evaluations": "How often the network was asked about one sample at one time: a cost that no machine changes.",
    "eta": "How much fresh noise a sampler adds at each step: 1 is the full random process, 0 a deterministic one.",
    "standard error": "How uncertain a mean is: the truth lies within two standard errors about 95 times out of 100.",
}


def write_report(folder: Path) -> Path:
    """Writes report.html into the folder of a run, of a comparison, or of several of them.

    UserError where there is none.
    """
    import jinja2

    folders = report_folders(folder)
    check_writable(folder, "RUN_OR_COMPARISON")
    parts = [_part(path) for path in folders]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "report.html.jinja").read_text(encoding="utf-8"))
    title = parts[0].title if len(parts) == 1 else "Fine-tuning with scoreaction"
    path = folder / "report.html"
    write_whole(path, template.render(title=title, parts=parts, glossary=GLOSSARY))
    return path


def report_folders(folder: Path) -> list[Path]:
    """The folder itself where it is a run or a comparison, otherwise those of its folders that are."""
    remedy = "give what train printed after run:, or compare after comparison:"
    check_folder(folder, remedy)
    if _reportable(folder):
        return [folder]
    inside = sorted(path for path in folder.glob("*") if _reportable(path))
    if not inside:
        raise UserError(f"{folder}: neither a run nor a comparison (no metrics.jsonl or comparison.json in it); {remedy}")
    return sorted(inside, key=lambda path: not (path / "comparison.json").exists())


def _part(folder: Path) -> Part:
    if (folder / "comparison.json").exists():
        return comparison_part(folder)
    if is_student(folder):
        return student_part(folder)
    return steered_part(folder) if is_steered(folder) else run_part(folder)


def _reportable(folder: Path) -> bool:
    place = RunFolder(folder)
    known = (folder / "comparison.json").exists() or is_steered(folder) or is_student(folder)
    return known or (place.description.exists() and place.metrics_path.exists())
