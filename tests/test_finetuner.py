"""Truth: the uninterrupted run, bit for bit; counting by hand; the tilted law that a short training must come nearer to."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from twins import accepts, close

import scoreaction as sa
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.errors import UserError
from scoreaction.models import gaussian_mixture
from scoreaction.rewards import RewardError
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.training.optimizer import TrainingError
from scoreaction.training.run import check_precision
from scoreaction.types import DTYPES


class Net(nn.Module):
    """A user's own network: x (batch, 2), cond (batch,) of class ids or None."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
        self.classes = nn.Embedding(3, 16)

    def forward(self, x, t, cond):
        h = self.body[0](torch.cat([x, t[:, None]], 1))
        return self.body[2](torch.tanh(h if cond is None else h + self.classes(cond)))


def own_model(prompts=False):
    encode = (lambda names: torch.tensor([int(name) for name in names])) if prompts else None
    return sa.Model(
        Net(), process=sa.VP(), predicts="eps", shape=(2,), encode=encode, null=torch.tensor([2]) if prompts else None
    )


def black_box(samples, conditions):
    """What an outside program might do: numpy in, list out."""
    sign = 1.0 if conditions is None else torch.tensor([1.0 - 2.0 * int(c) for c in conditions])
    return (sign * samples[:, 0]).numpy().tolist() if conditions is None else sign * samples[:, 0]


def tune(
    algorithm, *, iterations=4, output=None, reward=black_box, prompts=None, sampler=None, model=None, held_out=None, **train
):
    options = {"iterations": iterations, "batch": 16, "device": "cpu", "checkpoint_every": 2} | train
    return sa.Finetuner(
        model or own_model(prompts is not None),
        reward=reward,
        algorithm=algorithm,
        sampler=sampler or sa.Sampler(steps=4),
        train=sa.Train(**options),
        prompts=prompts,
        output=output,
        held_out=held_out,
    )


SCORE_ACTION = sa.ScoreAction(updates=2, rows=32, critic_updates=2)
ALGORITHMS = {
    "score_action": (SCORE_ACTION, None),
    "score_action_prompts": (SCORE_ACTION, ["0", "1"]),
    "ratio": (SCORE_ACTION.model_copy(update={"estimator": "likelihood_ratio", "look_ahead": "zeroth_order"}), None),
    "forward": (SCORE_ACTION.model_copy(update={"estimator": "forward", "each": 2}), ["0", "1"]),
    "ddpo": (sa.DDPO(baseline="prompt", minibatches=2), ["0", "1"]),
    "dpok": (sa.DPOK(kl_target=0.1, minibatches=2), None),
    "sqdf": (sa.SQDF(updates=2, rows=16, buffer=24, priority=1.0, importance=0.5, max_age=2), ["0", "1"]),
    "sqdf_published": (sa.SQDF(updates=2, rows=16, buffer=24, weights="chain", gamma=0.9), None),
    "sqdf_corrected": (sa.SQDF(updates=2, rows=16, correction=True, critic_updates=2, critic_rows=32, kl_target=0.1), None),
    "vard": (sa.VARD(updates=2, rows=16, critic_updates=2), ["0", "1"]),
    "pi_ft": (sa.PIFT(stages=2, rows=16, critic_updates=2), ["0", "1"]),
    "adjoint_matching": (sa.AdjointMatching(updates=2, rows=16), ["0", "1"]),
    "draft": (sa.DRaFT(last=2, beta=0.1, rows=16), ["0", "1"]),
    "draft_lv": (sa.DRaFT(low_variance=2), None),
    "refl": (sa.ReFL(beta=0.1, rows=16), ["0", "1"]),
    "ram": (sa.RAM(each=2, kl_target=0.1), ["0", "1"]),
    "nft": (sa.NFT(lag=0.2), ["0", "1"]),
    "awm": (sa.AWM(each=2), None),
}
SMOOTH = sa.Reward(
    lambda x, c: x[:, 0] if c is None else x[:, 0] * torch.tensor([1.0 - 2.0 * int(p) for p in c]), differentiable=True
)


def reward_of(name):
    """A black box where one will do."""
    return black_box if name in ("score_action", "score_action_prompts", "ratio", "ddpo", "dpok", "vard") else SMOOTH


def flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {name: value}


def lines(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    """Parameters, averages, critic, surrogate, replay buffer, optimisers, random state, counts and metrics, bit for bit."""
    (algorithm, prompts), reward = ALGORITHMS[name], reward_of(name)
    whole = tune(algorithm, prompts=prompts, reward=reward, output=tmp_path / "whole")
    list(whole)
    first = tune(algorithm, prompts=prompts, reward=reward, output=tmp_path / "cut")
    for metrics in first:
        if metrics["iteration"] == 3:  # one after the checkpoint: it is done again
            break
    second = tune(algorithm, prompts=prompts, reward=reward, output=tmp_path / "cut", seed=0)
    torch.manual_seed(99)  # the run's randomness is its own
    assert second.resume()
    assert second.iteration == 2
    assert len(lines(tmp_path / "cut")) == 2
    list(second)

    def everything(tuner):
        return flat(tuner.state()) | flat(tuner.model.average, "averages") | flat(dict(tuner.model.parameters), "weights")

    def check(tuner):
        ours, theirs = everything(tuner), everything(whole)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if key != "/seconds":
                same = torch.equal(ours[key], value) if isinstance(value, torch.Tensor) else ours[key] == value
                assert same, key

    afresh = tune(algorithm, prompts=prompts, reward=reward, iterations=2, output=None, seed=1)
    list(afresh)
    accepts(check, second, without_resume=first, other_seed=afresh)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [record["iteration"] for record in lines(tmp_path / "whole")] == [1, 2, 3, 4]


def counted(algorithm, *, iterations=1, **options):
    *_, last = tune(algorithm, iterations=iterations, **options)
    return last["model_evaluations"], last["reward_queries"], last["model_backward_rows"]


@pytest.mark.slow
def test_what_is_counted_is_what_was_asked():
    """16 trajectories of 4 steps, two iterations; by hand from what each algorithm must ask."""
    B, N = 16, 4
    reward = sa.Reward(lambda x, c: x[:, 0], differentiable=True)
    cases = {
        # rollout, reference everywhere, updates * rows; final rewards, and the look-ahead at the chosen points
        "pathwise": (SCORE_ACTION, {"reward": reward}, (2 * B * N + 64, B + 64, 2 * 64)),
        "surrogate": (SCORE_ACTION, {}, (2 * B * N + 64, B, 2 * 64)),
        "zeroth_order": (
            SCORE_ACTION.model_copy(update={"look_ahead": "zeroth_order"}),
            {},
            (2 * B * N + 64, B + 3 * 64, 2 * 64),
        ),
        "none": (SCORE_ACTION.model_copy(update={"look_ahead": "none"}), {}, (2 * B * N + 64, B, 64)),
        # rollout, reference at 8 states of each step for the log, every step with a density
        "ddpo": (sa.DDPO(minibatches=2), {}, (B * N + 8 * N + B * (N - 1), B, B * (N - 1))),
        "two_epochs": (sa.DDPO(epochs=2), {}, (B * N + 8 * N + 2 * B * (N - 1), B, 2 * B * (N - 1))),
        "dpok": (sa.DPOK(), {}, (2 * B * N + B * (N - 1), B, B * (N - 1))),
        # guidance doubles every network row
        "guided": (sa.DDPO(), {"prompts": ["0", "1"], "sampler": sa.Sampler(steps=4, guidance=2.0)}, (288, B, 96)),
        "many": (sa.DDPO(), {"batch": 48}, (48 * N + 8 * N + 48 * (N - 1), 48, 48 * (N - 1))),
    }
    for algorithm, options, truth in cases.values():
        close(counted(algorithm, **options), truth, atol=0, twice=[2 * n for n in truth], none=[0, 0, 0])
        close(counted(algorithm, iterations=2, **options), [2 * n for n in truth], atol=0, not_cumulative=truth)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_process_may_hold_runs_of_any_precision(precision):
    seen = []

    class Watched(Net):
        def forward(self, x, t, cond):
            out = super().forward(x, t, cond)
            seen.append(self.body[0](torch.cat([x, t[:, None]], 1)).dtype)
            return out

    model = sa.Model(Watched(), process=sa.VP(), predicts="eps", shape=(2,))
    tuner = tune(sa.DDPO(), iterations=2, model=model, precision=precision)
    if precision == "fp16":
        tuner.optimisation.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)  # small enough not to overflow at once
    metrics = list(tuner)
    assert all(math.isfinite(record["reward_mean"]) for record in metrics)
    truth = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def check(dtype):
        assert set(seen) == {dtype}

    accepts(check, truth, double=torch.float64)
    plain = list(tune(sa.DDPO(), iterations=1))[0]["grad_norm"]  # the same gradients, to rounding: nothing is left scaled
    norm = metrics[0]["grad_norm"]
    close(norm, plain, rtol=0.5, atol=0, still_scaled=norm * 128)


def test_an_overflow_in_fp16_is_a_step_left_out():
    tuner = tune(sa.DDPO(minibatches=1), iterations=1, precision="fp16")
    tuner.optimisation.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = tuner.model.parameters["body.0.weight"].detach().clone()
    (metrics,) = tuner
    assert metrics["skipped"] == 1
    assert torch.equal(before, tuner.model.parameters["body.0.weight"])
    assert tuner.optimisation.scaler.get_scale() < 2.0**100


@pytest.mark.parametrize("algorithm", [sa.SQDF(), sa.DRaFT(), sa.ReFL(), sa.DDPO()], ids=lambda a: a.name)
def test_equal_rewards_are_a_logged_skip(algorithm):
    """A clamp that all samples are above gives no gradient; the twin, one that tells them apart, does."""
    rewards = [sa.Reward(lambda x, c, end=end: x[:, 0].clamp(max=end), differentiable=True) for end in (-1e6, 1e6)]
    skipped = [[metrics.get("skipped") for metrics in tune(algorithm, reward=reward, iterations=2)] for reward in rewards]
    assert skipped == [[1.0, 1.0], [None, None]]


def test_a_policy_that_diverged_is_not_the_rewards_fault():
    class Overflowing(Net):
        def forward(self, x, t, cond):
            return 1e20 * (1 + x.square()) + super().forward(x, t, cond)

    with pytest.raises(TrainingError, match="iteration 2: the policy diverged, its KLs are not finite; lower train.lr"):
        list(tune(sa.DDPO(), lr=1e30))
    model = sa.Model(Overflowing(), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match="iteration 1: the policy diverged, its samples are not finite"):
        list(tune(sa.DDPO(), model=model))
    assert len(list(tune(sa.DDPO(), lr=1e-3))) == 4


@pytest.mark.slow
def test_rows_of_a_call_are_the_runs_else_the_models_own():
    """And 4096 where neither has any; no call of the network has more, with a graph or without."""

    def rows(own=None, **train):
        model = own_model()
        model.max_rows = own
        largest = []
        for net in (model.net, model.reference_net):
            net.register_forward_hook(lambda net, inputs, output: largest.append(len(output)))
        list(tune(SCORE_ACTION, model=model, iterations=1, **train))
        return model.max_rows, max(largest)

    def equals(truth):
        def check(value):
            assert value == truth

        return check

    accepts(equals((7, 7)), rows(7), the_runs=rows(7, max_rows=5), neither=rows())
    accepts(equals((5, 5)), rows(7, max_rows=5), the_models=rows(7))
    accepts(equals((4096, 64)), rows(), the_models=rows(7))


class Dead(nn.Module):
    """A network whose output does not depend on its parameters."""

    def __init__(self, how):
        super().__init__()
        self.line, self.how = nn.Linear(2, 2), how

    def forward(self, x, t, cond):
        if self.how == "unused":
            return 0.5 * x
        return self.line(x).detach() if self.how == "detached" else 0.5 * x + 0 * self.line(x)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unused", "detached", "times_zero"])
@pytest.mark.parametrize("algorithm", [sa.DDPO(), SCORE_ACTION], ids=["ddpo", "score_action"])
def test_a_network_without_gradient_is_an_error(how, algorithm):
    model = sa.Model(Dead(how), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match=r"iteration 1:.*received no gradient; check"):
        list(tune(algorithm, model=model))


def test_a_gradient_that_is_not_finite_is_an_error():
    class Exploding(Net):
        def forward(self, x, t, cond):
            return super().forward(x, t, cond) + (self.body[0].weight.sum() * 0).sqrt()  # value 0, slope infinite

    model = sa.Model(Exploding(), process=sa.VP(), predicts="eps", shape=(2,))
    with pytest.raises(TrainingError, match="not finite; lower train.lr"):
        list(tune(sa.DDPO(), model=model))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x, c: x[:, 0] * float("nan"), r"16 of 16 values are NaN"),
        (lambda x, c: torch.where(x[:, 0] > 5, x[:, 0], torch.inf), "NaN or infinite"),
        (lambda x, c: x, r"shape \(16,\), got shape \(16, 2\)"),
        (lambda x, c: x[:, 0].mean(), r"got shape \(\)"),
        (lambda x, c: 1 / 0, "raised ZeroDivisionError"),
        (lambda x, c: None, "one number a sample, got NoneType"),
        (sa.Reward(lambda x, c: x.detach()[:, 0], differentiable=True), "no gradient reaches the samples"),
    ],
)
def test_bad_rewards_are_reward_errors(reward, message):
    with pytest.raises(RewardError, match=message):
        list(tune(SCORE_ACTION, reward=reward))


@pytest.mark.slow
@pytest.mark.parametrize("which", ["held out", "looked ahead"])
def test_a_reward_that_fails_while_it_is_watched_takes_the_iteration_back(tmp_path, which):
    """Truth: the run in which nothing failed, bit for bit."""
    asked = []

    def flaky(samples, conditions):
        asked.append(1)
        if len(asked) == broken:
            raise OSError("the scorer is gone")
        return samples[:, 1]

    def run(folder):
        looks = which == "looked ahead"
        algorithm = SCORE_ACTION.model_copy(update={"look_ahead": "zeroth_order"}) if looks else SCORE_ACTION
        options = {"reward": flaky} if looks else {"held_out": {"second": flaky}}
        return tune(algorithm, output=folder, checkpoint_every=100, **options)

    broken = 0
    whole = list(run(tmp_path / "whole"))
    broken = 3 * len(asked) // 4  # in the third of four iterations
    asked.clear()
    with pytest.raises(RewardError, match="the scorer is gone"):
        list(run(tmp_path / "cut"))
    again = run(tmp_path / "cut")
    assert again.resume()
    assert again.iteration == 2

    def same(found):
        assert [{**m, "seconds": 0} for m in found] == [{**m, "seconds": 0} for m in whole[2:]]

    accepts(same, list(again), first=whole[:2])


def test_a_module_of_the_users_is_a_reward_with_a_gradient_and_stays_as_it_is():
    """Truth: the same function written out; the twin's module has other weights."""

    class Scorer(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.line = nn.Linear(2, 1, bias=False)
            nn.init.constant_(self.line.weight, slope)

        def forward(self, samples, prompts):
            return self.line(samples)[:, 0]

    def rewards(reward):
        return [metrics["reward_mean"] for metrics in tune(sa.DRaFT(), reward=sa.Reward(reward, differentiable=True))]

    module = Scorer(0.5).eval().requires_grad_(False)
    truth = rewards(lambda samples, prompts: 0.5 * samples.sum(1))
    close(rewards(module), truth, atol=1e-5, other_weights=rewards(Scorer(-0.5).eval().requires_grad_(False)))
    assert float(module.line.weight.mean()) == 0.5


@pytest.mark.slow
def test_the_public_interface_as_documented(tmp_path):
    """A user's own network and a plain function, black box, and the reward goes up; saved and drawn from."""
    model = sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,))
    tuner = sa.Finetuner(
        model,
        reward=black_box,
        algorithm=sa.ScoreAction(beta=0.5),
        sampler=sa.Sampler(steps=10, eta=1.0),
        train=sa.Train(iterations=12, batch=128, lr=1e-2, seed=0, device="cpu"),
        prompts=None,
        output=None,
    )
    metrics = list(tuner)
    wanted = {"iteration", "reward_mean", "reward_std", "kl_nats", "kl_chain_nats", "grad_norm", "reward_queries"}
    assert wanted | {"model_evaluations", "seconds"} <= metrics[0].keys()
    x = sa.sample(tuner.model, n=512, steps=20, eta=1.0, solver="ddim", seed=0)
    base = sa.sample(tuner.model, n=512, steps=20, eta=1.0, solver="ddim", seed=0, reference=True)
    assert x.shape == (512, 2)
    error = float((x - base)[:, 0].std()) / math.sqrt(512)

    def rises(samples):
        assert float((samples - base)[:, 0].mean()) > 5 * error

    accepts(rises, x, base=base, worse=2 * base - x)
    assert torch.equal(x, sa.sample(tuner.model, n=512, steps=20, seed=0))
    assert (tuner.save(tmp_path / "out") / "weights.safetensors").exists()
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.slow
def test_training_on_the_recipes_mixture_comes_nearer_to_the_tilted_law():
    """Fifteen iterations are not the optimum; reward and KL must have moved towards 2.098 and 1.229."""
    torch.manual_seed(0)
    model = gaussian_mixture.build(gaussian_mixture.Config())
    reward = QuadraticReward(Quadratic.linear([1.0, 0.5]))
    tuner = tune(
        sa.ScoreAction(beta=0.5), model=model, reward=reward, iterations=15, batch=128, lr=5e-3, sampler=sa.Sampler(steps=10)
    )
    first, *_, last = tuner
    assert first["reward_mean"] < 0.5

    def nearer(reward_mean):
        assert abs(reward_mean - 2.098) < 1.6

    accepts(nearer, last["reward_mean"], first=first["reward_mean"])
    assert 0.05 < last["kl_nats"] < 3


@pytest.mark.slow
def test_looking_does_not_change_training():
    """Summaries, samples and other people's random numbers between iterations leave the run as it is."""
    quiet = [m["reward_mean"] for m in tune(SCORE_ACTION)]
    watched, disturbed = tune(SCORE_ACTION), []
    watched.evaluation = sa.Evaluation(n=16, steps=3)
    for metrics in watched:
        torch.rand(7)
        counts = (metrics["reward_queries"], watched.model.evaluations.forward)
        watched.summary()
        sa.sample(watched.model, n=4, steps=2)
        assert (watched.reward.queries, watched.model.evaluations.forward) == counts
        disturbed.append(metrics["reward_mean"])

    def check(values):
        assert values == quiet

    accepts(check, disturbed, other_seed=[m["reward_mean"] for m in tune(SCORE_ACTION, seed=1)])


def test_prompts_are_drawn_and_kept_with_their_samples():
    seen = []

    def reward(samples, conditions):
        seen.append(list(conditions))
        return torch.tensor([float(c) for c in conditions])

    *_, last = tune(sa.DDPO(), prompts=["0", "1"], reward=reward, samples_per_prompt=4, iterations=2)
    assert all(batch[i : i + 4] == [batch[i]] * 4 for batch in seen for i in range(0, 16, 4))
    assert {c for batch in seen for c in batch} == {"0", "1"}
    close(last["reward_mean"], sum(map(float, seen[-1])) / 16, first_batch=-1.0)
    with pytest.raises(ValueError, match="the list is empty"):
        tune(sa.DDPO(), prompts=[])
    with pytest.raises(ValueError, match="takes no prompts"):
        tune(sa.DDPO(), prompts=["a"], model=own_model(False))


def test_frozen_networks_and_wrong_samplers_are_refused():
    net = Net()
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        tune(sa.DDPO(), model=sa.Model(net, process=sa.VP(), predicts="eps", shape=(2,)))
    with pytest.raises(ValueError, match=r"sampler\.solver"):
        tune(sa.ScoreAction(), sampler=sa.Sampler(solver="heun", eta=1.0))


def test_the_rate_follows_its_schedule():
    rates = []
    tuner = tune(sa.DDPO(), iterations=4, lr=0.1)
    for _ in tuner:
        rates.append(tuner.optimisation.optimisers["policy"].param_groups[0]["lr"])
    truth = [0.1 * (0.01 + 0.495 * (1 + math.cos(math.pi * i / 4))) for i in range(4)]
    close(rates, truth, constant=[0.1] * 4, one_late=truth[1:] + [0.001])
    constant = tune(sa.DDPO(), iterations=2, schedule="constant", lr=0.1)
    list(constant)
    assert constant.optimisation.optimisers["policy"].param_groups[0]["lr"] == 0.1


def test_a_prompt_alone_is_no_list_of_prompts():
    with pytest.raises(ValueError, match=r"prompts: must be a list of prompts \(got '01'\); one prompt is \['01'\]"):
        tune(sa.DDPO(), prompts="01", model=own_model(True))


def test_processes_that_do_not_meet_are_refused(monkeypatch):
    """Each would train the same run: on a CPU accelerate does not see that there are two."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert tune(sa.DDPO(), iterations=1) is not None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE: .* asks for 2 processes and they do not meet .*torchrun") as error:
        tune(sa.DDPO(), iterations=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", ["fp32", "bf16", "fp16"])
def test_every_pair_of_weights_and_precision_fits_or_is_refused(width, precision):
    """fp16 weights need fp16's scaled gradients, which bf16 weights do not go with; all other pairs are twins that fit."""
    model = own_model()
    model.net.to(DTYPES[width])
    fits = {("fp16", "fp32"): False, ("fp16", "bf16"): False, ("bf16", "fp16"): False}.get((width, precision), True)
    with nullcontext() if fits else pytest.raises(UserError, match=r"^train\.precision: .* model\.dtype to "):
        check_precision(model, precision)
    if not fits:
        with pytest.raises(UserError, match=r"^train\.precision: .* model\.dtype to "):
            tune(sa.DDPO(), model=model, precision=precision)
