"""Truth: the run that nothing cut off, byte for byte. What is killed at its end is a run that --resume completes."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_export import Own
from twins import accepts, same

import scoreaction as sa
from scoreaction import disk
from scoreaction.cli import main
from scoreaction.disk import staged, whole, write_whole
from scoreaction.training.run_folder import RunFolder

TINY = ["algorithm.name=ddpo", "train.batch=8", "evaluation={n: 16, steps: 3}", "sampler.steps=4", "model.hidden=8"]
COMMAND = ["train", "mixture", *TINY, "train.iterations=2", "--output"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*COMMAND, str(folder)]) == 0
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """All that the end of a run writes; what is being written and was left there too."""
    files = [folder / "summary.json", *folder.glob("samples/*"), *folder.rglob("*.part"), *folder.glob("model/**/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}


def killed(arguments: list[str], call: int, function: str) -> bool:
    """Runs a command in a process that dies as it calls a function of `os` for the n-th time; False where it does not."""
    child = os.fork()
    if child == 0:
        left, real = [call], getattr(os, function)

        def counted(*given: object, **more: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return real(*given, **more)

        setattr(os, function, counted)
        os._exit(main(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
@pytest.mark.parametrize("function", ["replace", pytest.param("fsync", marks=pytest.mark.long)])
def test_a_kill_at_the_end_leaves_a_run_that_resuming_completes(function: str, run: Path, tmp_path: Path) -> None:
    """At each rename, and at each flush of a file, of measuring, exporting and the card; twin: what the kill left."""
    truth, calls = results(run), 0
    while True:
        calls += 1
        folder = tmp_path / str(calls)
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "samples")
        (folder / "summary.json").unlink()
        if not killed([*COMMAND, str(folder), "--resume"], calls, function):
            break
        left = results(folder)
        assert main([*COMMAND, str(folder), "--resume"]) == 0
        same(results(folder), truth, **({} if left == truth else {"as_it_was_left": left}))
    assert calls > 7, "samples, weights, recipe, description, summary, card"


def test_a_run_whose_model_was_lost_is_not_finished(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: where the summary alone says that a run is finished, resuming leaves a model with a card and nothing else."""

    def resumed(folder: Path) -> dict[str, bytes]:
        shutil.copytree(run, folder)
        shutil.rmtree(folder / "model")
        assert main([*COMMAND, str(folder), "--resume"]) == 0
        return results(folder)

    found = resumed(tmp_path / "found")
    monkeypatch.setattr(RunFolder, "complete", property(lambda place: place.summary_path.exists()))
    same(found, results(run), by_the_summary_alone=resumed(tmp_path / "other"))


def test_what_a_crash_left_half_written_is_cleared(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    parts = ["recipe.yaml.part", "summary.json.part", "samples/base.npz.part", "checkpoints/000002.part/tree.json"]
    for name in [*parts, "checkpoints/000002.part/.tmpAbC", "checkpoints/000009.part/holiday.jpg", "notes.part"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    assert main([*COMMAND, str(folder), "--resume"]) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    left = {str(path.relative_to(folder)) for path in files if path.read_bytes() == b"half"}
    same(left, {"checkpoints/000009.part/holiday.jpg", "notes.part"}, all_of_them=left | set(parts))


@pytest.mark.slow
def test_a_folder_with_others_files_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each name that a run writes; twin: a file that it does not write."""
    for name in ("summary.json", "model/README.md", "samples/base.npz", "tensorboard/x", "report.html", "checkpoints/100/a"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        for more, said in ([], "already holds a run"), (["--resume"], "holds files with the names of a run's, and no recipe"):
            assert main([*COMMAND, str(folder), *more]) == 2
            assert said in capsys.readouterr().err
        same((folder / name).read_text(), "mine", written_over="")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert main([*COMMAND, str(tmp_path / "other")]) == 0


@pytest.mark.slow
def test_an_edited_recipe_is_refused_in_the_middle(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the very command that an interrupt prints; the twin, which only measures otherwise, goes on."""
    for old, new, code in (("lr: 0.001", "lr: 0.01", 2), ("iterations: 2", "iterations: 3", 0), ("n: 16", "n: 18", 0)):
        folder = tmp_path / new.replace(": ", "")
        shutil.copytree(run, folder)
        text = (folder / "recipe.yaml").read_text()
        assert old in text
        (folder / "recipe.yaml").write_text(text.replace(old, new))
        (folder / "summary.json").unlink()
        assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder), "--resume"]) == code
        line = (
            f"train.lr: {folder / 'checkpoints' / '000002'} is of a run with 0.001, not 0.01; set it as it was, or name another"
        )
        same(capsys.readouterr().err.startswith(line), code == 2, the_other=code == 0)


def test_a_file_is_written_whole_and_not_through_a_link(tmp_path: Path) -> None:
    """Truth: the file that a link points at stays; twin: writing as Python does."""
    victim, link = tmp_path / "victim", tmp_path / "file"
    for name in ("file", "file.part"):
        victim.write_text("precious")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(victim)
        write_whole(link, "new")
        assert link.read_text() == "new"
        assert victim.read_text() == "precious"
    link.unlink()
    link.symlink_to(victim)
    link.write_text("new")
    assert victim.read_text() == "new"

    def fill_the_disk() -> None:
        with whole(tmp_path / "other") as file:
            file.write(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


def test_a_staged_folder_has_its_last_file_only_when_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' files in it stay; the twin is the order of names."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    moved = []
    real = os.replace
    monkeypatch.setattr(disk.os, "replace", lambda a, b: (moved.append(Path(b).name), real(a, b)))
    with staged(target, last="a.json") as part:
        for name in ("b.txt", "a.json", "deep/c.txt"):
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(name)
        (part / "b.txt").chmod(0o600)
    accepts(lambda order: _last(order, "a.json"), moved, by_name=sorted(moved))
    assert {path.name for path in target.iterdir()} == {"notes.txt", "a.json", "b.txt", "deep"}
    assert (target / "b.txt").stat().st_mode == (target / "a.json").stat().st_mode, "as the umask says"

    def interrupt() -> None:
        with staged(target, last="a.json") as part:
            (part / "b.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert (target / "b.txt").read_text() == "b.txt"
    assert not (target / ".part").exists()


def _last(order: list[str], name: str) -> None:
    assert order[-1] == name


def test_files_can_be_read_as_the_umask_says(run: Path) -> None:
    """safetensors writes private ones; twin: one that is private."""

    def check(modes: set[int]) -> None:
        assert len(modes) == 1

    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    accepts(check, modes, a_private_one={*modes, 0o600})


def test_a_model_saved_again_in_its_folder_leaves_nothing_stale(tmp_path: Path) -> None:
    """Twin: the first model's files, which the second has not."""

    def save(lora: int | None) -> set[str]:
        model = sa.Model(Own(8), process=sa.VP(), predicts="v", shape=(2,), lora_rank=lora)
        tuner = sa.Finetuner(model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), train=sa.Train(iterations=1, batch=8))
        tuner.save(tmp_path)
        return {path.name for path in tmp_path.iterdir()}

    first = save(None)
    same(save(2), {"model.json", "weights.safetensors", "reference.safetensors"}, as_before=first)
    assert json.loads((tmp_path / "model.json").read_text())["lora"]["rank"] == 2
