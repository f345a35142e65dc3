"""Truth: networks that were never adapted, and autograd without checkpointing. Policy, reference and consistency do not mix."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.networks.adapters import Adapters, LoraShape, base_tensors, without_adapters
from scoreaction.networks.model import Model

peft = pytest.importorskip("peft")

X, T = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), f64(0.4)
TWO = LoraShape(2, 4.0, ["first", "middle"])


class Net(nn.Module):
    """x (batch, 2); the middle is run again in backward where `again` is set."""

    def __init__(self, again=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(3, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.again = again

    def forward(self, x, t, cond):
        h = torch.tanh(self.first(torch.cat([x, t[:, None]], 1)))
        middle = lambda h: torch.tanh(self.middle(h))  # noqa: E731
        return self.last(checkpoint(middle, h, use_reentrant=False) if self.again else middle(h))


def build(rank=None, *, again=False, lora=TWO):
    """A model whose policy and consistency model both differ from the reference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # LoRA begins at random
        model = Model(Net(again), process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank, lora_targets=["middle", "last"])
        move(model.parameters, 1)
        move(model.add_consistency(lora), 2)
    return model


def move(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def same(truth):
    def check(value):
        assert torch.equal(value, truth)

    return check


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("lora", [TWO, None])
def test_policy_and_reference_do_not_see_the_consistency_model(rank, lora):
    """To the bit, before and after it is added, moved and used."""
    model = Model(Net(), process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank)
    move(model.parameters, 1)
    names = list(model.parameters)
    policy, reference = model.predict(X, T).x0.detach(), model.reference(X, T).x0.detach()
    added = model.add_consistency(lora)
    accepts(same(reference), model.consistency(X, T).detach(), policy=policy)  # it begins as the reference
    move(added, 2)
    for _ in range(2):
        f = model.consistency(X, T).detach()
        accepts(same(policy), model.predict(X, T).x0.detach(), reference=reference, consistency=f)
        accepts(same(reference), model.reference(X, T).x0.detach(), policy=policy, consistency=f)
    assert names == [name for name, p in model.net.named_parameters() if p.requires_grad] == list(model.parameters)
    assert not any(p.requires_grad for p in added.values())
    pretrained = base_tensors(model.reference_net.state_dict())
    assert {name: value.shape for name, value in pretrained.items()} == {n: v.shape for n, v in Net().state_dict().items()}
    bare = without_adapters(model.reference_net)(X, torch.full((5,), 0.4), None)
    accepts(same(Net()(X, torch.full((5,), 0.4), None)), bare, policy=model.net(X, torch.full((5,), 0.4), None))


@pytest.mark.parametrize("rank", [None, 2])
def test_one_backward_through_all_three_with_gradient_checkpointing(rank):
    """Truth: the same network without checkpointing. Twin: the adapters switched without hooks on the ends of a call."""

    def gradients(again, spoil=False):
        model = build(rank, again=again)
        if spoil:
            model.adapters.call = lambda role, net, x: forgetful(model.adapters, role, net, x)
        x = X.clone().requires_grad_()
        near = model.consistency(model.reference(x, T).x0, f64(0.2))
        loss = near.square().sum() + (model.predict(x, T).x0 * model.reference(near, f64(0.1)).x0).sum()
        model.predict(X, T)  # what is asked in between does not matter
        loss.backward()
        assert all(p.grad is None for n, p in model.reference_net.named_parameters() if n not in model.parameters)
        assert all(p.grad is None or n in model.parameters for n, p in model.net.named_parameters())
        again_x0 = model.net(X, torch.full((5,), 0.4), None)  # the policy's adapter is on again
        return torch.cat(
            [x.grad.flatten(), *[p.grad.flatten() for p in model.parameters.values()], again_x0.detach().flatten()]
        )

    def forgetful(adapters, role, net, x):
        with adapters._on(role):
            return net(x)

    try:
        wrong = gradients(True, spoil=True)
    except CheckpointError:  # torch noticed that another number of tensors came out
        wrong = torch.tensor(torch.nan)
    close(gradients(True), gradients(False), atol=1e-5, without_hooks=wrong)


def test_the_consistency_model_leaves_data_alone_and_is_counted_once():
    model = build(2)
    t = f64([0.0, 0.3, 0.0, 1.0, 0.5])
    x = X.clone().requires_grad_()
    f = model.consistency(x, t)
    counts = f64([model.evaluations.forward, model.evaluations.backward])
    accepts(same(f64([5, 5])), counts, twice=f64([10, 5]))
    accepts(same(X[[0, 2]]), f.detach()[[0, 2]], noised=model.consistency(X, (t + 0.3).clamp(max=1)).detach()[[0, 2]])
    f.sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().min()) > 0


@pytest.mark.parametrize("predicts", ["x0", "score", "velocity", "eps", "v"])
def test_at_time_0_it_is_the_identity_whatever_the_network_predicts(predicts):
    model = Model(Net(), process=sa.VP(), predicts=predicts, shape=(2,))
    model.add_consistency()
    x = X.clone().requires_grad_()
    f = model.consistency(x, torch.zeros((), dtype=F64))
    f.sum().backward()
    close(f.detach(), X, atol=0, later=model.consistency(X, f64(0.1)).detach())
    close(x.grad, torch.ones_like(X), atol=0, nothing=0 * X)


def test_refusals():
    model = Model(Net(), process=sa.VP(), predicts="v", shape=(2,))
    assert not model.has_consistency
    with pytest.raises(ValueError, match=r"model\.consistency: .*scoreaction distill"):
        model.consistency(X, T)
    with pytest.raises(ValueError, match="no module"):
        model.add_consistency(LoraShape(2, 2, ["attention"]))
    model.add_consistency(TWO)
    assert model.has_consistency
    with pytest.raises(ValueError, match="already has"):
        model.add_consistency()


def test_ranks_by_module():
    """Truth: `W x + alpha/rank B A x` by hand."""
    net = Net()
    base = copy.deepcopy(net)
    adapters = Adapters(net)
    shape = LoraShape(2, 4.0, r"first|middle", ranks={"middle": 3})
    parameters = adapters.add("consistency", shape)
    move(parameters, 3)
    x = torch.randn(4, 16)
    A, B = (parameters[f"middle.lora_{part}.consistency.weight"] for part in "AB")
    assert A.shape == (3, 16)
    by_hand = lambda scale: (base.middle(x) + scale * x @ A.T @ B.T).detach()  # noqa: E731
    found = adapters.call("consistency", net.middle, x).detach()
    close(found, by_hand(2.0), atol=1e-5, unscaled=by_hand(1.0), alpha_of_another_rank=by_hand(4 / 3))
