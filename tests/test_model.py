"""Truth: guidance by hand, the pretrained network itself, the recursion of an average, counting on fingers."""

import copy
from types import SimpleNamespace

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


class Layered(nn.Module):
    """x (batch, 2) through a layer in the middle; cond is added to the output."""

    def __init__(self, middle=nn.Identity, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(3, 16), middle(), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x, t, cond):
        y = self.body(torch.cat([x, t[:, None]], 1))
        return y if cond is None else y + cond


def layered(net, **options):
    return sa.Model(net, process=sa.VP(), predicts="v", shape=(2,), **options)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("middle", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(16)])
def test_whatever_is_drawn_of_a_model_is_drawn_in_evaluation_mode(middle, rank):
    """Networks come in training mode. Twin: the same model, put back into it."""
    net = Layered(middle)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    model = layered(net.train(), lora_rank=rank)
    draw = lambda reference=False: sa.sample(model, n=8, steps=3, seed=1, reference=reference)  # noqa: E731
    accepts(same(draw()), draw(reference=True), one_noise=draw().flip(0))
    again, after = draw(), {name: value.clone() for name, value in model.net.named_buffers()}
    model.net.train()
    accepts(same(again), model.net.eval() and draw(), training=model.net.train() and draw())

    def unmoved(found):
        assert all(torch.equal(value, found[name]) for name, value in buffers.items())

    accepts(unmoved, after, **({"training": dict(model.net.named_buffers())} if buffers else {}))


def test_weight_norm_trains_beside_its_frozen_reference():
    with pytest.warns(FutureWarning):
        net = Layered(lambda: nn.utils.weight_norm(nn.Linear(16, 16)))
    truth = net(X, torch.full((5,), 0.4), None).detach()
    model = layered(net)
    before = model.reference(X, T).eps.detach()
    accepts(
        same(truth), model.reference_net(X, torch.full((5,), 0.4), None), others=Layered(seed=1)(X, torch.full((5,), 0.4), None)
    )
    model.predict(X, T).eps.square().sum().backward()
    gradients = {name: p.grad for name, p in model.parameters.items()}

    def all_train(found):
        assert {name for name, grad in found.items() if grad is not None and bool(grad.any())} == set(model.parameters)

    accepts(all_train, gradients, frozen={**gradients, "body.1.weight_v": None})
    with torch.no_grad():
        for p in model.parameters.values():
            p.add_(0.1)
    accepts(same(before), model.reference(X, T).eps.detach(), policy=model.predict(X, T).eps.detach())


def test_what_cannot_be_copied_is_refused_with_the_remedy_which_works():
    import threading

    pytest.importorskip("peft")
    net = Layered()
    net.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"net: .*copy\.deepcopy fails \(TypeError: .*lock.*set lora_rank"):
        layered(net)
    model = layered(net, lora_rank=2)
    accepts(same(net(X, torch.full((5,), 0.4), None)), model.reference_net(X, torch.full((5,), 0.4), None), nothing=0 * X)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_network_of_doubles_works_in_doubles(rank):
    """Truth: its own output, with and without guidance, rounded once. Twin: the same network in single precision."""
    net, single, generator = Layered().double(), Layered(), torch.Generator().manual_seed(2)
    x, cond, null = (torch.randn(n, 2, generator=generator) for n in (64, 64, 1))
    y, y_null = (net(x.double(), torch.full((64,), 0.4, dtype=F64), c.double()).detach() for c in (cond, null))
    model, other = layered(net, lora_rank=rank, null=null), layered(single, null=null)
    for weight in (1.0, 3.0):
        truth = to_prediction(sa.VP(), "v", x, T, (y_null + weight * (y - y_null)).float())
        found, wrong = (each.predict(x, T, cond, guidance=weight).eps.detach() for each in (model, other))
        assert found.dtype == torch.float32
        accepts(same(truth.eps), found, single=wrong)
    model.predict(x, T, cond).eps.sum().backward()
    assert all(p.grad is not None for p in model.parameters.values())
    assert sa.sample(model, n=3, steps=2).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_by_who_converts_and_refused_by_name_else(dtype):
    class Converts(Layered):
        def forward(self, x, t, cond):
            return super().forward(x.to(dtype), t.to(dtype), cond)

    with pytest.raises(
        ValueError, match=rf"net: its weights are in {dtype}, and x and t come in torch.float32.*convert.*net.float"
    ):
        layered(Layered().to(dtype)).predict(X, T)
    assert layered(Converts().to(dtype)).predict(X, T).eps.dtype == torch.float32
    found, truth, other = (
        layered(net).predict(X, T).eps.detach() for net in (Layered().to(dtype).float(), Layered(), Layered(seed=1))
    )
    close(found, truth, atol=0.05, other=other)

    class Broken(Layered):
        def forward(self, x, t, cond):
            raise RuntimeError("the pump has failed")

    with pytest.raises(RuntimeError, match="the pump has failed"):
        layered(Broken().to(dtype)).predict(X, T)


@pytest.mark.parametrize(
    ("function", "kind"),
    [(lambda x: (x,), "tuple"), (lambda x: {"sample": x}, "dict"), (lambda x: SimpleNamespace(sample=x), "SimpleNamespace")],
)
def test_what_is_no_tensor_is_refused_by_its_kind(function, kind):
    with pytest.raises(ValueError, match=rf"net: Returns returned a {kind}, not a tensor of x's shape; wrap it.*\.sample"):
        sa.sample(layered(Returns(function)), n=2, steps=2)
    assert sa.sample(layered(Returns(lambda x: x)), n=2, steps=2).shape == (2, 2)


def test_a_network_that_is_called_otherwise_is_refused_when_the_model_is_built():
    class Two(Layered):
        def forward(self, x, t):
            return x

    class Four(Layered):
        def forward(self, x, t, cond, mask):
            return x

    class Named(Layered):
        def forward(self, x, *, t, cond):
            return x

    class Default(Layered):
        def forward(self, x, t, cond=None, *, mask=None, **more):
            return x

    for wrong in (Two, Four, Named, lambda: nn.Linear(2, 2)):
        with pytest.raises(
            ValueError, match=r"net: it is called as net\(x, t, cond\), and \w+\.forward\(.*is not; .*cond=None"
        ):
            layered(wrong())
    assert layered(Default()).predict(X, T).eps.shape == X.shape


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.slow
def test_two_models_do_not_train_one_network(rank):
    """The training of the first would move the policy of the second, and not its reference."""
    net = Layered()
    first = layered(net)
    with pytest.raises(ValueError, match=r"net: another model trains it already.*copy\.deepcopy"):
        layered(net, lora_rank=rank)
    second = layered(copy.deepcopy(net), lora_rank=rank)
    before = second.predict(X, T).eps.detach()
    learn_from = lambda model: model.predict(X, T).eps.square().sum().backward()  # noqa: E731
    learn_from(first)
    with torch.no_grad():
        for p in first.parameters.values():
            p.sub_(p.grad)
    accepts(same(before), second.predict(X, T).eps.detach(), the_first=first.predict(X, T).eps.detach())
    first.itself = first  # as a closure may hold a model
    del first
    assert layered(net, lora_rank=rank).predict(X, T).eps.shape == X.shape


class Odd(nn.Module):
    """A network that does not fit, in one way."""

    def __init__(self, how):
        super().__init__()
        self.line, self.how = nn.Linear(3 if how == "size" else 2, 2), how

    def forward(self, x, t, cond=None):
        y = self.line(x)
        match self.how:
            case "tuple":
                return (y,)
            case "output":
                return SimpleNamespace(sample=y)
            case "shape":
                return y[:, :1]
            case "cond":
                return y + cond[:, None]
            case "name":
                return y + self.missing
        return y


ODD = {
    "tuple": "net: Odd returned a tuple, not a tensor of x's shape; wrap it in a module whose forward",
    "output": "net: Odd returned a SimpleNamespace, not a tensor of x's shape; wrap it",
    "shape": r"the network returned shape \(2, 1\) for x of shape \(2, 2\)",
    "size": r"net: Odd fails on x \(2, 2\), t \(2,\) and cond None: RuntimeError: mat1 and mat2",
    "cond": r"net: Odd fails on .* cond None: TypeError: .*; conditions come from encode= and prompts",
    "name": "net: Odd fails on .*: AttributeError: 'Odd' object has no attribute 'missing'",
}


@pytest.mark.parametrize("how", ODD)
def test_a_network_that_does_not_fit_is_refused_when_a_model_is_made_of_it(how):
    """And is left as it was, without adapters. Twin: one that fits."""

    def refused(how):
        net = Odd(how)
        with pytest.raises(ValueError, match=f"^{ODD.get(how, '')}"):
            sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,), lora_rank=1)
        assert all(p.requires_grad for p in net.parameters())

    refused(how)
    sa.Model(Odd("fine"), process=sa.VP(), predicts="eps", shape=(2,), lora_rank=1)


def test_a_network_with_conditions_is_tried_on_those_of_a_run():
    """Twin: conditions of the network's own size."""

    def made(width):
        encode = lambda names: torch.zeros(len(names), width)  # noqa: E731
        net = Odd("cond")
        net.forward = lambda x, t, cond: net.line(x) + cond @ torch.ones(2, 2)
        model = sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,), encode=encode)
        return sa.Finetuner(model, reward=lambda x, _: x[:, 0], algorithm=sa.DDPO(), prompts=["a"], train=sa.Train(batch=4))

    assert made(2).reward.queries == 0
    with pytest.raises(ValueError, match=r"^net: Odd fails on x \(2, 2\), t \(2,\) and cond \(2, 3\): RuntimeError: mat1"):
        made(3)
