"""Truth: questions to an oracle counted by hand: what is logged, what a budget pays for, how noisy answers are."""

import json

import pytest
import torch
from commanding import TINY
from test_online import LOG, ROUNDS, Killed, Oracle, tuner_with
from twins import close, same

from scoreaction.cli import main
from scoreaction.rewards import RewardError
from scoreaction.sampling.steering import Steering
from scoreaction.training.run_folder import read_json_lines


def test_what_is_asked_is_logged_and_counted(tmp_path):
    oracle = Oracle()
    tuner = tuner_with(oracle, output=tmp_path, prompts=["0", "1"])
    metrics = list(tuner)
    close([m["reward_queries"] for m in metrics], [20, 20, 44, 44, 74, 74], atol=0, of_the_proxy=[16 * i for i in range(1, 7)])
    close([m["round"] for m in metrics], [1, 1, 2, 2, 3, 3], atol=0, from_zero=[0, 0, 1, 1, 2, 2])
    log = read_json_lines(tmp_path / LOG)
    assert [record["round"] for record in log] == [1] * 20 + [2] * 24 + [3] * 30
    assert [record["prompt"] for record in log] == ["0", "1"] * 37, "each prompt as often as the other"
    asked = torch.tensor(oracle.asked)
    read = torch.tensor([record["features"] for record in log])
    close(read, asked, atol=0, rounded=[[float(f"{x:.6g}") for x in row] for row in asked.tolist()])
    second = torch.tensor([record["value"] for record in log])[20:44]
    close(metrics[2]["oracle_mean"], second.mean(), of_all=torch.tensor([record["value"] for record in log]).mean())
    assert "proxy_error" not in metrics[0]
    assert metrics[2]["proxy_error"] > 0
    summary = tuner.summary()
    assert summary["reward_queries"] == sum(ROUNDS), "measuring is not training"
    assert len(oracle.asked) == sum(ROUNDS) + 2 * 16


class Guarded(Oracle):
    """Answers so many questions, and fails the test at one more, whoever asks."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __call__(self, samples, conditions):
        assert len(self.asked) + len(samples) <= self.most
        return super().__call__(samples, conditions)


def budgeted(oracle, budget, folder, n=16, **more):
    return tuner_with(oracle, output=folder, iterations=3, rounds=(20, 24, 30), budget=budget, n=n, **more)


def test_a_budget_pays_for_the_rounds_and_the_measurement(tmp_path):
    """Truth: 74 in the rounds, 2 x 16 at the end. Twins: one question less is refused before any is asked, and a larger n."""
    oracle = Guarded(74 + 32)
    tuner = budgeted(oracle, 74 + 32, tmp_path / "run")
    list(tuner)
    tuner.summary()
    same(len(oracle.asked), 106, rounds_alone=74)
    same(json.loads((tmp_path / "run" / "asked.json").read_text())["asked"], 106, uncounted=74)
    for budget, n in ((105, 16), (106, 17)):
        with pytest.raises(ValueError, match=r"^online\.budget: 10\d questions do not pay for the 74 of all rounds and"):
            budgeted(oracle, budget, tmp_path / "refused", n=n)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(RewardError, match=r"budget: 16 more questions would pass it, 106 of 106 are asked; raise it to 122"):
        tuner.reward(torch.zeros(16, 2), None)
    same(len(oracle.asked), 106, asked_all_the_same=122)


@pytest.mark.slow
def test_what_is_asked_twice_counts_twice(tmp_path, monkeypatch):
    """A kill while the run is measured: 32 questions more, which the budget does not pay for until it is raised."""
    oracle = Guarded(74 + 32 + 20)
    tuner = budgeted(oracle, 74 + 32 + 20, tmp_path)
    list(tuner)
    with monkeypatch.context() as patch:
        patch.setattr("scoreaction.training.summary.measure_kl", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            tuner.summary()
    again = budgeted(oracle, 74 + 32 + 20, tmp_path)
    assert again.resume()
    with pytest.raises(RewardError, match=r"budget: 32 more questions would pass it, 106 of 126 are asked; raise it to 138"):
        again.summary()
    same(len(oracle.asked), 106, half_of_it=122)
    oracle.most = 138
    raised = budgeted(oracle, 138, tmp_path)
    assert raised.resume()
    raised.summary()
    same(len(oracle.asked), 138, first_time_only=106)
    lost = budgeted(oracle, 138, tmp_path)
    (tmp_path / "asked.json").unlink()
    lost.resume()
    lost.before_asking()
    same(lost.budget.count, 74, of_nothing=0)  # the answers in the log, where the count is gone
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(RewardError, match=r"asked\.json cannot be read"):
        lost.reward(torch.zeros(1, 2), None)


def test_what_a_measurement_asks_is_what_it_was_said_to(tmp_path):
    """Truth: the oracle's own count, steered and certified; twin: without either."""
    options = {
        "evaluation": {"certificate": True},
        "steer": Steering(method="smc", particles=4),
        "rounds": (8,),
        "budget": 10**6,
    }
    oracle = Oracle()
    tuner = tuner_with(oracle, output=tmp_path, iterations=1, **options)
    list(tuner)
    tuner.summary()
    said = {name: part.queries for name, part in tuner.measuring().items()}
    same(len(oracle.asked), 8 + sum(said.values()), of_base_and_tuned=8 + said["base and tuned"])


@pytest.mark.slow
def test_a_question_without_a_run_to_count_it_is_refused(tmp_path, refused):
    options = [*TINY, "online.rounds=[8]", "online.budget=40", "train.iterations=1"]
    assert refused("doctor", "mixture", *options).startswith("online.budget: doctor asks the oracle too")
    line = refused("steer", "mixture", *options, "--output", tmp_path / "x")
    assert line.startswith("online.budget: steer asks the oracle too")
    assert refused("pairs", "mixture", *options, "--n", "4").startswith("online.budget: pairs asks the oracle too")
    assert main(["doctor", "mixture", *options, "online.budget=null"]) in (0, 1)


@pytest.mark.slow
def test_answers_are_as_noisy_as_asked_for(tmp_path):
    def noise(std, folder):
        oracle = Oracle()
        list(tuner_with(oracle, output=folder, rounds=(600,), iterations=1, noise_std=std, hidden=0))
        values = torch.tensor([record["value"] for record in read_json_lines(folder / LOG)])
        return values - Oracle()(torch.tensor(oracle.asked), None)

    error = noise(0.3, tmp_path / "a")
    close(error.std(), 0.3, rtol=0.1, atol=0, none=noise(0.0, tmp_path / "b").std(), variance=0.09)
    close(error.mean(), 0.0, atol=0.05, biased=error.mean() + 0.3)
