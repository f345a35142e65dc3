"""Truth: points that a sample does not have count for nothing, whatever a network says there; the KL is that of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.algorithms._forward import renoised
from scoreaction.algorithms.hypernoise import Hypernoise
from scoreaction.algorithms.q_learning import QLearning
from scoreaction.networks.layers import PromptEmbedding
from scoreaction.training.evaluation import diversity, measure_kl

POINTS, PROMPTS = 4, ["1", "2", "4"]
RATIO = {"estimator": "likelihood_ratio", "exploration": 0.1}
ALGORITHMS: dict[str, Any] = {
    "score_action": sa.ScoreAction(updates=2, rows=8, critic_updates=2),
    "ratio": sa.ScoreAction(updates=2, critic_updates=2, look_ahead="zeroth_order", **RATIO),
    "forward": sa.ScoreAction(updates=2, critic_updates=2, estimator="forward", each=2),
    "ddpo": sa.DDPO(),
    "sqdf": sa.SQDF(updates=2, rows=8),
    "sqdf_corrected": sa.SQDF(updates=2, rows=8, correction=True, critic_updates=2, critic_rows=16),
    "sqdf_chain": sa.SQDF(updates=2, rows=8, weights="chain"),
    "vard": sa.VARD(updates=2, rows=8, critic_updates=2),
    "pi_ft": sa.PIFT(stages=2, rows=8, critic_updates=2),
    "adjoint_matching": sa.AdjointMatching(updates=2, rows=8),
    "draft": sa.DRaFT(last=1, low_variance=1),
    "refl": sa.ReFL(beta=0.1, rows=8),
    "ram": sa.RAM(each=2),
    "nft": sa.NFT(),
    "awm": sa.AWM(each=2),
    "q_learning": QLearning(updates=2, rows=8, critic_updates=2),
    "hypernoise": Hypernoise(),
    "prompt_loop": sa.PromptLoop(menu={name: [name, name] for name in PROMPTS}, at=[1.0, 0.5], hidden=8),
}
BLACK_BOXES = ("ratio", "ddpo")
HINTED = sa.DDPO(baseline="group", ineffective={"do": "hint", "hint": "steer", "beta": 1.0})


class Points(nn.Module):
    """The noise of data N(0, 1/4) at every point, and a push along the mean of all; in padding `junk` of both."""

    def __init__(self, junk: float = 0.0, push: float = 0.0) -> None:
        super().__init__()
        self.junk, self.push = junk, nn.Parameter(torch.tensor(push))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        alpha, sigma = (f(t.double()).to(x)[:, None, None] for f in (sa.VP().alpha, sa.VP().sigma))
        y = sigma * x / (0.25 * alpha**2 + sigma**2) + self.push * (1 + x.sum(1, keepdim=True))
        return torch.where(cond["here"][..., None], y, self.junk * (y + self.push))


def encode(names: list[str]) -> dict[str, Tensor]:
    return {"here": torch.arange(POINTS) < torch.tensor([[int(name)] for name in names])}


def model_of(net: nn.Module, *, mask: bool = True, **more: Any) -> sa.Model:
    padding = {"mask": lambda cond: cond["here"]} if mask else {}
    return sa.Model(net, process=sa.VP(), predicts="eps", shape=(POINTS, 2), encode=encode, **padding, **more)


def tuner(name: str, junk: float, *, mask: bool = True) -> sa.Finetuner:
    smooth = sa.Reward(lambda x, _: x.sum((1, 2)) - x.square().sum((1, 2)), differentiable=name not in BLACK_BOXES)
    return sa.Finetuner(
        model_of(Points(junk), mask=mask), reward=smooth, algorithm=ALGORITHMS[name], prompts=PROMPTS,
        sampler=sa.Sampler(steps=3, eta=float(name != "hypernoise")), train=sa.Train(iterations=1, batch=6, device="cpu"),
    )  # fmt: skip


def outcome(made: sa.Finetuner) -> list[float]:
    """What is logged, and the trained weights."""
    metrics = next(iter(made))
    logged = [value for key, value in metrics.items() if isinstance(value, float) and key != "seconds"]
    return [*logged, *(value for p in made.model.parameters.values() for value in p.detach().flatten().tolist())]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_does_not_matter_what_a_network_says_in_padding(name: str) -> None:
    """Figures and weights to the bit. Twin: without a mask."""
    same(outcome(tuner(name, 100.0)), outcome(tuner(name, 0.0)), unmasked=outcome(tuner(name, 100.0, mask=False)))


@pytest.mark.parametrize("algorithm", [HINTED, Hypernoise()], ids=["hinted", "hypernoise"])
def test_rewards_see_nothing_in_padding(algorithm: Any) -> None:
    """Of trajectories that are drawn in ways of their own. Twin: without a mask."""

    def largest(mask: bool) -> float:
        seen = []

        def reward(x: Tensor, prompts: Any) -> Tensor:
            seen.append(float(x.detach()[~encode(list(map(str, prompts)))["here"]].abs().max()))
            return x.sum((1, 2)) - x.sum((1, 2)).detach()  # all equal, so that groups are drawn again, with a gradient

        noisy = algorithm is HINTED
        made = sa.Finetuner(
            model_of(Points(), mask=mask), reward=sa.Reward(reward, differentiable=True), algorithm=algorithm, prompts=PROMPTS,
            sampler=sa.Sampler(steps=3, eta=float(noisy), solver="euler_maruyama" if noisy else "ddim"),
            train=sa.Train(iterations=1, batch=6, samples_per_prompt=2, device="cpu"),
        )  # fmt: skip
        next(iter(made))
        return max(seen)

    same(largest(True), 0.0, unmasked=largest(False))


@pytest.mark.parametrize("solver", ["ddim", "euler_maruyama", "dpmpp_2m"])
def test_samples_are_0_in_padding_and_the_models_own_elsewhere(solver: Any) -> None:
    """Variance 1/4 at points, less the solver's own error. Twin: a model without a mask."""

    def right(model: sa.Model) -> None:
        eta = 0.0 if solver == "dpmpp_2m" else 1.0
        x = sa.sample(model, n=3000, steps=60, eta=eta, solver=solver, prompts=PROMPTS)
        here = encode([PROMPTS[i % 3] for i in range(3000)])["here"]
        assert bool((x[~here] == 0).all())
        close(x[here].square().mean(), 0.25, atol=0.04)

    accepts(right, model_of(Points()), unmasked=model_of(Points(), mask=False))


@pytest.mark.parametrize("method", ["twisted", "guidance", "svdd"])
def test_steered_samples_are_0_in_padding(method: Any) -> None:
    """A reward that pulls at padding too. Twin: a model without a mask."""

    def right(model: sa.Model) -> None:
        pull = sa.Reward(lambda x, _: x.sum((1, 2)), differentiable=True)
        more = {} if method == "guidance" else {"particles": 4}
        steered = sa.steer(model, pull, n=6, method=method, beta=1.0, steps=5, prompts=PROMPTS, **more)
        here = encode([str(prompt) for prompt in steered.prompts or []])["here"]
        assert bool((steered.x0[~here] == 0).all())
        assert bool((steered.x0[here] != 0).all())

    accepts(right, model_of(Points()), unmasked=model_of(Points(), mask=False))


class Shifted(Points):
    """The same with a constant for a push, in padding too."""

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return Points(0.0, 0.0)(x, t, cond) + self.push


def test_the_kl_of_a_shift_is_that_of_a_point_times_the_points() -> None:
    """A shift of eps by a constant costs the same at every point. Twin: without a mask all prompts pay for all points."""

    def nats(mask: bool) -> list[float]:
        model, found = model_of(Shifted(), mask=mask), []
        with torch.no_grad():
            model.net.push.fill_(0.1)
        for prompt in PROMPTS:
            kls = measure_kl(model, sa.Sampler(steps=5), 2, [prompt], 0)
            found += [kls["kl_nats"], kls["kl_chain_nats"]]
        return [nats / found[i % 2] for i, nats in enumerate(found)]

    close(nats(True), [1.0, 1.0, 2.0, 2.0, 4.0, 4.0], atol=1e-4, unmasked=nats(False))


@pytest.mark.parametrize("name", ["hypernoise", "ddpo"])
def test_trajectories_begin_at_0_in_padding(name: str) -> None:
    """Twin: a model without a mask."""

    def right(mask: bool) -> None:
        made = tuner(name, 0.0, mask=mask)
        rollout = made.collector.rollout(made.learner, torch.Generator().manual_seed(0), 0)
        here = encode([PROMPTS[number] for number in rollout.prompt.tolist()])["here"]
        assert bool((rollout.x[0][~here] == 0).all())
        assert bool((rollout.x[0][here] != 0).all())

    accepts(right, True, unmasked=False)


def test_the_value_of_pi_ft_has_no_slope_in_padding() -> None:
    """So that its damping, a norm of what the slope changes by, is that of the points. Twin: a model without a mask."""

    def right(mask: bool) -> None:
        made = tuner("pi_ft", 0.0, mask=mask)
        next(iter(made))  # its critic has learned by then
        rollout = made.collector.rollout(made.learner, torch.Generator().manual_seed(0), 0)
        states = rollout.steps().states
        slope, here = made.learner.gradient(states), encode([PROMPTS[number] for number in states.prompt.tolist()])["here"]
        assert bool((slope[~here] == 0).all())
        assert bool((slope[here] != 0).all())

    accepts(right, True, unmasked=False)


def test_noise_that_is_put_on_samples_again_is_0_in_padding() -> None:
    """Twin: a model without a mask."""

    def right(mask: bool) -> None:
        made = tuner("ram", 0.0, mask=mask)
        generator = torch.Generator().manual_seed(0)
        rollout = made.collector.rollout(made.learner, generator, 0)
        points = renoised(made.learner, rollout, torch.rand(2, 6, dtype=torch.float64), generator)
        here = encode([PROMPTS[number] for number in points.prompt.tolist()])["here"]
        assert bool((points.eps[~here] == 0).all())
        assert bool((points.eps[here] != 0).all())

    accepts(right, True, unmasked=False)


def test_diversity_is_that_of_the_points() -> None:
    """The mean distance of two samples of one point. Twin: without a mask the padding's is in it."""

    def found(mask: bool) -> tuple[float, float]:
        model = model_of(Points(), mask=mask)
        x = sa.sample(model, n=40, steps=5, prompts=["1"])
        figure = diversity(model, x, torch.zeros(40, dtype=torch.long))["diversity"]
        return figure, float(torch.pdist(x[:, 0].double()).mean())

    def right(pair: tuple[float, float]) -> None:
        close(pair[0], pair[1])

    accepts(right, found(True), unmasked=found(False))


def test_the_centre_of_the_points_that_there_are_is_0() -> None:
    """Twin: a projection that counts padding as points."""

    def centred(project: Any) -> None:
        x = sa.sample(model_of(Points(), project=project), n=60, steps=5, prompts=PROMPTS)
        assert float(x.sum(1).abs().max()) < 1e-5

    def right(x0: Tensor, inside: Tensor) -> Tensor:
        return x0 - x0.sum(1, keepdim=True) / inside.sum(1, keepdim=True)

    accepts(centred, right, counting_padding=lambda x0, inside: x0 - x0.mean(1, keepdim=True))


def test_guidance_keeps_the_mask_of_the_sample() -> None:
    """`null` lacks the mask's key: `y_null + w (y_cond - y_null)` of the same points. Twin: without guidance."""

    class Kinds(Points):
        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            return torch.where(cond["here"][..., None], x * 0 + cond["kind"][:, None, None], 1e6)

    def both(names: list[str]) -> dict[str, Tensor]:
        return {**encode(names), "kind": torch.tensor([float(name) for name in names])}

    model = model_of(Kinds(), null={"kind": torch.zeros(1)})
    model.encode = both
    t, x = torch.tensor(0.5), torch.randn(3, POINTS, 2)
    eps = model.predict(x, t, model.conditions(PROMPTS), guidance=3.0).eps[:, :, 0]
    truth = [[3.0, 0, 0, 0], [6.0, 6.0, 0, 0], [12.0, 12.0, 12.0, 12.0]]
    close(eps, truth, plain=[[value / 3 for value in row] for row in truth])


def test_the_doctor_knows_padding() -> None:
    """A right network with a mask and a centre gives no alarm. Twin: an eps of half the size, at points alone."""

    class Centred(Points):
        half = False

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            alpha, sigma = (f(t.double()).to(x)[:, None, None] for f in (sa.VP().alpha, sa.VP().sigma))
            here = cond["here"][..., None]
            y = x - (x * here).sum(1, keepdim=True) / here.sum(1, keepdim=True)
            return (0.5 if self.half else 1.0) * sigma * y / (0.25 * alpha**2 + sigma**2) + self.push * x

    def findings(half: bool) -> list[str]:
        net = Centred()
        net.half = half
        model = model_of(net, project=lambda x0, inside: x0 - x0.sum(1, keepdim=True) / inside.sum(1, keepdim=True))
        reward = sa.Reward(lambda x, _: x.square().sum((1, 2)), differentiable=True)
        train = sa.Train(iterations=1, batch=32, device="cpu")
        made = sa.Finetuner(
            model, reward=reward, algorithm=sa.DDPO(), prompts=["2", "4"], sampler=sa.Sampler(steps=5), train=train
        )
        return [f"{f.check}: {f.seen}" for f in sa.examine(made, iterations=1) if f.verdict == "wrong"]

    def no_alarm(found: list[str]) -> None:
        assert not found, found

    accepts(no_alarm, findings(False), half=findings(True))


def test_prompts_that_differ_by_a_mask_are_told_apart_by_a_critic() -> None:
    """Twin: one mask for all."""

    def apart(names: list[str]) -> None:
        vectors = PromptEmbedding(encode(names))(torch.arange(2))
        assert not torch.equal(vectors[0], vectors[1])

    accepts(apart, ["1", "2"], alike=["2", "2"])


def test_what_a_mask_cannot_be_is_refused() -> None:
    """The right twins are above."""
    with pytest.raises(ValueError, match=r"^prompts: this model's mask is made of conditions"):
        sa.sample(model_of(Points()), n=2, steps=2)
    wide = sa.Model(
        Points(), process=sa.VP(), predicts="eps", shape=(POINTS, 2), encode=encode, mask=lambda cond: cond["here"][:, :3]
    )
    with pytest.raises(ValueError, match=r"^mask: must be \(rows, \.\.\.\) with the first dimensions of a sample, \(4, 2\)"):
        sa.sample(wide, n=2, steps=2, prompts=PROMPTS)
