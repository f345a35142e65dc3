"""The report: self-contained, safe against what users write, and saying what the figures say."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commanding import train
from matplotlib.figure import Figure
from test_export import Own
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.algorithms._learner import Algorithm
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import load_recipe
from scoreaction.report.cluster_parts import clusters_figure, clusters_table
from scoreaction.report.comparison import comparison_headline
from scoreaction.report.curve_figures import band
from scoreaction.report.numbers import number, objectives, with_error
from scoreaction.report.page import write_report
from scoreaction.report.run import run_headline
from scoreaction.report.sample_figures import pairs_figure, samples_figure, tiled

SUMMARY = {
    "reward_base": 0.1, "reward_tuned": 2.0, "kl_nats": 1.2, "diversity_base": 2.0, "diversity_tuned": 1.0, "beta": 0.5,
    "held_out.legibility_base": 0.9, "held_out.legibility_tuned": 0.4, "optimum_reward": 2.1, "optimum_kl_nats": 1.3,
    "distance_to_optimum": 0.2, "distance_floor": 0.1, "distance_oracle": 0.15, "seconds": 12.0, "reward_queries": 100,
    "model_evaluations": 2000,
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page: its texts, the addresses it would fetch, whether tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_runs_page_holds_everything_it_shows(run: Path) -> None:
    text = write_report(run).read_text(encoding="utf-8")

    def whole(text: str) -> None:
        found = Page(text)
        assert found.open == []
        assert len(found.fetched) == 2 + 3, "samples before and after, and three curves"
        for source in found.fetched:
            kind, _, data = source.partition("base64,")
            assert kind == "data:image/png;"
            assert base64.b64decode(data).startswith(b"\x89PNG")
        assert "reward linear" in found.words
        assert "The words on this page" in found.words
        assert "hidden: 8" in found.words, "the recipe is there"

    accepts(
        whole,
        text,
        fetched_from_elsewhere=text.replace("data:image/png;base64,", "https://example.org/"),
        not_closed=text.replace("</table>", "", 1),
        without_its_recipe=text.replace("hidden: 8", ""),
    )


@pytest.mark.slow
def test_what_users_write_is_text_and_not_html(tmp_path: Path, run: Path) -> None:
    recipe = (run / "recipe.yaml").read_text()
    try:
        (run / "recipe.yaml").write_text("# <script>alert(1)</script>\n" + recipe)
        text = write_report(run).read_text()
    finally:
        (run / "recipe.yaml").write_text(recipe)

    def harmless(text: str) -> None:
        assert "<script>" not in text
        assert "&lt;script&gt;" in text

    accepts(harmless, text, as_written=text.replace("&lt;script&gt;", "<script>"), left_out=write_report(run).read_text())


@pytest.mark.slow
def test_an_unfinished_run_says_so(tmp_path: Path, run: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())

    def unfinished(folder: Path) -> None:
        assert "is not finished" in page(folder).words

    accepts(unfinished, tmp_path, finished=run)


@pytest.mark.slow
def test_a_run_started_from_python_has_a_page_and_no_commands(
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    def rightness(samples: torch.Tensor, conditions: None) -> torch.Tensor:
        return samples[:, 0]

    def write(output: Path, algorithm: Algorithm, **more: Any) -> None:
        model = sa.Model(Own(8), process=sa.VP(), predicts="v", shape=(2,))
        tuner = sa.Finetuner(
            model, reward=rightness, algorithm=algorithm, train=sa.Train(iterations=1, batch=4), sampler=sa.Sampler(steps=2),
            held_out={"up": lambda x, c: x[:, 1]}, output=output, evaluation=sa.Evaluation(n=16, steps=2), **more,
        )  # fmt: skip
        assert len(list(tuner)) == 1
        tuner.summary()

    write(tmp_path / "run", sa.DDPO())
    said = page(tmp_path / "run").words
    assert "DDPO fine-tuned the model Own on the reward rightness." in said
    assert "The held-out reward up, which was only measured" in said
    assert "minibatches: 4" in said
    write(tmp_path / "other", sa.DPOK())
    assert "DPOK fine-tuned" in page(tmp_path / "other").words
    for command in (["sample"], ["evaluate"]):
        assert "was started from Python" in refused(*command, tmp_path / "run")
    assert "was started from Python" in refused("train", "mixture", "--output", tmp_path / "run", "--resume")


@pytest.mark.slow
def test_a_run_on_a_module_of_ones_own_has_its_page_anywhere(tmp_path: Path, run: Path) -> None:
    """The module is not there where the page is made."""
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["reward"] = {"name": "nowhere.mine", "factor": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def of_its_own(folder: Path) -> None:
        assert "on the reward nowhere.mine." in page(folder).words

    accepts(of_its_own, tmp_path, of_the_shelf=run)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "model: {name: x}", "[1]"])
def test_a_recipe_that_is_none_is_one_line(text: str, tmp_path: Path, run: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"recipe\.yaml: is not what a run writes"):
        write_report(tmp_path)


@pytest.mark.slow
def test_a_folder_of_several_is_one_page(tmp_path: Path) -> None:
    for seed in (0, 1):
        assert train(tmp_path / f"run{seed}", f"train.seed={seed}", iterations=2) == 0

    def both(folder: Path) -> None:
        found = page(folder)
        assert found.words.count("DDPO on gaussian_mixture") == 2
        assert len(found.fetched) == 10, "two pictures and three curves of each"

    accepts(both, tmp_path, of_one=tmp_path / "run0")


def test_the_headline_says_what_the_figures_say() -> None:
    said = " ".join(run_headline(load_recipe("mixture").values(), [], SUMMARY))
    assert "Its mean reward went from 0.1 to 2." in said
    assert "1.2 nats (KL)" in said
    assert "50 % as diverse" in said
    assert "legibility, which was only measured, went from 0.9 to 0.4" in said
    assert "reward - 0.5 x KL, came to 1.4; the best possible is 1.45" in said
    close(objectives(SUMMARY)[0], 2.0 - 0.5 * 1.2, wrong_sign=2.0 + 0.5 * 1.2, without_beta=2.0 - 1.2)


def test_a_held_out_reward_of_the_trained_ones_name_is_told_apart() -> None:
    figures = {**SUMMARY, "held_out.shapes_base": 0.4, "held_out.shapes_tuned": 0.6}
    said = " ".join(run_headline(load_recipe("shapes").values(), [], figures))
    scorer = " ".join(run_headline(load_recipe("shapes", ["reward.name=shapes_scorer"]).values(), [], figures))

    def apart(said: str) -> None:
        assert "The held-out reward shapes (correct: true), which was only measured, went from 0.4 to 0.6" in said

    accepts(apart, said, names_differ=scorer)
    assert "The held-out reward shapes, which" in scorer


def test_a_comparison_names_who_left_the_data() -> None:
    def said(kl: float) -> str:
        mean = {**SUMMARY, "kl_nats": kl}
        group = {"label": "ddpo", "mean": mean, "standard_error": dict.fromkeys(mean)}
        return " ".join(comparison_headline({"groups": [group], "seeds": [0]}, load_recipe("mixture").values()))

    def warns(kl: float) -> None:
        assert "left the data behind" in said(kl)

    accepts(warns, 100.0, near_the_optimum=1.2)


@pytest.mark.slow
def test_a_comparison_page_shows_every_way(tmp_path: Path) -> None:
    from commanding import TINY

    from scoreaction.cli import main

    folder = tmp_path / "comparison"
    command = ["compare", "mixture", *TINY[1:], "train.iterations=2", "--algorithms", "ddpo,dpok", "--output", str(folder)]
    assert main(command) == 0
    found = page(folder)

    def all_shown(labels: list[str]) -> None:
        assert all(re.search(rf"{label}: reward from", found.words) for label in labels)

    accepts(all_shown, json.loads((folder / "comparison.json").read_text())["algorithms"], another=["ddpo", "sqdf"])
    assert len(found.fetched) == 3 + 5, "samples of three models, and five figures"


def test_bands_are_standard_errors() -> None:
    x = np.array([0.0, 1.0])
    grid, mean, error = band([(x, x), (x, x + 1), (x, x + 5)])
    close(mean[0], 2.0)
    close(error, 7**0.5 / 3**0.5, deviation=7**0.5, biased=(14 / 3 / 3) ** 0.5)
    grid, _, _ = band([(x, x), (2 * x + 0.5, x)])
    assert (grid[0], grid[-1]) == (0.5, 1.0), "only where every curve is"


def test_images_keep_their_place_in_the_sheet() -> None:
    images = np.stack([np.full((1, 2, 2), value) for value in (0.0, 0.25, 0.5)])
    sheet = tiled(images, 2)
    close(sheet.shape, (5, 5, 3), atol=0, in_a_row=tiled(images, 3).shape)
    corners = [sheet[i, j, 0] for i in (0, 3) for j in (0, 3)]
    close(corners, [0.0, 0.25, 0.5, 1.0], atol=0, by_columns=[sheet[i, j, 0] for j in (0, 3) for i in (0, 3)])


@pytest.mark.parametrize("shape", [(20, 1), (20, 2), (20, 16), (20, 1, 8, 8), (20, 3, 8, 8), (20, 5, 4)])
def test_samples_of_any_shape_are_drawn(shape: tuple[int, ...]) -> None:
    samples = np.random.default_rng(0).uniform(size=shape)
    figure = samples_figure({"before": samples, "after": samples})
    figure.canvas.draw()
    titles = [axis.get_title() for axis in figure.axes]
    alone = [axis.get_title() for axis in samples_figure({"before": samples}).axes]
    same(titles, ["before", "after"], alone=alone, exchanged=titles[::-1])
    assert all(axis.collections or axis.images or axis.patches for axis in figure.axes), "nothing is empty"


def test_pairs_of_pictures_stand_over_their_prompts() -> None:
    """Truth: the prompts in order, the picture before on the left and after on the right."""
    dark, light = np.zeros((3, 3, 4, 4)), np.full((3, 3, 4, 4), 0.5)
    prompts = ["a red circle", "two blue squares", "a very long prompt that has to be broken into more than one line"]

    def check(figure: Figure) -> None:
        titles = [axis.get_title().replace("\n", " ") for axis in figure.axes]
        assert titles[:3] == prompts
        assert not any(titles[3:])
        sheet = figure.axes[0].images[0].get_array()
        assert (float(sheet[1, 1, 0]), float(sheet[1, -2, 0])) == (0.0, 0.5), "inside their frames"

    right = pairs_figure(dark, light, prompts)
    right.canvas.draw()
    accepts(check, right, swapped=pairs_figure(light, dark, prompts), shuffled=pairs_figure(dark, light, prompts[::-1]))


@pytest.mark.parametrize("size", [(16, 64), (32, 32), (48, 24)], ids=str)
def test_prompts_stand_beneath_pictures_of_any_form(size: tuple[int, int]) -> None:
    """Truth: the boxes of picture and prompt as they are drawn. Twin: prompts that are higher."""
    pictures = np.zeros((3, 1, *size))

    def check(up: float) -> None:
        figure = pairs_figure(pictures, pictures, ["a text"] * 3)
        for axis in figure.axes[:3]:
            axis.title.set_y(axis.title.get_position()[1] + up)
        figure.canvas.draw()
        assert all(axis.title.get_window_extent().y1 < axis.images[0].get_window_extent().y0 for axis in figure.axes[:3])

    accepts(check, 0.0, higher=0.2 * size[1] / size[0])


def test_numbers_are_readable() -> None:
    values = (0.123456, 12345.6, 7, None, -0.00012)
    truth = ["0.1235", "12,346", "7", "", "-0.00012"]
    same([number(value) for value in values], truth, two_digits=[number(value, 2) for value in values])
    same(with_error(1461.2, 533.3), "1,461 ± 533", no_error=with_error(1461.2, None), exchanged=with_error(533.3, 1461.2))
    assert with_error(1.0, None) == "1"


def test_clusters_stand_in_the_text_and_in_a_table() -> None:
    """Effective clusters by exp; rows by their change. Twins: nats, rows in the file's order, a run without clusters."""
    clusters = [{"cluster": i, "share_base": 0.25, "share_tuned": t} for i, t in enumerate((0.2, 0.6, 0.1, 0.1))]
    figures = {**SUMMARY, "cluster_entropy_base": 1.386294, "cluster_entropy_tuned": 1.0889, "clusters": clusters}
    values = load_recipe("mixture").values()
    sentence = "Of 4 clusters its samples fill 2.97 in effect (1.09 nats), 4 before (1.39 nats)."
    same(
        sentence in " ".join(run_headline(values, [], figures)),
        True,
        without=sentence in " ".join(run_headline(values, [], SUMMARY)),
    )
    best = " ".join(run_headline(values, [], {**figures, "optimum_cluster_entropy": 0.382645}))
    same("nats); the optimum fills 1.47." in best, True, in_nats="the optimum fills 0.38" in best)
    rows = [row[0] for row in clusters_table(figures).rows]
    same(rows[:3], ["1", "2", "3"], in_order=["0", "1", "2"])
    heights = [bar.get_height() for bar in clusters_figure(clusters).axes[0].patches]
    close(heights, [0.25] * 4 + [0.2, 0.6, 0.1, 0.1], tuned_alone=[0.2, 0.6, 0.1, 0.1] * 2)
