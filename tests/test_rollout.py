"""Truth: the steps taken one by one by hand, the law of the exact score, a network that counts its calls."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import perturbed
from scoreaction.diffusion.solvers import SOLVERS, jittered, time_grid
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import compared, joined, roll_out
from scoreaction.sampling.trajectory import trajectory
from scoreaction.types import Prediction
from scoreaction.world import World


class Line(nn.Module):
    """`eps = w x + t/10 + condition`."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, t, cond):
        self.calls.append(len(x))
        y = self.w * x + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1))
        return y if cond is None else y + cond[:, None].to(y)


def build(shape=(2,)):
    return sa.Model(Line(), process=sa.VP(), predicts="eps", shape=shape)


def rolled(model, sampler, n=6, *, seed=0, explore=None, prompt=None):
    times = sampler.times(model.process)
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.zeros(n, dtype=torch.long) if prompt is None else prompt
    return roll_out(model, sampler, model.predict, prompt, generator, times=times, explore=explore)


def same(truth):
    def check(value):
        assert torch.equal(value, truth)

    return check


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
def test_a_rollout_is_its_steps_and_keeps_no_graph(shape):
    model, sampler = build(shape), sa.Sampler(steps=4)
    rollout = rolled(model, sampler)
    assert rollout.x.shape == (5, 6, *shape)
    assert rollout.old.eps.shape == (4, 6, *shape)

    def check(tensors):
        assert not any(t.requires_grad for t in tensors)

    with_graph = [model.predict(rollout.x[0], rollout.times[0]).eps]
    accepts(check, [rollout.x, rollout.old.x0, rollout.old.eps], with_graph=with_graph)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *shape, generator=generator) * sa.VP().prior_std
    for i, (t, s) in enumerate(zip(rollout.times[:-1], rollout.times[1:], strict=True)):
        assert torch.equal(rollout.x[i], x)
        prediction = model.predict(x, t)
        assert torch.equal(prediction.eps, rollout.old.eps[i])
        step = SOLVERS["ddim"].step(model.process, None, prediction, x, t, s, 1.0, None)
        x = (step.sample(generator) if i < 3 else step.mean).detach()
    accepts(same(x), rollout.x0, before_the_last_step=rollout.x[-2])


def test_a_rollout_starts_from_any_stored_state():
    model, sampler = build(), sa.Sampler(steps=6, eta=0.0)
    whole = rolled(model, sampler)

    def rest(i):
        visits = trajectory(model.predict, model.process, whole.x[i], whole.times[i:], solver=SOLVERS["ddim"], eta=0.0)
        with torch.no_grad():
            return list(visits)

    visits = rest(3)
    assert [float(visit.t) for visit in visits] == whole.times[3:-1].tolist()
    with torch.no_grad():
        shifted = list(trajectory(model.predict, model.process, whole.x[3], whole.times[2:-1], solver=SOLVERS["ddim"], eta=0.0))
    accepts(same(whole.x0), visits[-1].x_next, one_time_off=shifted[-1].x_next)


@pytest.mark.parametrize(("process", "std"), [(sa.VP(), 1.0), (sa.Flow(), 1.0), (sa.VE(), 50.0)])
def test_noise_has_the_std_of_the_process(process, std):
    model = sa.Model(Line(), process=process, predicts="v", shape=(2,))
    x = rolled(model, sa.Sampler(steps=1), n=20_000).x[0]
    close(float(x.std()) / std, 1.0, atol=0.02, variance=float(x.var()) / std + 0.5)


@pytest.mark.slow
def test_samples_of_the_exact_score_have_the_law():
    law = Mixture.isotropic([[1.0, -1.0]], std=0.8)
    for process in (sa.VP(), sa.Flow()):
        predict = lambda x, t, p=process: law.prediction(p, x, t)  # noqa: E731
        model = sa.Model(Line(), process=process, predicts="v", shape=(2,))
        generator = torch.Generator().manual_seed(0)
        times = time_grid(process, 100, name="power")
        x0 = roll_out(model, sa.Sampler(), predict, torch.zeros(8000), generator, times=times).x0
        close(x0.mean(0), [1.0, -1.0], atol=0.04, noise=[0.0, 0.0])
        close(x0.std(0), [0.8, 0.8], atol=0.04, noise=[1.0, 1.0])


@pytest.mark.parametrize(("solver", "eta", "a_step"), [("ddim", 1.0, 1), ("dpmpp_2m", 0.0, 1), ("heun", 0.0, 2)])
def test_exploration_keeps_the_policys_own_prediction_apart_from_what_was_done(solver, eta, a_step):
    """The stored prediction is the policy's own at the stored state, also where the solver asks it twice a step."""
    model, noise = build(), torch.Generator().manual_seed(1)

    def explore(x, t, prediction):
        return perturbed(model.process, x, t, prediction, 0.1, noise)

    sampler = sa.Sampler(solver=solver, eta=eta, steps=4)
    model.evaluations.forward = 0
    rollout = rolled(model, sampler, explore=explore)
    assert model.evaluations.forward == 6 * (4 * a_step - (a_step - 1))  # Heun's last step, to t = 0, is one of Euler
    with torch.no_grad():
        own = torch.stack([model.predict(rollout.x[i], rollout.times[i]).eps for i in range(4)])
    close(rollout.old.eps, own, atol=1e-6, what_was_done=rollout.action.eps)
    spread = (rollout.action.eps - rollout.old.eps).std()
    close(spread, 0.1, atol=0.025, none=0.0, twice=2 * float(spread))
    x, alpha, sigma = rollout.x[1], *(float(f(rollout.times[1])) for f in (model.process.alpha, model.process.sigma))
    close(alpha * rollout.action.x0[1] + sigma * rollout.action.eps[1], x, atol=1e-5, not_moved=x + 0.1)


def test_exploring_noise_does_not_act_on_pure_noise():
    prediction = Prediction(torch.ones(2, 1), torch.zeros(2, 1))
    generator = torch.Generator().manual_seed(0)
    assert perturbed(sa.Flow(), torch.zeros(2, 1), f64(1.0), prediction, 0.1, generator) is prediction
    assert perturbed(sa.Flow(), torch.zeros(2, 1), f64(0.9), prediction, 0.1, generator) is not prediction


def test_steps_are_in_step_order_and_have_all_of_their_row():
    """Row `step * batch + path`: state, end, times, prediction and prompt of its step and trajectory; each counts for N."""
    prompt = torch.tensor([7, 5, 5, 6])
    rollout = rolled(build(), sa.Sampler(steps=3), prompt=prompt)
    assert rollout.size == (3, 4)
    steps = rollout.steps()
    accepts(same(prompt.repeat(3)), steps.prompt, step_fastest=prompt.repeat_interleave(3))
    for row in range(12):
        step, path = row // 4, row % 4
        truth = [rollout.x[step, path], rollout.x[step + 1, path], rollout.times[step], rollout.times[step + 1]]
        other = [rollout.x[step, 3 - path], rollout.x[step, path], rollout.times[step + 1], rollout.times[step]]
        for value, right, wrong in zip((steps.x, steps.x_next, steps.t, steps.s), truth, other, strict=True):
            accepts(same(right), value[row], wrong=wrong)
        accepts(same(rollout.old.eps[step, path]), steps.old.eps[row], x0=steps.old.x0[row])
        assert (int(steps.step[row]), int(steps.path[row])) == (step, path)
    accepts(same(torch.full((12,), 3.0, dtype=torch.float64)), steps.weight, one=torch.ones(12, dtype=torch.float64))
    states = take(steps.states, torch.tensor([9]))
    assert [part.tolist() for part in states] == [rollout.x[2, 1:2].tolist(), [float(rollout.times[2])], [5]]
    assert steps.x.data_ptr() == rollout.x.data_ptr()  # views


CONDITIONS = torch.tensor([0.0, 0.3, -0.4])


def learner(conditions, rows=None):
    """A learner of the line with these conditions of all prompts."""
    built = sa.DDPO().build(Setting(build(), sa.Sampler(steps=3), Objective(lambda x, prompt: x[:, 0], True), 4, conditions))
    built.reference_rows = rows
    return built


@pytest.mark.parametrize("rows", [2, 3, None, 100])
def test_the_pretrained_model_is_evaluated_at_as_many_trajectories_a_step(rows):
    """At each visited time and not at an end, with that trajectory's prompt; at the next step others have their turn."""
    agent, prompt = learner(torch.tensor([0.0, 0.3, -0.4]), rows), torch.tensor([2, 0, 1, 0])
    rollout = rolled(agent.model, agent.sampler, prompt=prompt)
    with torch.no_grad():
        agent.model.net.w.add_(0.2)  # the policy has gone on
    agent.model.net.calls.clear()
    complete = agent.prepare(rollout, torch.Generator())
    n = min(rows or 4, 4)
    assert complete.pretrained.x0.shape == complete.difference().x0.shape == (3, n, 2)
    assert complete.pretrained.x0.requires_grad is False

    def eps(w, shift, i):
        path = [(n * i + j) % 4 for j in range(n)]
        at_prompt = torch.tensor([-0.4, 0.0, 0.3, 0.0])[path][:, None].roll(shift, 0)
        return w * rollout.x[i, path] + 0.1 * float(rollout.times[i]) + at_prompt

    for i in range(3):
        close(
            complete.pretrained.eps[i], eps(0.5, 0, i), atol=1e-5, policy=eps(0.7, 0, i), other_prompts=eps(0.5, 1, i),
            other_step=eps(0.5, 0, i + 1),
        )  # fmt: skip
    assert (complete.steps().pretrained is None) == (n < 4)  # steps are whole, or without it


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_processes_compare_the_trajectories_that_one_would(size):
    """Eight of twelve at each step, whatever the number of processes; twins: without what does not count, or of one alone."""

    def chosen(worlds, counted=True):
        found = []
        for world in worlds:
            trajectories, counts = compared(5, 12 // world.size, 8, world)
            assert trajectories.shape == (5, -(-8 // world.size))
            assert int(trajectories.max()) < 12 // world.size
            everyone = trajectories * world.size + world.rank
            found += [(i, int(row)) for i in range(5) for row in (everyone[i][counts[i]] if counted else everyone[i])]
        return sorted(found)

    truth = sorted((i, (8 * i + j) % 12) for i in range(5) for j in range(8))

    def right(found):
        assert found == truth

    every = [World(rank, size) for rank in range(size)]
    accepts(right, chosen([World()]), whole_trajectories=[(i, j) for i in range(5) for j in range(8)])
    accepts(right, chosen(every), of_one_process=chosen(every[:1]))
    assert (chosen(every, counted=False) == truth) == (8 % size == 0)


@pytest.mark.parametrize("size", [2, 3, 12])
def test_the_logged_kl_is_the_same_for_every_number_of_processes(size):
    """At the states that one process compares, evaluated once each; twins: all rows counted, and the first process alone."""

    def seen(world):
        setting = Setting(model, sa.Sampler(steps=3), Objective(lambda x, prompt: x[:, 0], True), 12, CONDITIONS, 1, world)
        agent = sa.DDPO().build(setting)
        own = Prediction(*(world.own(part.transpose(0, 1)).transpose(0, 1) for part in rollout.old))
        part = replace(
            rollout, x=world.own(rollout.x.transpose(0, 1)).transpose(0, 1), old=own, action=own, prompt=world.own(prompt)
        )
        before = model.evaluations.forward
        complete = agent.prepare(part, torch.Generator())
        return agent.kls(complete)[0].mean(), model.evaluations.forward - before

    model, prompt = build(), torch.tensor([2, 0, 1, 0] * 3)
    rollout = rolled(model, sa.Sampler(steps=3), prompt=prompt)
    with torch.no_grad():
        model.net.w.add_(0.2)
    rollout = replace(rollout, old=Prediction(*(part + 0.1 * torch.arange(12)[:, None] for part in rollout.old)))
    truth, evaluations = seen(World())
    each = [seen(World(rank, size)) for rank in range(size)]
    mean = torch.stack([kl for kl, _ in each]).mean()
    close(mean, truth, atol=1e-4 * float(truth), of_the_first=each[0][0], a_tenth_more=1.1 * mean)
    assert sum(count for _, count in each) == evaluations == 3 * 2


def test_a_beta_that_follows_the_kl_sees_more_of_it():
    """Eight states a step where beta moves with the estimate, two where it is logged alone, all where there are no more."""

    def asked(kl_target, batch):
        model = build()
        setting = Setting(model, sa.Sampler(steps=3), Objective(lambda x, prompt: x[:, 0], True), batch, CONDITIONS)
        rollout = rolled(model, sa.Sampler(steps=3), prompt=torch.zeros(batch, dtype=torch.long))
        before = model.evaluations.forward
        sa.RAM(kl_target=kl_target).build(setting).prepare(rollout, torch.Generator())
        return (model.evaluations.forward - before) // 3

    close([asked(None, 12), asked(0.1, 12), asked(0.1, 4)], [2, 8, 4], atol=0, alike=[2, 2, 2], everything=[12, 12, 4])


def test_difference_is_of_the_trajectories_that_were_compared():
    rollout = rolled(build(), sa.Sampler(steps=3), n=4)
    path = torch.tensor([[0, 1], [2, 3], [0, 1]])
    half = Prediction(*(part[torch.arange(3)[:, None], path] - i for i, part in enumerate(rollout.old, 1)))
    difference = replace(rollout, pretrained=half, compared_at=path).difference()
    assert difference.eps.shape == (3, 2, 2)
    first = Prediction(*(part[:, :2] - other for part, other in zip(rollout.old, half, strict=True)))
    close(difference.x0, 1.0, atol=1e-5, sign=-difference.x0, first_two=first.x0)
    close(difference.eps, 2.0, atol=1e-5, x0=difference.x0, first_two=first.eps)
    with pytest.raises(ValueError, match="has not been evaluated"):
        rollout.difference()


def test_rows_in_parts_are_all_rows_and_a_graph_is_of_one_call():
    """`max_rows` of the model splits a call without a graph, each row with its time; with one the loop gives what fits."""
    model, x, t = build(), torch.arange(14.0).reshape(7, 2), torch.linspace(0.1, 0.7, 7)

    def called():
        model.net.calls.clear()
        return model.predict(x, t), list(model.net.calls)

    with torch.no_grad():
        whole, one = called()
        model.max_rows = 3
        parts, three = called()
    _, graph = called()
    assert (one, three, graph) == ([7], [3, 3, 1], [7])
    accepts(same(whole.x0), parts.x0, reordered=parts.x0.flip(0))
    accepts(same(whole.eps), parts.eps, x0=parts.x0)


@pytest.mark.parametrize("exploring", [False, True])
def test_parts_of_a_batch_are_joined_side_by_side(exploring):
    """Trajectories keep their states, predictions and prompts; where nobody explores the action is the prediction itself."""
    model, noise = build(), torch.Generator().manual_seed(1)

    def explore(x, t, prediction):
        return perturbed(model.process, x, t, prediction, 0.1, noise)

    sampler, prompts = sa.Sampler(steps=3), ([4, 5, 6], [7, 8])
    parts = [
        rolled(model, sampler, seed=seed, explore=explore if exploring else None, prompt=torch.tensor(prompt))
        for seed, prompt in enumerate(prompts)
    ]
    whole = joined(parts)
    assert whole.size == (3, 5)
    accepts(same(torch.tensor([4, 5, 6, 7, 8])), whole.prompt, swapped=torch.tensor([7, 8, 4, 5, 6]))
    for name in ("old", "action"):
        for i, part in enumerate(("x0", "eps")):
            truth = torch.cat([getattr(rollout, name)[i] for rollout in parts], 1)
            accepts(same(truth), getattr(getattr(whole, name), part), swapped=truth.roll(2, 1))
    accepts(same(torch.cat([rollout.x for rollout in parts], 1)), whole.x, swapped=whole.x.roll(2, 1))
    assert (whole.action is whole.old) != exploring
    assert bool((whole.action.eps != whole.old.eps).any()) == exploring
    assert joined(parts[:1]) is parts[0]


@pytest.mark.parametrize("name", ["uniform", "power", "log_snr"])
def test_a_jittered_grid_stays_a_grid_and_moves_around_its_own(name):
    times, generator = time_grid(sa.VP(), 12, name=name), torch.Generator().manual_seed(0)
    moved = torch.stack([jittered(times, generator) for _ in range(4000)])

    def check(grids):
        assert bool((grids[:, :-1] > grids[:, 1:]).all())
        assert bool((grids[:, 0] == 1).all())
        assert bool((grids[:, -1] == 0).all())

    accepts(check, moved, past_neighbours=times + 3 * (moved - times), ends_too=moved + 1e-3)
    up, down = (times[:-2] - times[1:-1]) / 2, (times[1:-1] - times[2:]) / 2
    inner = moved[:, 1:-1] - times[1:-1]
    close((inner.max(0).values / up), 1.0, atol=0.01, never=0.0)
    close((inner.min(0).values / down), -1.0, atol=0.01, never=0.0)
    truth = (up - down) / 4  # a uniform move, up or down as likely
    spread = (up + down) / 100
    assert bool(((inner.mean(0) - truth).abs() < spread).all())


def test_samplers_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="heun takes eta zero"):
        sa.Sampler(solver="heun", eta=1.0).find()
    with pytest.raises(ValueError, match="use ddim, heun or dpmpp_2m"):
        sa.Sampler(solver="sde_dpmpp", eta=0.0).find()
    for bad in ({"steps": 0}, {"eta": 1.5}, {"solver": "rk4"}, {"grid": "cubic"}, {"step": 3}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sa.Sampler(**bad)
