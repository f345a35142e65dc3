"""Truth: a run on tokens resumed is the uninterrupted one, pieces of a batch give the figures of the whole, pages are drawn."""

import json

import numpy as np
import pytest
import torch
from token_laws import enumerated, first, model_of
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.report.sample_figures import samples_figure
from scoreaction.report.token_figures import changed, is_tokens, shares

ALGORITHMS = {
    "score_action": sa.ScoreAction(rows=32, updates=4, critic_updates=4),
    "by ratios": sa.ScoreAction(estimator="likelihood_ratio", critic_updates=4, updates=4),
    "ddpp": sa.DDPP(rows=32, updates=2),
    "weighted": sa.DDPP(rows=32, updates=2, loss="weighted"),
    "balance": sa.DDPP(rows=32, updates=2, loss="balance"),
    "dpok": sa.DPOK(),
}


def tuner(name, output=None, **train):
    settings = {"iterations": 4, "batch": 20, "lr": 0.02, "checkpoint_every": 2} | train
    made = sa.MaskedModel(model_of(enumerated(first()[0], 4)).net, process=sa.Masking(3), length=4)
    return sa.Finetuner(
        made, reward=lambda x, p: x.sum(1), algorithm=ALGORITHMS[name], train=sa.Train(**settings), output=output
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score_action", "ddpp", "weighted"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    whole = tuner(name, tmp_path / "whole")
    list(whole)
    part = tuner(name, tmp_path / "part")
    for metrics in part:
        if metrics["iteration"] == 2:
            break
    later = tuner(name, tmp_path / "part")
    assert later.resume()
    list(later)
    weights = [made.model.parameters["change"].detach() for made in (later, whole, part)]
    same(weights[0], weights[1], not_resumed=weights[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_rows_of_a_call_change_nothing(name):
    """Figures of a batch are those of 7 rows at a time or of all at once. Twin: those of another seed."""

    def figures(**train):
        found = next(iter(tuner(name, iterations=1, **train)))
        return torch.tensor([value for key, value in found.items() if isinstance(value, float) and key != "seconds"])

    close(figures(max_rows=7), figures(max_rows=10_000), atol=1e-5, rtol=1e-3, another_seed=figures(seed=1))


def test_what_changed_and_shares():
    before, after = np.array([[0, 1, 2], [2, 2, 1]]), np.array([[0, 2, 2], [2, 2, 1]])
    same(changed(before, after).tolist(), [[False, True, False], [False] * 3], all=[[True] * 3] * 2)
    close(shares(after, 4), [1 / 6, 1 / 6, 4 / 6, 0], atol=1e-12, of_before=shares(before, 4))
    assert is_tokens(after)
    assert not is_tokens(after.astype(np.float32))

    def marks(figure):
        axis = figure.axes[1]
        assert len(axis.lines[0].get_xdata()) == 1, "one position is framed"
        assert "17%" in axis.get_title()

    right = samples_figure({"before": before, "after": after})
    accepts(marks, right, equal=samples_figure({"before": before, "after": before.copy()}))


@pytest.mark.slow
def test_the_commands_on_tokens(tmp_path, capsys):
    """A run, its samples, its grid and its report; what has no meaning is one line. Twin: a continuous run's report."""
    run = tmp_path / "run"
    small = ["model.length=4", "train.iterations=2", "train.batch=16", "evaluation.n=32"]
    assert main(["train", "markov_chain", *small, "--output", str(run)]) == 0
    assert main(["sample", str(run), "--n", "4", "--output", str(tmp_path / "samples")]) == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["samples"].dtype == np.int64
    assert main(["evaluate", str(run), "--steps", "4", "--solver", "one_by_one,ancestral"]) == 0
    grid = json.loads((run / "evaluation.json").read_text())["grid"]
    same(["distance_to_optimum" in cell for cell in grid], [True, False], both=[True, True])
    assert (
        main(
            ["train", "mixture", "train.iterations=1", "train.batch=8", "evaluation.n=16", "--output", str(tmp_path / "other")]
        )
        == 0
    )

    def of_tokens(folder):
        assert main(["report", str(folder)]) == 0
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert "tokens that tuning changed" in text
        assert "gap to the optimum" in text

    accepts(of_tokens, run, continuous=tmp_path / "other")
    for command in (
        ["doctor", "markov_chain"],
        ["plan", "markov_chain"],
        ["distill", "markov_chain", "--output", str(tmp_path / "d")],
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert "this one's are tokens" in capsys.readouterr().err
    online = "online={rounds: [16, 24], members: 2, hidden: 8}"
    assert main(["train", "markov_chain", *small, online, "--output", str(tmp_path / "online")]) == 0
