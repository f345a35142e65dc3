"""Truth: networks that were never adapted, and autograd without checkpointing. Policy, reference and consistency do not mix."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from twins import F64, accepts, close, f64
from twins import same as equal

import scoreaction as sa
from scoreaction.networks.adapters import Adapters, LoraShape, base_modules, base_tensors, find_targets, without_adapters
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


def test_between_calls_the_policys_adapter_is_on():
    """As plain calls of the network show, which switch nothing: after another adapter is added, and after its calls."""
    model = Model(Net(), process=sa.VP(), predicts="v", shape=(2,), lora_rank=2, lora_targets=["first"])
    move(model.parameters, 1)
    plainly = lambda: model.net(X, torch.full((5,), 0.4), None).detach()  # noqa: E731
    policy = plainly()
    move(model.add_consistency(LoraShape(2, 4.0, ["last"])), 2)
    accepts(same(policy), plainly(), off=Net()(X, torch.full((5,), 0.4), None).detach())
    f = model.consistency(X, T).detach()
    accepts(same(policy), plainly(), consistency=f)


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
    with pytest.raises(ValueError, match="names no linear layer"):
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
    shape = LoraShape(2, 4.0, ["first", "middle"], ranks={"middle": 3})
    parameters = adapters.add("consistency", shape)
    move(parameters, 3)
    x = torch.randn(4, 16)
    A, B = (parameters[f"middle.lora_{part}.consistency.weight"] for part in "AB")
    assert A.shape == (3, 16)
    by_hand = lambda scale: (base.middle(x) + scale * x @ A.T @ B.T).detach()  # noqa: E731
    found = adapters.call("consistency", net.middle, x).detach()
    close(found, by_hand(2.0), atol=1e-5, unscaled=by_hand(1.0), alpha_of_another_rank=by_hand(4 / 3))


class Read(nn.Module):
    """x (batch, 4, 2) through a layer whose weights something reads that never calls the layer."""

    def __init__(self, kind):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
            self.middle = {
                "fused": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
                "attention": lambda: nn.MultiheadAttention(16, 2, batch_first=True),
                "functional": lambda: nn.Linear(16, 16),
                "convolution": lambda: nn.Conv1d(16, 16, 3, padding=1),
            }[kind]()
        self.kind = kind

    def forward(self, x, t, cond):
        h = self.first(torch.cat([x, t[:, None, None].expand(-1, 4, 1)], -1))
        if self.kind == "attention":
            h = self.middle(h, h, h)[0]
        elif self.kind == "functional":
            h = nn.functional.linear(h, self.middle.weight, self.middle.bias)
        elif self.kind == "convolution":
            h = nn.functional.conv1d(h.mT, self.middle.weight, self.middle.bias, padding=1).mT
        else:
            h = self.middle(h)
        return self.last(torch.tanh(h))


@pytest.mark.parametrize("kind", ["fused", "attention", "functional", "convolution"])
def test_what_samples_is_what_trains_where_weights_are_read_past_forward(kind):
    """Truth: the plain network with `W + alpha/rank B A` written into its weights. Twin: peft's own layers."""
    x, sees = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(1)), Read(kind).eval()
    targets = list(base_modules(sees))
    targets = [name for name in targets if isinstance(sees.get_submodule(name), (nn.Linear, nn.Conv1d))]

    def outputs(spoil=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Model(Read(kind), process=sa.VP(), predicts="v", shape=(4, 2), lora_rank=2, lora_targets=targets)
        move(model.parameters, 1)
        if spoil:
            for layer in model.adapters.layers:
                layer.__class__ = type(layer).__mro__[1]
        with torch.no_grad():
            sampled, pretrained = model.predict(x, T).eps, model.reference(x, T).eps
        trained = model.predict(x, T).eps
        gradients = torch.autograd.grad(trained.sum(), list(model.parameters.values()), allow_unused=True)
        reached = sum(g is not None and bool(g.any()) for g in gradients) / len(gradients)
        return model, sampled, trained.detach(), pretrained, reached

    model, sampled, trained, pretrained, reached = outputs()
    by_hand = copy.deepcopy(sees)
    for name in targets:
        parts = [model.parameters[f"{name}.lora_{part}.default.weight"].detach() for part in "BA"]
        weight = by_hand.get_submodule(name).weight.data
        weight += (parts[0].flatten(1) @ parts[1].flatten(1)).view_as(weight)
    truth, base = (
        Model(net, process=sa.VP(), predicts="v", shape=(4, 2)).predict(x, T).eps.detach() for net in (by_hand, sees)
    )
    _, peft_sampled, peft_trained, _, peft_reached = outputs(spoil=True)
    close(sampled, truth, atol=1e-5, base=base, peft=peft_sampled)
    close(trained, truth, atol=1e-5, base=base, **({} if kind == "fused" else {"peft": peft_trained}))
    close(pretrained, base, atol=1e-5, adapted=truth)
    for copied in (copy.deepcopy(model.net), pickle.loads(pickle.dumps(model.net))):
        output = copied(x, torch.full((5,), 0.4), None).detach()
        close(
            output,
            model.net(x, torch.full((5,), 0.4), None).detach(),
            atol=1e-6,
            base=sees(x, torch.full((5,), 0.4), None).detach(),
        )
    equal(reached, 1.0, peft=peft_reached)


class Ends(nn.Module):
    """Names that end alike."""

    def __init__(self):
        super().__init__()
        self.block, self.out, self.rest = nn.Module(), nn.Linear(16, 2), nn.Module()
        self.block.out, self.block.to_q, self.rest.to_q = nn.LayerNorm(16), nn.Linear(3, 16), nn.Conv1d(3, 16, 1)
        self.rest.out, self.rest.attention = nn.Linear(16, 16), nn.MultiheadAttention(16, 2)

    def forward(self, x, t, cond):
        return self.out(self.block.out(self.block.to_q(torch.cat([x, t[:, None]], 1))))


def test_names_that_end_alike_are_told_apart():
    net, every = Ends(), ["block.to_q", "out", "rest.attention.out_proj", "rest.out"]
    equal(find_targets(net, ["out"]), ["out"], endings=["block.out", "out", "rest.out"], layers=["out", "rest.out"])
    equal(find_targets(net, ["to_q", "rest.out"]), ["block.to_q", "rest.to_q", "rest.out"], linear=["block.to_q", "rest.out"])
    model = Model(net, process=sa.VP(), predicts="v", shape=(2,), lora_rank=2)
    equal(sorted(name.partition(".lora_A")[0] for name in model.parameters if "lora_A" in name), sorted(every), one=["out"])
    equal(find_targets(net, ["to_q"]), ["block.to_q", "rest.to_q"], wrapped=["block.to_q.base_layer", "rest.to_q"])
    for wrong, hint in (["block.out"], "choose from out"), (["rest.attention"], "choose from"), (["to_w"], "did you mean to_q"):
        with pytest.raises(ValueError, match=rf"lora_targets: '{wrong[0]}' names no linear layer or convolution.*{hint}"):
            find_targets(net, wrong)
    with pytest.raises(ValueError, match=r"lora_targets: must be a list of names \(got 'out'\); one name is \['out'\]"):
        Model(Ends(), process=sa.VP(), predicts="v", shape=(2,), lora_rank=2, lora_targets="out")


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("state", ["on", "off", "merged"])
def test_a_lora_of_the_users_own_is_refused_until_it_is_in_the_weights(rank, state):
    """Truth: peft's own call of the network. Twin: the network without that LoRA."""
    net = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["middle"]), adapter_name="style")
    move({name: p for name, p in net.named_parameters() if "lora_" in name}, 3)
    truth = net(X, torch.full((5,), 0.4), None).detach()
    own = net.base_model.model
    if state == "off":
        net.base_model.disable_adapter_layers()
    if state == "merged":
        net.merge_adapter()
    before = own(X, torch.full((5,), 0.4), None).detach()
    with pytest.raises(ValueError, match=r"net: it already has an adapter \(style at middle\); load .*anew.*merge_and_unload"):
        Model(own, process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank)
    accepts(same(before), own(X, torch.full((5,), 0.4), None).detach(), moved=before + 1)
    if state == "on":
        model = Model(net.merge_and_unload(), process=sa.VP(), predicts="v", shape=(2,), lora_rank=rank)
        bare = Net()(X, torch.full((5,), 0.4), None).detach()
        for role_net in (model.net, model.reference_net):
            close(role_net(X, torch.full((5,), 0.4), None).detach(), truth, atol=1e-6, without=bare)
