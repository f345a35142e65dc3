"""The report's section about one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from scoreaction import catalog
from scoreaction.errors import UserError
from scoreaction.recipes.prompts import prompt_list
from scoreaction.report.cluster_parts import clusters_figure, clusters_sentence, clusters_table
from scoreaction.report.numbers import (
    before_and_after,
    change,
    held_out_figures,
    number,
    objectives,
    steered_rows,
    with_error,
)
from scoreaction.report.parts import (
    Grid,
    Part,
    Picture,
    about,
    exact_laws,
    held_out_title,
    letters_of,
    picture,
    prompts_of,
    reward_name,
    samples_of,
)  # fmt: skip
from scoreaction.report.sample_figures import SHEET
from scoreaction.report.tiles import tiles_of
from scoreaction.report.verdict import run_verdict
from scoreaction.training.run_folder import RunFolder, read_description, read_json_lines, read_summary
from scoreaction.types import Values

SHOWN = 20
"""Prompts in the table at most."""


def run_part(folder: Path) -> Part:
    """The section about one run, finished or not."""
    from scoreaction.report.curve_figures import run_figure

    values, text = read_description(folder)
    records, summary = read_json_lines(RunFolder(folder).metrics_path), read_summary(folder)
    if not records:
        raise UserError(f"{folder}: no iteration is logged yet; train it first")
    part = Part(
        title=f"{display_name(values['algorithm']['name'])} on {values['model']['name']}",
        headline=run_headline(values, records, summary),
        recipe=text,
    )
    panels = {title: samples_of(folder, kind) for title, kind in (("before", "base"), ("after", "tuned"))}
    there = {title: samples for title, samples in panels.items() if samples is not None}
    if summary is not None and len(there) == len(panels):
        show_samples(part, folder, values, summary, there)
    caption = "Each iteration's own samples, against the number of network evaluations. Reward should rise, KL stay moderate."
    part.pictures.append(picture("How training went", caption, run_figure(records, summary)))
    if summary is not None and "clusters" in summary:
        caption = "How the samples of the base model and of the tuned one fall into the clusters of the run's file."
        part.pictures.append(picture("Clusters", caption, clusters_figure(summary["clusters"]), wide=False))
    if summary is not None:
        part.cards = run_cards(values, summary)
        part.tables = run_tables(summary)
    return part


def display_name(algorithm: str) -> str:
    """Name for people: the first line of an algorithm's file up to the colon, else the name itself."""
    path = catalog.files("algorithm").get(algorithm)
    return algorithm if path is None else catalog.summary(path).partition(":")[0] or algorithm


def run_headline(values: Values, records: list[Values], summary: Values | None) -> list[str]:
    """Sentences about the training and its result."""
    model, reward = values["model"]["name"], reward_name(values)
    name = display_name(values["algorithm"]["name"])
    parts = [text for text in [about(values)] if text]
    if summary is None:
        means = [record["reward_mean"] for record in records if "reward_mean" in record]  # late rewards lack at first
        so_far = f", mean reward {change(means[0], means[-1])} so far" if means else ""
        return [
            f"{name} is fine-tuning the model {model} on the reward {reward}: iteration {records[-1]['iteration']} of"
            f" {values['train']['iterations']}{so_far}."
            " The run is not finished, so nothing is measured yet.",
            *parts,
        ]
    sentences = [
        f"{name} fine-tuned the model {model} on the reward {reward}. Its mean reward went"
        f" {change(summary['reward_base'], summary['reward_tuned'])}.",
        f"Verdict: {run_verdict(summary)}.",
        *parts,
    ]
    base, tuned = summary["diversity_base"], summary["diversity_tuned"]
    diverse = f", and its samples are {100 * tuned / base:.0f} % as diverse as before" if base and tuned is not None else ""
    sentences.append(f"For that it moved {number(summary['kl_nats'], 3)} nats (KL) away from the pretrained model{diverse}.")
    if "clusters" in summary:
        sentences.append(clusters_sentence(summary))
    for key, before, after in held_out_figures(summary):
        title = held_out_title(values, key)
        sentences.append(f"The held-out reward {title}, which was only measured, went {change(before, after)}.")
    if "selected_iteration" in summary:
        sentences.append(
            f"All of this is of the weights after iteration {summary['selected_iteration']}, the best by"
            f" {values['train']['select']}."
        )
    if "distance_to_optimum" in summary:
        goal, best = (number(value, 3) for value in objectives(summary))
        sentences.append(f"What it maximises, reward - {summary['beta']:g} x KL, came to {goal}; the best possible is {best}.")
        oracle, floor = (number(summary[f"distance_{name}"], 3) for name in ("oracle", "floor"))
        away = with_error(summary["distance_to_optimum"], summary.get("distance_to_optimum_se"), 3)
        if is_total_variation(summary):
            sentences.append(
                f"Its law is at a total variation of {away} from the known optimum's: 0 is equal, 1 has nothing in common."
            )
        else:
            sentences.append(
                f"Its samples are at distance {away} from the known optimum; the exact optimal policy reaches {oracle} with the"
                f" same sampler, and {floor} is the smallest that this many samples can show."
            )
    if "optimum_rows" in summary:
        rows, error = number(summary["optimum_rows"], 3), number(summary["optimum_reward_se"], 2)
        sentences.append(
            f"The data law is a density of the table's rows. The optimum rests on {rows} of them in effect, so that its reward"
            f" is that of the law behind the rows to within a standard error of {error} only."
        )
    sentences.append(
        f"It took {summary['seconds']:.0f} seconds, {summary['reward_queries']:,} questions to the reward and"
        f" {summary['model_evaluations']:,} evaluations of the network."
    )
    return sentences


def is_total_variation(summary: Values) -> bool:
    """True for tokens, whose laws are enumerated: no two samples are compared, so there is neither floor nor oracle."""
    return "objective_gap" in summary


def run_cards(values: Values, summary: Values) -> list[tuple[str, str, str]]:
    """The figures to see first: label, value, small print."""
    cards = [
        ("reward", f"{number(summary['reward_base'], 3)} → {number(summary['reward_tuned'], 3)}", "base → tuned"),
        ("KL", f"{number(summary['kl_nats'], 3)} nats", "from the pretrained model"),
    ]
    if summary["diversity_base"] is not None:
        both = f"{number(summary['diversity_base'], 3)} → {number(summary['diversity_tuned'], 3)}"
        cards.append(("diversity", both, "base → tuned"))
    for key, before, after in held_out_figures(summary):
        both = f"{number(before, 3)} → {number(after, 3)}"
        cards.append((held_out_title(values, key), both, "held out: only measured"))
    if "distance_to_optimum" in summary:
        small = f"floor {number(summary['distance_floor'], 3)}, oracle {number(summary['distance_oracle'], 3)}"
        if is_total_variation(summary):
            small = "total variation: 0 is equal, 1 has nothing in common"
        away = with_error(summary["distance_to_optimum"], summary.get("distance_to_optimum_se"), 3)
        cards.append(("distance to the optimum", away, small))
    if "objective_gap" in summary:
        small = f"of reward - {summary['beta']:g} x KL; 0 is the best possible"
        cards.append(("gap to the optimum", with_error(summary["objective_gap"], summary.get("objective_gap_se"), 3), small))
    return cards


def run_tables(summary: Values) -> list[Grid]:
    """Everything that was measured; on exact tasks also the optimum."""
    rows = [[key.removeprefix("held_out.").replace("_", " "), *cells] for key, *cells in before_and_after(summary)]
    rows.append(["KL (nats)", "0", with_error(summary["kl_nats"], summary.get("kl_nats_se"))])
    if "gap_nats" in summary:
        rows.append(["gap to the optimum (nats)", "", with_error(summary["gap_nats"], summary["gap_nats_se"])])
    tables = [Grid("Before and after", "Means with their standard errors over samples.", ["", "base", "tuned"], rows)]
    if "reward_steered" in summary:
        caption = "The tuned model as it is, and steered by the reward while it samples."
        tables.append(Grid("Steered", caption, ["", "tuned", "steered"], steered_rows(summary)))
    if any("accuracy_tuned" in row for row in summary.get("by_label", {}).values()):
        tables.append(labels_table(summary["by_label"]))
    if "clusters" in summary:
        tables.append(clusters_table(summary))
    if len(summary.get("prompts", [])) > 1:
        tables.append(prompts_table(summary["prompts"]))
    if "distance_to_optimum" in summary:
        goal, best = (number(value) for value in objectives(summary))
        tuned = [number(summary[key]) for key in ("reward_tuned", "kl_nats")]
        optimum = [number(summary[key]) for key in ("optimum_reward", "optimum_kl_nats")]
        oracle, floor = (number(summary[f"distance_{name}"]) for name in ("oracle", "floor"))
        away = with_error(summary["distance_to_optimum"], summary.get("distance_to_optimum_se"))
        tables.append(
            Grid(
                "Against the optimum",
                "On this task the best possible result is known in closed form.",
                ["", "reward", "KL (nats)", f"reward - {summary['beta']:g} x KL", "distance to the optimum"],
                [
                    ["tuned", *tuned, goal, away],
                    ["optimum", *optimum, best, f"{floor} (floor)"],
                    ["exact policy, same sampler (oracle)", "", "", "", oracle],
                ],
            )
        )
    return tables


def labels_table(by_label: dict[str, Values]) -> Grid:
    """Accuracy and F1 of each label, as a held-out judge reads it, and the KL of its prompts."""
    keys = ("accuracy_base", "accuracy_tuned", "f1_base", "f1_tuned", "kl_nats")
    rows = [[label, *(number(row.get(key), 3) for key in keys)] for label, row in by_label.items()]
    caption = (
        "Share of the samples asked for with a label in which the held-out judge reads it, F1 of the label, KL of its prompts."
    )
    return Grid("By label", caption, ["", "accuracy, base", "tuned", "F1, base", "tuned", "KL (nats)"], rows)


def prompts_table(prompts: list[Values]) -> Grid:
    """The mean reward of each prompt; of many prompts those that gained most and least."""
    gained = sorted(prompts, key=lambda p: p["reward_tuned"] - p["reward_base"], reverse=True)
    caption = "Mean reward of each prompt, the one that gained most first."
    if len(gained) > SHOWN:
        caption = f"Mean reward of the prompts that gained most and least, of {len(gained)}; summary.json has all."
        gained = [*gained[: SHOWN // 2], *gained[-SHOWN // 2 :]]
    rows = [
        [
            p["prompt"],
            *(number(p[f"reward_{kind}"]) for kind in ("base", "tuned")),
            number(p["reward_tuned"] - p["reward_base"]),
        ]
        for p in gained
    ]
    return Grid("By prompt", caption, ["", "base", "tuned", "gained"], rows)


def show_samples(part: Part, folder: Path, values: Values, summary: Values, panels: dict[str, NDArray[Any]]) -> None:
    """Adds the samples of a run to its section: pictures large, with their prompts, and whatever else as a figure."""
    from scoreaction.report.sample_figures import is_pictures, samples_figure

    first = next(iter(panels.values()))
    if not is_pictures(first):
        part.pictures.append(_samples_picture(values, summary, panels, letters_of(folder)))
        return
    caption = "The same random noise turned into pictures by the base model (left) and by the tuned model (right)."
    part.tiles.append(tiles_of("Before and after", caption, panels, prompts_of(folder)))
    if len(first) > len(part.tiles[0].tiles):
        n = min(len(first), SHEET)
        caption = f"The first {n} of the {len(first)} pictures that the run kept (samples/), small, to see how alike they are."
        part.pictures.append(picture("More of them", caption, samples_figure(panels)))


def _samples_picture(values: Values, summary: Values, panels: dict[str, NDArray[Any]], letters: str | None) -> Picture:
    from scoreaction.report.sample_figures import samples_figure
    from scoreaction.report.token_figures import is_tokens

    data, optimum = exact_laws(values, summary)
    laws = {"before": data, "after": optimum}
    caption = "The same random noise turned into samples by the base model (left) and by the tuned model (right)."
    first = next(iter(panels.values()))
    if data is not None and first[0].size == 2:
        caption += " Red contours: the data law (left) and the optimum (right). A good run fills the contours and nothing else."
    elif is_tokens(first):
        caption = (
            "The same random numbers turned into sequences by the base model (left) and by the tuned model (middle), a row a"
            " sequence and a colour a token. Frames: tokens that tuning changed. Right: how often each token comes."
        )
    elif first[0].size > 2:
        caption += f" Shown are the first two of {first[0].size} coordinates."
    prompts = prompt_list(values["prompts"])
    if prompts:
        texts = "; ".join(dict.fromkeys(prompts[:10]))
        caption += f" Prompts, in this order and again from the start: {texts}{' ...' if len(prompts) > 10 else ''}."
    return picture("Before and after", caption, samples_figure(panels, laws, letters))
