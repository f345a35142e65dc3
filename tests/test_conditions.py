"""Truth: indexing by hand. Conditions are None, a tensor, or a dict of tensors, and all three go the same way."""

import pytest
import torch
from twins import accepts

from scoreaction.networks.conditions import concatenate, map_conditions, repeat, take

IDS = torch.tensor([5, 6, 7])
FEATURES = torch.arange(12.0).reshape(3, 2, 2)


def same(truth):
    def check(value):
        assert value.tolist() == truth

    return check


def test_take_repeat_and_concatenate():
    accepts(same([7, 5]), take(IDS, torch.tensor([2, 0])), unordered=IDS[:2])
    accepts(same([5, 6, 7, 5, 6, 7]), repeat(IDS, 2), batch_slowest=IDS.repeat_interleave(2))
    accepts(same([5, 6, 7, 6]), concatenate(IDS, IDS[1:2]), swapped=concatenate(IDS[1:2], IDS))
    assert torch.equal(repeat(FEATURES, 2)[3:], FEATURES)
    assert repeat(FEATURES, 3).shape == (9, 2, 2)


def test_none_stays_none_and_a_dict_goes_part_by_part():
    rows = torch.tensor([1])
    for value in (take(None, rows), repeat(None, 3), concatenate(None, None)):
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
