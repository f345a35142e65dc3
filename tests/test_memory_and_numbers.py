"""Truth: the run whose memory sufficed, JSON without NaN, and texts as they are."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from tuning import SCORE_ACTION, SMOOTH, Net, tune
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.networks.memory import fitting, is_out_of_memory
from scoreaction.recipes.recipe import load_recipe
from scoreaction.report.axes import new_figure, plain_legend
from scoreaction.report.model_card import write_card
from scoreaction.report.sample_figures import pairs_figure, samples_figure, save_samples
from scoreaction.training.errors import TrainingError
from scoreaction.yaml_text import parse_yaml


class Small(Net):
    """A network that has memory for a few rows only, with a graph for fewer."""

    rows = 1000

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        if len(x) > (self.rows // 2 if torch.is_grad_enabled() else self.rows):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(x, t, cond)


def small_model(rows: int) -> sa.Model:
    model = sa.Model(Small(), process=sa.VP(), predicts="eps", shape=(2,))
    model.net.rows = model.reference_net.rows = rows
    return model


@pytest.mark.parametrize("algorithm", [sa.DDPO(), SCORE_ACTION, sa.SQDF(updates=2, rows=16)], ids=lambda a: a.name)
def test_out_of_memory_halves_the_rows_and_keeps_the_batch(algorithm: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Truth: the run that had memory, to rounding, with the same counts; the twin has a smaller batch."""

    def run(rows: int, **more: Any) -> tuple[list[dict[str, float]], int]:
        model = small_model(rows)
        records = list(tune(algorithm, model=model, reward=SMOOTH, iterations=2, **more))
        assert model.max_rows is not None
        return records, model.max_rows

    (truth, large), (other, _) = run(1000), run(1000, batch=12)
    with caplog.at_level(logging.WARNING):
        records, rows = run(12)
    assert large == 4096
    assert rows <= 12
    messages = [record.getMessage() for record in caplog.records]
    assert f"train.max_rows={rows} begins with that" in messages
    keys = ["reward_mean", "kl_nats", "grad_norm"]
    picked = [[[record[key] for key in keys] for record in run] for run in (records, truth, other)]
    close(picked[0], picked[1], rtol=2e-3, atol=1e-5, another_batch=picked[2])
    counts = ["model_evaluations", "model_backward_rows", "reward_queries"]
    same([records[-1][key] for key in counts], [truth[-1][key] for key in counts], other=[other[-1][key] for key in counts])


def test_memory_for_no_row_is_a_remedy(tmp_path: Path) -> None:
    """Twin: another error of the network, which is no matter of memory and raised as it is."""
    with pytest.raises(MemoryError, match="out of memory with one row a network call; lower train.batch, take a smaller model"):
        list(tune(sa.DDPO(), model=small_model(0)))
    with pytest.raises(RuntimeError, match="odd"):
        fitting(small_model(4), 8, lambda limit: (_ for _ in ()).throw(RuntimeError("odd")))
    errors = [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.OutOfMemoryError(),
    ]
    same([is_out_of_memory(error) for error in errors], [True] * 3, another=[is_out_of_memory(RuntimeError("odd"))] * 3)


def test_a_policy_that_diverged_after_its_last_check_has_no_summary(tmp_path: Path) -> None:
    """Its figures would be NaN; twin: before it diverged."""
    tuner = tune(sa.DDPO(), output=tmp_path, iterations=1)
    list(tuner)
    tuner.evaluation = sa.Evaluation(n=16, steps=3)
    assert math.isfinite(tuner.summary()["kl_nats"])
    (tmp_path / "summary.json").unlink()
    with torch.no_grad():
        for value in (tuner.model.average or {}).values():
            value.fill_(float("nan"))
    with pytest.raises(TrainingError, match="the samples of the tuned model are not finite; lower train.lr"):
        tuner.summary()
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_a_summary_is_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: a parser that knows no NaN; twin: JSON as Python writes it."""
    monkeypatch.setattr(
        "scoreaction.training.evaluation.diversity", lambda *_, **__: {"diversity": math.inf, "vendi": math.nan}
    )
    command = ["train", "mixture", "algorithm.name=ddpo", "train={iterations: 1, batch: 8}", "evaluation={n: 16, steps: 3}"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0

    def strict(text: str) -> None:
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        json.loads(text, parse_constant=refuse)

    text = (tmp_path / "run" / "summary.json").read_text()
    accepts(strict, text, as_python_writes=text.replace("null", "NaN"))
    assert json.loads(text)["diversity_base"] is None


DEGENERATE = {
    "equal": np.zeros((20, 2), np.float32),
    "far": np.full((20, 2), 1e6, np.float32) + np.eye(20, 2, dtype=np.float32),
    "huge": 1e30 * np.eye(20, 2, dtype=np.float32),
    "infinite": np.full((20, 2), np.inf, np.float32),
    "one coordinate": np.full((20, 1), 1e6, np.float32),
    "tiny": 1e-30 * np.eye(20, 2, dtype=np.float32),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_figure_is_drawn_of_any_samples(name: str, tmp_path: Path) -> None:
    """Over the law of a mixture that none of them is near; twin: contours of a density that is zero everywhere."""
    law = sa.gaussian_mixture.build(sa.gaussian_mixture.Config()).law
    samples = DEGENERATE[name]
    figure = samples_figure({"before": samples, "after": samples}, {"before": law, "after": law})
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert (tmp_path / "figure.png").stat().st_size > 500
    with pytest.raises(ValueError, match="Contour levels must be increasing"):
        new_figure()[1][0].contour(np.zeros((2, 2)), levels=np.zeros(4))


FORMULAS = [
    "$\\frac{$ a circle",
    "costs $5 and $6",
    "$\\bad$",
    "x^2_{",
    "\\",
    "a\nb",
    "\x00x",
    "\U0001f600",
    "[/red] [bold",
    "</svg>",
]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", FORMULAS)
def test_a_prompt_is_shown_letter_by_letter(prompt: str, tmp_path: Path) -> None:
    """Twin: matplotlib's own titles, in which a $ begins a formula."""
    pictures = np.random.default_rng(0).random((2, 3, 4, 4))
    save_samples(tmp_path / "samples.png", pictures, [prompt] * 2)
    pairs_figure(pictures, pictures, [prompt] * 2).savefig(tmp_path / "pairs.png", dpi=40)
    figure, (axis,) = new_figure()
    axis.plot([0, 1], label=prompt)
    plain_legend(axis, title=prompt)
    figure.savefig(tmp_path / "legend.png", dpi=40)
    with pytest.raises(ValueError, match="Expected|Unknown|ParseException|Parse"):
        _with_a_formula(figure, tmp_path / "other.png")


def _with_a_formula(figure: Any, path: Path) -> None:
    figure.suptitle("$\\frac{$")
    figure.savefig(path)


def test_a_prompt_does_not_leave_the_recipe_of_a_card(tmp_path: Path) -> None:
    """Truth: what Markdown takes for the end of a fence; twin: the usual fence."""
    from scoreaction.training.run_folder import read_summary

    prompts = "prompts=" + json.dumps(["a\n```\n<img>", "````"])
    run = [
        "shapes",
        "algorithm.name=ddpo",
        "reward={name: jpeg}",
        "train={iterations: 1, batch: 4}",
        "sampler.steps=2",
        prompts,
    ]
    command = [*run, "evaluation={n: 4, steps: 2, held_out: []}", "--output", str(tmp_path / "run")]
    recipe = load_recipe(command[0], command[1:-2])
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    figures = {"kl_nats": 1.0, "iterations": 1, "reward_queries": 4, "model_evaluations": 8}
    assert read_summary(folder) is None
    text = write_card(folder, recipe, figures).read_text()

    def fenced(text: str) -> None:
        fence = next(line for line in text.splitlines() if line.endswith("yaml") and line.startswith("```"))[:-4]
        body = text.partition(f"{fence}yaml\n")[2]
        lines = body.splitlines()
        assert not any(line.strip().startswith(fence) for line in lines[: lines.index(fence)])
        assert lines.index(fence) == len(lines) - 1

    accepts(fenced, text, the_usual_fence=text.replace("`````", "```"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12; put a text in quotes"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: !!int abc", "not valid YAML: invalid literal"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("&a {b: *a}", "its aliases unfold to more than 1,000,000 values; write them out"),
        (
            "[&a [0, 0], " + ", ".join(f"&{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(9)) + "]",
            "aliases unfold",
        ),
        ('"\\ud83d"', "half a letter"),
    ],
)
def test_odd_yaml_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_yaml(text, where="recipe")


def test_plain_yaml_is_read() -> None:
    """Anchors that do not explode, and letters that JSON writes as two."""
    found = parse_yaml('{a: &x [1, 2], b: *x, c: "\\ud83d\\ude00"}', where="recipe")
    same(found, {"a": [1, 2], "b": [1, 2], "c": "\U0001f600"}, halves={"a": [1, 2], "b": [1, 2], "c": "\ud83d\ude00"})
    assert matplotlib.__version__


@pytest.mark.parametrize(
    "key",
    ["model.hidden", "model.depth", "sampler.steps", "evaluation.steps", "online.members", "online.hidden", "distill.steps"],
)
def test_a_number_that_no_memory_holds_is_refused(key: str) -> None:
    """Twin: one that memory holds."""
    with pytest.raises(UserError, match=rf"^{key}: must be less than or equal to "):
        load_recipe("mixture", [f"{key}=1000000000"])
    section, _, name = key.partition(".")
    same(load_recipe("mixture", [f"{key}=3"]).values()[section][name], 3, other=4)
