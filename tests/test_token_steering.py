"""Truth: the law of steered sequences by enumeration, of SVDD the choice among M candidates by quadrature."""

import json
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from token_laws import enumerated, first, model_of, reward_of
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.reveals import Reveal, chosen, product_draws, tokens_of
from scoreaction.rewards import CountedReward
from scoreaction.sampling.steering import Steering
from scoreaction.training.steering import certificate
from scoreaction.training.token_task import exact_task

BETA, LENGTH, VOCABULARY = 0.5, 4, 3
LAW, REWARDS = first()
SPACE = enumerated(LAW, LENGTH).space
TILTED = LAW * np.exp(REWARDS / BETA) / (LAW @ np.exp(REWARDS / BETA))
LOG_Z, MEAN = 4.13483893, 2.32399850


def steered(model=None, **settings):
    model = model or model_of(enumerated(LAW, LENGTH))
    return sa.steer(model, reward_of(REWARDS, VOCABULARY), **{"beta": BETA, "n": 2000, **settings})


def law_of(x0):
    numbers = (x0 * VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return (torch.bincount(numbers, minlength=len(LAW)).double() / len(x0)).numpy()


def tv(p, q):
    return np.abs(p - q).sum() / 2


@cache
def candidates(state):
    """Next states, the value of one sequence drawn there from the product of the exact laws, and probabilities of both."""
    exact = enumerated(LAW, LENGTH).log_conditionals(SPACE.states).exp().numpy()
    masked, states = SPACE.masked.numpy(), SPACE.states.numpy()
    found = []
    for i in np.flatnonzero(masked[state]):
        for v in range(VOCABULARY):
            there = int(SPACE.filled(torch.tensor([state]))[0, i, v])
            agree = ((states[there] == VOCABULARY) | (SPACE.sequences.numpy() == states[there])).all(1)
            x0 = SPACE.sequences.numpy()[agree]
            chances = np.full(len(x0), exact[state, i, v] / masked[state].sum())
            for k in np.flatnonzero(masked[there]):
                chances = chances * exact[there, k, x0[:, k]]
            found += [(there, value, chance) for value, chance in zip(REWARDS[agree], chances, strict=True)]
    return tuple(np.array(column) for column in zip(*found, strict=True))


@cache
def svdd_law(m, temperature):
    """The law of SVDD with one draw a candidate: `E[w_1/sum_j w_j]` by the integral of `e^{-lambda w}` over lambda."""
    grid = np.exp(np.linspace(-14, 14, 561))
    width = np.gradient(np.log(grid)) * grid
    visits = np.zeros(len(SPACE.states))
    visits[-1] = 1
    for state in np.argsort(-SPACE.masked.sum(1).numpy(), kind="stable"):
        if visits[state] == 0 or not SPACE.masked[state].any():
            continue
        there, value, chance = candidates(int(state))
        weight = np.exp((value - value.max()) / temperature)
        decay = np.exp(-grid[:, None] * weight)
        kept = m * chance * weight * (width[:, None] * decay * (decay @ chance)[:, None] ** (m - 1)).sum(0)
        np.add.at(visits, there, visits[state] * kept / kept.sum())
    return visits[~SPACE.masked.any(1).numpy()]


@pytest.mark.slow
def test_svdd_has_the_law_of_a_choice_among_m_and_comes_near_the_tilted_one():
    """T = beta (M-1)/M is nearer to it than T = beta on tokens too: with V itself .028 and .080 at M = 4; here .056, .103."""
    m = 4
    here = steered(method="svdd", particles=m, n=4000)
    law, uncorrected = svdd_law(m, BETA * (m - 1) / m), svdd_law(m, BETA)
    close([tv(law, TILTED), tv(uncorrected, TILTED)], [0.0557, 0.1027], atol=1e-4, swapped=[0.1027, 0.0557])
    close(here.x0.shape[0], 4000)
    mean, error = law @ REWARDS, np.sqrt(law @ REWARDS**2 - (law @ REWARDS) ** 2) / np.sqrt(4000)
    found = law_of(here.x0)
    close(found @ REWARDS, mean, atol=3 * error, uncorrected=uncorrected @ REWARDS, tilted=TILTED @ REWARDS)

    def near(other):
        assert tv(found, other) < 0.04, tv(found, other)  # that of 4,000 draws of the law itself is .025

    accepts(near, law, base=LAW, uncorrected=uncorrected)
    same(here.figures["queries_per_sample"], 16.0, none_at_the_end=12.0)
    same(here.figures["evaluations_per_sample"], 1.0 + 3 * m, start_of_all=4.0 * m)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 8])
def test_smc_reaches_the_tilted_law_whatever_is_drawn(draws):
    """log Z without bias and the tilted law. Twin: the base; weights without the last reward; a step of the wrong sign."""
    found = steered(method="smc", particles=32, returns="weighted", draws=draws, n=1000)
    figures = found.figures
    close(figures["log_z"], LOG_Z, atol=4 * figures["log_z_se"] + 1e-3, of_the_mean=float(LAW @ REWARDS) / BETA)

    def near(other):
        assert tv(law_of(found.x0), other) < 0.08, tv(law_of(found.x0), other)

    accepts(near, TILTED, base=LAW)
    close(float(law_of(found.x0) @ REWARDS), MEAN, atol=0.06, base=float(LAW @ REWARDS))
    same(figures["queries_per_sample"], 32.0 * (4 * draws + 1), one_draw_less=32.0 * (4 * draws))


@pytest.mark.slow
def test_a_tuned_model_proposes_and_the_pretrained_law_is_tilted():
    """Twin: the target of the tuned model itself, whose log Z is another."""
    model = model_of(enumerated(LAW, LENGTH))
    with torch.no_grad():
        model.net.change += 0.7 * torch.randn(model.net.change.shape, generator=torch.Generator().manual_seed(3))
    found, own = (steered(model, method="smc", particles=32, n=400, target=target) for target in ("reference", "model"))
    error = found.figures["log_z_se"]
    close(found.figures["log_z"], LOG_Z, atol=4 * error, own=own.figures["log_z"])
    base = steered(model, method="smc", particles=32, n=400, reference=True)
    close(base.figures["log_z"], LOG_Z, atol=4 * base.figures["log_z_se"], own=own.figures["log_z"])


def test_best_of_m_is_a_choice_among_whole_sequences():
    """The law of the best of M: `F(r)^M` by the distribution function. Twin: one more and one less."""

    def best(m):
        order = np.argsort(REWARDS)
        values, starts = np.unique(REWARDS[order], return_index=True)
        steps = np.append(np.add.reduceat(LAW[order], starts).cumsum(), 0.0)
        return float(values @ (steps[:-1] ** m - np.roll(steps, 1)[:-1] ** m))

    found = steered(method="best_of", particles=4, n=3000)
    close(law_of(found.x0) @ REWARDS, best(4), atol=0.035, three=best(3), six=best(6))


def test_guesses_are_draws_of_the_product_or_its_most_probable_sequence():
    model = model_of(enumerated(LAW, LENGTH))
    x = torch.tensor([[VOCABULARY, 1, VOCABULARY, VOCABULARY]]).repeat(4000, 1)
    prediction = model.predict(x, torch.tensor(0.5))
    rows, every = torch.arange(len(x)), model.guesses(len(x), 3, RowNoise(0, torch.arange(len(x))))
    drawn = every(rows, x, prediction)
    exact = prediction.log_prob[0].exp().double()
    exact[1] = torch.nn.functional.one_hot(torch.tensor(1), VOCABULARY)
    shares = torch.nn.functional.one_hot(drawn, VOCABULARY).double().mean((0, 1))
    close(shares, exact, atol=0.02, shown_one_drawn=prediction.log_prob[0].exp())
    part = every(rows[7:9], x[7:9], tokens_of(prediction.log_prob[7:9]))
    same(part, drawn[7:9], other_rows=drawn[:2])
    best = model.guesses(1, None, RowNoise(0, rows[:1]))(rows[:1], x[:1], tokens_of(prediction.log_prob[:1]))
    truth = torch.where(x[:1] == VOCABULARY, prediction.log_prob[0].argmax(-1), x[:1])[:, None]
    same(best, truth, least=torch.where(x[:1] == VOCABULARY, prediction.log_prob[0].argmin(-1), x[:1])[:, None])
    uniform = torch.rand(4000, 3, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one_by_one = chosen(prediction.log_prob.exp()[:, None].expand(-1, 3, -1, -1), uniform)
    same(product_draws(prediction.log_prob, uniform), one_by_one, of_the_first_row=one_by_one[:1].expand_as(one_by_one))


def test_the_certificate_is_the_gap_by_enumeration():
    """`KL(policy || optimum)` of a perturbed policy in nats. Twin: a KL of a third, as of a mean over positions."""
    model, reward = model_of(enumerated(LAW, LENGTH)), reward_of(REWARDS, VOCABULARY)
    with torch.no_grad():
        model.net.change += 1.5 * torch.randn(model.net.change.shape, generator=torch.Generator().manual_seed(3))
    sampler, task = sa.Sampler(**model.sampling), exact_task(model, reward, BETA)
    truth = task.distances(model, sampler, 1, 0)["objective_gap"] / BETA

    def gap():
        return certificate(model, sampler, CountedReward(reward), BETA, n=1024, prompts=None, seed=0)

    found, whole_kl = gap(), Reveal.kl
    with patch.object(Reveal, "kl", lambda self, other: whole_kl(self, other) / 3):
        wrong = gap()
    close(found["gap_nats"], truth, atol=4 * found["gap_nats_se"], third_of_the_kl=wrong["gap_nats"])


REFUSED = {
    "steer.method: twisted moves states by the reward's gradient and tokens have none": {"method": "twisted"},
    "steer.method: guidance moves": {"method": "guidance"},
    "steer.draws: best_of has no use for it": {"method": "best_of", "draws": 2},
    "steer.beta: smc needs it": {"method": "smc", "beta": None},
    "sampler.solver: ddim steps Gaussian states": {"method": "smc", "solver": "ddim"},
    "sampler.steps: one_by_one shows one position": {"method": "smc", "steps": 7},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_tokens_cannot_do_is_refused(message):
    reward = sa.Reward(reward_of(REWARDS, VOCABULARY), differentiable=True)  # whatever a reward says of gradients

    def refuses(settings):
        said = ""
        try:
            sa.steer(model_of(enumerated(LAW, LENGTH)), reward, **{"beta": BETA, "n": 2, **settings})
        except ValueError as error:
            said = str(error)
        assert said.startswith(message), said

    accepts(refuses, REFUSED[message], one_that_fits={"particles": 2})


def test_draws_are_of_tokens():
    sampler = sa.Sampler()
    with pytest.raises(ValueError, match="steer.draws: the look-ahead of Gaussian states is one clean sample"):
        Steering(method="smc", draws=2).settled(differentiable=False, sampler=sampler, beta=BETA)
    assert Steering(method="smc").settled(differentiable=False, sampler=sampler, beta=BETA).draws is None
    tokens = sa.Sampler(solver="one_by_one", steps=LENGTH)
    chosen_settings = Steering().settled(differentiable=True, sampler=tokens, beta=BETA)
    same((chosen_settings.method, chosen_settings.draws), ("smc", 1), gaussian=("twisted", None))


@pytest.mark.long
def test_the_commands_steer_tokens(tmp_path, capsys):
    """A run with a `steer:` block and the certificate has their figures; twisted is refused. Twin: a run without both."""
    small = ["model.length=4", "train.iterations=1", "train.batch=16", "evaluation.n=32"]

    def measured(settings):
        run = tmp_path / f"run{len(settings)}"
        assert main(["train", "markov_chain", *small, *settings, "--output", str(run)]) == 0
        assert {"reward_steered", "gap_nats"} <= json.loads((run / "summary.json").read_text()).keys()

    accepts(measured, ["steer.particles=4", "evaluation.certificate=true"], plain=[])
    capsys.readouterr()
    asking = ["sample", str(tmp_path / "run2"), "--n", "4", "--output", str(tmp_path / "samples")]
    assert main([*asking, "--steer", "twisted"]) == 2
    assert "tokens have none; use smc, svdd or best_of" in capsys.readouterr().err
    assert main([*asking, "--steer", "svdd"]) == 0
