"""Truth: the chain of a Gaussian under every method of steering, in closed form or simulated in numpy."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from affine import model
from scipy import integrate, stats
from steering_chain import BETA, M0, log_z, made, moments, selected, steered
from twins import F64, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.transitions import Transition
from scoreaction.errors import Failed
from scoreaction.sampling import steering_methods, walks
from scoreaction.sampling.particles import Particles, categorical, effective_share, systematic
from scoreaction.sampling.steer import steer_x0
from scoreaction.sampling.steering import Steering
from scoreaction.sampling.trajectory import Chosen, trajectory
from scoreaction.types import Prediction


def plain(*step):
    return 0.0


def test_a_chosen_step_keeps_its_prediction_and_what_the_solver_looks_back_on():
    """By a solver that writes down what it is given."""
    seen, evaluated = [], []

    class Recorder:
        def step(self, process, predict, prediction, x, t, s, eta, past):
            seen.append((prediction.x0[:, 0].tolist(), None if past is None else past.prediction.x0[:, 0].tolist()))
            return Transition(x, torch.zeros((), dtype=F64))

    def predict(x, t):
        evaluated.append(float(t))
        return Prediction(x, x)

    def choose(transition, t, s):
        rows = torch.tensor([1, 1])
        x = transition.mean[rows]
        return Chosen(x, Prediction(x + 10, x) if float(s) > 0.5 else None, rows)

    x, times = f64([[1.0], [2.0]]), f64([1.0, 0.6, 0.3, 0.0])
    ends = [v.x_next for v in trajectory(predict, sa.VP(), x, times, solver=Recorder(), eta=1.0, choose=choose)]
    close(ends[-1], f64([[2.0], [2.0]]), unchosen=x)
    truth = [([1.0, 2.0], None), ([12.0, 12.0], [2.0, 2.0]), ([2.0, 2.0], [12.0, 12.0])]
    same(seen, truth, past_of_other_rows=[truth[0], (truth[1][0], [1.0, 2.0]), truth[2]])
    same(evaluated, [1.0, 0.3], asked_again=[1.0, 0.6, 0.3])


def test_particles_resample_within_groups_and_keep_log_z():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]).log()
    u = torch.tensor([0.5, 0.1], dtype=F64)
    same(systematic(weights, u).tolist(), [[0, 0, 1, 2], [3, 3, 3, 3]], groups_mixed=systematic(weights.flip(0), u).tolist())
    draws = categorical(weights[:1].expand(20_000, 4), torch.rand(20_000, generator=torch.Generator().manual_seed(0)).double())
    share = torch.bincount(draws, minlength=4) / 20_000
    close(share, [0.5, 0.25, 0.25, 0.0], atol=0.015, uniform=[0.25] * 4)
    close(effective_share(weights), [1 / (4 * 0.375), 0.25], sum_of_squares=[0.375, 1.0])
    particles, generator = Particles(2, 4), torch.Generator().manual_seed(0)
    particles.weigh(weights)
    parents = particles.resample(0.5, generator)
    assert parents[:4].tolist() == [0, 1, 2, 3]
    assert parents[4:].tolist() == [7] * 4
    close(particles.log_z, [-math.log(4)] * 2, forgotten=[-math.log(4), 0.0])
    particles.weigh(torch.zeros(2, 4))
    close(particles.log_z, [-math.log(4)] * 2, forgotten=[-math.log(4), 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_svdd_is_right_for_few_candidates_and_for_every_eta(eta):
    """With T = beta (eta^2/c) (M-1)/M; published, T = beta, it solves beta M/(M-1) at eta 1 and another problem below."""
    c, m, n = (1 + eta**2) / 2, 4, 50
    truth = selected(n, m, BETA * eta**2 / c * (m - 1) / m, eta)
    x, figures = steered({"method": "svdd", "particles": m}, n=4000, steps=n, eta=eta)
    published, _ = steered({"method": "svdd_published", "select": "categorical", "particles": m}, n=4000, steps=n, eta=eta)
    close(x.mean(), truth, atol=0.05, published=published.mean())
    close(published.mean(), selected(n, m, BETA, eta), atol=0.05, corrected=x.mean())
    limit, _ = moments(n, lambda k, gain, here, there: k * k * c / eta**2 * there / BETA, eta)
    close(x.mean(), limit, atol=0.12, published=published.mean())
    same(
        (figures["evaluations_per_sample"], figures["queries_per_sample"]),
        (49 * m + 1, 49 * m),
        all_again=(50 * (m + 1), 49 * m),
    )


@pytest.mark.slow
def test_the_best_candidate_has_no_limit_of_short_steps():
    """Means of 3.58 and 6.44 at 10 and 25 steps, 20 candidates, uniform grid: it grows as the root of their number."""
    largest = integrate.quad(lambda z: z * 20 * stats.norm.cdf(z) ** 19 * stats.norm.pdf(z), -8, 10)[0]
    for n in (10, 25):
        truth, _ = moments(n, lambda k, gain, here, there: k * largest, rho=1.0)
        x, figures = steered({"method": "svdd_published", "particles": 20}, n=1500, steps=n, grid="uniform")
        corrected, _ = steered({"method": "svdd", "particles": 20}, n=500, steps=n, grid="uniform")
        close(x.mean(), truth, atol=0.08, corrected=corrected.mean())
        close(figures["kl_steered_nats"], (n - 1) * (math.log(20) - 19 / 20), atol=1e-9, of_one_choice=math.log(20) - 19 / 20)


def test_sequential_monte_carlo_has_no_bias_in_z_whatever_the_number_of_particles():
    """And without the start's own weight it has one."""
    truth = math.exp(log_z(10))

    def forgets_the_start(self):
        self.weigh(self.walk_.times[0], resample=False)
        self.particles = Particles(self.walk_.groups, self.walk_.m)
        x0 = self.walk_.follow(self.predict, self.x, self.choose).unflatten(0, (self.walk_.groups, self.walk_.m))
        rewards, shares = self.values.view(self.walk_.groups, -1), torch.stack(self.particles.shares, 1)
        return walks.Walked(x0, self.particles.log_weights, self.particles.log_z, rewards, torch.zeros(len(x0)), shares)

    for settings in ({"particles": 2}, {"particles": 8}, {"particles": 8, "every": 3}):
        _, figures = steered({"method": "smc", **settings}, n=6000 // settings["particles"], steps=10)
        with patch.object(steering_methods._Weighted, "walk", forgets_the_start):
            _, without = steered({"method": "smc", **settings}, n=6000 // settings["particles"], steps=10)
        close(
            math.exp(figures["log_z"]) / truth, 1.0, atol=5 * figures["log_z_se"], no_start=math.exp(without["log_z"]) / truth
        )
        close(figures["kl_steered_nats"], moments(10, plain)[1] / (2 * BETA**2), atol=0.25, of_the_law=1.6)


def test_the_twisted_proposal_with_an_exact_value_leaves_all_weights_equal():
    x, figures = steered({"method": "twisted", "particles": 4}, n=1000)
    _, untwisted = steered({"method": "smc", "particles": 4}, n=1000)
    close(figures["ess_min"], 1.0, atol=0.02, smc=untwisted["ess_min"])
    close(figures["log_z"], log_z(50), atol=0.02, of_the_law=M0 / BETA + 1.6)
    close(figures["log_z_se"], 0.0, atol=0.005, smc=untwisted["log_z_se"])
    tilted = moments(50, plain)[0] + moments(50, plain)[1] / BETA
    close(x.mean(), tilted, atol=0.1, untilted=M0)
    same(figures["backward_per_sample"], 200.0, none=0.0)


@pytest.mark.slow
def test_groups_drawn_by_their_z_have_not_the_bias_of_few_particles():
    mean, var = moments(25, plain)
    truth = mean + var / BETA
    values = {
        returns: steered({"method": "smc", "particles": 2, "returns": returns}, n=6000, steps=25)[0]
        for returns in ("one", "weighted")
    }
    whole, figures = steered({"method": "smc", "particles": 512, "returns": "all"}, n=6000, steps=25)
    assert len(whole) == 6144  # whole groups
    same(figures["evaluations_per_sample"], 25.0, a_group_each=25.0 * 512)
    close(values["weighted"].mean(), truth, atol=0.15, one=values["one"].mean())
    close(whole.mean(), truth, atol=0.15, one=values["one"].mean())


def test_the_best_of_several_samples():
    """E max of 4 normals is 1.0294 deviations, and the choice costs log 4 - 3/4 nats."""
    mean, var = moments(20, plain)
    x, figures = steered({"method": "best_of", "particles": 4}, n=4000, steps=20)
    drawn, other = steered({"method": "best_of", "particles": 4, "select": "categorical"}, n=4000, steps=20)
    close(x.mean(), mean + 1.0294 * math.sqrt(var), atol=0.04, drawn=drawn.mean())
    close(figures["kl_steered_nats"], math.log(4) - 0.75, atol=1e-12, drawn=other["kl_steered_nats"])
    same((figures["kl_steered_is_bound"], other["kl_steered_is_bound"]), (False, True), swapped=(True, False))
    same(figures["queries_per_sample"], 4.0, every_step=84.0)


@pytest.mark.slow
@pytest.mark.parametrize(("eta", "solver"), [(1.0, "ddim"), (0.5, "ddim"), (0.0, "heun")])
def test_guidance_needs_no_factor_at_any_eta(eta, solver):
    """The score of the noised tilted law: the mean of the data is moved by v/beta, and the path KL is v/(2 beta^2)."""
    x, figures = steered({"method": "guidance"}, n=2000, steps=100, eta=eta, solver=solver)
    if solver == "ddim":
        truth = moments(100, lambda k, gain, here, there: gain * here / BETA, eta)[0]
        close(x.mean(), truth, atol=0.07, half=M0 + (truth - M0) / 2)
    c = (1 + eta**2) / 2
    factor, _ = steered(
        {"method": "guidance"}, n=500, steps=100, eta=eta, solver=solver, beta=BETA * c / eta**2 if eta else 1e9
    )
    close(x.mean(), M0 + 0.8 / BETA, atol=0.1, factor=factor.mean() if eta < 1 else M0)
    path = 1.6 * ((c / eta) ** 2 if eta else 1.0)
    close(figures["kl_steered_nats"], path, atol=0.08 * path, squared=path**2)


def test_guidance_at_pure_noise_moves_the_first_step():
    """On the flow, whose score says nothing at t = 1; without k^2 grad v(s, mean) there the mean is another one."""
    flow = model(sa.Flow(), (0.0, 0.0))
    x, _ = steered({"method": "guidance"}, n=2000, steps=50, model=flow, grid="uniform")
    slope = [((1 - t) * 0.8 / ((1 - t) ** 2 * 0.8 + t * t)) for t in np.arange(50, -1, -1) / 50]
    mean, first = 0.0, True
    for t, s, here, there in zip(np.arange(50, 0, -1) / 50, np.arange(49, -1, -1) / 50, slope[:-1], slope[1:], strict=True):
        if first:
            mean, first = (1 - s) * M0 + s * s * there / BETA, False
            unrepaired = (1 - s) * M0
            continue
        k2 = s * s / (t * t) * (t * t - ((1 - t) / (1 - s)) ** 2 * s * s)
        direction = math.sqrt(max(s * s - k2, 0.0))
        a = ((1 - s) * (1 - t) * 0.8 + direction * t) / ((1 - t) ** 2 * 0.8 + t * t)
        shift = ((1 - s) * t * t / (1 - t) - t * direction) * here / BETA
        mean, unrepaired = (a * m + (1 - s) * M0 - a * (1 - t) * M0 + shift for m in (mean, unrepaired))
    close(x.mean(), mean, atol=0.06, unrepaired=mean + 3 * abs(mean - unrepaired) + 0.2)


@pytest.mark.slow
def test_a_tuned_model_is_corrected_to_the_optimum_of_its_reference():
    """Its own chain proposes, and the weights undo what it is wrong by; steered as a model of its own it is tilted twice."""
    mean, var = moments(50, plain)
    tuned = made((-0.1, 1.2))
    settings = {"method": "smc", "particles": 8, "returns": "weighted"}
    x, figures = steered({**settings, "target": "reference"}, n=1500, model=tuned)
    twice, _ = steered(settings, n=1500, model=tuned)
    close(x.mean(), mean + var / BETA, atol=0.15, tilted_twice=twice.mean())
    close(figures["log_z"], log_z(50), atol=0.15, of_the_policy=log_z(50) + 1)
    same(figures["evaluations_per_sample"], 8.0 * 100, policy_alone=8.0 * 50)


def test_solvers_that_look_back_are_weighed_too():
    x, figures = steered({"method": "smc", "particles": 16, "returns": "weighted"}, n=1000, steps=50, solver="sde_dpmpp")
    close(x.mean(), 1.9, atol=0.2, untilted=M0)


class Half:
    """A world of two, of which one is here: what the other gathers is zero."""

    def __init__(self, rank):
        self.rank, self.size, self.leads = rank, 2, rank == 0

    def stripe(self, total):
        return torch.arange(self.rank, total, 2)

    def gather(self, own, total):
        whole = own.new_zeros(total, *own.shape[1:])
        whole[self.rank :: 2] = own
        return whole

    def together(self, work):
        return work()

    def reduced(self, values, how="mean"):
        return list(values)


@pytest.mark.slow
def test_groups_are_the_same_however_they_are_dealt_and_cut():
    for method in ("svdd", "smc", "twisted", "guidance", "best_of"):
        settings = {"method": method} if method == "guidance" else {"method": method, "particles": 4}
        whole, _ = steered(settings, n=6, steps=6)
        close(
            steered(settings, n=6, steps=6, chunk=4)[0], whole, atol=1e-5, other_seed=steered(settings, n=6, steps=6, seed=1)[0]
        )
        for rank in (0, 1):
            part, _ = steered(settings, n=6, steps=6, world=Half(rank))
            close(part[rank::2], whole[rank::2], atol=1e-5, the_others=whole[1 - rank :: 2])


def test_each_group_has_one_prompt_and_its_own_reward():
    seen = []

    def prompted(x0, texts):
        seen.append(texts)
        values = x0[:, 0] * torch.tensor([1.0 if text == "up" else -1.0 for text in texts])
        return lambda: values

    torch.manual_seed(0)
    net = made().net
    both = sa.Model(net, process=sa.VP(), predicts="v", shape=(1,), encode=lambda texts: torch.zeros(len(texts), 1))
    sampler = sa.Sampler(steps=20)
    for returns in ("one", "weighted", "all"):
        steering = Steering(method="smc", particles=8, returns=returns).settled(
            differentiable=False, sampler=sampler, beta=BETA
        )
        out = steer_x0(both, sampler, steering, prompted, n=200, prompts=["up", "down"], seed=0)
        up = torch.tensor([text == "up" for text in out.prompts])
        gap = float(out.x0[up].mean() - out.x0[~up].mean())
        close(gap, 2 * moments(20, plain)[1] / BETA, atol=0.9, mixed=0.0)
        assert len(out.prompts) == len(out.x0) == (208 if returns == "all" else 200)
    assert all(len(set(texts[i : i + 8])) == 1 for texts in seen for i in range(0, len(texts), 8))


REFUSED = [
    ({"method": "svdd"}, {"eta": 0.0}, "sampler.eta: svdd has nothing to choose from"),
    ({"method": "guidance"}, {"differentiable": False}, "steer.method: guidance needs the reward's gradient"),
    ({"method": "twisted"}, {"differentiable": False}, "use smc, svdd or best_of"),
    ({"method": "smc"}, {"beta": None}, "steer.beta: smc needs it"),
    ({"method": "guidance", "particles": 4}, {}, "steer.particles: guidance has no use for it"),
    ({"method": "svdd", "returns": "all"}, {}, "steer.returns: svdd has no use for it"),
    ({"method": "best_of", "every": 2}, {}, "steer.every: best_of has no use for it"),
    ({"method": "twisted", "target": "reference"}, {}, "set steer.method to smc"),
    ({"method": "smc", "target": "reference"}, {"tuned": False}, "steer.target: the pretrained model is steered"),
    ({"method": "smc", "target": "reference"}, {"solver": "sde_dpmpp"}, "do not look back"),
    ({"method": "smc", "select": "argmax"}, {}, "steer.select: smc has no use for it"),
]


@pytest.mark.parametrize(("settings", "run", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_with_the_remedy(settings, run, message):
    run = dict(run)
    sampler = sa.Sampler(eta=run.pop("eta", 1.0), solver=run.pop("solver", "ddim"))
    with pytest.raises(ValueError, match=message):
        Steering(**settings).settled(sampler=sampler, **{"differentiable": True, "beta": 0.5, **run})


def test_the_method_is_the_best_that_reward_and_sampler_allow():
    def chosen(differentiable, eta, **settings):
        return Steering(**settings).settled(differentiable=differentiable, sampler=sa.Sampler(eta=eta), beta=1.0).method

    found = [
        chosen(True, 1.0),
        chosen(False, 1.0),
        chosen(True, 0.0),
        chosen(False, 0.0),
        chosen(True, 1.0, target="reference"),
    ]
    same(
        found, ["twisted", "smc", "guidance", "best_of", "smc"], gradient_forgotten=["smc", "smc", "best_of", "best_of", "smc"]
    )


def test_guidance_that_diverges_names_beta_and_steps():
    with pytest.raises(Failed, match=r"beta 1e-30, 5 steps\); raise\s+steer.beta or sampler.steps"):
        steered({"method": "guidance"}, n=4, steps=5, beta=1e-30, reward=lambda x0, texts: lambda: (x0**2).sum(1) * 1e20)
