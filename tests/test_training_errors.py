"""Truth: the same run without the fault, a reward's, a network's or a setting's. What training refuses, skips or takes back."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from tuning import SCORE_ACTION, Net, black_box, own_model, tune
from twins import accepts, same

import scoreaction as sa
from scoreaction.errors import UserError
from scoreaction.rewards import RewardError
from scoreaction.training.checks import check_precision, check_whole
from scoreaction.training.errors import GradientError, TrainingError
from scoreaction.types import DTYPES


def test_an_overflow_in_fp16_is_a_step_left_out():
    tuner = tune(sa.DDPO(minibatches=1), iterations=1, precision="fp16")
    tuner.optimisation.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = tuner.model.parameters["body.0.weight"].detach().clone()
    (metrics,) = tuner
    assert metrics["skipped"] == 1
    assert torch.equal(before, tuner.model.parameters["body.0.weight"])
    assert tuner.optimisation.scaler.get_scale() < 2.0**100


@pytest.mark.parametrize("algorithm", [sa.SQDF(), sa.DRaFT(), sa.ReFL(), sa.DDPO()], ids=lambda a: a.name)
def test_equal_rewards_are_a_logged_skip(algorithm):
    """A clamp that all samples are above gives no gradient; the twin, one that tells them apart, does."""
    rewards = [sa.Reward(lambda x, c, end=end: x[:, 0].clamp(max=end), differentiable=True) for end in (-1e6, 1e6)]
    skipped = [[metrics.get("skipped") for metrics in tune(algorithm, reward=reward, iterations=2)] for reward in rewards]
    assert skipped == [[1.0, 1.0], [None, None]]


def test_a_policy_that_diverged_is_not_the_rewards_fault():
    class Overflowing(Net):
        def forward(self, x, t, cond):
            return 1e20 * (1 + x.square()) + super().forward(x, t, cond)

    with pytest.raises(TrainingError, match="iteration 2: the policy diverged, its KLs are not finite; lower train.lr"):
        list(tune(sa.DDPO(), lr=1e30))
    model = sa.Model(Overflowing(), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match="iteration 1: the policy diverged, its samples are not finite"):
        list(tune(sa.DDPO(), model=model))
    assert len(list(tune(sa.DDPO(), lr=1e-3))) == 4


class Dead(nn.Module):
    """A network whose output does not depend on its parameters."""

    def __init__(self, how):
        super().__init__()
        self.line, self.how = nn.Linear(2, 2), how

    def forward(self, x, t, cond):
        if self.how == "unused":
            return 0.5 * x
        return self.line(x).detach() if self.how == "detached" else 0.5 * x + 0 * self.line(x)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unused", "detached", "times_zero"])
@pytest.mark.parametrize("algorithm", [sa.DDPO(), SCORE_ACTION], ids=["ddpo", "score_action"])
def test_a_network_without_gradient_is_an_error(how, algorithm):
    model = sa.Model(Dead(how), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match=r"iteration 1:.*received no gradient; check"):
        list(tune(algorithm, model=model))


def test_a_gradient_that_is_not_finite_is_an_error():
    class Exploding(Net):
        def forward(self, x, t, cond):
            return super().forward(x, t, cond) + (self.body[0].weight.sum() * 0).sqrt()  # value 0, slope infinite

    model = sa.Model(Exploding(), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match="not finite; lower train.lr"):
        list(tune(sa.DDPO(), model=model))


@pytest.mark.parametrize(("size", "fault"), [(1e30, "is not finite"), (1e-30, "received no gradient")])
def test_rewards_of_an_odd_size_are_named_where_no_gradient_can_be_had(size, fault):
    """Twin: the same fault under rewards of usual size."""
    with pytest.raises(TrainingError, match=f"iteration 1: the .*{fault}; rewards spread by ") as told:
        list(tune(SCORE_ACTION, reward=lambda x, c: size * x[:, 0]))
    usual = str(GradientError("the gradient is not finite").explained(1e-3))
    same("scale the reward to a spread near 1" in str(told.value), True, usual="spread near 1" in usual)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, c: x[:, 0] * float("nan"), r"16 of 16 values are NaN"),
        (lambda x, c: torch.where(x[:, 0] > 5, x[:, 0], torch.inf), "NaN or infinite"),
        (lambda x, c: x, r"shape \(16,\), got shape \(16, 2\)"),
        (lambda x, c: x[:, 0].mean(), r"got shape \(\)"),
        (lambda x, c: 1 / 0, "raised ZeroDivisionError"),
        (lambda x, c: None, "one number a sample, got NoneType"),
        (sa.Reward(lambda x, c: x.detach()[:, 0], differentiable=True), "no gradient reaches the samples"),
    ],
)
def test_bad_rewards_are_reward_errors(reward, message):
    with pytest.raises(RewardError, match=message):
        list(tune(SCORE_ACTION, reward=reward))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["held out", "looked ahead"])
def test_a_reward_that_fails_while_it_is_watched_takes_the_iteration_back(tmp_path, which):
    """Truth: the run in which nothing failed, bit for bit."""
    asked = []

    def flaky(samples, conditions):
        asked.append(1)
        if len(asked) == broken:
            raise OSError("the scorer is gone")
        return samples[:, 1]

    def run(folder):
        looks = which == "looked ahead"
        algorithm = SCORE_ACTION.model_copy(update={"look_ahead": "zeroth_order"}) if looks else SCORE_ACTION
        options = {"reward": flaky} if looks else {"held_out": {"second": flaky}}
        return tune(algorithm, output=folder, checkpoint_every=100, **options)

    broken = 0
    whole = list(run(tmp_path / "whole"))
    broken = 3 * len(asked) // 4  # in the third of four iterations
    asked.clear()
    with pytest.raises(RewardError, match="the scorer is gone"):
        list(run(tmp_path / "cut"))
    again = run(tmp_path / "cut")
    assert again.resume()
    assert again.iteration == 2

    def same(found):
        assert [{**m, "seconds": 0} for m in found] == [{**m, "seconds": 0} for m in whole[2:]]

    accepts(same, list(again), first=whole[:2])


def test_frozen_networks_and_wrong_samplers_are_refused():
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        tune(sa.DDPO(), model=sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,)))
    with pytest.raises(ValueError, match=r"sampler\.solver"):
        tune(sa.ScoreAction(), sampler=sa.Sampler(solver="heun", eta=1.0))


GIVEN = {
    "algorithm: must be an object such as sa.DDPO() (got 'ddpo')": {"algorithm": "ddpo"},
    "algorithm: must be an object such as sa.DDPO() (got <class": {"algorithm": sa.DDPO},
    "sampler: must be an object such as sa.Sampler(steps=20) (got 5)": {"sampler": 5},
    "train: must be an object such as sa.Train(iterations=100) (got {'lr': 0.1})": {"train": {"lr": 0.1}},
    "train.device: 'gpu' cannot be used here; take auto, cpu or": {"train": sa.Train(device="gpu")},
    "evaluation: must be an object such as sa.Evaluation(n=64) (got 64)": {"evaluation": 64},
    "held_out: must be an object such as {'clip': reward} (got [": {"held_out": [black_box]},
    "reward: must be a function of (samples, prompts), or a Reward (got 'clip')": {"reward": "clip"},
    "held_out.clip: must be a function of (samples, prompts), or a Reward (got 1)": {"held_out": {"clip": 1}},
    "model: must be an object such as sa.Model(...) (got Net(": {"model": Net()},
}


@pytest.mark.parametrize("said", GIVEN)
def test_a_part_of_another_kind_is_one_line_with_such_a_part(said):
    """Names, classes and mappings in the place of objects. Twin: the objects, which are taken."""
    right = {"model": own_model(), "reward": black_box, "algorithm": sa.DDPO(), "sampler": sa.Sampler(steps=3)}

    def refused(given):
        try:
            sa.Finetuner(**right | given)
        except UserError as error:
            return str(error)
        return ""

    def tells(given):
        assert refused(given).startswith(said)
        assert "\n" not in refused(given)

    accepts(tells, GIVEN[said], objects={"train": sa.Train(device="cpu"), "held_out": {"clip": black_box}})


def test_a_model_is_made_of_a_module_and_drawn_from_itself():
    """Twin: the module, its dimensions and the model."""
    kind = {"process": sa.VP(), "predicts": "eps"}
    with pytest.raises(UserError, match=r"^net: must be an object such as a torch\.nn\.Module whose forward takes"):
        sa.Model(lambda x, t, cond: x, shape=(2,), **kind)
    with pytest.raises(UserError, match=r"^shape: must be an object such as \(2,\), or \(3, 32, 32\) of pictures \(got 2\)"):
        sa.Model(Net(), shape=2, **kind)
    tuner = tune(sa.DDPO(), iterations=1)
    for draw in (sa.sample, lambda model, n: sa.steer(model, black_box, n=n, beta=1.0, particles=2, steps=2)):
        with pytest.raises(UserError, match=r"^model: must be .* or the `model` of a Finetuner \(got <scoreaction"):
            draw(tuner, n=2)
    same(tuple(sa.sample(tuner.model, n=2, steps=2).shape), (2, 2), of_three=(3, 2))


def test_a_prompt_alone_is_no_list_of_prompts():
    with pytest.raises(ValueError, match=r"prompts: must be a list of prompts \(got '01'\); one prompt is \['01'\]"):
        tune(sa.DDPO(), prompts="01", model=own_model(True))


def test_a_mapping_of_a_recipe_is_no_prompt_in_python():
    """It would be encoded as the text of a mapping. Twin: the same as a `Prompt`."""

    def taken(prompts):
        try:
            tune(sa.DDPO(), prompts=prompts, model=own_model(True), reward=lambda x, c: x[:, 0])
        except ValueError as error:
            raise AssertionError(str(error)) from error

    accepts(taken, [sa.Prompt("0", weight=2.0), "1"], mapping=[{"prompt": "0", "weight": 2.0}, "1"])
    with pytest.raises(ValueError, match=r"^prompts: .* in Python it is sa\.Prompt\('0', weight="):
        tune(sa.DDPO(), prompts=[{"prompt": "0"}], model=own_model(True))


def test_processes_that_do_not_meet_are_refused(monkeypatch):
    """Each would train the same run: on a CPU accelerate does not see that there are two."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert tune(sa.DDPO(), iterations=1) is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE: .* asks for 2 processes and they do not meet .*torchrun") as error:
        tune(sa.DDPO(), iterations=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", ["fp32", "bf16", "fp16"])
def test_every_pair_of_weights_and_precision_fits_or_is_refused(width, precision):
    """fp16 weights need fp16's scaled gradients, which bf16 weights do not go with; all other pairs are twins that fit."""
    model = own_model()
    model.net.to(DTYPES[width])
    fits = {("fp16", "fp32"): False, ("fp16", "bf16"): False, ("bf16", "fp16"): False}.get((width, precision), True)
    with nullcontext() if fits else pytest.raises(UserError, match=r"^train\.precision: .* model\.dtype to "):
        check_precision(model, precision)
    if not fits:
        with pytest.raises(UserError, match=r"^train\.precision: .* model\.dtype to "):
            tune(sa.DDPO(), model=model, precision=precision)


def test_quantised_weights_are_not_divided():
    """Twin: the same network before it is quantised."""
    net = Net()
    model = sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,))
    check_whole(model)
    net.register_parameter("packed", torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False))
    with pytest.raises(ValueError, match=r"^train\.shard: quantised weights are not divided"):
        check_whole(model)
