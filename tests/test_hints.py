"""Truth: laws of hinted paths: their weights, their KL, and what each hint does."""

from __future__ import annotations

import math

import pytest
import torch
from many import PROMPTS, conditional, rare
from test_ineffective import _between, within
from twins import F64, accepts, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.transitions import Transition
from scoreaction.sampling.hints import Hinted

STEPS = 12
VP = sa.VP()


def hinted(move, nats, rows=4096, dimension=2):
    """Hinted paths of the chain x -> .9 x + .3 z, the hint moving each mean by `move(x)`; with their last states."""
    noise = RowNoise(5, torch.arange(rows))
    x = noise.normal((rows, dimension), torch.float32)
    mask = torch.ones(STEPS, dtype=torch.bool)
    mask[3], mask[-1] = False, False
    hint = Hinted(lambda x, t, s, transition: transition.mean + move(x), x, mask, nats)
    for i in range(STEPS):
        std = f64(0.3 if i < STEPS - 1 else 0.0)
        x = hint.choose(noise, Transition(0.9 * hint.x, std), f64(1 - i / STEPS), f64(0.0)).x
    return hint, x


MOVES = {
    "even": lambda x: torch.full_like(x, 0.05),
    "by state": lambda x: 0.1 * torch.sin(3 * x) + 0.05,
    "far": lambda x: torch.full_like(x, 3.0),
}


@pytest.mark.parametrize("name", MOVES)
def test_path_weights_are_exact_and_the_kl_is_capped(name):
    """E w = 1, E w x is the policy's mean of x (0), and E -log w is the KL, at most one nat. Twins: no weight, the inverse."""
    hint, x = hinted(MOVES[name], 1.0)
    weight = hint.log_weight.exp()
    deviation = float(weight.std() / math.sqrt(len(weight)))
    accepts(within(1.0, deviation), float(weight.mean()), inverse=float((-hint.log_weight).exp().mean()))
    first = x[:, 0].double()
    error = float((weight * first).std() / math.sqrt(len(weight)))
    accepts(within(0.0, error), float((weight * first).mean()), none=float(first.mean()))
    spread = float(hint.log_weight.std() / math.sqrt(len(weight)))
    accepts(within(float(hint.kl.mean()), spread), -float(hint.log_weight.mean()), none=0.0)
    accepts(lambda kl: _between(0, kl, 1 + 1e-9), float(hint.kl.max()), uncapped=STEPS * 3.0**2 / 0.3**2)


def test_a_hint_below_the_cap_is_followed_in_full():
    """A move d of each of ten steps: KL 10 d^2/(2 k^2) a number, and E w^2 - 1 = exp(2 KL) - 1. Twins: exp(KL), all steps."""
    hint, _ = hinted(MOVES["even"], 1e9, rows=20_000, dimension=1)
    kl = 10 * 0.05**2 / (2 * 0.3**2)
    close(hint.kl, torch.full_like(hint.kl, kl), atol=1e-6, of_all_steps=torch.full_like(hint.kl, kl * 1.2))
    close(hint.log_weight.mul(2).exp().mean() - 1, math.expm1(2 * kl), atol=0.05, once=math.expm1(kl))
    capped, _ = hinted(MOVES["even"], kl / 4, rows=8, dimension=1)
    close(capped.kl, torch.full_like(capped.kl, kl / 4), atol=1e-6, uncapped=hint.kl[:8])


def test_a_hint_that_says_nothing_is_the_policy():
    """Bit for bit, with log weights of 0. Twin: one that says something."""
    hint, x = hinted(torch.zeros_like, 1.0, rows=16)
    other, moved = hinted(MOVES["even"], 1.0, rows=16)
    same(hint.log_weight, torch.zeros(16, dtype=F64), moved=other.log_weight)
    noise = RowNoise(5, torch.arange(16))
    plain = noise.normal((16, 2), torch.float32)
    for _ in range(STEPS - 1):
        plain = Transition(0.9 * plain, f64(0.3)).sample(noise)
    close(x, 0.9 * plain, atol=1e-6, moved=moved)


# Runs

HARD = [sa.Prompt(prompt, metadata={"hint": hint}) for prompt, hint in zip(PROMPTS, "bcda", strict=True)]


def run(do, *, algorithm=sa.DDPO, reward=rare, prompts=HARD, iterations=3, model=None, sampler=None, seed=0, **ineffective):
    chosen = algorithm(baseline="group", ineffective={"do": do, **ineffective})
    return sa.Finetuner(
        model or conditional(), reward=reward, algorithm=chosen, sampler=sampler or sa.Sampler(steps=6), prompts=prompts,
        train=sa.Train(iterations=iterations, batch=64, samples_per_prompt=8, device="cpu", seed=seed),
    )  # fmt: skip


SMOOTH = sa.Reward(lambda x, prompts: 1 + (4 * (x[:, 0] - 6)).sigmoid(), differentiable=True)
"""Equal but for rounding, with a gradient."""
FORMS = {
    "skip": {},
    "resample": {"tries": 2},
    "guidance": {"guidance": 8.0},
    "prompt": {},
    "steer": {"beta": 1e-8, "reward": SMOOTH},
    "branch": {"iterations": 8, "at": 0.6},
}


@pytest.mark.parametrize("algorithm", [sa.DDPO, sa.DPOK], ids=["ddpo", "dpok"])
@pytest.mark.parametrize("name", FORMS)
def test_it_runs_and_says_what_it_did(name, algorithm):
    """Queries by hand: a batch an iteration, and the paths that were drawn again. Twin: the batches alone."""
    more = FORMS[name] if name in ("skip", "resample") else {"hint": name, **FORMS[name]}
    rows = list(run(name if name in ("skip", "resample") else "hint", algorithm=algorithm, **more))
    assert any(row["dead_groups"] > 0 for row in rows)
    assert all(row.get("log_ratio_first", 0.0) < 1e-4 for row in rows)
    redrawn = sum(row.get("redrawn_paths", 0.0) for row in rows)
    asked, batches = rows[-1]["reward_queries"], 64.0 * len(rows)
    if name == "resample":
        assert batches < asked <= batches + 2 * redrawn
    else:
        each = 6 if name == "steer" else 1  # five steps with noise ask for the look-ahead's gradient
        close(asked, batches + each * redrawn, atol=0, **({} if name == "skip" else {"batches": batches}))
    if name in ("guidance", "prompt", "steer"):
        hints = [row for row in rows if "hint_kl_nats" in row]
        assert hints
        assert all(0 < row["hint_kl_nats"] <= 1 and 0 < row["hint_ess"] <= 1 for row in hints)


def paths(hint, nats, n, **more):
    """Hinted paths of an untrained learner of six steps, their log weights, and the learner; the first n rows' noise."""
    made = run("hint", hint=hint, nats=nats, iterations=1, **more)
    learner, prompt, seen = made.learner, torch.arange(n) % 4, []
    times = made.sampler.times(VP)
    rollout = learner.redrawn._explore(times, None, seen.append, prompt, RowNoise(3, torch.arange(n)))
    return rollout, seen[0], learner, prompt


def plain(learner, prompt, *, guidance=1.0, conditions=None, move=None):
    """The chain of the policy by hand from the same noise, its mean moved by `move(x, t, std)`; states but the last."""
    noise, model = RowNoise(3, torch.arange(len(prompt))), learner.model
    conditions = learner.conditions if conditions is None else conditions
    times, x, states = learner.sampler.times(VP), model.start(len(prompt), noise), []
    for t, s in zip(times[:-2], times[1:-1], strict=True):
        with torch.no_grad():
            prediction = model.predict(x, t, conditions, prompt=prompt, guidance=guidance)
        step = learner.sampler.find().step(VP, None, prediction, x, t, s, 1.0, None)
        mean = step.mean if move is None else step.mean + move(x, t, float(step.std))
        x = Transition(mean, step.std).sample(noise)
        states.append(x)
    return torch.stack(states)


def test_each_hint_is_what_it_says():
    """Below the cap the paths are, by hand, those of the guided policy, the other prompt, twisted steps. Twin: the policy."""
    rollout, _, learner, prompt = paths("guidance", 1e9, 8, guidance=5.0)
    own = plain(learner, prompt)
    close(rollout.x[1:-1], plain(learner, prompt, guidance=5.0), atol=1e-5, policy=own)
    rollout, _, learner, prompt = paths("prompt", 1e9, 8)
    others = learner.model.conditions(list("bcda"))
    close(rollout.x[1:-1], plain(learner, prompt, conditions=others), atol=1e-5, policy=own)
    bent = sa.Reward(lambda x, prompts: x[:, 0] ** 2 - x[:, 1], differentiable=True)
    rollout, _, learner, prompt = paths("steer", 1e9, 8, beta=0.7, reward=bent)

    def twisted(x, t, std):
        leaf = x.clone().requires_grad_()
        x0 = learner.model.predict(leaf, t, learner.conditions, prompt=prompt).x0
        return std**2 / 0.7 * torch.autograd.grad((x0[:, 0] ** 2 - x0[:, 1]).sum(), leaf)[0]

    close(rollout.x[1:-1], plain(learner, prompt, move=twisted), atol=1e-4, policy=own)


@pytest.mark.parametrize("hint", ["guidance", "prompt"])
def test_weighted_hinted_samples_have_the_policys_mean(hint):
    """E w = 1 and E w x0 that of the policy's own samples, to their standard errors. Twin: without the weights."""
    more = {"guidance": 40.0} if hint == "guidance" else {}
    rollout, seen, learner, prompt = paths(hint, 0.5, 8192, **more)
    weight, x = seen.log_weight.exp(), rollout.x[-2].double().sum(1)
    own = plain(learner, prompt)[-1].double().sum(1)
    n = math.sqrt(len(x))
    accepts(within(1.0, float(weight.std()) / n), float(weight.mean()), inverse=float((-seen.log_weight).exp().mean()))
    error = math.hypot(float((weight * x).std()), float(own.std())) / n
    accepts(
        within(float(own.mean()), error),
        float((weight * x).mean()),
        **({"none": float(x.mean())} if hint == "guidance" else {}),
    )


def test_steps_before_a_branch_are_not_learned_from():
    """Truth: the update of a batch whose branched paths end at their first step is that of their last steps alone."""
    made = run("hint", hint="branch", at=0.6, iterations=1)
    learner, times = made.learner, made.sampler.times(VP)
    rollout = learner.explore(torch.zeros(64, dtype=torch.long), times, RowNoise(1, torch.arange(64)))
    rewards = torch.linspace(0, 1, 64)
    step = int((times <= 0.6).nonzero()[0])

    def terms(first):
        weight = (torch.arange(6)[:, None] >= torch.full((64,), first)).double()
        scored = type(rollout)(**vars(rollout) | {"rewards": rewards, "weight": weight})
        prepared = learner.prepare(scored, torch.Generator().manual_seed(0))
        return [update.terms[0].rows for update in learner.updates(prepared, torch.Generator().manual_seed(0))]

    def learned(rows):
        return sorted({int(row) // 64 for part in rows for row in part.own})

    same(learned(terms(step)), list(range(step, 5)), everything=learned(terms(0)))
    same(sum(part.total for part in terms(step)), 64 * 5, shrunk=64 * (5 - step))


def test_a_branch_goes_on_from_the_prompts_best_state():
    """Truth: states kept by hand. A group with the best reward so far is left alone. Twins: another prompt's, the last."""
    made = run("hint", hint="branch", at=0.6, iterations=1)
    learner, times = made.learner, made.sampler.times(VP)
    prompt = torch.tensor([0, 1]).repeat_interleave(4)
    noise = RowNoise(1, torch.arange(8))
    rollout = learner.explore(prompt, times, noise)
    step = int((times <= 0.6).nonzero()[0])
    best = learner.redrawn.best
    rewards = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 4.0, 4.0, 4.0])
    best.remember(learner, rollout, step, rewards, prompt)
    close(best.x[:2], rollout.x[step][[1, 4]], atol=0, swapped=rollout.x[step][[4, 1]], last=rollout.x[step][[3, 7]])
    kept = best.x.clone()
    best.remember(learner, rollout, step, rewards - 1, prompt)
    same(best.x, kept, forgotten=torch.zeros_like(kept))
    flat = type(rollout)(**vars(rollout) | {"rewards": torch.tensor([1.0] * 4 + [5.0] * 4)})
    drawn = []

    def draw(explore, rows):
        drawn.append(rows.tolist())
        new = explore(prompt[rows], RowNoise(2, rows))
        close(new.x[0], kept[prompt[rows]], atol=0, other=kept[1 - prompt[rows]])
        return type(new)(**vars(new) | {"rewards": torch.arange(4.0)})

    after, figures = learner.redraw(flat, draw)
    same(drawn, [[0, 1, 2, 3]], all=[list(range(8))])
    same(after.rewards.tolist(), [0.0, 1.0, 2.0, 3.0] + [5.0] * 4, before=flat.rewards.tolist())
    same(figures["dead_groups"], 1.0, half=0.5)
    weight = torch.ones(6, 8, dtype=torch.float64)
    weight[:step, :4] = 0
    same(after.weight, weight, everything=torch.ones(6, 8, dtype=torch.float64))


REFUSED = {
    "baseline": ({"baseline": "prompt"}, "algorithm.ineffective.do: hint is of groups with one prompt; set algorithm.baseline"),
    "no null": ({"null": None}, "algorithm.ineffective.hint: guidance needs prompts and an unconditional condition"),
    "weaker": ({"guidance": 1.0}, "algorithm.ineffective.guidance: 1 is no stronger than sampler.guidance 1; raise it"),
    "no hints": (
        {"hint": "prompt", "prompts": PROMPTS},
        "algorithm.ineffective.hint: prompt needs a hint .* 'a', 'b', 'c' and",
    ),
    "black box": ({"hint": "steer", "beta": 1.0}, "algorithm.ineffective.hint: steer needs the reward's gradient"),
    "no beta": ({"hint": "steer", "reward": SMOOTH}, "algorithm.ineffective.beta: steer needs it"),
    "late": ({"hint": "branch", "at": 1e-6}, "algorithm.ineffective.at: no step between t = 1e-06 and the data has noise"),
    "idle": ({"do": "resample", "hint": "prompt"}, "algorithm.ineffective.hint: nothing here has use for it .*do to hint"),
    "other": ({"hint": "prompt", "guidance": 4.0}, "algorithm.ineffective.guidance: .*leave it out, or set .*hint to guidance"),
    "one": ({"group": 1}, "train.samples_per_prompt: algorithm.baseline group compares samples of one prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_one_line(case):
    """Twin: the hint as it should be."""
    changes, said = REFUSED[case]
    changes = dict(changes)
    model = conditional()
    model.null = changes.pop("null", model.null)
    baseline, each = changes.pop("baseline", "group"), changes.pop("group", 8)
    reward, prompts = changes.pop("reward", rare), changes.pop("prompts", HARD)

    def build(**ineffective):
        return sa.Finetuner(
            model, reward=reward, algorithm=sa.DDPO(baseline=baseline, ineffective=ineffective), sampler=sa.Sampler(steps=6),
            prompts=prompts if each > 1 else prompts * 20,
            train=sa.Train(iterations=1, batch=64, samples_per_prompt=each, device="cpu"),
        )  # fmt: skip

    with pytest.raises(ValueError, match=said):
        build(**{"do": "hint", **changes})
    if baseline == "group" and each > 1:
        build()


@pytest.mark.parametrize("hint", ["guidance", "branch"])
@pytest.mark.slow
def test_a_run_that_goes_on_is_the_whole_one(hint):
    """Bit for bit, with the states that branches begin at. Twin: one that forgets them, or of another seed."""

    def weights(stop, seed=0):
        made = run("hint", hint=hint, iterations=6, seed=seed)
        rows = iter(made)
        for _ in range(stop):
            next(rows)
        state = made.state()
        after = run("hint", hint=hint, iterations=6, seed=seed)
        after.load_state(state)
        assert any(["redrawn_paths" in row for row in after])  # all of them are made
        return torch.cat([p.detach().flatten() for p in after.model.parameters.values()])

    same(weights(3), weights(1), other=weights(3, seed=1))
