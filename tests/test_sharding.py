"""Truth: the run of which every process has all, which equals that of one process; and what a process must hold of a tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch
from safetensors.torch import load_file
from torch import nn
from twins import accepts, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.networks.sharding import blocks, mesh_of
from scoreaction.sampling.steer import check_steered
from scoreaction.training.checkpoints import load_tree
from scoreaction.training.checks import check_shard
from scoreaction.training.collector import _begun
from scoreaction.training.evaluation import check_certificate
from scoreaction.world import Stranded, World


def launched(folder, what, *names, processes=2):
    """What so many processes report."""
    source = str(Path(sa.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [sharded.__file__, str(folder), what, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{what}.json").read_text())


def alike(right):
    """A check that a run has the metrics and weights of this one, within 1e-5."""

    def check(run):
        assert len(run["metrics"]) == len(right["metrics"])
        for one, other in zip(right["metrics"], run["metrics"], strict=True):
            assert one.keys() == other.keys()
            apart = {key: (one[key], other[key]) for key in one if abs(one[key] - other[key]) > 1e-5 * max(1, abs(one[key]))}
            assert not apart, apart
        assert (torch.tensor(run["weights"]) - torch.tensor(right["weights"])).abs().max() <= 1e-5

    return check


def counted(run, again):
    """The run with so many evaluations more in each iteration."""
    metrics = [{**row, "model_evaluations": row["model_evaluations"] + row["iteration"] * again} for row in run["metrics"]]
    return {**run, "metrics": metrics}


def rest(run, begin):
    return {**run, "metrics": run["metrics"][begin:]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, launched(folder, "write", *sharded.QUICK)


@pytest.mark.long
def test_shared_networks_train_as_whole_ones(written):
    _, report = written
    for name, run in report["runs"].items():
        twins = {"summed": report["summed"]} if name == "ddpo" else {}
        accepts(alike(run["whole"]), run["sharded"], untrained={**run["sharded"], "weights": [0.0]}, **twins)
    same(report["names"]["sharded"], report["names"]["whole"], none=[])
    accepts(half_of(report["held"]["whole"]), report["held"]["sharded"], whole=report["held"]["whole"])


def half_of(all_of_them):
    def check(held):
        assert 0.45 < held / all_of_them < 0.55

    return check


@pytest.mark.long
def test_evaluation_sees_the_averaged_weights(written):
    _, report = written
    right = report["outputs"]["whole"]

    def check(found):
        for kind, output in right.items():
            assert (torch.tensor(found[kind]) - torch.tensor(output)).abs().max() < 1e-6, kind

    stale = {**right, "again": right["averaged"]}
    accepts(check, report["outputs"]["sharded"], data_swapped=report["outputs"]["swapped"], stale=stale)
    close_to(report["summaries"]["whole"], report["summaries"]["sharded"])


def close_to(right, found):
    assert right.keys() == found.keys()
    assert all(right[key] == pytest.approx(found[key], rel=1e-5, abs=1e-5) for key in right)


def tensors(tree, key=""):
    """The tensors of a tree by their paths."""
    if isinstance(tree, torch.Tensor):
        return {key: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: value for name, inner in items for path, value in tensors(inner, f"{key}/{name}").items()}


@pytest.mark.long
def test_saved_models_and_states_are_those_of_whole_networks(written):
    folder, _ = written
    names = ["weights.safetensors", "network.safetensors", "reference.safetensors"]

    def check(kind):
        for name in names:
            assert (folder / kind / name).is_file(), name
        files = [(load_file(folder / "whole" / name), load_file(folder / kind / name)) for name in names]
        files.append((tensors(load_tree(folder / "whole/state")), tensors(load_tree(folder / kind / "state"))))
        for right, found in files:
            assert right.keys() == found.keys()
            for key, value in right.items():
                assert value.shape == found[key].shape, key
                assert (value.double() - found[key].double()).abs().max() <= 1e-6, key

    accepts(check, "sharded", parts="parts")
    same((folder / "sharded/model.json").read_text(), (folder / "whole/model.json").read_text(), nothing="")


@pytest.mark.long
def test_a_run_goes_on_with_shared_networks_or_alone(written):
    folder, report = written
    uninterrupted = report["runs"]["ddpo"]["whole"]
    accepts(alike(rest(uninterrupted, 2)), report["resumed"], afresh=uninterrupted)
    alone = sharded.resumed(folder / "run of sharded", sharded.ITERATIONS, shard=False)
    accepts(alike(rest(uninterrupted, 2)), alone, afresh=uninterrupted)
    again = launched(folder, "resume", "6")
    longer = sharded.trained(sharded.CASES["ddpo"].tuner(shard=False, iterations=6))
    accepts(alike(rest(longer, 4)), again, alone=alone)


@pytest.mark.long
def test_processes_with_other_numbers_of_rows_call_shared_networks_alike(tmp_path):
    names = [name for name in sharded.CASES if name not in sharded.QUICK]
    for name, run in launched(tmp_path, "compare", *names).items():
        again = sharded.CASES[name].again
        uncounted = {"uncounted": run["whole"]} if again else {}
        twins = {"untrained": {**run["sharded"], "weights": [0.0]}, **uncounted}
        accepts(alike(counted(run["whole"], again)), run["sharded"], **twins)


@pytest.mark.long
def test_every_node_has_the_network(tmp_path):
    for run in launched(tmp_path, "nodes", "ddpo", "score_action, uneven", processes=4).values():
        accepts(alike(run["whole"]), run["sharded"], untrained={**run["sharded"], "weights": [0.0]})


def test_processes_without_the_others_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(ValueError, match=r"train\.shard: .*of 4 this one has 1; start as many on each node, at least 2"):
        mesh_of(World(0, 4), "cpu")


def test_a_process_that_fails_while_others_wait_for_its_network_sends_nothing():
    """Truth: a world of two where there is no group, in which every message fails."""

    def fail():
        raise MemoryError("full")

    assert World(1, 2).together(lambda: 5, sends=True) == 5
    with pytest.raises(Stranded, match="process 1 of 2: MemoryError: full"):
        World(1, 2).together(fail, sends=True)


def test_a_reward_that_fails_at_its_beginning_says_so_when_it_is_asked():
    def fail():
        raise ValueError("no such scorer")

    scores = _begun(fail)
    with pytest.raises(ValueError, match="no such scorer"):
        scores()
    same(_begun(lambda: lambda: torch.ones(2))(), torch.ones(2), others=torch.zeros(2))


class Named(nn.Module):
    """A network that names its blocks."""

    _no_split_modules = ("Linear",)

    def __init__(self):
        super().__init__()
        self.first, self.silent, self.rest = nn.Linear(2, 2), nn.SiLU(), nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(2, 2))


def test_blocks_are_named_or_items_of_the_outermost_lists():
    kinds = [type(block).__name__ for block in blocks(Named())]
    same(kinds, ["Linear", "Linear"], of_lists=["Linear", "Conv1d"])
    deep = nn.ModuleDict({"down": nn.ModuleList([nn.Sequential(nn.Linear(1, 1)), nn.SiLU()]), "up": nn.Linear(1, 1)})
    same(blocks(deep), [deep["up"], deep["down"][0][0]], outer_first=[deep["down"][0][0], deep["up"]])


@pytest.mark.parametrize(
    ("size", "settings", "message"),
    [
        (1, {}, r"train\.shard: there is one process.*--processes N"),
        (2, {"optimizer": "adam8bit"}, r"train\.optimizer: adam8bit .*take adam"),
        (2, {"precision": "fp16"}, r"train\.precision: fp16 .*take bf16"),
    ],
)
def test_what_cannot_be_shared_is_refused(size, settings, message):
    check_shard(sa.Train(shard=True), World(0, 2))
    with pytest.raises(ValueError, match=message):
        check_shard(sa.Train(shard=True, **settings), World(0, size))


@pytest.mark.parametrize("check", [check_steered, check_certificate])
def test_steering_of_a_shared_network_is_refused_before_training(check):
    """A run asks both when it is made."""
    model = sharded.CASES["ddpo"].tuner(shard=False).model
    check(model)
    model.sharded = True
    with pytest.raises(ValueError, match=r"steering does not share a network; set .* to false"):
        check(model)


def test_a_run_of_one_process_says_how_to_start_more():
    with pytest.raises(ValueError, match=r"train\.shard: there is one process"):
        sharded.CASES["ddpo"].tuner(shard=True)


@pytest.mark.slow
def test_one_process_reads_and_measures_what_several_trained(tmp_path):
    """Truth: the run of a recipe that says nothing of it; twin: training it alone, which is refused."""
    command = ["mixture", "algorithm.name=ddpo", "train={iterations: 1, batch: 8, device: cpu}", "evaluation={n: 8, steps: 3}"]
    assert main(["train", *command, "--output", str(tmp_path / "run")]) == 0
    for recipe in (tmp_path / "run").rglob("recipe.yaml"):
        recipe.write_text(recipe.read_text().replace("shard: false", "shard: true"))
    assert main(["evaluate", str(tmp_path / "run"), "--n", "8"]) == 0
    drawn = sa.sample(sa.load(tmp_path / "run"), n=3, steps=3)
    same(drawn, sa.sample(sa.load(tmp_path / "run"), n=3, steps=3), base=sa.sample(sa.load(tmp_path / "run"), n=3, steps=4))
    assert main(["train", *command, "train.shard=true", "--output", str(tmp_path / "other")]) == 2
