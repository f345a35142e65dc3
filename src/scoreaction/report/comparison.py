"""The report's section about a comparison."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from scoreaction.diffusion.mixtures import Mixture
from scoreaction.report.numbers import change, comparison_rows, held_out_figures, number, objectives, with_error
from scoreaction.report.parts import (
    Grid,
    Part,
    Picture,
    about,
    exact_laws,
    letters_of,
    picture,
    prompts_of,
    reward_name,
    samples_of,
)
from scoreaction.report.tiles import tiles_of
from scoreaction.report.verdict import comparison_verdict
from scoreaction.training.run_folder import read_description
from scoreaction.types import Values


def comparison_part(folder: Path) -> Part:
    """The section about a comparison."""
    from scoreaction.report.curve_figures import comparison_figures

    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    first = folder / comparison["runs"][0]["folder"]
    values, text = read_description(first)
    several = len(comparison["seeds"]) > 1
    part = Part(
        title=f"Comparison on {Path(comparison['recipe']).stem}: {', '.join(group['label'] for group in comparison['groups'])}",
        headline=comparison_headline(comparison, values),
        recipe=text,
        recipe_of="its first run",
    )
    part.tables.append(_comparison_table(comparison))
    _show_samples(part, folder, comparison)
    band = " Bands: one standard error over seeds." if several else " One seed each, so there is no band."
    captions = {
        "reward": "Higher is better; further left is cheaper." + band,
        "kl": "How far each has moved from the pretrained model." + band,
        "reward_seconds": "The same against time on the machine that ran it." + band,
        "reward_kl": "Thin lines: the way during training; dots: the end, as measured. Up and to the left is better.",
    }
    titles = {"reward": "Reward", "kl": "KL", "reward_seconds": "Reward against time", "reward_kl": "Reward against KL"}
    for name, figure in comparison_figures(comparison, folder).items():
        title = titles.get(name, name.capitalize())
        caption = captions.get(name, "During training, on its own samples." + band)
        part.pictures.append(picture(title, caption, figure, wide=False))
    part.pictures += _frontiers(comparison)
    return part


def _frontiers(comparison: Values) -> list[Picture]:
    """Price of the reward for each algorithm, where a setting was swept."""
    from scoreaction.report.frontiers import frontier_figures

    setting = (comparison["sweep"] or "").partition("=")[0]
    bars = "bars: one standard error over seeds" if len(comparison["seeds"]) > 1 else "one seed each, so there are no bars"
    caption = (
        f"A point is the end of training at one {setting}, which stands beside it; a line joins those of one algorithm; {bars}."
    )
    return [
        picture(
            f"Reward against {name.removeprefix('frontier_').replace('kl', 'KL')}: the frontier", caption, figure, wide=False
        )
        for name, figure in frontier_figures(comparison).items()
    ]


def comparison_headline(comparison: Values, values: Values) -> list[str]:
    """Sentences about the results of all, best first."""
    seeds = len(comparison["seeds"])
    sentences = [
        f"{len(comparison['groups'])} methods fine-tune the model {values['model']['name']} on the reward"
        f" {reward_name(values)}, with the same number of iterations and samples each, {seeds} seed{'s' if seeds > 1 else ''}.",
        f"Verdict: {comparison_verdict(comparison)}.",
        *(text for text in [about(values)] if text),
    ]
    exact = all("distance_to_optimum" in group["mean"] for group in comparison["groups"])
    key, sign = ("distance_to_optimum", 1) if exact else ("reward_tuned", -1)
    sentences += [
        _sentence(group)
        for group in sorted(comparison["groups"], key=lambda group: sign * group["mean"].get(key, sign * math.inf))
    ]
    if exact:
        mean = comparison["groups"][0]["mean"]
        beta, reward, kl = mean["beta"], number(mean["optimum_reward"], 3), number(mean["optimum_kl_nats"], 3)
        oracle, floor = number(mean["distance_oracle"], 3), number(mean["distance_floor"], 3)
        sentences.append(
            f"For scale: the optimum, where reward - {beta:g} x KL is highest, has reward {reward} at a KL of {kl} nats; the"
            f" exact optimal policy is at distance {oracle} with this sampler, and {floor} is the smallest that can be told"
            " from perfect."
        )
    return sentences


def _sentence(group: Values) -> str:
    """The result of one algorithm, or of one value of the sweep, in a sentence."""
    mean, error = group["mean"], group["standard_error"]
    if not {"reward_base", "reward_tuned", "kl_nats"} <= mean.keys():
        return f"{group['label']}: no finite figures of {'the run' if group['n'] == 1 else 'all its runs'}: it diverged."
    rose = change(mean["reward_base"], mean["reward_tuned"])
    sentence = f"{group['label']}: reward {rose} at a KL of {number(mean['kl_nats'], 3)} nats"
    if "distance_to_optimum" in mean:
        sentence += f", distance to the optimum {with_error(mean['distance_to_optimum'], error.get('distance_to_optimum'), 3)}"
    for name, before, after in held_out_figures(mean):
        sentence += f", held-out {name} {change(before, after)}"
    return f"{sentence}, in {mean['seconds']:.0f} seconds."


def _comparison_table(comparison: Values) -> Grid:
    groups = comparison["groups"]
    rows = comparison_rows(comparison)
    if all("distance_to_optimum" in group["mean"] for group in groups):
        values = [[number(value) for value in objectives(group["mean"])] for group in groups]
        rows.insert(3, ["reward - beta x KL (best possible)", *(f"{goal} ({best})" for goal, best in values)])
    caption = "Measured after training; mean ± standard error over seeds where there are several."
    return Grid("Results", caption, ["", *(group["label"] for group in groups)], rows)


def _show_samples(part: Part, folder: Path, comparison: Values) -> None:
    """Adds the base model's samples and those of each tuned model, first seed."""
    from scoreaction.report.sample_figures import is_pictures, samples_figure

    first = {
        group["label"]: next(r for r in comparison["runs"] if r["label"] == group["label"]) for group in comparison["groups"]
    }
    panels: dict[str, NDArray[Any]] = {}
    laws: dict[str, Mixture | None] = {}
    for label, record in first.items():
        place = folder / record["folder"]
        data, optimum = exact_laws(read_description(place)[0], record["summary"])
        base, tuned = samples_of(place, "base"), samples_of(place, "tuned")
        if base is not None and tuned is not None:
            panels.setdefault("before", base)
            laws.setdefault("before", data)
            panels[label], laws[label] = tuned, optimum
    caption = "The same noise turned into samples by the base model and by each tuned model (first seed)."
    if is_pictures(next(iter(panels.values()))):
        part.tiles.append(tiles_of("Samples", caption, panels, prompts_of(folder / comparison["runs"][0]["folder"])))
        return
    if any(law is not None and law.dimension == 2 for law in laws.values()):
        caption += " Red contours: the data law (before) and the optimum (after)."
    part.pictures.append(
        picture("Samples", caption, samples_figure(panels, laws, letters_of(folder / comparison["runs"][0]["folder"])))
    )
