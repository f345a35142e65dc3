"""Truth: standard errors by hand, the whole grid, samples drawn in process. A run is compared, measured and drawn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commanding import TINY
from twins import accepts, close, same

from scoreaction import catalog
from scoreaction.cli import main
from scoreaction.commands.compare import grouped, planned
from scoreaction.commands.evaluate import open_run
from scoreaction.recipes.recipe import optimum_beta
from scoreaction.sampling.draw import draw, spread_prompts
from scoreaction.training.finetuner import Finetuner


@pytest.mark.slow
def test_two_equal_runs_are_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that has no effect: how often state is saved. Twin: one that has, the learning rate."""

    def ended(name: str, sweep: str) -> tuple[int, str]:
        command = ["compare", "mixture", *TINY[1:], "train.iterations=2", "--algorithms", "ddpo", "--sweep", sweep]
        code = main([*command, "--output", str(tmp_path / name)])
        assert (tmp_path / name / "comparison.json").exists()
        return code, capsys.readouterr().err

    def fails(end: tuple[int, str]) -> None:
        assert end[0] == 1
        both = "ddpo/train.checkpoint_every=1/seed0 and ddpo/train.checkpoint_every=2/seed0"
        assert end[1].endswith(
            f"{both}: their tuned models are equal to the digit; what tells these runs apart has no effect\n"
        )

    accepts(fails, ended("equal", "train.checkpoint_every=1,2"), other=ended("other", "train.lr=0.001,0.01"))


@pytest.mark.slow
def test_sample_draws_tuned_and_base(run: Path, tmp_path: Path) -> None:
    def draw(*more: str) -> np.ndarray:
        assert main(["sample", str(run), "--n", "12", "--steps", "4", "--output", str(tmp_path), *more]) == 0
        assert (tmp_path / "samples.png").stat().st_size > 1000
        with np.load(tmp_path / "samples.npz") as arrays:
            assert set(arrays) == {"samples"}
            return arrays["samples"]

    first = draw()
    assert first.shape == (12, 2)
    close(draw(), first, other_seed=draw("--seed", "1"), base=draw("--base"), other_solver=draw("--solver", "heun"))


def test_evaluate_measures_the_grid_and_leaves_out_what_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--steps", "2,3", "--solver", "ddim,heun", "--eta", "0,1"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    cells = [(row["solver"], row["eta"], row["steps"]) for row in found["grid"]]
    whole = [(solver, eta, steps) for solver in ("ddim", "heun") for eta in (0, 1) for steps in (2, 3)]
    same(cells, [cell for cell in whole if cell[:2] != ("heun", 1)], with_what_cannot_be=whole)
    assert [(note["solver"], note["eta"]) for note in found["skipped"]] == [("heun", 1)]
    rewards = {row["reward"] for row in found["grid"]}
    assert len(rewards) == len(cells), "each cell was measured by itself"
    assert {"reward", "kl_nats", "kl_chain_nats", "diversity"} <= set(found["grid"][0])
    assert "left out: heun takes only eta 0" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_runs_what_is_missing_and_gives_standard_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "comparison"
    tiny = [*TINY[1:], "train.iterations=2"]
    more = ["--seeds", "0,1", "--sweep", "algorithm.beta=0.1,0.3", "--output", str(folder)]
    command = ["compare", "mixture", *tiny, "--algorithms", "ddpo,dpok", *more]
    assert main(command) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    found = json.loads((folder / "comparison.json").read_text())
    assert [group["label"] for group in found["groups"]] == ["ddpo", "dpok, beta 0.1", "dpok, beta 0.3"]
    assert (folder / "dpok" / "algorithm.beta=0.3" / "seed1" / "summary.json").exists()
    assert (folder / "ddpo" / "seed0" / "summary.json").exists()
    card = (folder / "dpok" / "algorithm.beta=0.3" / "seed1" / "model" / "README.md").read_text()
    assert "beta: 0.3" in card, "a model card has its own run's recipe"
    assert {path.name for path in folder.glob("*.png")} >= {"reward.png", "kl.png", "diversity.png"}
    assert "optimum_reward" in found["groups"][0]["mean"], "an algorithm without beta is measured to the recipe's optimum"

    monkeypatch.setattr(Finetuner, "_iterate", lambda tuner: pytest.fail("a finished run was run again"))
    assert main(command) == 0
    with pytest.raises(pytest.fail.Exception, match="run again"):
        main([*command, "--seeds", "0,1,2"])


def test_one_rule_gives_the_optimum_that_a_comparison_is_measured_against(tmp_path: Path) -> None:
    """evaluation.beta, else the beta of the recipe's own algorithm with the overrides that it knows."""

    def betas(recipe: str, *overrides: str) -> list[float | None]:
        return [optimum_beta(entry.recipe) for entry in planned(recipe, overrides, ["score_action", "ddpo"], [0], None)]

    def alike(found: list[float | None]) -> None:
        assert found == [found[0]] * 2

    accepts(alike, betas("mixture"), apart=[0.5, None])
    assert betas("mixture", "algorithm.beta=0.2") == [0.2, 0.2]
    assert betas("mixture", "algorithm.minibatches=2") == [0.5, 0.5], "a setting that only the other algorithm knows"
    own = tmp_path / "own.yaml"
    own.write_text(catalog.recipes()["mixture"].read_text().replace("seed: 1234}", "seed: 1234, beta: 0.25}"))
    assert betas(str(own)) == [0.25, 0.25], "the file's evaluation.beta is that of all"
    assert betas(str(own), "evaluation.beta=0.3") == [0.3, 0.3]


def test_standard_errors_are_over_seeds() -> None:
    runs = [{"label": "a", "algorithm": "a", "value": None, "summary": {"x": x}} for x in (1.0, 2.0, 6.0)]
    close(grouped(runs)[0]["mean"]["x"], 3.0)
    close(grouped(runs)[0]["standard_error"]["x"], 7**0.5 / 3**0.5, deviation=7**0.5, biased=(14 / 3 / 3) ** 0.5)
    assert grouped(runs[:1])[0]["standard_error"]["x"] is None, "one seed has no standard error"
    for run in runs:  # all seeds are measured on the same noise, and more of them do not make its error smaller
        run["summary"]["x_se"] = 2.0
    both = grouped(runs)[0]["standard_error"]["x"]
    close(both, (7 / 3 + 4) ** 0.5, over_seeds_alone=(7 / 3) ** 0.5, as_if_of_their_own=(7 / 3 + 4 / 3) ** 0.5)


@pytest.mark.long
def test_a_run_on_a_black_box_is_drawn_from(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Its critic and surrogate are another's than a differentiable reward would have had, and drawing needs neither."""
    small = ["train.iterations=1", "train.batch=4", "sampler.steps=2", "evaluation.n=4", "evaluation.held_out=[]"]
    assert main(["train", "digits", "reward=jpeg", *small, "--output", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--seed", "3"]) == 0
    assert refused("sample", tmp_path / "run", "--prompt", "cat").startswith("--prompt: prompt 'cat' names no digit")
    drawn = np.load(tmp_path / "run" / "samples.npz")["samples"]
    tuner = open_run(tmp_path / "run", tuned=True).tuner
    prompts = spread_prompts(tuner.prompts, 2)
    samples = [
        draw(tuner.model, tuner.evaluation.sampler(tuner.sampler), 2, prompts, 3, reference=base).cpu()
        for base in (False, True)
    ]
    close(drawn, samples[0], atol=1e-6, base=samples[1])
