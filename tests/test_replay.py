"""Truth: counting by hand, chi-square of frequencies, the plain mean that importance weights must give back."""

import pytest
import torch
from scipy.stats import chisquare
from tuning import own_model
from twins import accepts, close

import scoreaction as sa
from scoreaction.sampling.replay import Replay
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Prediction

STEPS = 3


def brought(first, batch):
    """Trajectory n visits `10 n + step`, predicts minus that, has prompt n % 3, reward n and a grid of its own."""
    n = torch.arange(first, first + batch)
    x = (10 * n[None] + torch.arange(STEPS + 1)[:, None]).float()[:, :, None].expand(-1, -1, 2)
    old = Prediction(-x[:-1], x[:-1])
    times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** (1 + first / 100)
    return Rollout(times, x, old, old, n % 3, n.float())


def filled(capacity, batches, size=2, **options):
    made = Replay(capacity, STEPS, (2,), batch=size, **options)
    for i in range(batches):
        made.add(brought(i * size, size))
    return made


def kept(made):
    """The number of the trajectory in each slot."""
    return (made.x[:, 0, 0] / 10).int()


MODEL = own_model(False)


def drawn(made, rows=2000, steps=None, seed=0):
    """Rows of these steps, of all by default; one process has all of the list."""
    steps = torch.arange(STEPS) if steps is None else torch.tensor(steps)
    got, where = made.draw(MODEL, rows, steps, torch.Generator().manual_seed(seed))
    assert torch.equal(where.place, torch.arange(rows))
    return got


def test_the_newest_over_the_oldest():
    """Ten trajectories through a buffer of six: the last six are drawn and no other."""
    made = filled(6, 5)

    def newest(numbers):
        assert sorted(numbers.tolist()) == [4, 5, 6, 7, 8, 9]

    accepts(newest, kept(made), all_of_them=torch.arange(10), oldest=torch.arange(6))
    seen = set((drawn(made).x[:, 0] / 10).int().tolist())
    assert seen == {4, 5, 6, 7, 8, 9}
    assert set(drawn(filled(6, 1)).path.tolist()) == {0, 1}  # what was never filled is never drawn
    assert [filled(6, batches).known() for batches in (0, 1, 2, 5)] == [0, 2, 4, 6]
    assert kept(filled(3, 1, size=5)).tolist() == [3, 4, 2]  # a batch larger than the buffer leaves its newest


def test_a_row_is_one_step_of_one_trajectory():
    """State, its end, the prediction there, times, prompt: all of the same trajectory and step."""
    got = drawn(filled(6, 5))
    number, step = (got.x[:, 0] / 10).floor(), got.x[:, 0] % 10
    batch = 2 * (number // 2)  # trajectories of one batch share their grid
    t, s = ((1 - (step + i).double() / STEPS) ** (1 + batch.double() / 100) for i in (0, 1))
    close(step, got.step, one_later=step + 1)
    close(got.x_next, got.x + 1, atol=0, itself=got.x, other_row=got.x.roll(1, 0) + 1)
    close(got.old.x0, -got.x, atol=0, other_row=-got.x.roll(1, 0))
    alpha, sigma = (part.float()[:, None] for part in (MODEL.process.alpha(got.t), MODEL.process.sigma(got.t)))
    close(got.old.eps, (got.x + alpha * got.x) / sigma, rtol=1e-4, sign=(got.x - alpha * got.x) / sigma, x0=got.old.x0)
    close(got.t, t, atol=1e-9, end=s)
    close(got.s, s, atol=1e-9, start=t)
    close(got.prompt, number % 3, atol=0, other_row=(number % 3).roll(1))


def frequencies(made, probability, draws=4000):
    """p-value of the chi-square test of how often each (trajectory, step) came."""
    got = drawn(made, draws)
    count = torch.bincount(got.path * STEPS + got.step, minlength=probability.numel())
    expected = probability.double().flatten()
    return chisquare(count.numpy(), (draws * expected / expected.sum()).numpy()).pvalue


def likely(p):
    assert p > 1e-3


PAIRS = torch.arange(4).repeat_interleave(STEPS), torch.arange(STEPS).repeat(4)
WEIGHTS = 0.2 + torch.rand(4, STEPS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [1, 2])
def test_uniform_and_priority_frequencies(size):
    """One trajectory a batch is one class, drawn by the priorities of all; of two, each class has half of the rows."""

    def shares(weights):
        return (weights.view(-1, size, STEPS) / weights.view(-1, size, STEPS).sum((0, 2), keepdim=True)).reshape(4, STEPS)

    weights, flat = shares(WEIGHTS), torch.ones(4, STEPS)
    uniform, first, half = (filled(4, 4 // size, size, priority=priority) for priority in (0.0, 1.0, 0.5))
    for made in (uniform, first, half):
        made.set_priority(*PAIRS, WEIGHTS.flatten())
    accepts(likely, frequencies(uniform, flat), by_priority=frequencies(uniform, weights))
    squared = frequencies(first, shares(WEIGHTS**2))
    accepts(likely, frequencies(first, weights), uniform=frequencies(first, flat), squared=squared)
    accepts(likely, frequencies(half, shares(WEIGHTS**0.5)), whole=frequencies(half, weights), uniform=frequencies(half, flat))


def test_some_steps_only():
    """A row counts for the steps that are drawn from."""
    got = drawn(filled(4, 2, priority=1.0), 200, [0, 2])
    assert set(got.step.tolist()) == {0, 2}
    close(got.weight, 2.0, atol=0, all_steps=torch.full((200,), float(STEPS)))


def test_a_new_trajectory_has_the_largest_priority_yet():
    made = filled(4, 1, priority=1.0)
    made.set_priority(torch.tensor([0]), torch.tensor([1]), torch.tensor([7.0]))
    made.add(brought(2, 2))
    close(made.weights[2:], 7.0, atol=0, one=torch.ones(2, STEPS))
    made.set_priority(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
    assert float(made.weights.min()) > 0  # nothing becomes impossible


@pytest.mark.parametrize("size", [1, 2])
def test_importance_weights_give_the_mean_of_all_pairs_back(size):
    """Of all classes together, as each has as many pairs."""

    def mean(importance, priority=1.0):
        made = filled(4, 4 // size, size, priority=priority, importance=importance)
        made.set_priority(*PAIRS, WEIGHTS.flatten())
        got = drawn(made, 60_000)
        assert 0 < float(got.weight.min()) <= float(got.weight.max()) == STEPS  # times the number of steps
        return float((got.weight * WEIGHTS[got.path, got.step]).sum() / got.weight.sum())

    truth, classes = float(WEIGHTS.mean()), WEIGHTS.view(-1, size, STEPS)
    close(mean(1.0), truth, rtol=0.01, atol=0, not_corrected=mean(0.0), half=mean(0.5))
    close(mean(0.0), float(((classes**2).sum((0, 2)) / classes.sum((0, 2))).mean()), rtol=0.01, atol=0, corrected=mean(1.0))


def test_old_trajectories_are_not_drawn():
    made = {limit: filled(8, 4, max_age=limit) for limit in (1, 2, None)}
    assert {limit: buffer.known() for limit, buffer in made.items()} == {1: 2, 2: 4, None: 8}

    def newest(limit):
        assert set(drawn(made[limit]).path.tolist()) == {6, 7}

    accepts(newest, 1, of_two_iterations=2, without_a_limit=None)


def test_mapped_from_a_file_is_the_same(monkeypatch):
    inside = filled(6, 5, priority=1.0)
    monkeypatch.setattr("scoreaction.sampling.replay.ON_DISK", 0)
    outside = filled(6, 5, priority=1.0)
    for name, value in inside.state_dict().items():
        assert torch.equal(outside.state_dict()[name], value), name
    a, b = drawn(inside), drawn(outside)
    close(b.x, a.x, atol=0, other_seed=drawn(outside, seed=1).x)
    back = Replay(6, STEPS, (2,), batch=2, priority=1.0)
    back.load_state_dict(inside.state_dict())
    close(drawn(back).x, a.x, atol=0, empty=0 * a.x)


def test_what_neither_memory_nor_disk_holds_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"algorithm\.buffer: .* need .* GiB.*lower algorithm\.buffer") as error:
        Replay(10**9, 50, (4, 64, 64), batch=1)
    assert "\n" not in str(error.value)
    monkeypatch.setattr("scoreaction.sampling.replay.ON_DISK", 0)
    usage = type("Usage", (), {})
    room = 4 * 6 * (STEPS + 1 + STEPS) * 2 / 0.9  # exactly for x, with its ends, and old
    for free, fits in ((room + 2, True), (room - 2, False)):
        usage.free = free
        monkeypatch.setattr("scoreaction.sampling.replay.shutil.disk_usage", lambda path: usage)
        try:
            Replay(6, STEPS, (2,), batch=2)
            room_enough = True
        except ValueError:
            room_enough = False
        assert room_enough == fits


def test_it_stays_on_the_cpu_and_in_float32():
    """Moving or casting all networks of a run leaves the buffer where and what it is."""
    made = filled(6, 5)
    parts = torch.nn.ModuleDict({"replay": made, "other": torch.nn.Linear(1, 1)})
    parts.to("meta", torch.float16)
    assert (made.x.device.type, made.x.dtype) == ("cpu", torch.float32)
    assert parts["other"].weight.device.type == "meta"
    assert not list(made.parameters())


def test_a_state_dict_is_all_of_it():
    whole = filled(6, 4, priority=1.0, max_age=2)
    whole.set_priority(torch.tensor([0]), torch.tensor([1]), torch.tensor([3.0]))
    back = Replay(6, STEPS, (2,), batch=2, priority=1.0, max_age=2)
    back.load_state_dict(whole.state_dict())
    for made in (whole, back):
        made.add(brought(8, 2))
    afresh = filled(6, 1, priority=1.0, max_age=2)
    close(drawn(back).x, drawn(whole).x, atol=0, afresh=drawn(afresh).x)
    assert set(drawn(back).path.tolist()) == set(drawn(whole).path.tolist()) == {0, 1, 2, 3}  # of the last two iterations


def test_rows_keep_their_prompts():
    """The reward of each drawn row is that of its own prompt."""
    queries, got = [], []

    def reward(x, conditions):
        queries.append([int(c) for c in conditions])
        return x[:, 0] + x.new_tensor([float(c) for c in conditions])

    tuner = sa.Finetuner(
        own_model(True),
        reward=sa.Reward(reward, differentiable=True),
        algorithm=sa.SQDF(rows=12, updates=1, buffer=20),
        sampler=sa.Sampler(steps=3),
        train=sa.Train(iterations=2, batch=8, device="cpu"),
        prompts=["0", "1"],
    )
    draw = tuner.learner.replay.draw

    def watched(*options):
        got.append(draw(*options))
        return got[-1]

    tuner.learner.replay.draw = watched
    list(tuner)

    def check(prompt):
        assert queries[-1] == prompt.tolist()

    last = got[-1][0].prompt
    accepts(check, last, as_drawn_later=last.roll(1), other_way=1 - last)
