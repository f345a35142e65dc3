"""Truth: the folder of one process that nothing interrupted; the twins are folders of other iterations, and of no resuming."""

import json
from pathlib import Path

import pytest
import torch
from many_ends import ended
from test_many_processes import launched
from twins import accepts, same

from scoreaction.training.checkpoints import load_tree

ENDS = Path(__file__).with_name("many_ends.py")


def together(count, folder, *plan):
    """What each of so many processes saw: its errors, and what it wrote."""
    launched(count, ENDS, folder / "seen.json", json.dumps([[name, str(path), *more] for name, path, *more in plan]))
    return json.loads((folder / "seen.json").read_text(encoding="utf-8"))


def lines(folder):
    """The metrics of a run but for its seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def numbers(tree, name=""):
    """All numbers of a tree by their names, as float64; seconds are those of the clock."""
    if isinstance(tree, dict | list):
        found = {}
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            found |= {} if key == "seconds" else numbers(value, f"{name}/{key}")
        return found
    if isinstance(tree, torch.Tensor | int | float):
        return {name: torch.as_tensor(tree).double().flatten()}
    return {}


def state(folder, iteration):
    return numbers(load_tree(folder / "checkpoints" / f"{iteration:06d}"))


def like(truth):
    """A check that numbers are these: each within 1e-5 of its size or of 1, but for one of a thousand."""

    def check(found):
        assert found.keys() == truth.keys()
        values, right = (torch.cat([*each.values()]) for each in (found, {name: truth[name] for name in found}))
        assert values.shape == right.shape
        apart = (values - right).abs() > 1e-5 * right.abs().clamp(min=1.0)
        assert float(apart.double().mean()) < 1e-3, [name for name in truth if not torch.equal(found[name], truth[name])][:9]
        generator = found.get("/generator"), truth.get("/generator")
        assert generator[0] is None or torch.equal(*generator)

    return check


@pytest.mark.long
@pytest.mark.parametrize("name", ["score_action", "sqdf, replay", "dpok, late rewards"])
def test_a_run_goes_on_with_two_processes_with_four_and_with_one(name, tmp_path):
    """Two iterations by each in turn: the state and every line are those of one process that went through."""
    whole, parts, settings = tmp_path / "whole", tmp_path / "parts", (None, False, 8)
    ended(name, whole, 8, *settings)
    ended(name, parts, 2, *settings)
    for count, until in ((2, 4), (4, 6)):
        assert [seen["errors"] for seen in together(count, tmp_path, (name, parts, until, *settings))] == [[None]] * count
        assert max(path.name for path in (parts / "checkpoints").iterdir()) == f"{until:06}"
    before, afresh = state(parts, 6), tmp_path / "afresh"
    ended(name, parts, 8, *settings)
    ended(name, afresh, 2, *settings)
    accepts(like(state(whole, 8)), state(parts, 8), before=before, begun_again=state(afresh, 2))
    found, truth = numbers(lines(parts)), numbers(lines(whole))
    accepts(like(truth), found, a_line_less=numbers(lines(parts)[:-1]), twice=numbers(lines(parts) * 2))


@pytest.mark.slow
def test_where_the_reward_fails_in_one_process_all_end_and_keep_what_was_learned(tmp_path):
    """The third iteration is taken back: scoring a batch, looking ahead after it, within an update; one process goes on."""
    cases = {"ddpo": [2, 0], "score_action": [2, 1], "refl": [2, 1], "draft, low variance": [2, 1], "sqdf": [2, 1]}
    plan = [(name, tmp_path / name, 6, fails) for name, fails in cases.items()]
    first, second = (seen["errors"] for seen in together(2, tmp_path, *plan))
    for name, (others, own) in zip(cases, zip(first, second, strict=True), strict=True):

        def reported(error):
            assert error[0] == "RewardError"
            assert "OSError: no answer" in error[1]

        accepts(reported, own, of_the_other=others, nothing=["", ""])
        assert others == ["OtherProcess", f"process 1 of 2: RewardError: {own[1]}"]
        if name == "sqdf":  # it has stored the batch when it asks: what was saved before stands
            assert not list((tmp_path / name / "checkpoints").glob("0*"))
            continue
        broken, whole = tmp_path / name, tmp_path / f"whole {name}"
        ended(name, whole, 2)
        accepts(like(state(whole, 2)), state(broken, 2), moved={k: v + 1 for k, v in state(whole, 2).items()})
        same([row["iteration"] for row in lines(broken)], [1, 2], with_the_third=[1, 2, 3])
        assert [path.name for path in (broken / "checkpoints").iterdir()] == ["000002"]
        for folder in (whole, broken):
            ended(name, folder, 4)
        accepts(like(state(whole, 4)), state(broken, 4), not_resumed=state(whole, 2))


@pytest.mark.slow
def test_where_an_awaited_reward_fails_in_one_process_the_batches_that_wait_are_kept(tmp_path):
    """The other process has its answers and the saved state none: resumed, the run asks again and is the uninterrupted one."""
    name, broken, whole = "dpok, late rewards", tmp_path / "broken", tmp_path / "whole"
    first, second = (seen["errors"] for seen in together(2, tmp_path, (name, broken, 6, [2, 0])))
    same([first[0][0], second[0][0]], ["OtherProcess", "RewardError"], waiting_for_ever=["RuntimeError", "RuntimeError"])
    assert "OSError: no answer" in second[0][1]
    same([path.name for path in (broken / "checkpoints").iterdir()], ["000002"], none=[])
    for folder in (whole, broken):
        ended(name, folder, 4)
    accepts(like(state(whole, 4)), state(broken, 4), not_resumed=state(whole, 2))


@pytest.mark.long
def test_four_processes_measure_two_samples_as_one_does(tmp_path):
    """Two of them hold none: of the samples, of the held-out ones, and of the certificate's groups."""
    name, runs = "ddpo, few samples", (tmp_path / "one", tmp_path / "four")
    ended(name, runs[0], 2, None, True, 2)
    assert [seen["errors"] for seen in together(4, tmp_path, (name, runs[1], 2, None, True, 2))] == [[None]] * 4
    one, four = (numbers(json.loads((folder / "summary.json").read_text(encoding="utf-8"))) for folder in runs)
    accepts(like(one), four, moved={key: value + 1 for key, value in four.items()})
    accepts(like(numbers(lines(runs[0]))), numbers(lines(runs[1])), a_line_less=numbers(lines(runs[1])[:-1]))


@pytest.mark.long
def test_the_folder_of_two_processes_is_that_of_one_and_one_of_them_writes_it(tmp_path):
    name = "ddpo, prompts"
    (tmp_path / "one").mkdir()
    ended(name, tmp_path / "one" / "run", 6, None, True)
    one, two = tmp_path / "one" / "run", tmp_path / "run"
    leads, other = together(2, tmp_path, (name, two, 6, None, True))
    assert leads["errors"] == other["errors"] == [None]

    def files(folder):
        return sorted(str(path.relative_to(folder)).partition(".tfevents")[0] for path in folder.rglob("*") if path.is_file())

    same(files(two), files(one), one_more=[*files(one), "rank"], one_less=files(one)[1:])
    assert {"metrics.jsonl", "summary.json"} < set(files(two))
    assert len(lines(two)) == 6
    accepts(like(numbers(lines(one))), numbers(lines(two)), each_twice=numbers([row for row in lines(two) for _ in "01"]))
    measured = [numbers(json.loads((folder / "summary.json").read_text(encoding="utf-8"))) for folder in (one, two)]
    accepts(like(measured[0]), measured[1], moved={key: value + 1 for key, value in measured[1].items()})

    def silent(written):
        assert written == []

    accepts(silent, other["written"], the_leading_one=leads["written"])
