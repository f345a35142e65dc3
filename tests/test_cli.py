"""The command line: exit codes, one line for every fault, run folders, resuming, interruption, comparing."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twins import accepts, close, same

from scoreaction import catalog
from scoreaction.cli import main
from scoreaction.commands.compare import grouped, planned
from scoreaction.commands.evaluate import open_run
from scoreaction.commands.listing import listed
from scoreaction.commands.signals import Signals
from scoreaction.commands.streams import Unread
from scoreaction.commands.train import Stopper
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.recipes.recipe import load_recipe, optimum_beta
from scoreaction.sampling.draw import draw, spread_prompts
from scoreaction.training.finetuner import Finetuner
from scoreaction.training.run_folder import read_json_lines

TINY = ["algorithm.name=ddpo", "train.batch=8", "evaluation.n=16", "evaluation.steps=3", "sampler.steps=4", "model.hidden=8"]
CONTRACT = {
    "iteration", "reward_mean", "reward_std", "kl_nats", "kl_chain_nats", "grad_norm", "reward_queries", "model_evaluations",
    "seconds",
}  # fmt: skip


def train(folder: Path, *more: str, iterations: int = 4) -> int:
    return main(["train", "mixture", *TINY, f"train.iterations={iterations}", "--output", str(folder), *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with this code and gives the one line it says on stderr."""

    def command(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        return said.strip()

    return command


# Running


def test_a_run_leaves_what_the_contract_names(run: Path) -> None:
    records = read_json_lines(run / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert set(records[0]) >= CONTRACT
    summary = json.loads((run / "summary.json").read_text())
    assert {"reward_base", "reward_tuned", "kl_nats", "diversity_base", "diversity_tuned", "seconds"} <= set(summary)
    longer = load_recipe("mixture", [*TINY, "train.iterations=5"])
    same(load_recipe(str(run / "recipe.yaml")), load_recipe("mixture", [*TINY, "train.iterations=4"]), other_length=longer)


@pytest.mark.slow
def test_the_module_and_its_exit_code_from_a_shell(tmp_path: Path) -> None:
    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "scoreaction", *arguments], cwd=tmp_path, text=True, capture_output=True, check=False
        )

    wrong = shell("train", "mixture", "algorithm.bata=" + "9" * 200)
    assert (wrong.returncode, wrong.stderr) == (2, "algorithm.bata: unknown key; did you mean beta?\n")
    assert list(tmp_path.iterdir()) == [], "a refused run writes nothing"
    debug = shell("train", "mixture", "algorithm.bata=1", "--debug")

    def one_line(run: subprocess.CompletedProcess[str]) -> None:
        assert (run.returncode, run.stderr.count("\n")) == (2, 1)
        assert "Traceback" not in run.stderr

    accepts(one_line, wrong, with_debug=debug, right=shell("list", "recipes"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing command"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "mixture", "--outptu", "x"], "No such option"),
        (["train", "mixture", "--resume"], "--resume: say which run with --output DIR"),
        (["train", "mixtrue"], "mixtrue: no such recipe; did you mean mixture?"),
        (["train", "mixture", "algorithm.beta=-1"], "algorithm.beta: must be greater than 0"),
        (["train", "mixture", "reward.direction=[1]"], "reward.direction: must have 2 numbers"),
        (["train", "mixture", "early_stop={metric: kl_natz}"], "early_stop.metric: no metric 'kl_natz'; choose from"),
        (["train", "mixture", "--output", "/dev/null"], "--output: /dev/null is a file"),
        (["train", "mixture", "--output", "/dev/null/x"], "--output: /dev/null/x cannot be written to (Not a directory)"),
        (["train", "mixture", "--output", ""], "Invalid value for '--output': is empty; name a folder"),
        (["train", "mixture", "--output", "a" * 300], "a" * 300 + ": is too long a name; choose a shorter one"),
        (["train", "a" * 300], "a" * 300 + ": no such recipe"),
        (["train", "mixture", "train.device=meta"], "train.device: 'meta' cannot be used here"),
        (["train", "mixture", "algorithm.name=ddpo", "sampler.steps=1"], "sampler.steps: no step has a density, which ddpo"),
        (["train", "digits", "prompts=[x]"], "prompts: prompt 'x' names no digit"),
        (["distill", "mixture", "--output", "/dev/null/x"], "--output: /dev/null/x cannot be written to"),
        (["train", "mixture", "train.seed=99999999999999999999"], "train.seed: must be less than 4294967296"),
        (["train", "mixture", "train.seed=4294967301"], "train.seed: must be less than 4294967296"),  # it would be seed 5
        (["train", "mixture", "evaluation.solver=heun"], "evaluation.solver: heun takes eta zero and eta is 1.0"),
        (["sample", "nowhere"], "nowhere: not a run folder"),
        (["evaluate", "nowhere"], "nowhere: not a run folder"),
        (["report", "nowhere"], "nowhere: neither a run nor a comparison"),
        (["list", "algoritms", "ddpo"], "list: there is no list of 'algoritms'; did you mean algorithms?"),
        (["list", "algoritms"], "list: there is no list of 'algoritms'; did you mean algorithms?"),
        (["compare", "mixture"], "Missing option '--algorithms'"),
        (["compare", "mixture", "--algorithms", "ddop"], "--algorithms: unknown algorithm 'ddop'; did you mean ddpo?"),
        (
            ["compare", "mixture", "reward.name=jpeg", "--algorithms", "ddpo,draft"],
            "reward: jpeg does not fit the model gaussian_mixture: expected floating images",
        ),
        (
            ["compare", "mixture", "--algorithms", "sqdf,ddpo", "sampler.steps=1"],
            "sampler.steps: no step has a density, which ddpo",
        ),
        (["compare", "mixture", "--algorithms", ","], "--algorithms: name at least one"),
        (["compare", "mixture", "--algorithms", "ddpo", "--seeds", "a"], "--seeds: must be whole numbers"),
        (["compare", "mixture", "--algorithms", "ddpo", "--sweep", "train.lr= "], "--sweep: train.lr has no value"),
        (["compare", "mixture", "--algorithms", "ddpo", "--output", "a" * 300], "a" * 300 + ": is too long a name"),
        (["report", "a" * 300], "a" * 300 + "/comparison.json: is too long a name"),
        (["compare", "mixture", "--algorithms", "ddpo", "--sweep", "beta"], "--sweep: must be key=value,value"),
        (
            ["compare", "mixture", "--algorithms", "ddpo", "--sweep", "train.seed=1,2"],
            "--sweep: train.seed has an option of its own",
        ),
        (["compare", "mixture", "train.seed=3", "--algorithms", "ddpo"], "train.seed: has an option of its own: --seeds"),
        (["compare", "mixture", "algorithm={name: dpok, beta: 1}", "--algorithms", "dpok"], "algorithm: has an option of its"),
        (
            ["compare", "mixture", "--algorithms", "dpok", "--sweep", "algorithm.beta=0.1,0.10"],
            "--sweep: algorithm.beta has a value",
        ),
        (["compare", "mixture", "--algorithms", "ddpo", "--sweep", "algorithm.beta=1"], "algorithm.beta: no setting of ddpo"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    arguments: list[str], said: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(*arguments).startswith(said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--n", "x"], "Invalid value for '--n'"),
        (["sample", "--output", "/dev/null/x"], "--output: /dev/null/x cannot be written to (Not a directory)"),
        (["sample", "--n", "0"], "Invalid value for '--n'"),
        (["sample", "--solver", "heum"], "--solver: unknown solver 'heum'; did you mean heun?"),
        (["sample", "--solver", "heun", "--eta", "1"], "--solver: heun takes only eta 0"),
        (["sample", "--eta", "2"], "--eta: must be between 0 and 1"),
        (["sample", "--prompt", "cat"], "--prompt: the model gaussian_mixture takes no prompts"),
        (["evaluate", "--steps", "ten"], "--steps: must be whole numbers"),
        (["evaluate", "--steps", "0"], "--steps: must be at least 1"),
        (["evaluate", "--solver", "ddim,dimm"], "--solver: unknown solver 'dimm'; did you mean ddim?"),
        (["evaluate", "--eta", "-1"], "--eta: must be between 0 and 1"),
        (["evaluate", "--solver", "heun", "--eta", "1"], "--solver: nothing to measure"),
    ],
)
def test_wrong_options_on_a_run(arguments: list[str], said: str, run: Path, refused: Callable[..., str]) -> None:
    assert refused(arguments[0], run, *arguments[1:]).startswith(said)


def test_a_failing_reward_is_code_1(tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text(
        "from pydantic import BaseModel\nclass Config(BaseModel):\n    pass\n"
        "def build(config): return lambda samples, prompts: samples.sum(1) if len(samples) < 8 else 1 / 0\n"
    )
    (tmp_path / "failing").mkdir()
    (tmp_path / "failing.py").rename(tmp_path / "failing" / "now.py")
    monkeypatch.chdir(tmp_path)
    said = refused("train", "mixture", *TINY, "reward={name: failing.now}", "--output", tmp_path / "out", code=1)
    assert "ZeroDivisionError" in said
    assert not (tmp_path / "out" / "summary.json").exists()


# Resuming


def weights(folder: Path) -> bytes:
    return (folder / "model" / "weights.safetensors").read_bytes()


class Stop:
    """Raises or signals after some iterations of any run, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, act: Callable[[], None]) -> None:
        iterate = Finetuner._iterate

        def counted(tuner: Finetuner) -> dict[str, Any]:
            metrics = iterate(tuner)
            if tuner.iteration == after:
                monkeypatch.setattr(Finetuner, "_iterate", iterate)
                act()
            return metrics

        monkeypatch.setattr(Finetuner, "_iterate", counted)


def _raise() -> None:
    raise KeyboardInterrupt


def test_an_existing_run_is_refused_and_a_finished_one_is_left_alone(run: Path, refused: Callable[..., str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = ["train", "mixture", *TINY, "train.iterations=4", "--output", run]
    assert refused(*command).startswith(f"--output: {run} already holds a run")
    assert train(run, "--resume") == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    said = refused("train", "mixture", *TINY, "train.iterations=4", "train.lr=0.5", "--output", run, "--resume")
    assert said.startswith("train.lr: this run has 0.001, not 0.5")
    assert refused("train", "mixture", *TINY, "train.iterations=3", "--output", run, "--resume").startswith("train.iterations")


@pytest.mark.slow
def test_resume_starts_afresh_where_there_is_nothing(run: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "new", "--resume") == 0
    assert train(tmp_path / "other", "train.seed=5") == 0
    same(weights(tmp_path / "new"), weights(run), other_seed=weights(tmp_path / "other"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_stops_between_iterations_and_resuming_equals_the_uninterrupted_run(
    number: signal.Signals, run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    said = refused("train", "mixture", *TINY, "train.iterations=4", "--output", folder, code=130)
    assert "stopped after iteration 2, state saved; go on with: scoreaction train" in said
    assert signal.getsignal(number) == before
    assert not (folder / "summary.json").exists()
    (folder / ".lock").write_text("999999999")  # of a process that is dead
    assert train(folder, "--resume") == 0
    assert weights(folder) == weights(run)
    assert len(read_json_lines(folder / "metrics.jsonl")) == 4


def test_a_second_hangup_is_no_haste_and_an_ignored_one_none() -> None:
    """A lost terminal hangs up twice, and nohup lets it be ignored; the twin, a second SIGTERM, stops at once."""

    def twice(number: signal.Signals) -> bool:
        with Signals() as signals:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            return signals.requested

    assert twice(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        twice(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not twice(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stream_without_a_reader_takes_all_that_is_written() -> None:
    """The twin is the stream of Python itself, which a closed pipe makes fail."""

    def write_to(kind: type[io.FileIO]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        with kind(writer, "w") as stream:
            assert stream.write(b"four") == 4

    write_to(Unread)
    with pytest.raises(BrokenPipeError):
        write_to(io.FileIO)


@pytest.mark.slow
def test_a_run_goes_on_when_its_reader_goes_away(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "scoreaction",
        "train",
        "mixture",
        *TINY,
        "train.iterations=4",
        "--output",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert (process.wait(), process.stderr.read() if process.stderr else b"") == (0, b"")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_run_in_which_no_iteration_learned_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All rewards are equal: all is written, and the exit code is 1. Twin: a run in which they differ."""

    def ended(name: str, direction: str) -> tuple[int, str]:
        capsys.readouterr()
        code = train(tmp_path / name, f"reward={{name: linear, direction: {direction}}}", "train.iterations=2")
        assert (tmp_path / name / "summary.json").exists()
        return code, capsys.readouterr().err

    def fails(end: tuple[int, str]) -> None:
        assert end[0] == 1
        assert "flat: no iteration learned anything: in each all rewards were equal, or fp16 overflowed" in end[1]

    accepts(fails, ended("flat", "[0.0, 0.0]"), learned=ended("steep", "[1.0, 0.5]"))


@pytest.mark.slow
def test_two_equal_runs_are_no_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that has no effect: how often state is saved. Twin: one that has, the learning rate."""

    def ended(name: str, sweep: str) -> tuple[int, str]:
        command = ["compare", "mixture", *TINY[1:], "train.iterations=2", "--algorithms", "ddpo", "--sweep", sweep]
        code = main([*command, "--output", str(tmp_path / name)])
        assert (tmp_path / name / "comparison.json").exists()
        return code, capsys.readouterr().err

    def fails(end: tuple[int, str]) -> None:
        assert end[0] == 1
        both = "ddpo/train.checkpoint_every=1/seed0 and ddpo/train.checkpoint_every=2/seed0"
        assert end[1].endswith(
            f"{both}: their tuned models are equal to the digit; what tells these runs apart has no effect\n"
        )

    accepts(fails, ended("equal", "train.checkpoint_every=1,2"), other=ended("other", "train.lr=0.001,0.01"))


def test_an_interrupt_within_an_iteration_goes_back_to_the_checkpoint(
    run: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Stop(monkeypatch, 2, _raise)
    folder = tmp_path / "run"
    command = ["train", "mixture", *TINY, "train.iterations=4", "train.checkpoint_every=1", "--output", folder]
    assert "the state after iteration 2 is saved" in refused(*command, code=130)
    assert main([str(part) for part in command] + ["--resume"]) == 0
    assert weights(folder) == weights(run)


def test_a_longer_run_extends_a_finished_one(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, iterations=2) == 0
    assert train(folder, "--resume", iterations=3) == 0
    iterations = [record["iteration"] for record in read_json_lines(folder / "metrics.jsonl")]
    same(iterations, [1, 2, 3], left_alone=[1, 2], begun_again=[1, 2, 1, 2, 3])
    assert json.loads((folder / "summary.json").read_text())["iterations"] == 3


def test_a_run_held_by_a_living_process_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    command = ["train", "mixture", *TINY, "train.iterations=1", "--output", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert refused(*command).startswith(f"--output: {tmp_path / 'run'} is in use by another process")
    assert main([str(part) for part in command]) == 0


def test_early_stop_waits_for_its_patience() -> None:
    def stops(rewards: list[float], patience: int = 2) -> list[bool]:
        stopper = Stopper(load_recipe("mixture", [f"early_stop={{metric: reward_mean, patience: {patience}}}"]).early_stop)
        return [stopper({"reward_mean": reward}) for reward in rewards]

    same(stops([1, 2, 2, 2]), [False, False, False, True], less=stops([1, 2, 2, 2], 1), more=stops([1, 2, 2, 2], 3))
    same(stops([1, 2, 2, 3]), [False] * 4, less=stops([1, 2, 2, 3], 1))


def test_early_stop_waits_where_diversity_is_not_known() -> None:
    stopper = Stopper(load_recipe("mixture", ["early_stop={metric: diversity, patience: 2}"]).early_stop)
    seen = [{}, {"diversity": 2.0}, {}, {"diversity": 1.0}, {}, {"diversity": 1.0}]
    found = [stopper(metrics) for metrics in seen]
    same(found, [False] * 5 + [True], where_it_is_not_known=[False] * 4 + [True] * 2, never=[False] * 6)


@pytest.mark.slow
def test_early_stop_ends_a_run_for_good(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "corrected"
    command = ["train", "mixture", *TINY, "train.iterations=1", "--output", folder]
    assert refused(*command, "early_stop={metric: reward_meen}").startswith("early_stop.metric: no metric 'reward_meen'")
    assert not folder.exists()
    assert main([*map(str, command), "early_stop={metric: reward_mean}"]) == 0
    level = "evaluation.held_out=[{name: linear, direction: [0.0, 0.0]}]"
    falling = [level, "early_stop={metric: held_out.linear, patience: 2}"]
    assert train(tmp_path / "flat", *falling) == 0
    assert len(read_json_lines(tmp_path / "flat" / "metrics.jsonl")) == 3
    assert train(tmp_path / "flat", *falling, "--resume") == 0
    assert len(read_json_lines(tmp_path / "flat" / "metrics.jsonl")) == 3


# What is done with a run


@pytest.mark.slow
def test_sample_draws_tuned_and_base(run: Path, tmp_path: Path) -> None:
    def draw(*more: str) -> np.ndarray:
        assert main(["sample", str(run), "--n", "12", "--steps", "4", "--output", str(tmp_path), *more]) == 0
        assert (tmp_path / "samples.png").stat().st_size > 1000
        with np.load(tmp_path / "samples.npz") as arrays:
            assert set(arrays) == {"samples"}
            return arrays["samples"]

    first = draw()
    assert first.shape == (12, 2)
    close(draw(), first, other_seed=draw("--seed", "1"), base=draw("--base"), other_solver=draw("--solver", "heun"))


def test_evaluate_measures_the_grid_and_leaves_out_what_cannot_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--steps", "2,3", "--solver", "ddim,heun", "--eta", "0,1"]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    cells = [(row["solver"], row["eta"], row["steps"]) for row in found["grid"]]
    whole = [(solver, eta, steps) for solver in ("ddim", "heun") for eta in (0, 1) for steps in (2, 3)]
    same(cells, [cell for cell in whole if cell[:2] != ("heun", 1)], with_what_cannot_be=whole)
    assert [(note["solver"], note["eta"]) for note in found["skipped"]] == [("heun", 1)]
    rewards = {row["reward"] for row in found["grid"]}
    assert len(rewards) == len(cells), "each cell was measured by itself"
    assert {"reward", "kl_nats", "kl_chain_nats", "diversity"} <= set(found["grid"][0])
    assert "left out: heun takes only eta 0" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_runs_what_is_missing_and_gives_standard_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "comparison"
    tiny = [*TINY[1:], "train.iterations=2"]
    more = ["--seeds", "0,1", "--sweep", "algorithm.beta=0.1,0.3", "--output", str(folder)]
    command = ["compare", "mixture", *tiny, "--algorithms", "ddpo,dpok", *more]
    assert main(command) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    found = json.loads((folder / "comparison.json").read_text())
    assert [group["label"] for group in found["groups"]] == ["ddpo", "dpok, beta 0.1", "dpok, beta 0.3"]
    assert (folder / "dpok" / "algorithm.beta=0.3" / "seed1" / "summary.json").exists()
    assert (folder / "ddpo" / "seed0" / "summary.json").exists()
    card = (folder / "dpok" / "algorithm.beta=0.3" / "seed1" / "model" / "README.md").read_text()
    assert "beta: 0.3" in card, "a model card has its own run's recipe"
    assert {path.name for path in folder.glob("*.png")} >= {"reward.png", "kl.png", "diversity.png"}
    assert "optimum_reward" in found["groups"][0]["mean"], "an algorithm without beta is measured to the recipe's optimum"

    monkeypatch.setattr(Finetuner, "_iterate", lambda tuner: pytest.fail("a finished run was run again"))
    assert main(command) == 0
    with pytest.raises(pytest.fail.Exception, match="run again"):
        main([*command, "--seeds", "0,1,2"])


def test_one_rule_gives_the_optimum_that_a_comparison_is_measured_against(tmp_path: Path) -> None:
    """evaluation.beta, else the beta of the recipe's own algorithm with the overrides that it knows."""

    def betas(recipe: str, *overrides: str) -> list[float | None]:
        return [optimum_beta(entry.recipe) for entry in planned(recipe, overrides, ["score_action", "ddpo"], [0], None)]

    def alike(found: list[float | None]) -> None:
        assert found == [found[0]] * 2

    accepts(alike, betas("mixture"), apart=[0.5, None])
    assert betas("mixture", "algorithm.beta=0.2") == [0.2, 0.2]
    assert betas("mixture", "algorithm.minibatches=2") == [0.5, 0.5], "a setting that only the other algorithm knows"
    own = tmp_path / "own.yaml"
    own.write_text(catalog.recipes()["mixture"].read_text().replace("seed: 1234}", "seed: 1234, beta: 0.25}"))
    assert betas(str(own)) == [0.25, 0.25], "the file's evaluation.beta is that of all"
    assert betas(str(own), "evaluation.beta=0.3") == [0.3, 0.3]


def test_standard_errors_are_over_seeds() -> None:
    runs = [{"label": "a", "algorithm": "a", "value": None, "summary": {"x": x}} for x in (1.0, 2.0, 6.0)]
    close(grouped(runs)[0]["mean"]["x"], 3.0)
    close(grouped(runs)[0]["standard_error"]["x"], 7**0.5 / 3**0.5, deviation=7**0.5, biased=(14 / 3 / 3) ** 0.5)
    assert grouped(runs[:1])[0]["standard_error"]["x"] is None, "one seed has no standard error"


def test_every_reward_is_documented() -> None:
    """Truth: the shelf. Twin: one that is not there."""
    from scoreaction.catalog import files

    text = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")

    def check(names: list[str]) -> None:
        assert all(f"`{name}`" in text for name in names)

    accepts(check, list(files("reward")), missing=["ink", "beauty"])


def test_list_names_the_shelves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    for what in ("algorithms", "rewards", "models", "solvers", "recipes"):
        found = listed(what)
        assert found
        assert all(found.values()), f"a file of {what} has no first line"
        assert all(f"  {name}" in everything for name in found)
    same(set(listed("solvers")), set(SOLVERS), recipes=set(listed("recipes")))
    same(set(listed("recipes")), set(catalog.recipes()), solvers=set(listed("solvers")))
    assert not [name for name in listed("algorithms") if name.startswith("_")]


def test_list_shows_the_keys_of_everything(capsys: pytest.CaptureFixture[str], refused: Callable[..., str]) -> None:
    """Truth: the fields of each class, and that a value which is said to be taken is."""
    for shelf_name, kind in (("algorithms", "algorithm"), ("rewards", "reward"), ("models", "model")):
        for name in listed(shelf_name):
            assert main(["list", shelf_name, name]) == 0
            said = capsys.readouterr().out
            lines = said.partition("key ")[2].splitlines()[1:]
            fields = [key for key in catalog.find(kind, name, key="").Config.model_fields if key != "name"]  # type: ignore[arg-type]
            assert [line.split()[0] for line in lines[: len(fields)]] == fields
    assert main(["list", "settings", "train"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nschedule +cosine +cosine or constant\n", said)
    assert re.search(r"\nlr +0.001 +number above 0\n", said)
    assert load_recipe("mixture", ["train.schedule=constant"]).train.schedule == "constant"
    assert main(["list", "recipes", "mixture"]) == 0
    assert "algorithm: {name: score_action, beta: 0.5}" in capsys.readouterr().out
    assert refused("list", "settings", "trian") == "list settings: there is no 'trian'; did you mean train?"
    assert refused("list", "algorithms", "sqfd").startswith("list algorithms: unknown algorithm 'sqfd'; did you mean sqdf?")


@pytest.mark.slow
def test_a_run_on_a_black_box_is_drawn_from(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Its critic and surrogate are another's than a differentiable reward would have had, and drawing needs neither."""
    small = ["train.iterations=1", "train.batch=4", "sampler.steps=2", "evaluation.n=4", "evaluation.held_out=[]"]
    assert main(["train", "digits", "reward=jpeg", *small, "--output", str(tmp_path / "run")]) == 0
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--seed", "3"]) == 0
    assert refused("sample", tmp_path / "run", "--prompt", "cat").startswith("--prompt: prompt 'cat' names no digit")
    drawn = np.load(tmp_path / "run" / "samples.npz")["samples"]
    tuner = open_run(tmp_path / "run", tuned=True).tuner
    prompts = spread_prompts(tuner.prompts, 2)
    samples = [
        draw(tuner.model, tuner.evaluation.sampler(tuner.sampler), 2, prompts, 3, reference=base).cpu()
        for base in (False, True)
    ]
    close(drawn, samples[0], atol=1e-6, base=samples[1])
