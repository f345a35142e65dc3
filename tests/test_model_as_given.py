"""Truth: the network as a user gives it: its mode, its precision, its shape, and who trains it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from test_model import Returns, T, X, same
from torch import nn
from twins import F64, accepts, close

import scoreaction as sa
from scoreaction.diffusion.predictions import to_prediction


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
