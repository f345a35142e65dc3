"""Truth: the bytes that were written, and the uninterrupted run: one other byte, or another run's, and a checkpoint is none."""

import json
import logging
import shutil
import subprocess

import pytest
import torch
from tuning import tune
from twins import accepts, same

import scoreaction as sa
from scoreaction.errors import UserError
from scoreaction.training import checkpoints
from scoreaction.training.checkpoints import DamagedError, load_newest, load_tree, save_tree
from scoreaction.training.run_folder import RunFolder

FILES = ["tensors.safetensors", "tree.json", "run.json", "SHA256SUMS"]


def flipped(data: bytes, at: int, bit: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


@pytest.mark.slow
def test_no_damaged_byte_is_accepted(tmp_path, monkeypatch):
    """Any bit of any byte of a small checkpoint; without the checksum, the twin, most pass."""
    whole = tmp_path / "000001"
    save_tree(whole, {"weights": torch.randn(20), "seconds": 1.5, "text": "abc"}, {"train.lr": 0.1})
    draws = torch.Generator().manual_seed(0)

    def accepted(n: int = 200) -> int:
        taken = 0
        for i in range(n):
            path = whole / FILES[i % 4]
            data = path.read_bytes()
            at, bit = (int(torch.randint(most, (), generator=draws)) for most in (len(data), 8))
            path.write_bytes(flipped(data, at, bit))
            try:
                load_tree(whole)
                taken += 1
            except DamagedError:
                pass
            path.write_bytes(data)
        return taken

    assert load_tree(whole)["text"] == "abc"
    found = accepted()
    monkeypatch.setattr(checkpoints, "_sums", lambda folder: (folder / "SHA256SUMS").read_text(errors="replace"))
    same(found, 0, without_the_checksum=accepted())


def test_checksums_are_those_of_sha256sum(tmp_path):
    """An independent program."""
    save_tree(tmp_path / "000001", {"weights": torch.ones(3)})
    command = ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "000001", check=False).returncode == 0
    (tmp_path / "000001" / "tree.json").write_text("{}")
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(command, cwd=tmp_path / "000001", check=True, capture_output=True)


def test_the_one_before_a_damaged_checkpoint_is_named_and_used(tmp_path, caplog):
    truth = list(tune(sa.DDPO(), iterations=6, schedule="constant"))
    list(tune(sa.DDPO(), output=tmp_path, schedule="constant"))
    damaged = tmp_path / "checkpoints" / "000004" / "tensors.safetensors"
    damaged.write_bytes(flipped(damaged.read_bytes(), -9, 3))
    again = tune(sa.DDPO(), output=tmp_path, iterations=6, schedule="constant")
    with caplog.at_level(logging.WARNING):
        assert again.resume()
    assert [record.getMessage() for record in caplog.records] == [
        f"{damaged.parent}: damaged; going on from {tmp_path / 'checkpoints' / '000002'}"
    ]
    found = [{**metrics, "seconds": 0} for metrics in again]
    later = [{**metrics, "seconds": 0} for metrics in truth]
    same(found, later[2:], from_the_damaged_one=later[4:])
    assert [path.name for path in RunFolder(tmp_path).saved_checkpoints()] == ["000004", "000006"]
    assert load_tree(damaged.parent)["iteration"] == 4, "it was written anew"


def test_damage_everywhere_is_said(tmp_path):
    list(tune(sa.DDPO(), output=tmp_path))
    for path in tmp_path.glob("checkpoints/*/tree.json"):
        path.write_text("{}")
    with pytest.raises(UserError, match="000004: cannot be read: damaged"):
        tune(sa.DDPO(), output=tmp_path).resume()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.5}, "train.lr: .*000002 is of a run with 0.001, not 0.5"),
        ({"seed": 1}, "train.seed: .* with 0, not 1"),
        ({"ema": False}, "train.ema: .* with True, not False"),
        ({"sampler": sa.Sampler(steps=5)}, "sampler.steps: .* with 4, not 5"),
        ({"algorithm": sa.DPOK()}, "algorithm.name: .* with 'ddpo', not 'dpok'"),
        ({"model": "wide"}, "weights.line.weight: .* with '2 x 2', not '4 x 2'"),
        ({"iterations": 9, "checkpoint_every": 1, "max_rows": 7}, None),  # the twin: these may change
    ],
)
def test_a_checkpoint_knows_its_run(tmp_path, change, said):
    def run(algorithm=None, model="narrow", iterations=2, **more):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.line = torch.nn.Linear(2, 4 if model == "wide" else 2)

            def forward(self, x, t, cond):
                return self.line(x)[:, :2]

        net = sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,))
        return tune(algorithm or sa.DDPO(), model=net, iterations=iterations, output=tmp_path, **more)

    list(run())
    if said is None:
        assert run(**change).resume()
    else:
        with pytest.raises(UserError, match=said):
            run(**change).resume()


def test_only_what_this_run_wrote_is_deleted(tmp_path):
    """Others' folders stay, whatever their names; twin: its own older checkpoints go."""
    tuner = tune(sa.DDPO(), output=tmp_path, iterations=8)
    steps = iter(tuner)
    [next(steps) for _ in range(3)]
    place = RunFolder(tmp_path)
    for name in ("000001", "1000", "3000"):
        (place.checkpoints / name).mkdir()
        (place.checkpoints / name / "photo.jpg").write_text("mine")
    save_tree(place.checkpoints / "000000", {}, {"train.lr": 7})  # another run's
    list(steps)
    names = {path.name for path in place.checkpoints.iterdir()}
    same(names, {"000001", "1000", "3000", "000000", "000006", "000008"}, its_own_too=names | {"000002", "000004"})
    assert place.newest_checkpoint().name == "000008"
    taken = tune(sa.DDPO(), output=tmp_path, iterations=9)
    assert taken.resume()
    (place.checkpoints / "000009").mkdir()
    (place.checkpoints / "000009" / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match="000009: is not a checkpoint of this run, and it is not written over; move it away"):
        list(taken)


def test_a_checkpoint_that_stands_is_not_written_again(tmp_path):
    """Its files keep their inodes; twin: of one that was damaged they are new."""
    tuner = tune(sa.DDPO(), output=tmp_path)
    list(tuner)
    file = tmp_path / "checkpoints" / "000004" / "tree.json"
    before = file.stat().st_ino
    assert tuner.checkpoint()
    found = file.stat().st_ino
    keeper = (tmp_path / "kept").mkdir() or shutil.move(file.parent, tmp_path / "kept")  # so that no inode comes twice
    tuner.checkpoint()
    same(found, before, written_again=file.stat().st_ino)
    assert keeper


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for act in (list, lambda tuner: tuner.resume()):
        with pytest.raises(ValueError, match="already holds a run|checkpoints is a link, and nothing is written through one"):
            act(tune(sa.DDPO(), output=tmp_path / "run"))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "run" / "checkpoints").unlink()
    assert len(list(tune(sa.DDPO(), output=tmp_path / "run"))) == 4, "the twin: without the link"


def test_what_is_written_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    """Truth: the order of the calls; twin: the rename first."""
    calls = []
    names = {}

    def fsync(number):
        calls.append(("fsync", names.get(number)))

    def opened(path, flags, *more, real=checkpoints.os.open, **options):
        number = real(path, flags, *more, **options)
        names[number] = str(path)
        return number

    monkeypatch.setattr("scoreaction.disk.os.fsync", fsync)
    monkeypatch.setattr("scoreaction.disk.os.open", opened)
    replace = checkpoints.os.replace
    monkeypatch.setattr("scoreaction.disk.os.replace", lambda a, b: (calls.append(("rename", str(b))), replace(a, b))[1])
    save_tree(tmp_path / "000001", {"a": torch.ones(1)})
    files = [str(tmp_path / "000001.part" / name) for name in FILES]

    def check(order):
        renamed = order.index(("rename", str(tmp_path / "000001")))
        assert {("fsync", name) for name in [*files, str(tmp_path / "000001.part")]} <= set(order[:renamed])
        assert ("fsync", str(tmp_path)) in order[renamed:]

    accepts(check, calls, the_rename_first=calls[::-1])


def test_a_metric_of_the_identity_is_json(tmp_path):
    """What JSON gives back is what is compared."""
    tuner = tune(sa.DDPO(), output=tmp_path, prompts=["0", "1"])
    same(json.loads(json.dumps(tuner.identity())), tuner.identity(), other_prompts={**tuner.identity(), "prompts.0": "1"})
    assert load_newest([], {}) is None
