"""The report's section about a model that was steered and not trained."""

from __future__ import annotations

from pathlib import Path

from scoreaction.errors import UserError
from scoreaction.report.numbers import change, number, steered_rows
from scoreaction.report.parts import Grid, Part, about, letters_of, picture, prompts_of, reward_name, samples_of
from scoreaction.report.tiles import tiles_of
from scoreaction.training.run_folder import RunFolder, read_description, read_summary


def is_steered(folder: Path) -> bool:
    """True for the folder that `scoreaction steer` writes: a summary of steered samples, and no log of a training."""
    place = RunFolder(folder)
    if not place.recipe_path.exists() or place.metrics_path.exists() or not place.summary_path.exists():
        return False
    return "method" in (read_summary(folder) or {})


def steered_part(folder: Path) -> Part:
    """The section about the samples of a model, as it is and steered."""
    from scoreaction.report.sample_figures import is_pictures, samples_figure

    (values, text), summary = read_description(folder), read_summary(folder)
    if summary is None:
        raise UserError(f"{folder}: has no summary.json; steer it again")
    kind = "base" if "reward_base" in summary else "tuned"
    model = f"the {'pretrained' if kind == 'base' else 'tuned'} model {values['model']['name']}"
    sentences = [
        f"The method {summary['method']} steered {model} by the reward {reward_name(values)}, without training it. The mean"
        f" reward went {change(summary[f'reward_{kind}'], summary['reward_steered'])}.",
        *[sentence for sentence in [about(values)] if sentence],
        f"A sample took {number(summary['evaluations_per_sample'])} evaluations of the network and"
        f" {number(summary['queries_per_sample'])} questions to the reward.",
    ]
    part = Part(title=f"Steered: {values['model']['name']} by {summary['method']}", headline=sentences, recipe=text)
    panels = {title: samples_of(folder, name) for title, name in (("as it is", kind), ("steered", "steered"))}
    there = {title: samples for title, samples in panels.items() if samples is not None}
    if len(there) == 2:
        caption = "Samples of the model as it is (left) and steered (right)."
        if is_pictures(there["steered"]):
            part.tiles.append(tiles_of("Samples", caption, there, prompts_of(folder, kind)))
        else:
            part.pictures.append(
                picture("Samples", caption, samples_figure(there, dict.fromkeys(there), letters_of(folder, kind)))
            )
    caption = "Means with their standard errors over samples."
    part.tables = [Grid("As it is and steered", caption, ["", kind, "steered"], steered_rows(summary))]
    return part
