"""Truth: the contract of a run's folder, and the fields of each class. Exit codes, one line for every fault, and the lists."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commanding import TINY, train
from twins import accepts, same

from scoreaction import catalog
from scoreaction.cli import main
from scoreaction.commands.listing import listed
from scoreaction.commands.streams import Unread
from scoreaction.diffusion.solvers import SOLVERS
from scoreaction.recipes.recipe import load_recipe
from scoreaction.training.run_folder import read_json_lines

CONTRACT = {
    "iteration", "reward_mean", "reward_std", "kl_nats", "kl_chain_nats", "grad_norm", "reward_queries", "model_evaluations",
    "seconds",
}  # fmt: skip


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
        (["sample", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["list", "algoritms", "ddpo"], "list: there is no list of 'algoritms'; did you mean algorithms?"),
        (["list", "algoritms"], "list: there is no list of 'algoritms'; did you mean algorithms?"),
        (["compare", "mixture"], "Missing option '--algorithms'"),
        (["compare", "mixture", "--algorithms", "ddop"], "--algorithms: unknown algorithm 'ddop'; did you mean ddpo or ddpp?"),
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
        (["report", "a" * 300], "a" * 300 + ": no such folder"),
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


@pytest.mark.slow
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

    def whole(lines: list[str]) -> None:
        assert all(line.endswith(".") for line in lines)

    accepts(whole, list(listed("recipes").values()), cut_off=["A network of your own data: `scoreaction pretrain` makes it,"])


def test_list_shows_the_keys_of_everything(capsys: pytest.CaptureFixture[str], refused: Callable[..., str]) -> None:
    """Truth: the fields of each class, and that a value which is said to be taken is."""
    for shelf_name, kind in (("algorithms", "algorithm"), ("rewards", "reward"), ("models", "model")):
        for name in listed(shelf_name):
            assert main(["list", shelf_name, name]) == 0
            said = capsys.readouterr().out
            lines = said.partition("\nkey ")[2].splitlines()[1:]
            fields = [key for key in catalog.find(kind, name, key="").Config.model_fields if key != "name"]  # type: ignore[arg-type]
            # a block of its own has a line for each of its keys
            keys = [line.partition(" ")[0].partition(".")[0] for line in lines if line.strip()]
            assert list(dict.fromkeys(keys))[: len(fields)] == fields
    assert main(["list", "settings", "train"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\nschedule +cosine +cosine or constant\n", said)
    assert re.search(r"\nlr +0.001 +number above 0\n", said)
    assert load_recipe("mixture", ["train.schedule=constant"]).train.schedule == "constant"
    assert main(["list", "recipes", "mixture"]) == 0
    assert "algorithm: {name: score_action, beta: 0.5}" in capsys.readouterr().out
    assert refused("list", "settings", "trian") == "list settings: there is no 'trian'; did you mean train?"
    assert refused("list", "algorithms", "sqfd").startswith("list algorithms: unknown algorithm 'sqfd'; did you mean sqdf?")
