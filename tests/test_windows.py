"""Truth: DDPO itself, the full gradient, closed forms of the Gaussian chain, and counting by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from affine import model, none, setting
from driving import each, total
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._learner import roll_out_chain
from scoreaction.algorithms._setting import Objective
from scoreaction.algorithms._windows import Window, Windows, sibling_advantages, signal, stretches
from scoreaction.diffusion.noise import RowNoise
from scoreaction.sampling.branches import branched
from scoreaction.training.collector import Collector

VP = sa.VP()
NEVER = {"seconds"}
ROWS = 20_000


def mixture(algorithm, *, iterations=4, batch=32, steps=8, output=None, reward=None, **train):
    torch.manual_seed(0)
    made = sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())
    settings = {"iterations": iterations, "batch": batch, "device": "cpu", **train}
    return sa.Finetuner(
        made, reward=reward or (lambda x, c: x[:, 0] + 0.5 * x[:, 1]), algorithm=algorithm, sampler=sa.Sampler(steps=steps),
        train=sa.Train(**settings), output=output,
    )  # fmt: skip


def trained(tuner):
    """The metrics of a run, and its weights."""
    metrics = [{key: value for key, value in row.items() if key not in NEVER} for row in tuner]
    return metrics, torch.cat([p.detach().flatten() for p in tuner.model.parameters.values()])


def test_a_full_window_and_one_branch_are_ddpo_to_the_bit():
    """Parameters and every metric. Twin: one step left out."""
    truth, found, short = (
        trained(mixture(algorithm, iterations=3))
        for algorithm in (
            sa.DDPO(), sa.HRF(window=Window(kind="full"), branches=1), sa.DDPO(window=Window(kind="fixed", size=6 / 7))
        )
    )  # fmt: skip
    same(found[1], truth[1], one_step_left_out=short[1])
    same(found[0], truth[0], one_step_left_out=[{k: row[k] for k in truth[0][0]} for row in short[0]])


def learner(window, branches=1, *, steps=12, batch=64, algorithm=sa.DDPO, reward=None, parameters=(-0.2, 0.3), **more):
    made = model(VP, parameters)
    where = setting(made, steps=steps, batch=batch)
    if reward is not None:
        where = where._replace(reward=Objective(lambda x0, prompt: reward(x0), False))
    baseline = {} if algorithm is sa.HRF else {"baseline": "branch" if branches > 1 else "batch"}
    return algorithm(window=window, branches=branches, **baseline, **more).build(where)


def grid(found):
    return found.sampler.times(found.process)


def rolled(found, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    times = found.times(generator)
    return found.explore(none(batch), times, RowNoise(seed, torch.arange(batch)))


@pytest.mark.parametrize("source", [lambda: RowNoise(3, torch.arange(8)), lambda: torch.Generator().manual_seed(3)])
def test_siblings_have_one_stem_and_the_first_is_the_plain_rollouts_trajectory(source):
    """Twin: the second sibling, which parts from it at step 4; one branch is the plain rollout."""
    found, times = learner(Window()), sa.Sampler(steps=9).times(VP)
    draw, start = partial(roll_out_chain, found), (lambda p, n: found.model.start(len(p), n))
    plain = draw(none(8), times, source(), x=None)
    for at in (0, 4, 7):
        alone = branched(draw, start, none(8), times, source(), at=at, count=1)
        same(alone.x, plain.x, other=plain.x.flip(1))
        same(alone.old.x0, plain.old.x0, other=plain.x[:-1])
        two = branched(draw, start, none(8), times, source(), at=at, count=2)
        first, second = two.x[:, :4], two.x[:, 4:]
        same(first, plain.x[:, :4], second=second)
        same(second[: at + 1], first[: at + 1], apart=plain.x[: at + 1, 4:])
        assert not bool((second[at + 1] == first[at + 1]).any())
        same(two.times, times, a_part=times[1:])
        if at:
            same(two.old.x0[:at], torch.cat([plain.old.x0[:at, :4]] * 2, 1), other=plain.old.x0[:at])


def test_no_step_is_in_more_windows_than_another_and_weights_undo_their_chance():
    """`E weight = 1` of every step, over all windows. Twins: unweighted; windows that are not cut off at the ends."""
    found = learner(Window(kind="random", size=5 / 19), steps=20)
    count = 19 + 5 - 1

    def mean(values):
        return torch.stack(values).mean(0)[:19]

    weights = [found.windows._weight(f64([(i + 0.5) / count]), grid(found)) for i in range(count)]
    close(mean(weights), torch.ones(19), atol=1e-15, unweighted=mean([(w > 0).double() for w in weights]))
    inner = stretches(19, 5)[4:-4].double().mean(0)  # those of whole length: the ends count a fifth of the middle
    close(inner[[0, 9, 18]], f64([0.067, 0.333, 0.067]), atol=5e-4, even=mean([(w > 0).double() for w in weights])[[0, 9, 18]])
    signals = learner(Window(kind="signal", size=5 / 19), 8, steps=20)
    signals.state.signal = {"0": 0.1, "9": 4.0, "12": -1.0, "18": 2.0}
    cover, numbers = stretches(19, 5), torch.arange(19)
    chance = signals.windows._chance(numbers, cover)
    ends = torch.cat([f64([0.0]), chance.cumsum(0)])
    weighted = [
        p * signals.windows._weight((a + b)[None] / 2, grid(signals))[:19]
        for p, a, b in zip(chance, ends, ends[1:], strict=False)
    ]
    close(sum(weighted), torch.ones(19), atol=1e-12, even=sum(weighted) / (chance @ cover.double()) * 5 / 23)
    mass = cover.double() @ f64([0.1, *[1.525] * 8, 4.0, 1.525, 1.525, 0.0, *[1.525] * 5, 2.0])
    close(chance, 0.1 / 23 + 0.9 * mass / mass.sum(), atol=1e-12, no_floor=mass / mass.sum())


def test_random_windows_have_the_full_gradient():
    """The mean over all windows of the gradient in each, on one batch. Twins: unweighted; weights of another size."""
    found = learner(Window(kind="random", size=3 / 9), steps=10, batch=400, estimator="reinforce")
    found.model.net.double()
    rollout = rolled(found, 400)
    rollout = replace(rollout, x=rollout.x.double(), rewards=-((rollout.x0[:, 0] - 1) ** 2))
    rollout = found.prepare(rollout, torch.Generator())

    def gradient(weight):
        (update,) = found.updates(replace(rollout, step_weight=weight), torch.Generator().manual_seed(0))
        return torch.autograd.grad(total(update), found.model.parameters["th"])[0]

    count = 9 + 3 - 1
    weights = [found.windows._weight(f64([(i + 0.5) / count]), grid(found)) for i in range(count)]
    full = gradient(None)
    windows = torch.stack([gradient(weight) for weight in weights]).mean(0)
    unweighted = torch.stack([gradient((weight > 0).double()) for weight in weights]).mean(0)
    close(windows, full, rtol=1e-5, atol=0, unweighted=unweighted, by_share=windows * 3 / 9)


def test_ratios_begin_at_one_with_branches():
    """Twin: a policy that moved between sampling and learning."""

    def first(moved):
        found = learner(Window(kind="random"), 4)
        rollout = rolled(found, 64)
        rollout = found.prepare(replace(rollout, rewards=rollout.x0[:, 0]), torch.Generator())
        with torch.no_grad():
            found.model.parameters["th"].add_(moved)
        return next(each(found.updates(rollout, torch.Generator())))[2]["log_ratio_first"]

    close(first(0.0), 0.0, atol=1e-5, moved=first(0.1))


def chain(steps):
    """Of the exact policy on N(.3, .8): the slopes A_i and deviations k_i of the DDIM chain at eta 1."""
    times = sa.Sampler(steps=steps).times(VP)
    t, s = times[:-1], times[1:]
    alpha, a_s, v_t, v_s = VP.alpha(t), VP.alpha(s), VP.sigma2(t), VP.sigma2(s)
    k2 = (v_s / v_t * (v_t - (alpha / a_s) ** 2 * v_s)).clamp(min=0)
    return (a_s * alpha * 0.8 + ((v_s - k2).clamp(min=0) * v_t).sqrt()) / (alpha**2 * 0.8 + v_t), k2.sqrt()


@pytest.mark.parametrize(("at", "truth"), [(10, 0.297), (15, 0.886)])
def test_the_share_between_stems_and_the_signal_are_those_of_the_chain(at, truth):
    """`Var E[r|x_t]/Var r` of a linear reward, and `(prod A k_i)^2`. Twins: stems taken for siblings; the factor left out."""
    A, k = chain(20)
    after = torch.stack([A[i + 1 :].prod() for i in range(20)])
    within = (after[at:] ** 2 * k[at:] ** 2).sum()
    whole = (after**2 * k**2).sum() + A.prod() ** 2  # the start has variance 1
    close(1 - within / whole, truth, atol=6e-4, within=within / whole)
    found, draws = learner(Window(kind="signal"), 2, steps=20, batch=ROWS, parameters=(0.0, 0.0)), []
    weight = torch.zeros(20, dtype=torch.float64).index_fill(0, torch.arange(at, at + 3), 1.0)
    for seed in range(4):
        found.windows.step_weight, found.state.signal = weight, {}
        rollout = found.windows.explore(partial(roll_out_chain, found), none(ROWS), sa.Sampler(steps=20).times(VP),
                                        torch.Generator().manual_seed(seed))  # fmt: skip
        rewards = rollout.x0[:, 0]
        found.windows.record(rollout, rewards)
        mixed = rewards.view(2, -1)
        stems_as_siblings = 1 - float(mixed.T.reshape(2, -1).var(0).mean() / rewards.var())
        draws.append([found.state.sibling_share, found.state.signal[str(at)] * float(rewards.var()), stems_as_siblings])
    mean, error = f64(draws).mean(0), 4 * f64(draws).std(0) / 2
    close(mean[0], truth, atol=float(error[0]) + 1e-3, stems_as_siblings=mean[2])
    gain = (after[at] * k[at]) ** 2
    close(mean[1], gain, atol=float(error[1]), without_the_factor=2 * mean[1])


def test_siblings_are_compared_without_bias_and_with_less_variance():
    """`E A z = dE r/dz` times 1/std. Twins: the plain mean of the siblings, 1 - 1/B of it; each family's own std (GRPO)."""
    B, stems, slope = 8, 40_000, 0.4
    generator = torch.Generator().manual_seed(0)
    z, stem, rest = (torch.randn(n, generator=generator) for n in (B * stems, stems, B * stems))
    rewards = 2.0 * stem.repeat(B) + slope * z + 0.3 * rest
    std = float(rewards.std(correction=0))
    advantage = sibling_advantages(rewards, B)
    families = rewards.view(B, -1)
    plain = (families - families.mean(0)).flatten() / std
    grpo = ((families - families.mean(0)) / families.std(0)).flatten()
    batch = (rewards - rewards.mean()) / std
    close((advantage * z).mean() * std, slope, atol=4e-3, plain_mean=(plain * z).mean() * std, own_std=(grpo * z).mean() * std)
    ratio = float((batch * z).var() / (advantage * z).var())
    assert ratio > 6, ratio
    equal = sibling_advantages(torch.full((16,), 3.0), 4)
    close(equal, torch.zeros(16), atol=0, spread=sibling_advantages(torch.arange(16.0), 4))


def test_a_signal_of_exploring_policies_is_refused():
    """It is of the sampler's noise. Twin: a window that needs no signal."""

    def made(kind, exploration):
        settings = {"estimator": "likelihood_ratio", "look_ahead": "none", "branches": 4, "exploration": exploration}
        model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
        algorithm = sa.ScoreAction(**settings, window={"kind": kind})
        return sa.Finetuner(model, reward=lambda x, p: x[:, 0], algorithm=algorithm, train=sa.Train(iterations=1, batch=8))

    with pytest.raises(ValueError, match=r"algorithm.window.kind: the signal is of the sampler's noise"):
        made("signal", 0.1)
    assert made("signal", 0.0).learner.branches == made("random", 0.1).learner.branches == 4


@pytest.mark.parametrize("B", [2, 3, 8])
def test_the_signal_has_no_bias_at_any_number_of_siblings(B):
    """`|E A z|^2` in three dimensions. Twin: with what two advantages have of one another."""
    generator, stems, slope = torch.Generator().manual_seed(B), 300_000 // B, f64([0.4, -0.2, 0.1])
    z = torch.randn(B, stems, 3, generator=generator, dtype=torch.float64)
    rewards = z @ slope + 0.5 * torch.randn(B, stems, generator=generator, dtype=torch.float64)
    own = (rewards - rewards.mean(0)) * B / (B - 1)
    found = signal(own, z)
    error = 4 * float(found.std()) / math.sqrt(stems)
    truth = float(slope @ slope)
    close(found.mean(), truth, atol=error)
    if B == 2:
        close(found.mean(), truth, atol=error, shared=found.mean() * 2)


def test_evaluations_are_those_of_stems_and_branches():
    """P i0 + n (N - i0) to sample, n L to learn, 2 N for the log. Twin: a trajectory each from noise."""
    found = next(iter(mixture(sa.HRF(window=Window(kind="fixed", start=0.36, size=3 / 7), branches=8), batch=64)))
    n, N, at, length = 64, 8, 4, 3
    drawn = n // 8 * at + n * (N - at)
    same(found["window_from"], float(sa.Sampler(steps=8).times(VP)[at]), the_next=0.230)
    same(found["model_evaluations"], drawn + n * length + 2 * N, plain=n * N + n * length + 2 * N)
    same(found["reward_queries"], n, of_stems=8)


PROMPTS = ["a", "b", "c"]


class Slow:
    """A reward that scores five samples at a time in the background."""

    differentiable, rows = False, 5

    def __call__(self, samples, prompts):
        return samples[:, 0] + 0.1 * samples[:, 1] ** 2

    def begin(self, samples, prompts):
        return lambda: self(samples, prompts)


def test_parts_that_are_scored_in_the_background_keep_the_order_of_rows():
    """Twin: the order of the parts."""

    def rollout(reward):
        tuner = mixture(sa.HRF(branches=4, window=Window(kind="fixed", start=0.5)), reward=reward)
        generator = torch.Generator().manual_seed(1)
        return tuner.collector.rollout(tuner.learner, generator, 0)

    plain, parts = rollout(Slow().__call__), rollout(Slow())
    order = torch.arange(32).view(4, -1).T.flatten()
    close(parts.x, plain.x, atol=1e-4, of_parts=plain.x[:, order])
    close(parts.rewards, plain.rewards, atol=1e-4, of_parts=plain.rewards[order])
    same(parts.step_weight, plain.step_weight, full=torch.ones(8, dtype=torch.float64))


def test_siblings_have_one_prompt_and_families_of_one_prompt_are_whole():
    """Twin: prompts drawn a trajectory each."""

    def prompts(branches, each):
        train = sa.Train(batch=24, samples_per_prompt=each)
        drawer = Collector(None, None, train, None, None, list("abcdefgh"))
        return drawer._drawn(branches, torch.Generator().manual_seed(0))

    def check(found):
        assert bool((found.view(4, -1) == found.view(4, -1)[0]).all())

    accepts(check, prompts(4, 1), each=prompts(1, 1))
    eight = prompts(4, 8).view(4, 3, 2)
    assert bool((eight == eight[:1, :, :1]).all())
    same(prompts(1, 3)[:6].tolist(), prompts(1, 3)[[0, 0, 0, 3, 3, 3]].tolist(), each=prompts(1, 1)[:6].tolist())


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        sa.HRF(branches=4, window=Window(kind="signal")),
        sa.DDPO(window=Window(kind="sliding", every=1)),
        sa.ScoreAction(
            estimator="likelihood_ratio",
            look_ahead="none",
            branches=4,
            window=Window(kind="random"),
            critic_updates=2,
            updates=2,
        ),
    ],
    ids=["signal", "sliding", "score_action"],
)
def test_a_resumed_run_is_the_uninterrupted_one(algorithm, tmp_path):
    """Twin: one that forgets its windows."""
    whole = trained(mixture(algorithm, iterations=4))
    first = mixture(algorithm, iterations=4, output=tmp_path / "run", checkpoint_every=2)
    rows = iter(first)
    next(rows), next(rows)

    def rest(forgets=False):
        tuner = mixture(algorithm, iterations=4, output=tmp_path / "run", checkpoint_every=100)
        assert tuner.resume()
        if forgets:
            tuner.learner.state.signal, tuner.learner.state.learned = {}, 0
            tuner.generator.manual_seed(3)
        found = [row for row, _ in zip(iter(tuner), range(2), strict=False)]
        weights = torch.cat([p.detach().flatten() for p in tuner.model.parameters.values()])
        return [{key: value for key, value in row.items() if key not in NEVER} for row in found], weights

    rows.close()
    forgotten, found = None, rest()
    same(found[0], whole[0][2:], the_first=whole[0][:2])
    for path in (tmp_path / "run" / "checkpoints").glob("000004"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    forgotten = rest(forgets=True)
    same(found[1], whole[1], forgets=forgotten[1])


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (r"algorithm.branches: 5 do not divide train.batch 64; .*train.batch to 60", lambda: learner(Window(), 5)),
        (
            r"algorithm.branches: baseline branch compares siblings",
            lambda: sa.DDPO(baseline="branch").build(setting(model(VP))),
        ),
        (
            r"algorithm.baseline: with branches the siblings are the baseline; set it to branch \(got prompt\)",
            lambda: sa.DPOK(branches=2).build(setting(model(VP))),
        ),
        (r"algorithm.window.kind: the signal .*branches to 2 or more, or take random", lambda: learner(Window(kind="signal"))),
        (
            r"algorithm.window.start: no step between t = 0.001 and 0 has noise; raise it",
            lambda: learner(Window(kind="fixed", start=1e-3)),
        ),
        (
            r"algorithm.window: windows are of densities, and the pathwise estimator has none",
            lambda: sa.ScoreAction(window=Window(kind="random")).build(setting(model(VP))),
        ),
        (r"algorithm.branches: windows are of", lambda: sa.ScoreAction(branches=2).build(setting(model(VP)))),
        (
            r"train.samples_per_prompt: 3 are no whole families of algorithm.branches 2, .* set it to 4",
            lambda: mixture(sa.HRF(branches=2), samples_per_prompt=3),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(match, make):
    with pytest.raises(ValueError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
    learner(Window(kind="random"), 4)  # the twin: what does
    assert isinstance(learner(Window()).windows, Windows)
