"""Truth: the steps taken one by one by hand, the law of the exact score, a network that counts its calls."""

import pytest
import torch
from torch import nn
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._pathwise import perturbed
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.solvers import SOLVERS, jittered, time_grid
from scoreaction.sampling.experience import Experience, Points, over_rows
from scoreaction.sampling.rollout import roll_out, trajectory
from scoreaction.types import Prediction


class Line(nn.Module):
    """`eps = w x + t/10`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, cond):
        return self.w * x + 0.1 * t.reshape(-1, *[1] * (x.ndim - 1))


def build(shape=(2,)):
    return sa.Model(Line(), process=sa.VP(), predicts="eps", shape=shape)


def rolled(model, sampler, n=6, *, seed=0, explore=None):
    times = sampler.times(model.process)
    generator = torch.Generator().manual_seed(seed)
    return roll_out(model, sampler, model.predict, n, generator, times=times, explore=explore)


def same(truth):
    def check(value):
        assert torch.equal(value, truth)

    return check


@pytest.mark.parametrize("shape", [(2,), (1, 3, 3)])
def test_a_rollout_is_its_steps_and_keeps_no_graph(shape):
    model, sampler = build(shape), sa.Sampler(steps=4)
    rollout = rolled(model, sampler)
    assert rollout.x.shape == (5, 6, *shape)
    assert rollout.prediction.eps.shape == (4, 6, *shape)

    def check(tensors):
        assert not any(t.requires_grad for t in tensors)

    with_graph = [model.predict(rollout.x[0], rollout.times[0]).eps]
    accepts(check, [rollout.x, rollout.prediction.x0, rollout.prediction.eps], with_graph=with_graph)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *shape, generator=generator) * sa.VP().prior_std
    for i, (t, s) in enumerate(zip(rollout.times[:-1], rollout.times[1:], strict=True)):
        assert torch.equal(rollout.x[i], x)
        said = model.predict(x, t)
        assert torch.equal(said.eps, rollout.prediction.eps[i])
        step = SOLVERS["ddim"].step(model.process, None, said, x, t, s, 1.0, None)
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
        x0 = roll_out(model, sa.Sampler(), predict, 8000, generator, times=times).x0
        close(x0.mean(0), [1.0, -1.0], atol=0.04, noise=[0.0, 0.0])
        close(x0.std(0), [0.8, 0.8], atol=0.04, noise=[1.0, 1.0])


@pytest.mark.parametrize(("solver", "eta", "a_step"), [("ddim", 1.0, 1), ("dpmpp_2m", 0.0, 1), ("heun", 0.0, 2)])
def test_exploration_keeps_what_the_policy_said_apart_from_what_was_done(solver, eta, a_step):
    """The stored prediction is the policy's own at the stored state, also where the solver asks it twice a step."""
    model, noise = build(), torch.Generator().manual_seed(1)

    def explore(x, t, said):
        return perturbed(model.process, x, t, said, 0.1, noise)

    sampler = sa.Sampler(solver=solver, eta=eta, steps=4)
    model.evaluations.forward = 0
    rollout = rolled(model, sampler, explore=explore)
    assert model.evaluations.forward == 6 * (4 * a_step - (a_step - 1))  # Heun's last step, to t = 0, is one of Euler
    with torch.no_grad():
        own = torch.stack([model.predict(rollout.x[i], rollout.times[i]).eps for i in range(4)])
    close(rollout.prediction.eps, own, atol=1e-6, what_was_done=rollout.action.eps)
    spread = (rollout.action.eps - rollout.prediction.eps).std()
    close(spread, 0.1, atol=0.025, none=0.0, twice=2 * float(spread))
    x, alpha, sigma = rollout.x[1], *(float(f(rollout.times[1])) for f in (model.process.alpha, model.process.sigma))
    close(alpha * rollout.action.x0[1] + sigma * rollout.action.eps[1], x, atol=1e-5, not_moved=x + 0.1)


def test_exploring_noise_does_not_act_on_pure_noise():
    said = Prediction(torch.ones(2, 1), torch.zeros(2, 1))
    generator = torch.Generator().manual_seed(0)
    assert perturbed(sa.Flow(), torch.zeros(2, 1), f64(1.0), said, 0.1, generator) is said
    assert perturbed(sa.Flow(), torch.zeros(2, 1), f64(0.9), said, 0.1, generator) is not said


def test_points_are_states_times_and_conditions_in_step_order():
    model = build()
    rollout = rolled(model, sa.Sampler(steps=3), n=4)
    groups = torch.tensor([0, 1, 2, 3])
    experience = Experience(rollout, torch.zeros(4), groups * 10, groups)
    assert experience.size == (3, 4)
    points = experience.points()
    row = 2 * 4 + 1  # step 2, trajectory 1
    assert torch.equal(points.x[row], rollout.x[2, 1])
    assert float(points.t[row]) == float(rollout.times[2])
    accepts(same(torch.tensor([0, 10, 20, 30] * 3)), points.conditions, step_fastest=(groups * 10).repeat_interleave(3))
    few = experience.points(2)
    assert torch.equal(few.x, torch.cat([rollout.x[i, :2] for i in range(3)]))
    assert few.conditions.tolist() == [0, 10] * 3
    chosen = points.take(torch.tensor([row]))
    assert (float(chosen.t), chosen.conditions.tolist()) == (float(rollout.times[2]), [10])


def test_difference_is_of_the_trajectories_that_were_compared():
    model = build()
    rollout = rolled(model, sa.Sampler(steps=3), n=4)
    half = Prediction(rollout.prediction.x0[:, :2] - 1, rollout.prediction.eps[:, :2] - 2)
    experience = Experience(rollout, torch.zeros(4), None, torch.zeros(4), reference=half)
    difference = experience.difference()
    assert difference.eps.shape == (3, 2, 2)
    close(difference.x0, 1.0, atol=1e-5, sign=-difference.x0)
    with pytest.raises(ValueError, match="has not been asked"):
        Experience(rollout, torch.zeros(4), None, torch.zeros(4)).difference()


def test_pieces_of_rows_are_all_rows():
    points = Points(torch.arange(14.0).reshape(7, 2), torch.linspace(0.1, 0.7, 7), torch.arange(7))
    seen = []

    def predict(x, t, conditions):
        seen.append(len(x))
        return Prediction(x + conditions[:, None], x * t[:, None].to(x))

    whole, pieces = over_rows(predict, points, 100), over_rows(predict, points, 3)
    assert seen == [7, 3, 3, 1]
    accepts(same(whole.x0), pieces.x0, reordered=pieces.x0.flip(0))
    assert torch.equal(whole.eps, pieces.eps)


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
