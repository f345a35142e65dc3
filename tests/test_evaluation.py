"""Truth: the tilted law, moments of the exact score, and diversity computed again from its definition."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from affine import LAW, OLD, REWARD, model
from oracles import linear_quadratic as lq
from scipy.spatial.distance import pdist
from torch import nn
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.models import gaussian_mixture
from scoreaction.rewards import CountedReward, Reward
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.sampling.draw import draw, spread_prompts, x0_in_parts
from scoreaction.sampling.rollout import Rollout
from scoreaction.training.evaluation import diversity, measure, measure_kl, rounding_floor, standard_error
from scoreaction.training.exact_task import ExactTask, sliced_w2
from scoreaction.types import Prediction
from scoreaction.world import ALONE, OtherProcess, Stranded, World

LINEAR = QuadraticReward(Quadratic.linear([1.0, 0.5]))


def recipe_model():
    torch.manual_seed(0)
    return gaussian_mixture.build(gaussian_mixture.Config())


class Exact(nn.Module):
    """The exact policy of a law, with a parameter that does nothing; and one that moves it."""

    def __init__(self, law, process):
        super().__init__()
        self.law, self.process, self.shift = law, process, nn.Parameter(torch.zeros(()))

    def forward(self, x, t, cond):
        return self.law.prediction(self.process, x, t.double()).eps - self.shift * self.process.sigma(t.double())[:, None].to(x)


def fingers(features):
    """Mean pairwise distance and Vendi score from their definitions, in numpy."""
    values = features.double().numpy()
    unit = values / ((values**2).sum(1, keepdims=True) ** 0.5)
    spectrum = [max(float(v), 0.0) for v in torch.linalg.eigvals(torch.from_numpy(unit @ unit.T) / len(values)).real]
    return float(pdist(values).mean()), math.exp(-sum(v * math.log(v) for v in spectrum if v > 1e-12))


def test_diversity_is_that_of_its_definition():
    made, generator = recipe_model(), torch.Generator().manual_seed(0)
    samples = torch.randn(60, 2, generator=generator) + 1
    groups = torch.arange(60) % 2
    parts = [fingers(samples[groups == g]) for g in (0, 1)]
    truth = [(a + b) / 2 for a, b in zip(*parts, strict=True)]
    found = diversity(made, samples, groups)
    close(list(found.values()), truth, atol=1e-6, prompts_mixed=fingers(samples))
    pairwise_with_self = truth[0] * 29 / 30
    close(truth[0], found["diversity"], self_counted=pairwise_with_self)


def test_the_vendi_score_counts_what_differs():
    made, still = recipe_model(), torch.zeros(40, dtype=torch.long)
    same, four = torch.ones(40, 2), torch.eye(4).repeat(10, 1)

    def said(samples):
        return list(diversity(made, samples, still).values())

    close(said(same), [0.0, 1.0], different=said(four))
    close(said(four)[1], 4.0, all_rows=40.0)
    close(said(torch.zeros(40, 2)), [0.0, 1.0], different=[0.0, 40.0])  # no direction at all
    assert diversity(made, same[:1], still[:1]) == {}
    assert diversity(made, same[:2], torch.tensor([0, 1])) == {}


def test_samples_are_the_same_noise_for_base_and_tuned():
    made = sa.Model(Exact(Mixture.isotropic([[0.0, 0.0]], std=1.0), sa.VP()), process=sa.VP(), predicts="eps", shape=(2,))
    sampler = sa.Sampler(steps=5)
    base, tuned = (draw(made, sampler, 50, None, 3, reference=r) for r in (True, False))

    def check(x):
        assert torch.equal(x, base)

    accepts(check, tuned, other_seed=draw(made, sampler, 50, None, 4))
    with torch.no_grad():
        made.parameters["shift"].add_(1.0)
    assert torch.equal(draw(made, sampler, 50, None, 3, reference=True), base)
    assert float((draw(made, sampler, 50, None, 3) - base).mean()) > 0.1
    made.average_weights(0.5)  # what is drawn is the average
    with torch.no_grad():
        made.parameters["shift"].add_(5.0)
    averaged = draw(made, sampler, 50, None, 3)
    with made.averaged():
        accepts(lambda x: check_equal(x, averaged), draw(made, sampler, 50, None, 3), base=base)


def check_equal(a, b):
    assert torch.equal(a, b)


def test_prompts_are_spread_evenly():
    same(spread_prompts(["a", "b", "c"], 5), ["a", "b", "c", "a", "b"], first_only=["a"] * 5, in_blocks=list("aabbc"))
    same(spread_prompts(list("abcdefgh"), 4), ["a", "c", "e", "g"], the_first=list("abcd"))
    assert spread_prompts(None, 5) is None


def test_a_standard_error_is_std_over_root_n():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    close(
        standard_error(values), float(values.std()) / 20, atol=1e-7, std=float(values.std()), over_n=float(values.std()) / 400
    )


@pytest.mark.slow
def test_measured_reward_kl_and_errors():
    """The policy N(1, 1) of the reference N(0, 1): mean reward 1, path KL 1/2, chain KL by exact moments."""
    process = sa.VP()
    law = Mixture.isotropic([[0.0]], std=1.0)
    made = sa.Model(Exact(law, process), process=process, predicts="eps", shape=(1,))
    made.net.law = Mixture.isotropic([[1.0]], std=1.0)
    sampler, reward = sa.Sampler(steps=100), CountedReward(Reward(lambda x, c: x[:, 0]))
    counted = made.evaluations.forward
    figures, samples = measure(
        made, sampler, reward, {"square": CountedReward(lambda x, c: x[:, 0] ** 2)}, n=4000, prompts=None, seed=0
    )
    error = figures["reward_se"]
    close(error, 1 / math.sqrt(4000), rtol=0.1, atol=0, std=1.0)
    close(figures["reward"], 1.0, atol=4 * error, base=0.0)
    close(figures["held_out.square"], 2.0, atol=0.15, base=1.0)
    assert (reward.queries, len(samples)) == (4000, 4000)
    assert made.evaluations.forward == counted  # measuring is not training
    found = measure_kl(made, sampler, 200, None, 0)
    times = sampler.times(process)
    chain = lq.chain_kl(lq.ScalarLQ(process), lq.ScalarLQ(process, m=1.0), times)
    close(found["kl_nats"], 0.5, rtol=0.02, atol=0, without_half=1.0, chain=chain)
    close(found["kl_chain_nats"], chain, rtol=5e-3, atol=0, path=0.5)
    for solver, eta in (
        ("heun", 0.0),
        ("dpmpp_2m", 0.0),
        ("sde_dpmpp", 1.0),
        ("ddim", 0.0),
    ):  # that of the same scores at eta 1
        again = measure_kl(made, sa.Sampler(steps=100, solver=solver, eta=eta), 50, None, 0)
        close(again["kl_nats"], 0.5, rtol=0.02, atol=0, nothing=0.0)
    close(measure_kl(made, sa.Sampler(steps=100, eta=0.5), 50, None, 0)["kl_nats"], 0.78125, rtol=0.02, atol=0, eta_1=0.5)


@pytest.mark.long
def test_distance_floor_and_oracle_of_an_exact_task():
    """The oracle is a little above the floor, the base far from both, the optimum itself at the floor."""
    made, n = recipe_model(), 2000
    task = ExactTask.of(made, LINEAR, 0.5)
    truth = made.law.optimum(LINEAR.quadratic, 0.5)
    close(
        [task.optimum.reward, task.optimum.kl_nats],
        [2.098379, 1.228649],
        other_beta=[made.law.optimum(LINEAR.quadratic, 1.0).reward] * 2,
    )
    floor = task.floor(n, 0)
    generator = torch.Generator().manual_seed(50)
    by_hand = sum(sliced_w2(truth.law.sample(n, generator), truth.law.sample(n, generator)) for _ in range(20)) / 20
    close(floor, by_hand, rtol=0.25, atol=0, base_law=sliced_w2(truth.law.sample(n, generator), made.law.sample(n, generator)))
    itself = task.distance(lambda seed: truth.law.sample(n, torch.Generator().manual_seed(seed + 900)), n, 0)
    base = task.distance(lambda seed: draw(made, sa.Sampler(steps=30), n, None, seed), n, 0)
    close(itself, floor, rtol=0.35, atol=0, base=base)
    oracle = task.oracle(made, sa.Sampler(steps=200), n, 0)
    coarse = task.oracle(made, sa.Sampler(steps=10), n, 0)

    def check(distance):
        assert 0.8 * floor < distance < 3 * floor

    accepts(check, oracle, base=base, coarse=coarse)
    close(task.oracle(made, sa.Sampler(steps=200, solver="heun", eta=0.0), n, 0), oracle, rtol=1e-6, atol=0, coarse=coarse)
    figures = task.figures(made, sa.Sampler(steps=30), n, 0)
    close(figures["distance_to_optimum"], base, atol=1e-9, tuned=oracle)
    values = task.measured(lambda seed: draw(made, sa.Sampler(steps=30), n, None, seed), n, 0)
    error = float(values.std()) / math.sqrt(len(values))
    close(figures["distance_to_optimum_se"], error, atol=1e-9, of_one_draw=float(values.std()))


def test_what_has_no_known_optimum_has_no_distances():
    made = recipe_model()
    own = sa.Model(Exact(LAW, sa.VP()), process=sa.VP(), predicts="eps", shape=(1,))
    for args in ((made, Reward(lambda x, c: x[:, 0]), 0.5), (made, LINEAR, 0.0), (made, LINEAR, None), (own, REWARD, 0.5)):
        same(ExactTask.of(*args), None, known=ExactTask.of(model(sa.VP(), OLD), REWARD, 0.5))


@pytest.mark.slow
def test_a_summary_says_what_a_user_wants_to_know(tmp_path):
    tuner = sa.Finetuner(
        recipe_model(),
        reward=LINEAR,
        algorithm=sa.ScoreAction(beta=0.5, updates=1, rows=64),
        sampler=sa.Sampler(steps=5),
        train=sa.Train(iterations=1, batch=32, device="cpu"),
        output=tmp_path,
        evaluation=sa.Evaluation(n=256, steps=10),
    )
    list(tuner)
    summary = tuner.summary()
    wanted = (
        "reward_base reward_tuned kl_nats kl_chain_nats diversity_base diversity_tuned reward_queries model_evaluations seconds"
    )
    wanted += " optimum_reward optimum_kl_nats distance_to_optimum distance_floor distance_oracle"
    assert set(wanted.split()) <= summary.keys()
    assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float))
    close(summary["reward_base"], 0.0, atol=6 * summary["reward_base_se"], tuned_optimum=2.1)
    assert (tmp_path / "summary.json").exists()
    assert summary["reward_queries"] == 32 + 64


@pytest.mark.parametrize("steps", [1, 7])
def test_sampling_is_repeatable_and_asks_no_more_than_it_needs(steps):
    made = recipe_model()
    x = sa.sample(made, n=10, steps=steps, seed=5)
    accepts(
        lambda other: check_equal(other, x),
        sa.sample(made, n=10, steps=steps, seed=5),
        other=sa.sample(made, n=10, steps=steps, seed=6),
    )
    with torch.no_grad():
        options = {"reference": False, "chunk": 4}
        parts = list(x0_in_parts(made, sa.Sampler(steps=steps, grid=made.grid), None, 5, torch.arange(10), **options))
    same(torch.cat([rows for rows, _ in parts]).tolist(), list(range(10)), one_part=list(range(4)))
    chunked = torch.cat([x0 for _, x0 in parts])
    close(chunked, x, atol=1e-5, of_a_part_again=chunked[:4].repeat(3, 1)[:10], other_order=chunked.flip(0))


def test_rounding_alone_is_a_kl_in_half_precision():
    """Truth: in float64 the same small change of the weights is nothing; the floor grows with the dimensions, fourfold here."""
    floors = {}
    for width, precision in ((64, torch.float64), (64, torch.bfloat16), (256, torch.bfloat16)):
        torch.manual_seed(0)
        net = Wide(width).double() if precision == torch.float64 else Wide(width)
        made = sa.Model(net, process=sa.VP(), predicts="eps", shape=(width,))
        made.autocast = lambda precision=precision: torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16
        )
        sampler, before = sa.Sampler(steps=10), [p.detach().clone() for p in made.parameters.values()]
        x = torch.randn(11, 16, width, dtype=next(net.parameters()).dtype)
        said = Prediction(x[:-1], x[:-1])
        rollout = Rollout(sampler.times(made.process), x, said, said, torch.zeros(16).long())
        floors[width, precision] = rounding_floor(made, sampler, None, rollout, 0, rows=16, world=ALONE)
        assert all(torch.equal(old, new) for old, new in zip(before, made.parameters.values(), strict=True))
        assert made.evaluations.forward == 0
    fine, coarse, wide = floors.values()
    close(fine / coarse, 0.0, atol=1e-2, measured=1.0)
    close(wide / coarse, 4.0, atol=2.0, flat=1.0)


@dataclass(frozen=True)
class Share(World):
    """A process whose messages are kept: what it would have told the others."""

    told: list = field(default_factory=list)

    def gather(self, own, total=None):
        self.told.append(own)
        return torch.zeros(2)


def shares(size, measured):
    """What so many processes tell, in the order of the rows."""
    told = [Share(rank, size) for rank in range(size)]
    for world in told:
        measured(world)
    return torch.cat([world.told[0] for world in told])


def test_more_processes_than_rows_measure_what_one_does():
    """Four trajectories in eight processes, of which four hold none."""
    made, sampler = recipe_model(), sa.Sampler(steps=3)
    with torch.no_grad():
        for p in made.parameters.values():
            p.add_(0.05)
    x = torch.randn(4, 4, 2)
    said = Prediction(x[:-1], x[:-1])
    rollout = Rollout(sampler.times(made.process), x, said, said, torch.zeros(4).long())

    def of_rounding(world):
        rows = world.stripe(4)
        own = [part[:, rows] for part in (x, said.x0, said.eps)]
        here = replace(
            rollout, x=own[0], old=Prediction(*own[1:]), action=Prediction(*own[1:]), prompt=torch.zeros(len(rows)).long()
        )
        return rounding_floor(made, sampler, None, here, 0, rows=4, world=world)

    for measured in (of_rounding, lambda world: measure_kl(made, sampler, 4, None, 0, world)):
        truth = shares(1, measured)
        close(shares(8, measured) / truth, torch.ones(4), atol=0.02, in_other_order=truth.flip(0) / truth)


@dataclass(frozen=True)
class Warned(World):
    """A process that says its failures to the others, but for those in work that sends messages of its own."""

    def together(self, work, *, sends=False):
        try:
            return work()
        except Exception as error:
            if sends:
                raise Stranded from error
            raise OtherProcess(f"all know of {error}", ()) from error


def test_features_that_fail_in_one_process_are_told_to_all():
    made, samples, groups = recipe_model(), torch.randn(4, 2), torch.zeros(4)
    close(diversity(made, samples, groups, world=Warned())["diversity"], fingers(samples)[0], doubled=2 * fingers(samples)[0])
    made.features = lambda samples: samples.reshape(-1, 7)
    with pytest.raises(OtherProcess, match="all know of shape"):
        diversity(made, samples, groups, world=Warned())


@pytest.mark.parametrize(("is_shared", "kind"), [(False, OtherProcess), (True, Stranded)])
def test_a_reward_that_fails_while_others_call_a_shared_network_sends_nothing(is_shared, kind):
    """They wait for its part of the network, and would take a message for that."""
    made, reward = recipe_model(), CountedReward(lambda samples, prompts: samples[:, 9])
    made.sharded = is_shared
    with pytest.raises(kind):
        measure(made, sa.Sampler(steps=2), reward, {}, n=4, prompts=None, seed=0, chunk=2, world=Warned())
    right, _ = measure(made, sa.Sampler(steps=2), CountedReward(LINEAR), {}, n=4, prompts=None, seed=0, world=Warned())
    truth, _ = measure(recipe_model(), sa.Sampler(steps=2), CountedReward(LINEAR), {}, n=4, prompts=None, seed=0)
    close(right["reward"], truth["reward"], other=truth["reward"] + 1)


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, width))

    def forward(self, x, t, cond):
        return self.body(x)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"n": 0}, "n: must be at least 1"), ({"prompts": "cat"}, "prompts: must be a list"), ({"prompts": []}, "one at least")],
)
def test_what_cannot_be_sampled_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        sa.sample(recipe_model(), **{"n": 2, "steps": 2, **wrong})


def test_a_prompt_is_encoded_once_however_many_samples_have_it():
    """Truth: a network that predicts its own condition as x0 gives each sample its prompt's number."""
    texts = []

    class Echo(nn.Module):
        def forward(self, x, t, cond):
            return cond + 0 * x

    def encode(prompts):
        texts.extend(prompts)
        return torch.tensor([[float(prompt)] for prompt in prompts])

    made = sa.Model(Echo(), process=sa.VP(), predicts="x0", shape=(1,), encode=encode)
    x = draw(made, sa.Sampler(steps=3, eta=0.0), 5, spread_prompts(["7", "3"], 5), 0)
    close(x[:, 0], [7.0, 3.0, 7.0, 3.0, 7.0], atol=1e-5, in_order_of_encoding=[7.0, 3.0, 3.0, 3.0, 3.0])
    accepts(lambda seen: _equal(seen, ["7", "3"]), texts, each_sample=["7", "3", "7", "3", "7"])


def _equal(found, expected):
    assert found == expected


class OwnCondition(nn.Module):
    """A network of which nothing but the prompt's condition can be seen, and that of the policy like its reference's."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.w * cond.expand_as(x)


def test_the_kl_is_between_policy_and_reference_for_the_same_prompt():
    """A policy that is its reference has none, whatever its prompts say; another prompt's reference is far from it."""

    def kl(reference_of=lambda prompt: prompt):
        model = sa.Model(
            OwnCondition(), process=sa.VP(), predicts="v", shape=(2,), encode=lambda p: torch.tensor([[float(x)] for x in p])
        )
        own = model.reference
        model.reference = lambda x, t, c, *, prompt, guidance: own(x, t, c, prompt=reference_of(prompt), guidance=guidance)
        return measure_kl(model, sa.Sampler(steps=4), 6, ["1", "2", "3"], 0)["kl_nats"]

    close(kl(), 0.0, atol=1e-10, of_the_next_prompt=kl(lambda prompt: prompt.roll(1)))
