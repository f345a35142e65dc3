"""Truth: indexing by hand. Conditions are None, a tensor, or a dict of tensors, and a record is a tuple of such parts."""

import pytest
import torch
from twins import accepts

import scoreaction as sa
from scoreaction.networks.conditions import concatenate, map_conditions, take
from scoreaction.sampling.rollout import Steps
from scoreaction.types import Prediction

IDS = torch.tensor([5, 6, 7])
FEATURES = torch.arange(12.0).reshape(3, 2, 2)


def same(truth):
    def check(value):
        assert value.tolist() == truth

    return check


def test_take_and_concatenate():
    accepts(same([7, 5]), take(IDS, torch.tensor([2, 0])), unordered=IDS[:2])
    accepts(same([5, 6, 7, 6]), concatenate(IDS, IDS[1:2]), swapped=concatenate(IDS[1:2], IDS))
    assert take(FEATURES, torch.tensor([0, 2, 2])).shape == (3, 2, 2)


def steps():
    """Four of them, whose every part has the number of its row."""
    number = torch.arange(4.0)
    old = Prediction(number[:, None] + 10, number[:, None] + 20)
    return Steps(number[:, None], number, number, number[:, None], old, None, number, number, number, number)


def test_the_rows_of_a_record_are_those_of_all_its_parts():
    """Nested parts too, and a part that is not there stays so; a record is what it was."""
    chosen = take(steps(), torch.tensor([3, 1, 3]))
    assert isinstance(chosen, Steps)
    assert isinstance(chosen.old, Prediction)
    for name in ("x", "t", "s", "x_next", "prompt", "path", "step", "weight"):
        accepts(same([3, 1, 3]), getattr(chosen, name).flatten(), sorted=torch.tensor([1.0, 3.0, 3.0]), all=torch.arange(4.0))
    accepts(
        same([23, 21, 23]), chosen.old.eps.flatten(), other_part=chosen.old.x0.flatten(), unchosen=steps().old.eps.flatten()
    )
    assert chosen.pretrained is None


def test_a_slice_of_rows_is_a_view_and_numbers_are_a_copy():
    def shares_memory(part):
        assert part.data_ptr() == whole.x[1:].data_ptr()

    whole = steps()
    accepts(shares_memory, take(whole, slice(1, 3)).x, copy=take(whole, torch.tensor([1, 2])).x)
    accepts(same([11, 12]), take(whole, slice(1, 3)).old.x0.flatten(), one_more=take(whole, slice(1, 4)).old.x0.flatten())


class Conditional(torch.nn.Module):
    """Gives its condition back, whatever x."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = torch.nn.Parameter(torch.ones(())), []

    def forward(self, x, t, cond):
        self.calls.append(len(cond["ids"]))
        return self.w * (cond["ids"].to(x) + cond["features"].sum((1, 2)))[:, None].expand_as(x)


def test_a_row_is_evaluated_with_its_prompts_condition():
    """In one call or in parts: conditions of all prompts and their numbers say the same as a condition for each row."""
    net, prompt = Conditional(), torch.tensor([2, 0, 0, 1, 2, 1, 0])
    conditions, x, t = {"ids": IDS, "features": FEATURES}, torch.randn(7, 1), torch.tensor(0.5)
    model = sa.Model(net, process=sa.VP(), predicts="x0", shape=(1,), encode=lambda prompts: conditions)
    truth = (IDS + FEATURES.sum((1, 2)))[prompt].tolist()
    for limit, calls in ((None, [7]), (3, [3, 3, 1])):
        model.max_rows = limit
        net.calls.clear()
        with torch.no_grad():
            by_number = model.predict(x, t, conditions, prompt=prompt).x0[:, 0]
            by_row = model.predict(x, t, take(conditions, prompt)).x0[:, 0]
        assert net.calls == 2 * calls
        accepts(same(truth), by_number, of_other_rows=by_number.roll(1), by_place=by_number[torch.arange(7) % 3])
        accepts(same(truth), by_row, of_other_rows=by_row.roll(1))


def test_none_stays_none_and_a_dict_goes_part_by_part():
    rows = torch.tensor([1])
    for value in (take(None, rows), concatenate(None, None)):
        assert value is None
    both = {"ids": IDS, "features": FEATURES}
    taken = take(both, rows)
    assert torch.equal(taken["ids"], IDS[1:2])
    assert torch.equal(taken["features"], FEATURES[1:2])
    joined = concatenate(both, taken)
    assert joined["ids"].tolist() == [5, 6, 7, 6]
    assert map_conditions(lambda a, b: a - b, both, both)["features"].abs().max() == 0
    with pytest.raises(KeyError):
        concatenate(both, {"ids": IDS})
