"""Truth: which iteration's metric was highest, counted by hand, and the weights that the run had then."""

from unittest.mock import patch

import pytest
import torch
from tuning import own_model
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.commands.evaluate import open_run
from scoreaction.report.page import write_report
from scoreaction.training.best_weights import Selection

SCORES = [1.0, 3.0, 2.0, 0.0, -1.0, 2.9]


def tuner_with(*, scores=SCORES, iterations=6, ema=False, output=None, select="held_out.judge", already=0):
    """A run whose held-out judge says these scores, one an iteration."""
    said = iter(scores[already:])
    return sa.Finetuner(
        own_model(),
        reward=lambda x, c: x[:, 0],
        algorithm=sa.DDPO(),
        sampler=sa.Sampler(steps=3),
        train=sa.Train(iterations=iterations, batch=8, lr=0.05, ema=ema, device="cpu", checkpoint_every=2, select=select),
        evaluation=sa.Evaluation(n=8, steps=3),
        held_out={"judge": sa.Reward(lambda x, c: torch.full((len(x),), next(said, 0.0)))},
        output=output,
    )


def weights_by_iteration(tuner):
    """Those that would be saved after each iteration, without a selection."""
    return [
        {name: value.clone() for name, value in (tuner.model.average or dict(tuner.model.parameters)).items()} for _ in tuner
    ]


def reported(tuner):
    with tuner.model.averaged():
        return {name: parameter.detach().clone() for name, parameter in tuner.model.parameters.items()}


@pytest.mark.parametrize("ema", [False, True])
def test_what_is_reported_are_the_weights_of_the_best_iteration(ema, tmp_path):
    tuner = tuner_with(ema=ema)
    after = weights_by_iteration(tuner)
    average, averages = None, []
    for i, score in enumerate(SCORES[1:]):  # the first is that of the pretrained model
        decay = (1 + i) / (10 + i) if ema else 0.0
        average = score if average is None else decay * average + (1 - decay) * score
        averages.append(average)
    best = averages.index(max(averages))
    assert best == 0 if not ema else best < 4
    assert tuner.selection.iteration == best + 1
    assert tuner.summary()["selected_iteration"] == best + 1

    def check(weights):
        assert all(torch.equal(weights[name], after[best][name]) for name in weights)

    accepts(check, reported(tuner), last=after[-1], one_late=after[best + 1], without=reported(tuner_with(select=None)))
    tuner.save(tmp_path / "out")
    loaded = own_model()
    from scoreaction.training.export import load_weights

    load_weights(loaded, tmp_path / "out")
    assert torch.equal(sa.sample(loaded, n=4, steps=3), sa.sample(tuner.model, n=4, steps=3))


def test_selection_does_not_change_training():
    plain, selecting = tuner_with(select=None), tuner_with()
    rewards = [metrics["reward_mean"] for metrics in plain]
    close([metrics["reward_mean"] for metrics in selecting], rewards, atol=0, without_training=[rewards[0]] * 6)


def test_a_resumed_run_selects_as_the_uninterrupted_one(tmp_path):
    whole = tuner_with(output=tmp_path / "whole")
    list(whole)
    for metrics in tuner_with(output=tmp_path / "cut"):
        if metrics["iteration"] == 5:
            break
    resumed = tuner_with(output=tmp_path / "cut", already=4)
    assert resumed.resume()
    list(resumed)

    def check(tuner):
        assert tuner.selection.state(None) == whole.selection.state(None)
        assert all(torch.equal(value, reported(whole)[name]) for name, value in reported(tuner).items())

    forgetful = tuner_with(already=4, iterations=2)
    list(forgetful)
    accepts(check, resumed, without_the_first_four=forgetful)


def test_a_step_that_ruins_the_policy_is_not_selected_with_the_samples_before_it():
    """The reward is the first weight; the fifth step throws away what the fourth has made and the fifth batch has shown."""
    tuner, values = tuner_with(select="reward_mean"), [1.0, 2.0, 3.0, 9.0, -5.0, -6.0]
    name, parameter = next(iter(tuner.model.parameters.items()))
    tuner.reward.reward = sa.Reward(lambda x, c: 0 * x[:, 0] + parameter.flatten()[0].detach())
    learn = tuner.optimisation.learn

    def learn_and_set(updates, iteration, **more):
        figures = learn(updates, iteration, **more)
        parameter.data.flatten()[0] = values[iteration]
        return figures

    with patch.object(tuner.optimisation, "learn", learn_and_set):
        list(tuner)
    close(reported(tuner)[name].flatten()[0], 9.0, atol=0, after_the_step=values[4])
    same(tuner.selection.iteration, 4, of_its_samples=5)


def test_the_average_forgives_a_lucky_batch():
    def chosen(values, decay):
        selection = Selection("x")
        for i, value in enumerate(values):
            selection(value, i + 1, decay)
        return selection.iteration

    lucky = [0.0, 1.5, 0.0, 1.0, 1.0, 1.0, 0.9, 0.0]
    close(chosen(lucky, 0.5), 6, one_batch=chosen(lucky, 0.0))


def test_an_unknown_metric_is_refused_at_once():
    for wrong in ("held_out.judje", "kl_nats"):
        with pytest.raises(ValueError, match=rf"train\.select: no metric '{wrong}'; choose from reward_mean, diversity, vendi"):
            tuner_with(select=wrong)


@pytest.mark.slow
def test_a_recipe_selects_and_its_run_is_opened_with_the_chosen_weights(tmp_path):
    from commanding import train

    assert train(tmp_path / "run", "train.select=diversity", iterations=3) == 0
    assert "the best by diversity" in write_report(tmp_path / "run").read_text()
    opened = open_run(tmp_path / "run", tuned=True).tuner
    saved = sa.load(tmp_path / "run")

    def check(model):
        assert torch.equal(sa.sample(model, n=4, steps=3), sa.sample(saved, n=4, steps=3))

    last = open_run(tmp_path / "run", tuned=True).tuner
    last.model.selected = {name: value + 1 for name, value in last.model.average.items()}
    accepts(check, opened.model, others=last.model)
