"""Truth: guidance by hand, the pretrained network itself, the recursion of an average, counting on fingers."""

import copy

import pytest
import torch
from torch import nn
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.diffusion.predictions import to_prediction


class Net(nn.Module):
    """A small conditional network: x (batch, 2), cond (batch,) of class ids; 3 is the unconditional one."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.classes, self.last = nn.Linear(3, 16), nn.Embedding(4, 16), nn.Linear(16, 2)
        self.batches = []

    def forward(self, x, t, cond):
        self.batches.append(len(x))
        h = self.first(torch.cat([x, t[:, None]], 1))
        return self.last(torch.tanh(h if cond is None else h + self.classes(cond)))


def build(**options):
    net = Net()
    encode = lambda prompts: torch.tensor([int(p) for p in prompts])  # noqa: E731
    return sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,), encode=encode, null=torch.tensor([3]), **options), net


class Returns(nn.Module):
    """A network that returns a function of x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, cond):
        return self.function(x)


X, T = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), f64(0.4)
COND = torch.tensor([0, 1, 2, 0, 1])


def same(truth):
    def check(value):
        assert torch.equal(value, truth)

    return check


def learn(model, steps=3):
    """Moves the trained parameters."""
    optimiser = torch.optim.SGD(model.parameters.values(), lr=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        (model.predict(X, T, COND).eps - 1).square().mean().backward()
        optimiser.step()


def test_guidance_is_linear_in_both_halves_of_one_batch():
    model, net = build()
    alone, null = model.predict(X, T, COND).eps, model.predict(X, T, torch.full((5,), 3)).eps
    net.batches.clear()
    guided = model.predict(X, T, COND, guidance=2.5).eps
    assert net.batches == [10]
    wrong = {"forgets_null": 2.5 * alone, "swapped": alone + 2.5 * (null - alone), "off_by_one": null + 3.5 * (alone - null)}
    close(guided.detach(), (null + 2.5 * (alone - null)).detach(), atol=1e-6, **{k: v.detach() for k, v in wrong.items()})
    accepts(same(alone), model.predict(X, T, COND, guidance=1.0).eps, guided=guided)
    accepts(same(model.predict(X, T, None).eps), model.predict(X, T, None, guidance=3.0).eps, conditional=alone)
    with pytest.raises(ValueError, match=r"sampler\.guidance.*null="):
        sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,)).predict(X, T, COND, guidance=2.0)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "velocity", "score"])
def test_what_comes_out_is_turned_into_x0_and_eps(predicts):
    model = sa.Model(Net(), process=sa.VP(), predicts=predicts, shape=(2,))
    said = model.predict(X, T, COND)
    alpha, sigma = (float(part(T)) for part in (sa.VP().alpha, sa.VP().sigma))
    close((alpha * said.x0 + sigma * said.eps).detach(), X, atol=1e-5, swapped=(sigma * said.x0 + alpha * said.eps).detach())
    truth = to_prediction(sa.VP(), predicts, X, T, model.net(X, torch.full((5,), 0.4), COND))
    assert torch.allclose(said.x0, truth.x0, atol=1e-6)


def test_times_may_differ_by_row():
    model, _ = build()
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    rows = torch.cat([model.predict(X[i : i + 1], t[i], COND[i : i + 1]).x0 for i in range(5)])
    one = model.predict(X, t[0], COND).x0
    close(model.predict(X, t, COND).x0.detach(), rows.detach(), atol=1e-5, rtol=1e-5, one_time_for_all=one.detach())


def test_reference_is_the_pretrained_network_after_training():
    model, net = build()
    pretrained = copy.deepcopy(net)
    before = model.predict(X, T, COND).eps.detach()
    learn(model)
    accepts(same(before), model.reference(X, T, COND).eps, the_policy=model.predict(X, T, COND).eps.detach())
    assert torch.equal(before, pretrained(X, torch.full((5,), 0.4), COND))
    x = X.clone().requires_grad_()
    said = model.reference(x, T, COND).x0.sum()
    (grad,) = torch.autograd.grad(said, x)
    assert float(grad.abs().min()) > 0  # gradients reach x
    assert all(not p.requires_grad for p in model.reference_net.parameters())


@pytest.mark.parametrize("targets", [None, ["first"]])
def test_lora_off_is_the_base_to_the_bit(targets):
    pytest.importorskip("peft")
    base = Net()
    truth = base(X, torch.full((5,), 0.4), COND).detach()
    net = Net()
    model = sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,), lora_rank=2, lora_targets=targets)
    assert set(model.parameters) == {n for n, p in net.named_parameters() if "lora" in n}
    accepts(same(truth), model.predict(X, T, COND).eps, other_weights=Net(1)(X, torch.full((5,), 0.4), COND))
    learn(model)
    accepts(same(truth), model.reference(X, T, COND).eps, adapted=model.predict(X, T, COND).eps.detach())
    moved = model.predict(X, T, COND).eps  # and the adapters are on again
    assert float((moved.detach() - truth).abs().max()) > 1e-3


def test_lora_targets_that_do_not_exist_are_refused():
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="lora_targets"):
        sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,), lora_rank=2, lora_targets=["attention"])
    with pytest.raises(ValueError, match="no linear layer"):
        sa.Model(Returns(lambda x: x), process=sa.VP(), predicts="eps", shape=(2,), lora_rank=2)


def test_averages_follow_their_recursion_and_swap_in_and_out():
    model, net = build()
    truth = None
    for decay in (0.5, 0.9, 0.9):
        learn(model, 1)
        weight = net.last.weight.detach().clone()
        truth = weight if truth is None else decay * truth + (1 - decay) * weight
        model.average_weights(decay)
    own = net.last.weight.detach().clone()
    close(model.average["last.weight"], truth, atol=1e-6, newest=own)
    outside = model.predict(X, T, COND).eps.detach()
    with model.averaged():
        assert torch.equal(net.last.weight, model.average["last.weight"])
        inside = model.predict(X, T, COND).eps.detach()
    accepts(same(outside), model.predict(X, T, COND).eps, averaged=inside)

    def fails_inside():
        with model.averaged():
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert torch.equal(net.last.weight, own)


def test_evaluations_are_counted_in_rows():
    model, _ = build()
    with torch.no_grad():
        model.predict(X, T, COND)  # 5
        model.predict(X, T, COND, guidance=2.0)  # 10
        model.reference(X, T, COND)  # 5
    model.predict(X[:3], T, COND[:3])  # 3, and 3 backward
    with model.uncounted():
        model.predict(X, T, COND)

    def check(counts):
        assert counts == (23, 3)

    accepts(check, (model.evaluations.forward, model.evaluations.backward), guidance_once=(18, 3), with_measuring=(28, 8))


class Centred(nn.Module):
    """The noise of centred data N(0, 1/4): five points on a line, whose network says nothing of their centre."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond):
        alpha, sigma = (f(t.double()).to(x)[:, None] for f in (sa.VP().alpha, sa.VP().sigma))
        y = x - x.mean(1, keepdim=True)
        return (sigma / (0.25 * alpha**2 + sigma**2) + self.w) * y


def test_samples_stay_in_the_space_that_x0_is_projected_to():
    """Truth: data of std 1/2 whose centre is 0. Twin: without the projection the centre keeps the noise that it began with."""

    def drawn(project):
        model = sa.Model(Centred(), process=sa.VP(), predicts="eps", shape=(5,), project=project)
        return sa.sample(model, n=2000, steps=100, eta=0.0, seed=0)

    inside, outside = drawn(lambda x0: x0 - x0.mean(1, keepdim=True)), drawn(None)
    close(inside.mean(1), 0.0, atol=1e-3, unprojected=outside.mean(1))
    close((inside - inside.mean(1, keepdim=True)).std() / 0.8**0.5, 0.5, atol=0.02, whole=outside.std())


def test_refusals():
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        sa.Model(Net(), process=sa.VP(), predicts="noise", shape=(2,))
    for predicts in ("eps", "score"):  # they say nothing of the sample where alpha is 0
        for process in (sa.Flow(), sa.CosineVP()):
            with pytest.raises(ValueError, match=r"at t = 1.*velocity, v or x0"):
                sa.Model(Net(), process=process, predicts=predicts, shape=(2,))
    for predicts in ("velocity", "v", "x0"):
        said = sa.Model(Net(), process=sa.Flow(), predicts=predicts, shape=(2,)).predict(X, f64(1.0), COND)
        assert bool(torch.isfinite(said.x0).all()), predicts
    with pytest.raises(ValueError, match="no prompts"):
        sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,)).conditions(["1"])

    class Flat(nn.Module):
        def forward(self, x, t, cond):
            return x.sum(1)

    with pytest.raises(ValueError, match=r"shape \(2,\) for x of shape \(2, 2\)"):
        sa.Model(Flat(), process=sa.VP(), predicts="eps", shape=(2,))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lora_rank": 0}, r"lora_rank: must be at least 1 \(got 0\)"),
        ({"process": "vp"}, r"process: must be one such as sa.VP\(\) \(got 'vp'\)"),
        ({"process": sa.VP}, "process: must be one such as"),
    ],
)
def test_what_no_model_can_be_made_of_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        sa.Model(nn.Linear(2, 2), **{"process": sa.VP(), "predicts": "eps", "shape": (2,), **wrong})
