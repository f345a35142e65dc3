"""Truth: what was put in comes out, to the bit; a crash leaves the old or the new, never a mixture."""

import fcntl

import pytest
import torch
from tuning import SCORE_ACTION, own_model, tune
from twins import accepts, same

import scoreaction as sa
from scoreaction.disk import write_whole
from scoreaction.errors import UserError
from scoreaction.training.checkpoints import load_tree, save_tree
from scoreaction.training.export import load_weights
from scoreaction.training.run_folder import RunFolder


def test_a_tree_comes_back_to_the_bit(tmp_path):
    tree = {
        "half": torch.randn(3, 2).bfloat16(),
        "nested": {"list": [1, 2.5, None, True, "x", torch.arange(3)], "empty": {}, "number": 0.1 + 0.2},
        "optimiser": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}},
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "bytes": torch.Generator().get_state(),
    }
    save_tree(tmp_path / "000001", tree)

    def check(found):
        assert found["nested"]["number"] == 0.1 + 0.2
        assert list(found["optimiser"]) == [0, 1]  # keys stay integers
        assert found["nested"]["list"][:5] == [1, 2.5, None, True, "x"]
        assert found["nested"]["empty"] == {}
        for key in ("half", "turned", "bytes"):
            assert found[key].dtype == tree[key].dtype
            assert torch.equal(found[key], tree[key])

    found = load_tree(tmp_path / "000001")
    accepts(check, found, transposed={**found, "turned": found["turned"].T}, rounded={**found, "half": found["half"].float()})


def test_two_names_for_one_tensor_are_kept(tmp_path):
    shared = torch.ones(2)
    save_tree(tmp_path / "a", {"policy": shared, "average": shared})
    found = load_tree(tmp_path / "a")
    same(found.keys(), {"policy", "average"}, one_of_them={"policy"})
    same(found["average"], shared, other=found["policy"] + 1)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    """Killed while writing, a run leaves a folder `.part`: the one before it counts, also when old ones are tidied away."""
    tuner = tune(sa.DDPO(), output=tmp_path)
    list(tuner)
    (tmp_path / "checkpoints" / "000005.part").mkdir()
    folder = RunFolder(tmp_path)

    def check(found):
        assert [path.name for path in found] == ["000002", "000004"]

    accepts(check, folder.saved_checkpoints(), with_the_part=sorted(folder.checkpoints.glob("[0-9]*")))
    assert folder.newest_checkpoint().name == "000004"
    again = tune(sa.DDPO(), iterations=8, output=tmp_path)
    assert again.resume()
    list(again)
    assert [path.name for path in folder.saved_checkpoints()] == ["000006", "000008"]


@pytest.mark.slow
def test_no_checkpoint_within_an_iteration(tmp_path):
    """Its state would be half of one iteration and half of another."""
    refused = []

    def reward(samples, conditions):
        refused.append(tuner.checkpoint())
        return samples[:, 0]

    tuner = tune(SCORE_ACTION, iterations=1, output=tmp_path, reward=reward)

    def check(answers):
        assert not any(answers)

    list(tuner)
    accepts(check, refused, between=[tuner.checkpoint()])
    assert [path.name for path in RunFolder(tmp_path).saved_checkpoints()] == ["000001"]


def test_an_iteration_that_failed_while_learning_is_not_saved(tmp_path, monkeypatch):
    calls = []
    tuner = tune(sa.DDPO(), output=tmp_path)
    updates = tuner.learner.updates

    def failing(experience, generator):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return updates(experience, generator)

    monkeypatch.setattr(tuner.learner, "updates", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(tuner)
    assert tuner.checkpoint() is False
    assert RunFolder(tmp_path).newest_checkpoint().name == "000002"


def test_an_iteration_whose_reward_failed_is_taken_back_and_what_was_learned_saved(tmp_path):
    """Truth: the run whose reward never failed."""
    calls = []

    def reward(samples, conditions):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the judge is gone")
        return samples[:, 0]

    tuner = tune(sa.DDPO(), output=tmp_path, reward=reward)
    with pytest.raises(RuntimeError, match="the judge is gone"):
        list(tuner)
    assert RunFolder(tmp_path).newest_checkpoint().name == "000003"
    again = tune(sa.DDPO(), output=tmp_path, reward=reward)
    again.resume()
    (last,) = list(again)
    *_, truth = list(tune(sa.DDPO(), reward=lambda samples, conditions: samples[:, 0]))

    def check(metrics):
        assert {**metrics, "seconds": 0} == {**truth, "seconds": 0}

    accepts(check, last, another={**truth, "reward_queries": truth["reward_queries"] + 1})


def test_resuming_where_nothing_is_starts_afresh(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics_path.write_text('{"iteration": 1}\n')
    tuner = tune(sa.DDPO(), output=tmp_path, iterations=1)
    assert not tuner.resume()
    list(tuner)
    log = folder.metrics_path.read_text()
    same(len(log.splitlines()), 1, going_on=len(('{"iteration": 1}\n' + log).splitlines()))
    assert tune(sa.DDPO()).resume() is False
    assert tune(sa.DDPO(), output=tmp_path, iterations=1).resume(), "what it wrote is there"


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics_path.write_text("a\nb\nc\nhalf a li")

    def check(text):
        assert text == "a\nb\n"

    before = folder.metrics_path.read_text()
    folder.cut_metrics(2)
    accepts(check, folder.metrics_path.read_text(), uncut=before)


def test_a_folder_is_one_run_at_a_time(tmp_path):
    """Truth: flock of the operating system, which another process would have."""
    (tmp_path / ".lock").write_text("999999999")  # left by a process that was killed
    with RunFolder(tmp_path).locked():
        with RunFolder(tmp_path).locked():  # a run's own loop within the command
            pass
        with (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match=r"output: .* in use by another process"), RunFolder(tmp_path).locked():
            pass
    with RunFolder(tmp_path).locked():
        pass


def test_a_text_is_written_whole(tmp_path):
    write_whole(tmp_path / "deep" / "file.json", "one")
    write_whole(tmp_path / "deep" / "file.json", "two")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file.json"]
    (tmp_path / "added.json").write_text("one")
    with (tmp_path / "added.json").open("a") as file:
        file.write("two")
    same((tmp_path / "deep" / "file.json").read_text(), "two", added=(tmp_path / "added.json").read_text())


def test_saved_weights_are_the_averaged_ones_and_load_back(tmp_path):
    tuner = tune(sa.DDPO(), lr=0.1)
    list(tuner)
    tuner.save(tmp_path / "out")
    other = own_model()
    load_weights(other, tmp_path / "out")
    with tuner.model.averaged():
        averaged = tuner.model.net.body[0].weight.clone()

    def check(weight):
        assert torch.equal(weight, averaged)

    accepts(check, other.net.body[0].weight, last=tuner.model.net.body[0].weight, base=own_model().net.body[0].weight)
    assert torch.equal(sa.sample(other, n=8, steps=4), sa.sample(tuner.model, n=8, steps=4))
    with pytest.raises(ValueError, match="give the folder that save wrote"):
        load_weights(other, tmp_path)
    stranger = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    with pytest.raises(ValueError, match="belongs to another network"):
        load_weights(stranger, tmp_path / "out")


@pytest.mark.parametrize("file", ["tensors.safetensors", "tree.json"])
@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_a_damaged_checkpoint_is_one_line_that_names_it(file, how, tmp_path):
    """Twin: whole, it is read."""
    whole = tmp_path / "000001"
    save_tree(whole, {"a": torch.ones(3), "b": 1})
    assert load_tree(whole)["b"] == 1
    broken = whole / file
    match how:
        case "cut":
            broken.write_bytes(broken.read_bytes()[:5])
        case "gone":
            broken.unlink()
        case _:
            broken.write_text("[1]")
    with pytest.raises(UserError, match=r"000001: cannot be read: damaged.*the one before it, or train again"):
        load_tree(whole)
