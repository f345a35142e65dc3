"""Truth: the plain run, the batch that was drawn so many iterations before, quadrature, and roots of a polynomial."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from affine import LAW, NEW, OLD, model, none, setting
from commanding import TINY, train
from driving import each
from servers import remote, serving
from test_windows import mixture, trained
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._likelihood_ratio import clipped_surrogate, truncated_surrogate
from scoreaction.algorithms._windows import Window
from scoreaction.cli import main
from scoreaction.commands.doctor.training import _late
from scoreaction.rewards import RewardError
from scoreaction.training.run_folder import read_json_lines

DPOK = sa.DPOK(beta=0.5)


def linear(x, prompts):
    return x[:, 0] + 0.5 * x[:, 1]


class Noted:
    """A black box that works in the background and notes the mean of each batch; `wait` may refuse to answer."""

    differentiable, rows = False, 2**31

    def __init__(self, wait=lambda number, begun: None):
        self.means, self.wait = [], wait

    def __call__(self, samples, prompts):
        return linear(samples, prompts)

    def begin(self, samples, prompts):
        scores, number = linear(samples, prompts), len(self.means)
        self.means.append(float(scores.mean()))

        def answer():
            self.wait(number, len(self.means))
            return scores

        return answer


def test_a_queue_that_holds_nothing_back_is_the_plain_run_to_the_bit():
    """Parameters and every metric. Twin: one that holds a batch back."""
    queue = mixture(DPOK, iterations=3)
    queue.late.delay = 0.5  # every batch passes through it
    truth, found, late = trained(mixture(DPOK, iterations=3)), trained(queue), trained(mixture(DPOK, reward_delay=1))
    same(found[1], truth[1], late=late[1])
    same(found[0], truth[0], late=late[0][1:])


def test_a_batch_is_learned_from_when_its_rewards_are_due():
    """Twin: the batch of now. The first ones are of a policy that has not moved, and nothing is learned before."""
    reward, still = Noted(), Noted()
    tuner = mixture(DPOK, iterations=6, reward=reward, reward_delay=2)
    rows, weights = [], [next(iter(tuner.model.parameters.values())).detach().clone()]
    for row in tuner:
        rows.append(row)
        weights.append(next(iter(tuner.model.parameters.values())).detach().clone())
    seen = [row.get("reward_mean") for row in rows]
    same(seen[:2], [None, None], plain=reward.means[:2])
    close(seen[2:], reward.means[:4], atol=1e-6, of_now=[*reward.means[2:], 0.0, 0.0])
    assert [row.get("skipped") for row in rows] == [1.0, 1.0, None, None, None, None]
    same(weights[2], weights[0], later=weights[3])
    list(mixture(DPOK, iterations=6, reward=still, reward_delay=2, lr=1e-12))
    close(still.means[:3], reward.means[:3], atol=1e-6, moved=reward.means[1:4])  # the fourth is of a policy that learned


def test_the_last_batches_are_not_scored():
    """Queries of n - d batches. Twin: of all."""
    last = list(mixture(DPOK, iterations=4, reward_delay=2))[-1]
    same(last["reward_queries"], 2 * 32, of_all=4 * 32)


def test_a_longer_run_scores_what_a_finished_one_left_unscored(tmp_path):
    """It learns in every iteration, of all n - d batches. Twin: a queue that is lost, which waits again."""
    list(mixture(DPOK, iterations=2, reward_delay=1, output=tmp_path))

    def rest(forgets):
        tuner = mixture(DPOK, iterations=4, reward_delay=1, output=tmp_path, checkpoint_every=100)
        assert tuner.resume()
        if forgets:
            tuner.late.waiting = []
        row = next(iter(tuner))
        return "reward_mean" in row, row["reward_queries"]

    same(rest(False), (True, 3 * 32), forgets=rest(True))


def test_the_loop_does_not_wait_for_answers():
    """An answer is read once `delay` more batches are begun. Twin: one iteration less."""

    def runs(delay):
        def wait(number, begun):
            assert begun > number + 2 or begun == 4, "it waits"

        list(mixture(DPOK, iterations=6, reward=Noted(wait), reward_delay=delay))

    runs(2)
    with pytest.raises(RewardError, match="it waits"):
        runs(1)


def test_the_ratio_of_a_late_batch_is_to_the_policy_that_sampled_it():
    """`log p_now - log p_then` of the affine chain in float64. Twin: to the policy as it is."""
    made = model(sa.VP(), OLD)
    found = sa.DDPO(minibatches=1, baseline="batch").build(setting(made, steps=6, batch=16)._replace(delay=2))
    generator = torch.Generator().manual_seed(0)
    rollout = found.explore(none(16), found.times(generator), generator)
    rollout = found.prepare(replace(rollout, rewards=rollout.x0[:, 0]), generator)
    with torch.no_grad():
        made.parameters["th"].copy_(torch.tensor(NEW))
    _, _, figures = next(each(found.updates(rollout, generator)))
    assert "log_ratio_first" not in figures
    assert "clip_fraction" not in figures
    VP, ratios = sa.VP(), []
    for i in range(5):
        t, s, x = rollout.times[i], rollout.times[i + 1], rollout.x[i].double()
        exact = LAW.prediction(VP, x, t)
        k2 = VP.sigma2(s) / VP.sigma2(t) * (VP.sigma2(t) - (VP.alpha(t) / VP.alpha(s)) ** 2 * VP.sigma2(s))

        def mean(th, t=t, s=s, x=x, exact=exact, k2=k2):
            move = th[0] * VP.alpha(t) * x + th[1]
            x0, eps = exact.x0 + VP.sigma2(t) * move, exact.eps - VP.alpha(t) * VP.sigma(t) * move
            return VP.alpha(s) * x0 + (VP.sigma2(s) - k2).sqrt() * eps

        law = torch.distributions.Normal
        now, then = (law(mean(th), k2.sqrt()).log_prob(rollout.x[i + 1].double()) for th in (NEW, OLD))
        ratios.append((now - then).abs().max())
    close(figures["log_ratio_stale"], float(max(ratios)), rtol=1e-3, atol=0, as_it_is=0.0)


@pytest.mark.parametrize(("theta", "share"), [(0.1, 1.0), (0.3, 0.998), (0.6, 0.81)])
def test_truncated_weights_keep_the_gradient_that_a_clip_cuts(theta, share):
    """N(0, 1) sampled, N(theta, 1) now, r = x^2: the gradient is 2 theta. By quadrature. Twins: the clip, no ratio."""
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])

    def gradient(surrogate):
        parameter = f64(theta).requires_grad_()
        log_ratio = parameter * x - parameter**2 / 2
        return -torch.autograd.grad((density * surrogate(log_ratio, x**2 - 1)).sum(), parameter)[0]

    stale = (density * (x**2 - 1) * x).sum()
    clip = gradient(lambda log_ratio, advantage: clipped_surrogate(log_ratio, advantage, 0.2))
    close(gradient(truncated_surrogate), share * 2 * theta, rtol=6e-3, atol=0, clip=clip, no_ratio=stale)
    close(gradient(lambda log_ratio, a: clipped_surrogate(log_ratio, a, None)), 2 * theta, rtol=1e-6, atol=0, clip=clip)
    assert float(clip) < 0 < 2 * theta


@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_the_largest_stable_step_is_the_root_of_its_polynomial(d):
    """`x <- x - g x_{n-d}`: all roots of z^{d+1} - z^d + g within the circle. Twins: the steps of other delays."""

    def radius(g):
        return abs(np.roots([1.0, -1.0, *[0.0] * (d - 1), g])).max()

    def check(share):
        assert radius(2 * share * 0.999) < 1 < radius(2 * share * 1.001)

    share = math.sin(math.pi / (2 * (2 * d + 1)))
    accepts(check, share, one_less=math.sin(math.pi / (2 * (2 * d - 1))), as_1_over_d=1 / (2 * d + 1))
    assert f"{share:.2g}" in _late(d).seen


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DPOK, sa.HRF(branches=4, window=Window(kind="signal"))], ids=["dpok", "hrf"])
def test_a_resumed_run_is_the_uninterrupted_one(algorithm, tmp_path):
    """Twin: one that forgets what waited."""
    settings = {"iterations": 5, "reward_delay": 2}
    whole = trained(mixture(algorithm, **settings))
    rows = iter(mixture(algorithm, output=tmp_path, checkpoint_every=3, **settings))
    for _ in range(3):
        next(rows)
    rows.close()

    def rest(forgets):
        tuner = mixture(algorithm, output=tmp_path, checkpoint_every=100, **settings)
        assert tuner.resume()
        assert len(tuner.late.waiting) == 2
        if forgets:
            tuner.late.waiting = tuner.late.waiting[::-1]
        found = [row for row, _ in zip(iter(tuner), range(1), strict=False)]
        weights = torch.cat([p.detach().flatten() for p in tuner.model.parameters.values()])
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found], weights

    same(rest(False)[0], whole[0][3:4], forgets=rest(True)[0])


@pytest.mark.slow
def test_what_failed_is_asked_again_and_the_run_is_the_uninterrupted_one(tmp_path):
    """The scorer breaks down at the third batch while two wait: their states are saved, and resuming asks for them again."""
    settings = {"iterations": 5, "reward_delay": 2}
    whole = trained(mixture(DPOK, reward=Noted(), **settings))
    broken = [True]

    def wait(number, begun):
        if broken[0] and number >= 1:
            raise ConnectionError("the scorer is down")

    first = mixture(DPOK, output=tmp_path, reward=Noted(wait), **settings)
    with pytest.raises(RewardError, match="the scorer is down"):
        list(first)
    assert first.iteration == 3
    second = mixture(DPOK, output=tmp_path, reward=Noted(wait), **settings)
    assert second.resume()
    assert [waiting.scores for waiting in second.late.waiting] == [None, None]
    broken[0] = False
    found = trained(second)
    same(found[0], whole[0][3:], counted_twice=[{**row, "reward_queries": row["reward_queries"] + 64} for row in found[0]])
    same(found[1], whole[1], other=whole[1] + 1e-6)
    list(first)  # the run itself can go on too
    weights = torch.cat([p.detach().flatten() for p in first.model.parameters.values()])
    same(weights, whole[1], other=whole[1] + 1e-6)


@pytest.mark.slow
def test_a_server_that_is_asked_over_http_answers_late_with_the_same_scores():
    """Truth: the same reward in process. Twin: answers that do not come late."""

    def rows(reward, delay):
        return trained(mixture(DPOK, iterations=4, reward=reward, reward_delay=delay))[0]

    with serving(linear) as server:
        found = rows(remote(server.url, batch=8), 2)
    means = [[row.get("reward_mean") for row in run] for run in (found, rows(linear, 2), rows(linear, 0))]
    assert means[0][:2] == [None, None]
    close(means[0][2:], means[1][2:], atol=1e-5, at_once=means[2][2:])


@pytest.mark.slow
def test_a_run_of_the_command_line_with_late_rewards(tmp_path, refused):
    """It is logged, stopped early and reported as others are. Twin: a delay as long as the run."""
    late = ["algorithm.name=hrf", "algorithm.branches=2", "train.reward_delay=2"]
    assert train(tmp_path / "run", *late, "early_stop={metric: reward_mean, patience: 3}", iterations=4) == 0
    logged = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    same(["reward_mean" in row for row in logged], [False, False, True, True], plain=[True] * 4)
    assert main(["report", str(tmp_path / "run")]) == 0
    command = ["train", "mixture", *TINY, *late, "train.iterations=2", "--output", tmp_path / "other"]
    assert refused(*command).startswith("train.reward_delay: no reward comes 2 iterations late in 2; set it below")


@pytest.mark.slow
def test_the_doctor_waits_for_the_first_rewards():
    """Twin: a run without delay, of which it says nothing."""

    def verdicts(delay):
        found = sa.examine(mixture(sa.DDPO(), iterations=5, reward_delay=delay), iterations=2)
        return {finding.check: finding.verdict for finding in found}

    late, plain = verdicts(2), verdicts(0)
    assert "wrong" not in late.values(), late
    same(late.get("rewards come late"), "note", plain=plain.get("rewards come late"))


@pytest.mark.parametrize(
    ("match", "algorithm", "settings"),
    [
        (
            r"train.reward_delay: no reward comes 4 iterations late in 4; set it below train.iterations",
            DPOK,
            {"reward_delay": 4},
        ),
        (r"train.reward_delay: Config takes every batch .* use ddpo, dpok, hrf, vard", None, {}),
        (r"train.reward_delay: ram takes every batch for one of the policy as it is", sa.RAM(beta=0.5), {}),
        (
            r"algorithm.look_ahead: zeroth_order takes answers .* set it to surrogate or none",
            sa.ScoreAction(look_ahead="zeroth_order"),
            {},
        ),
        (
            r"algorithm.ineffective.do: rewards of groups that are drawn again come late too, .* set it to skip",
            sa.DDPO(baseline="group", ineffective={"do": "resample"}),
            {"samples_per_prompt": 8},
        ),
        (r"train.select: reward_mean is that of weights which are gone", DPOK, {"select": "reward_mean"}),
    ],
)
def test_what_cannot_be_late_is_refused_with_a_remedy(match, algorithm, settings):
    if algorithm is None:

        class Config(sa.NFT):
            name: str = "Config"

        algorithm = Config()
    with pytest.raises(ValueError, match=match) as caught:
        mixture(algorithm, **{"reward_delay": 1, **settings})
    assert "\n" not in str(caught.value)
    mixture(DPOK, reward_delay=1)  # the twin: what can


def test_an_oracle_that_is_asked_in_rounds_cannot_be_late():
    made = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    with pytest.raises(ValueError, match=r"train.reward_delay: an online: block asks its oracle in rounds"):
        sa.Finetuner(
            made, reward=linear, algorithm=DPOK, online=sa.Online(rounds=(8,)), train=sa.Train(batch=8, reward_delay=1)
        )


def test_batches_without_room_are_refused_before_any_work(monkeypatch):
    """Twin: a folder with room for them."""
    monkeypatch.setattr("scoreaction.sampling.replay.ON_DISK", 64)
    mixture(DPOK, reward_delay=1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(
        ValueError, match=r"train.reward_delay: 1 batches of 32 trajectories need .* lower train.reward_delay or"
    ):
        mixture(DPOK, reward_delay=1)


def test_batches_that_are_large_wait_in_a_file(monkeypatch):
    """Twin: other states."""
    truth = trained(mixture(DPOK, iterations=3, reward_delay=1))[1]
    monkeypatch.setattr("scoreaction.training.late.ON_DISK", 64)
    monkeypatch.setattr("scoreaction.sampling.replay.ON_DISK", 64)
    same(trained(mixture(DPOK, iterations=3, reward_delay=1))[1], truth, other=truth + 1e-6)
