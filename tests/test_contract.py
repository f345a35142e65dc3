"""Truth: the optimum of a Gaussian under a linear reward, N(m + C l/beta, C), which gains `l C l/(2 beta)`."""

import pytest
import torch
from parameters import with_slow
from test_every_algorithm import OF_TOKENS, SAMPLED
from torch import nn
from twins import accepts, close

import scoreaction as sa
from scoreaction.catalog import files, find

BETA = 0.5
BEST = 1 / (2 * BETA)
"""What the optimum gains of `reward - beta KL` where C and l are 1."""
SLOPES = {"up": 1.0, "down": -1.0}
SHELF = sorted(files("algorithm").keys() - OF_TOKENS - {"prompt_loop"})
"""All but PromptLoop, whose frozen model must tell texts apart: `test_prompt_loop.py` holds it to its own optimum."""


def f32(value):
    return torch.tensor(value, dtype=torch.float32)


class Net(nn.Module):
    """`v = -sigma F(x, t, slope)`, F a perceptron that begins at 0: at first the data law is N(0, 1), whose v is 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x, t, cond):
        return -sa.VP().sigma(t)[:, None].to(x) * self.body(torch.cat([x, t[:, None].to(x), cond], 1))


def data_of(kind, sign):
    """Pairs labelled by `sign` times the slope of their prompt, or samples of the law that it tilts to."""
    generator, prompts = torch.Generator().manual_seed(0), [*SLOPES] * 400
    slopes = sign * torch.tensor([SLOPES[prompt] for prompt in prompts])[:, None]
    a, b, uniform = (draw(len(prompts), 1, generator=generator) for draw in (torch.randn, torch.randn, torch.rand))
    first = uniform < torch.sigmoid(slopes * (a - b))
    pairs = sa.Pairs(torch.where(first, a, b), torch.where(first, b, a), prompts)
    return {"pairs": pairs, "samples": sa.Samples(a + slopes / BETA, prompts)}.get(kind)


def tuner_of(name, sign, *, differentiable, settings=None, sampler=None, **train):
    """A short run whose reward is `sign` times the slope of the prompt."""
    Config = find("algorithm", name, key="algorithm.name").Config

    def reward(x, prompts):
        return sign * x[:, 0] * x.new_tensor([SLOPES[prompt] for prompt in prompts])

    return sa.Finetuner(
        sa.Model(Net(), process=sa.VP(), predicts="v", shape=(1,), encode=lambda prompts: f32([[SLOPES[p]] for p in prompts])),
        reward=sa.Reward(reward, differentiable=differentiable),
        algorithm=Config(**({"beta": BETA} if "beta" in Config.model_fields else {}) | (settings or {})),
        sampler=sampler or sa.Sampler(steps=8, **SAMPLED.get(name, {})),
        train=sa.Train(**{"iterations": 6, "batch": 96, "lr": 1e-2, "device": "cpu"} | train),
        evaluation=sa.Evaluation(n=1024, steps=8, **SAMPLED.get(name, {})),
        prompts=list(SLOPES),
        data=data_of(Config.learns_from, sign),
    )


def gains(tuner, sign):
    """What the reward of each prompt gained, and `reward - beta KL`, judged by the reward of sign 1."""
    list(tuner)
    found = tuner.summary()
    rewards = [sign * (prompt["reward_tuned"] - prompt["reward_base"]) for prompt in found["prompts"]]
    return *rewards, sum(rewards) / len(rewards) - BETA * found["kl_nats"]


def improves(gained):
    """Every prompt's reward and the objective rise, and the objective by no more than the optimum's does."""
    assert min(gained) > 0.05, gained
    assert gained[-1] < 1.1 * BEST, gained


def worsens(gained):
    assert max(gained) < -0.05, gained


@pytest.mark.parametrize("name", with_slow(SHELF, "pi_ft", "vard", "score_action", "sqdf", "adjoint_matching"))
def test_it_improves_the_objective_and_not_with_the_sign_flipped(name):
    right, flipped = (gains(tuner_of(name, sign, differentiable=True), sign) for sign in (1, -1))
    accepts(improves, right, flipped=flipped, first_prompt_only=(right[0], 0.0, right[2]), beyond=(*right[:2], 2 * BEST))
    accepts(worsens, flipped, right=right)


@pytest.mark.slow
@pytest.mark.parametrize("look_ahead", ["reward", "zeroth_order"])
def test_the_look_ahead_is_at_each_ones_own_prompt(look_ahead):
    """Where the critic learns nothing the value is `c_skip r(x0_hat)`, and still each prompt's own reward rises."""
    settings = {"look_ahead": look_ahead, "critic_lr": 1e-12}
    right, flipped = (gains(tuner_of("score_action", s, differentiable=True, settings=settings), s) for s in (1, -1))
    accepts(improves, right, flipped=flipped)


@pytest.mark.parametrize("name", with_slow(SHELF, "sqdf", "pi_ft", "vard", "score_action"))
def test_the_rows_of_a_call_change_nothing(name):
    """Figures of a batch, its gradient's norm among them, are those of 7 rows at a time or of all at once."""

    def figures(max_rows):
        found = next(iter(tuner_of(name, 1, differentiable=True, iterations=1, batch=32, max_rows=max_rows)))
        return {key: value for key, value in found.items() if isinstance(value, float) and key != "seconds"}

    whole, pieces = figures(10_000), figures(7)
    assert whole.keys() == pieces.keys()
    for key, truth in whole.items():
        wrong = {} if abs(truth) < 1e-4 else {"sum_of_means": pieces[key] * 32 / 7, "last_piece_alone": pieces[key] * 7 / 32}
        close(pieces[key], truth, atol=1e-5, rtol=0.05, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHELF)
def test_a_black_box_is_refused_or_learned_from(name):
    try:
        right, flipped = (tuner_of(name, sign, differentiable=False) for sign in (1, -1))
    except ValueError:
        with pytest.raises(ValueError, match="needs its gradient"):
            tuner_of(name, 1, differentiable=False)
        return
    accepts(improves, gains(right, 1), flipped=gains(flipped, -1))
