"""The report's section about a few-step student of a run."""

from __future__ import annotations

import json
from pathlib import Path

from scoreaction.errors import UserError
from scoreaction.report.numbers import number, with_error
from scoreaction.report.parts import Grid, Part, about, picture, reward_name, samples_of
from scoreaction.training.run_folder import STUDENT, read_description
from scoreaction.types import Values


def is_student(folder: Path) -> bool:
    """True for the folder that `scoreaction distill RUN` writes."""
    return (folder / STUDENT).is_file()


def student_part(folder: Path) -> Part:
    """The section about a student: beside its teacher, and beside plain solvers of as many steps."""
    from scoreaction.report.sample_figures import samples_figure

    values, text = read_description(folder)
    try:
        figures: Values = json.loads((folder / STUDENT).read_text(encoding="utf-8"))
        rows, kept = figures["rows"], figures["reward_kept"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STUDENT}: is damaged; distill again") from error
    share = "" if kept is None else f" and keeps {100 * kept:.0f} % of its gain in the reward {reward_name(values)}"
    sentences = [
        f"A student of {figures['steps']} steps follows the policy of {figures['of']}{share}.",
        *[sentence for sentence in [about(values)] if sentence],
        "A deterministic sampler has no path KL: the KL beside the teacher is that of its policy.",
    ]
    part = Part(title=f"A student on {values['model']['name']}", headline=sentences, recipe=text)
    panels = {title: samples_of(folder, kind) for title, kind in (("pretrained", "base"), ("student", "tuned"))}
    there = {title: samples for title, samples in panels.items() if samples is not None}
    if len(there) == 2:
        caption = "The pretrained model under the student's sampler (left) and the student (right), from the same noise."
        part.pictures.append(picture("Samples", caption, samples_figure(there, dict.fromkeys(there))))
    known = dict.fromkeys(key for row in rows for key in row if not key.endswith("_se") and key != "vendi")
    cells = [[_cell(row, key) for key in known] for row in rows]
    caption = "Means with their standard errors; rms is the distance to the teacher's samples of the same noise."
    part.tables = [Grid("What it kept", caption, [key.replace("_", " ") for key in known], cells)]
    return part


def _cell(row: Values, key: str) -> str:
    value = row.get(key)
    if value is None or isinstance(value, str | int):
        return "" if value is None else str(value)
    error = row.get(f"{key}_se")
    return number(value, 3) if error is None else with_error(value, error, 3)
