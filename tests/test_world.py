"""Truth: counting rows by hand, numpy's ways of cutting, moments of a normal, and that N processes together are one."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from scipy.stats import kstest
from test_replay import MODEL, STEPS, brought
from twins import F64, accepts, close, same

from scoreaction.diffusion.noise import AHEAD, RowNoise, drawn_seed, normal
from scoreaction.sampling.replay import Replay
from scoreaction.types import Prediction
from scoreaction.world import ALONE, OtherProcess, Rows, World

N, BATCH = 5, 12
"""Steps, and trajectories of all processes."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def deal(size, count=N * BATCH, seed=0):
    """The lists of so many processes, which all drew alike."""
    return [World(rank, size).dealt(N, BATCH // size, count, seeded(seed)) for rank in range(size)]


def whole(lists, own=lambda rows, rank, size: rows.own):
    """The list of all: which (step, trajectory) is at each place, (total, 2), -1 where none or more than one process is."""
    size, made = len(lists), torch.full((lists[0].total, 2), -1)
    seen = torch.zeros(lists[0].total, dtype=torch.long)
    for rank, rows in enumerate(lists):
        numbers, batch = own(rows, rank, size), BATCH // size
        made[rows.place] = torch.stack([numbers // batch, numbers % batch * size + rank], 1)
        seen[rows.place] += 1
    made[seen != 1] = -1
    return made


@pytest.mark.parametrize("count", [N * BATCH, 23, 7, 10**6])
def test_dealing_is_the_same_list_for_any_number_of_processes(count):
    (alone,) = deal(1, count)
    truth, (two, four) = whole([alone]), (deal(2, count), deal(4, count))
    assert torch.equal(alone.place, torch.arange(min(count, N * BATCH)))
    for lists in (two, four):
        same(
            whole(lists),
            truth,
            one_missing=whole([lists[0]] + [replace(rows, own=rows.own[:0], place=rows.place[:0]) for rows in lists[1:]]),
            ranks_exchanged=whole(lists[::-1]),
            another_seed=whole(deal(len(lists), count, seed=1)),
            local_numbers_of_all=whole(lists, lambda rows, rank, size: (rows.own + 1) % (N * BATCH // size)),
        )


def test_dealing_takes_every_row_once():
    def once(rows):
        assert sorted(rows.tolist()) == list(range(N * BATCH))

    (all_of_it,), (few,) = deal(1), deal(1, 31)
    drawn = torch.randint(N * BATCH, (N * BATCH,), generator=seeded())
    accepts(once, all_of_it.own, with_replacement=drawn, fewer=few.own)
    assert len(few.own.unique()) == len(few) == few.total == 31


@pytest.mark.parametrize("size", [2, 4])
def test_any_stretch_has_as_many_rows_of_every_process(size):
    """And at most one more; in a shuffled list it has not."""

    def even(lists):
        for begin in range(0, N * BATCH, 3):
            for end in range(begin + 1, N * BATCH + 1, 4):
                counts = [int(((rows.place >= begin) & (rows.place < end)).sum()) for rows in lists]
                assert max(counts) - min(counts) <= 1, (begin, end, counts)

    order = torch.randperm(N * BATCH, generator=seeded())
    shuffled = [replace(rows, place=order[rows.place]) for rows in deal(size)]
    blocks = [
        replace(rows, place=torch.arange(rank * 60 // size, (rank + 1) * 60 // size)) for rank, rows in enumerate(deal(size))
    ]
    accepts(even, deal(size), shuffled=shuffled, in_blocks=blocks)


def test_dealing_is_fair_to_steps_and_trajectories():
    """Over seeds the first rows of the list are any (step, trajectory), each as likely."""

    def uniform(counts):
        spread = float(counts.double().std(correction=0) / counts.double().mean().sqrt())
        assert spread < 1.4, spread

    first = torch.cat([deal(1, 1, seed)[0].own for seed in range(1200)])
    counts = torch.bincount(first, minlength=N * BATCH)
    early = torch.bincount(first % (N * BATCH // 2), minlength=N * BATCH)
    accepts(uniform, counts, early_steps_only=early)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("total", "parts"), [(60, 4), (23, 4), (7, 3), (2, 5)])
def test_lists_are_cut_as_torch_cuts_them(size, total, parts):
    """`chunk` and `tensor_split` of the processes together are those of the list of all."""

    def joined(cut):
        """The parts of all processes, each as the rows of all at their places."""
        made = []
        for lists in zip(*cut, strict=True):
            part = torch.full((lists[0].total, 2), -1)
            for rank, rows in enumerate(lists):
                assert rows.total == lists[0].total
                batch = BATCH // size
                part[rows.place] = torch.stack([rows.own // batch, rows.own % batch * size + rank], 1)
            made.append(part)
        return made

    def alike(pair):
        parts, truth = pair
        assert len(parts) == len(truth)
        assert all(torch.equal(a, b) for a, b in zip(parts, truth, strict=True))

    lists, truth = deal(size, total), whole(deal(1, total))
    for name in ("chunk", "tensor_split"):
        right = list(getattr(truth, name)(parts))
        made = joined([getattr(rows, name)(parts) for rows in lists])
        accepts(alike, (made, right), backwards=(made[::-1], right), whole=([truth], right), first_lost=(made[1:], right))
    assert len(lists[0].tensor_split(parts)) == parts  # the last ones empty where it is short


@pytest.mark.parametrize("size", [1, 2, 4])
def test_drawn_again_from_a_list_it_is_the_draw_of_one_process(size):
    """`randint` over the list of all, each process having those of the drawn rows that it holds."""
    lists, everything = deal(size, 23), whole(deal(1, 23))
    truth = everything[torch.randint(23, (40,), generator=seeded(3))]
    again = [rows.redrawn(40, seeded(3)) for rows in lists]
    assert {rows.total for rows in again} == {40}
    numbers = [Rows(rows.own[part.own], part.place, 40) for rows, part in zip(lists, again, strict=True)]
    unmapped = [Rows(part.own, part.place, 40) for part in again]
    twin = [rows.redrawn(40, seeded(4)) for rows in lists]
    other = [Rows(rows.own[part.own], part.place, 40) for rows, part in zip(lists, twin, strict=True)]
    same(whole(numbers), truth, the_places_in_the_list=whole(unmapped), other_seed=whole(other))


def test_a_stripe_is_every_sizeth_row():
    for size in (1, 2, 3):
        stripes = [World(rank, size).stripe(11) for rank in range(size)]
        same(torch.cat(stripes).sort().values, torch.arange(11), one_less=torch.cat(stripes)[1:].sort().values)
        assert all(bool((stripe % size == rank).all()) for rank, stripe in enumerate(stripes))
        rows = World(size - 1, size).rows(11)
        same(rows.place, stripes[-1], own=rows.own + 1)
        assert (torch.equal(rows.own, torch.arange(len(rows))), rows.total) == (True, 11)


def test_of_fewer_rows_than_processes_the_last_ones_hold_none():
    """Four rows of eight processes: of each of the first four one, as a batch in half precision is measured on."""
    same([World(rank, 8).stripe(4).tolist() for rank in range(8)], [[0], [1], [2], [3], [], [], [], []], of_four=[[0]] * 8)
    rows = World(7, 8).rows(4)
    same((len(rows), rows.total), (0, 4), all_of_them=(4, 4))


def test_of_one_process_messages_are_what_it_says():
    x, place = torch.randn(4, 2, generator=seeded()), torch.tensor([3, 0, 5, 1])
    same(ALONE.gather(x), x, other=x.flip(0))
    merged = torch.zeros(6, 2)
    for row, where in zip(x, place.tolist(), strict=True):
        merged[where] = row
    same(ALONE.merged(x, place, 6), merged, in_order=torch.cat([x, torch.zeros(2, 2)]))
    for how in ("mean", "sum", "max"):
        same(ALONE.reduced([1.5, -2.0], how), [1.5, -2.0], halved=[0.75, -1.0])
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.tensor([1.0, 2.0])
    same(ALONE.average_gradients([p], [3.0]), [3.0], doubled=[6.0])
    same(p.grad, torch.tensor([1.0, 2.0]), doubled=2 * p.grad)
    assert (ALONE.any(True), ALONE.any(False), ALONE.broadcast("a"), ALONE.every("a")) == (True, False, "a", ["a"])
    assert (ALONE.leads, World(1, 2).leads, World.current()) == (True, False, ALONE)


def test_a_gradient_that_no_process_has_stays_none():
    """So that Adam, which moves by its momentum where a gradient is 0, makes no step of it, as in one process."""
    two = World(0, 2)
    learned, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    learned.grad = torch.tensor([1.0, 2.0])
    with patch("torch.distributed.all_reduce", lambda message: message.mul_(2)):  # the other has the same
        close(two.average_gradients([learned, unused], [3.0]), [3.0], summed=[6.0])
    same(learned.grad, torch.tensor([1.0, 2.0]), summed=torch.tensor([2.0, 4.0]))
    same(unused.grad, None, zero=torch.zeros(2))


def test_of_one_process_an_error_is_its_own():
    def fails():
        raise KeyError("a")

    assert ALONE.together(lambda: 3) == 3
    with pytest.raises(KeyError) as error:
        ALONE.together(fails)
    assert not isinstance(error.value, OtherProcess)


@pytest.mark.skipif("WORLD_SIZE" in os.environ, reason="there is a launcher")
def test_without_a_launcher_one_process_is_the_world(monkeypatch):
    assert World.joined("cpu") == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.joined("cpu") == ALONE
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"^WORLD_SIZE: .* asks for 3 processes"):
        World.joined("cpu")


def streams(rows, shape=(3,), draws=1, seed=7):
    """(draws, rows, *shape) of one source."""
    source = RowNoise(seed, torch.as_tensor(rows))
    return torch.stack([source.normal((len(source.streams), *shape), torch.float32) for _ in range(draws)])


def test_rows_have_standard_normal_noise():
    def standard(x):
        assert kstest(x.flatten().double().numpy(), "norm").pvalue > 1e-3

    x = streams(range(200), (4,), 50)
    accepts(standard, x, wider=1.1 * x, moved=x + 0.05, same_for_all=x[:1, :1].expand(50, 200, 4))
    assert x.dtype == torch.float32
    assert RowNoise(0, torch.arange(2)).normal((2, 3), F64).dtype == F64


def test_rows_draws_and_seeds_have_nothing_in_common():
    """Correlations of neighbours are those of 4,000 independent pairs: at most 4/sqrt(4,000)."""

    def independent(pair):
        a, b = (part.flatten() - part.mean() for part in pair)
        assert abs(float((a * b).sum() / (a.norm() * b.norm()))) < 4 / 4000**0.5

    x, other = streams(range(21), (200,), 2), streams(range(21), (200,), 2, seed=8)
    row = (x[0, :20], x[0, 1:])
    accepts(independent, row, same_row=(x[0, :20], x[0, :20]))
    accepts(independent, (x[0, :20], x[1, :20]), same_draw=(x[1, :20], x[1, :20]))
    accepts(independent, (x[0, :20], other[0, :20]), same_seed=(x[0, :20], streams(range(20), (200,))[0]))
    accepts(independent, (x[0, :20], other[0, 1:]), row_for_seed=(x[0, 1:], streams(range(1, 21), (200,))[0]))
    assert (
        len({generator.initial_seed() for seed in (0, 1) for generator in RowNoise(seed, torch.arange(5000)).streams}) == 10_000
    )


@pytest.mark.parametrize("shape", [(), (2,), (3, 40, 50)])
def test_a_part_of_the_rows_has_their_noise_bit_for_bit(shape):
    """Stripes of processes and pieces of memory, whatever is drawn ahead; the twins are noise by place in the part."""
    draws = AHEAD + 3 if len(shape) < 2 else 3
    truth = streams(range(12), shape, draws)
    stripes = [streams(World(rank, 3).stripe(12), shape, draws) for rank in range(3)]
    by_place = [streams(range(4), shape, draws) for _ in range(3)]
    dealt = torch.stack(stripes, 2).flatten(1, 2)
    same(dealt, truth, the_same_on_every_rank=torch.stack(by_place, 2).flatten(1, 2), in_blocks=torch.cat(stripes, 1))
    pieces = [streams(rows, shape, draws) for rows in torch.arange(12).split(5)]
    same(torch.cat(pieces, 1), truth, anew=torch.cat([streams(range(len(part[0])), shape, draws) for part in pieces], 1))


def test_shapes_that_come_in_turn_keep_their_streams():
    """A draw of another shape between is the next of the stream and no row's neighbour sees it."""
    whole, part = RowNoise(3, torch.arange(6)), RowNoise(3, torch.arange(1, 6, 2))
    for shape in ((2,), (5, 5), (2,), (), (5, 5)):
        a, b = whole.normal((6, *shape), torch.float32), part.normal((3, *shape), torch.float32)
        same(b, a[1::2], other_rows=a[::2])
    with pytest.raises(ValueError, match="there are streams for 3 rows, and 4 are asked for"):
        part.normal((4, 2), torch.float32)
    assert RowNoise(3, torch.arange(0)).normal((0, 2), torch.float32).shape == (0, 2)


def test_noise_is_of_a_generator_or_of_rows():
    same(normal((3, 2), seeded(1)), torch.randn(3, 2, generator=seeded(1)), other_seed=torch.randn(3, 2, generator=seeded(2)))
    same(normal((3, 2), RowNoise(1, torch.arange(3))), streams(range(3), (2,), seed=1)[0], of_one=normal((3, 2), seeded(1)))
    same(
        RowNoise.drawn(seeded(1), torch.arange(3)).normal((3, 2), torch.float32),
        streams(range(3), (2,), seed=drawn_seed(seeded(1)))[0],
    )
    assert 0 <= drawn_seed(seeded(5)) < 2**62


@dataclass(frozen=True)
class Thread(World):
    """A process that is a thread of this one; a deaf one takes its own values for those of all."""

    table: Any = None
    deaf: bool = False

    def every(self, value):
        barrier, values = self.table
        values[self.rank] = value
        barrier.wait(20)
        seen = list(values)
        barrier.wait(20)
        return seen

    def reduced(self, values, how="mean"):
        assert how == "max"
        return [max(each) for each in zip(*self.every(values), strict=True)] if not self.deaf else values

    def gather(self, own, total=None):
        return torch.stack(self.every(own), 1).flatten(0, 1)


def everywhere(size, work, *, deaf=False):
    """What `work(world)` gives in each of so many processes."""
    table = threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Thread(rank, size, table, deaf)), range(size)))


def buffer(world, batches, *, size=4, capacity=8, **options):
    """A process's part of a buffer after so many batches of all processes; all but the last have priorities of their own."""
    made = Replay(capacity, STEPS, (2,), batch=size, world=world, **options)
    own = world.stripe(size)
    for i in range(batches):
        rollout = brought(i * size, size)
        old = Prediction(*(part[:, own] for part in rollout.old))
        made.add(replace(rollout, x=rollout.x[:, own], old=old, action=old, prompt=rollout.prompt[own], rewards=own.float()))
        if i < batches - 1:
            path = (torch.arange(len(own)) + i * len(own)) % len(made.times)
            for step in range(STEPS):
                made.set_priority(path, torch.full_like(path, step), 1.0 + step + 3 * own**2)
    return made


def listed(made, seed=0, rows=50):
    """The places of the rows that this process draws, and (trajectory, step, weight, prompt) of each."""
    steps, where = made.draw(MODEL, rows, torch.arange(STEPS), seeded(seed))
    assert (where.total, torch.equal(where.own, torch.arange(len(where)))) == (rows, True)
    return where.place, torch.stack([(steps.x[:, 0] / 10).floor().double(), steps.step, steps.weight, steps.prompt], 1)


def drawn(size, batches, *, seed=0, deaf=False, **options):
    """What the processes draw, in the order of the list of all."""
    made = torch.full((50, 4), -1.0, dtype=F64)
    for place, rows in everywhere(size, lambda world: listed(buffer(world, batches, **options), seed), deaf=deaf):
        assert bool((made[place] == -1).all())
        made[place] = rows
    return made


OPTIONS = [{}, {"max_age": 1}, {"max_age": 2}, {"priority": 0.7}, {"priority": 1.0, "importance": 0.5, "max_age": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_the_buffers_of_many_processes_draw_the_rows_of_one(options, batches):
    truth = drawn(1, batches, **options)
    wrong = {"other_seed": drawn(1, batches, seed=1, **options)}
    if "priority" in options and batches > 1:
        wrong["own_largest"] = drawn(2, batches, deaf=True, **options)
    if options.get("max_age", batches) < min(batches, 2):  # there is room for two
        wrong["of_any_age"] = drawn(2, batches, **{**options, "max_age": None})
    for size in (2, 4):
        close(drawn(size, batches, **options), truth, atol=1e-9, **wrong)


def test_a_buffers_state_is_that_of_all_processes():
    """Two processes save what one would, and one reads what two have written."""
    options = {"priority": 1.0, "importance": 0.5}
    (alone,) = everywhere(1, lambda world: buffer(world, 5, **options).state_dict())
    first, second = everywhere(2, lambda world: buffer(world, 5, **options).state_dict())
    for name, value in alone.items():
        same(first[name], value, other=value + 1)
        assert torch.equal(second[name], value), name

    def read(state):
        def work(world):
            made = Replay(8, STEPS, (2,), batch=4, world=world, **options)
            made.load_state_dict(state)
            return listed(made)

        made = torch.full((50, 4), -1.0, dtype=F64)
        for place, rows in everywhere(2, work):
            made[place] = rows
        return made

    rolled = {name: value.roll(1, 0) if value.ndim else value for name, value in alone.items()}
    close(read(alone), drawn(1, 5, **options), atol=1e-9, slots_exchanged=read(rolled))


def test_a_buffer_that_is_not_shared_evenly_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.buffer: 9 trajectories are not shared evenly by 2 processes; change it"):
        Replay(9, STEPS, (2,), batch=2, world=World(0, 2))
    Replay(9, STEPS, (2,), batch=2, world=World(0, 3))
