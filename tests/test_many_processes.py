"""Truth: the run of one process; the twins are worlds in which one message is not sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from many import CASES, TEN, TWINS, trained
from twins import accepts, same

from scoreaction.catalog import files

MANY = Path(__file__).with_name("many.py")


def launched(count, script, *arguments, status=0):
    """What so many processes print, which meet on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done.stdout


def together(count, folder, names):
    """The runs of these names by so many processes."""
    launched(count, MANY, folder / "runs.json", *names)
    return json.loads((folder / "runs.json").read_text(encoding="utf-8"))


def apart(run, truth):
    """The largest distance of a metric, and how many of the weights are 1e-5 apart."""
    assert [row.keys() for row in run["metrics"]] == [row.keys() for row in truth["metrics"]]
    pairs = [(row[key], right[key]) for row, right in zip(run["metrics"], truth["metrics"], strict=True) for key in right]
    metrics = max(abs(value - right) / max(1.0, abs(right)) for value, right in pairs)
    weights = (torch.tensor(run["weights"]) - torch.tensor(truth["weights"])).abs() > 1e-5
    return metrics, float(weights.double().mean())


def alike(name, truth):
    """A check that a run is the one of this name by one process."""

    def check(run):
        metrics, weights = apart(run, truth)
        assert metrics < 1e-5, f"{name}: metrics are {metrics:.2g} apart"
        # Adam makes a step of the whole rate of a gradient that is rounding, so that a few weights may be anywhere
        assert weights <= 1e-3, f"{name}: {weights:.2%} of the weights are apart"

    return check


def moved(run, metric=0.0, share=0.0):
    """The run with one metric elsewhere, or a share of its weights."""
    *rows, last = run["metrics"]
    weights = torch.tensor(run["weights"])
    weights[: int(share * len(weights))] += 2e-5
    last = {**last, "reward_mean": last["reward_mean"] + metric * max(1.0, abs(last["reward_mean"]))}
    return {"metrics": [*rows, last], "weights": weights.tolist()}


def test_every_algorithm_on_the_shelf_is_among_the_cases():
    """One that appears there is trained by many processes the same day."""
    names = {name.partition(",")[0] for name in CASES}
    same(sorted(files("algorithm").keys() - names), [], without_ddpo=sorted(files("algorithm").keys() - (names - {"ddpo"})))


FIRST = list({name.partition(",")[0]: name for name in reversed(CASES)}.values())
"""A case of every algorithm, of a weighted sum, and of an oracle that is asked in rounds."""
FAULTY, GROWING = "ddpo, prompts", "adjoint_matching"
"""The case that is run with faults too, and the algorithm whose adjoint states grow."""
QUICK = [*(f"{TEN}: {name}" for name in FIRST), "ddpo, groups and lora", "sqdf, replay", FAULTY]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, marks=pytest.mark.slow, id="of_every_algorithm"),
        pytest.param([name for name in CASES if name not in {*FIRST, *QUICK}], marks=pytest.mark.long, id="others"),
    ],
)
def test_two_processes_train_as_one(names, tmp_path):
    """Every algorithm for ten iterations. Of one case each twin is a run in whose world a message is left out."""
    faults = [f"{twin}: {FAULTY}" for twin in TWINS] if FAULTY in names else []
    runs = together(2, tmp_path, [*names, *faults])
    for name in names:
        truth = trained(name)
        if name.endswith(GROWING):  # and rounding with them: their gradient's norm alone is 1e-4 apart
            for row in [*runs[name]["metrics"], *truth["metrics"]]:
                row.pop("grad_norm")
        wrong = {fault: runs[fault] for fault in faults if fault.endswith(f": {name}")}
        accepts(
            alike(name, truth), runs[name], one_metric=moved(truth, metric=3e-5), of_weights=moved(truth, share=0.01), **wrong
        )


@pytest.mark.long
def test_four_processes_train_as_one(tmp_path):
    names = ["score_action, prompts in parts", "ddpo, groups and lora", "sqdf, replay", "online"]
    runs = together(4, tmp_path, names)
    for name, run in runs.items():
        truth = trained(name)
        accepts(alike(name, truth), run, one_metric=moved(truth, metric=3e-5), of_weights=moved(truth, share=0.01))


BITTEN = ["ddpo, prompts", "sqdf, replay"]
"""Cases of which every fault moves one or both."""


@pytest.mark.long
def test_no_message_can_be_left_out(tmp_path):
    """In worlds with a fault two processes learn something else: by far more than rounding, in nearly all weights."""
    runs = together(2, tmp_path, [*BITTEN, *(f"{twin}: {name}" for twin in TWINS for name in BITTEN)])
    truth = {name: trained(name) for name in BITTEN}

    def right(prefix):
        for name in BITTEN:
            alike(name, truth[name])(runs[prefix + name])

    accepts(right, "", **{twin: f"{twin}: " for twin in TWINS})
    for twin in TWINS:
        assert max(apart(runs[f"{twin}: {name}"], truth[name])[1] for name in BITTEN) > 0.9, twin
