"""Truth: the tensors that were written, and one line that names the key for every file that is not what it should be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from twins import close, same

import scoreaction as sa
from scoreaction.algorithms._learner import Algorithm
from scoreaction.cli import main
from scoreaction.commands.pairs import prefers_first
from scoreaction.errors import UserError
from scoreaction.models import digits, shapes
from scoreaction.recipes.build import build
from scoreaction.recipes.data_files import read_data
from scoreaction.recipes.recipe import dump, load_recipe
from scoreaction.training.examples import Unread, settled


def grey(path: Path, value: int, size: tuple[int, int] = (16, 16), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(path)


def test_an_npz_gives_its_arrays(tmp_path: Path) -> None:
    better, worse = np.random.default_rng(0).random((2, 3, 2))
    np.savez(tmp_path / "a.npz", winner=better, loser=worse, prompts=np.array(["a", "b", "a"]), more=np.zeros(2))
    found = read_data(tmp_path / "a.npz")
    assert isinstance(found, sa.Pairs)
    close(found.winner, better, exchanged=worse)
    assert found.prompts == ["a", "b", "a"]
    np.savez(tmp_path / "b.npz", samples=better)
    others = read_data(tmp_path / "b.npz")
    assert isinstance(others, sa.Samples)
    assert others.prompts is None


def test_pictures_of_folders_and_lines(tmp_path: Path) -> None:
    """Values 51/255; a subfolder is a prompt; grey pictures have one channel and others three."""
    for side, value in (("winner", 51), ("loser", 102)):
        for prompt in ("3", "7"):
            grey(tmp_path / "pairs" / side / prompt / "1.png", value)
    found = read_data(tmp_path / "pairs")
    assert isinstance(found, sa.Pairs)
    close(found.winner, torch.full((2, 1, 16, 16), 0.2), losers=found.loser)
    assert found.prompts == ["3", "7"]
    grey(tmp_path / "plain" / "1.PNG", 51, mode="RGB")
    plain = read_data(tmp_path / "plain")
    assert isinstance(plain, sa.Samples)
    close(plain.samples[0, :, 0, 0], [0.2, 0.0, 1.0], atol=1e-6, in_another_order=[1.0, 0.0, 0.2])
    lines = [{"winner": "pairs/winner/3/1.png", "loser": "pairs/loser/3/1.png", "prompt": "3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "b.jsonl").write_text('{"sample": [1, 2]}\n{"sample": [3, 4]}')
    pairs, numbers = read_data(tmp_path / "a.jsonl"), read_data(tmp_path / "b.jsonl")
    close(pairs[0], found.winner[:1], losers=found.loser[:1])
    close(numbers[0], [[1, 2], [3, 4]], exchanged=[[3, 4], [1, 2]])


WRONG: dict[str, tuple[Any, str]] = {
    "a.npz": (b"no zip", "is no .npz; write one with numpy.savez"),
    "b.npz": ({"winner": np.zeros((2, 2))}, "must hold winner and loser, or samples"),
    "c.npz": ({"winner": np.zeros((2, 2)), "loser": np.zeros((3, 2))}, "winner and loser must have one shape"),
    "d.npz": ({"samples": np.array([["a"]])}, "must be numbers of shape"),
    "e.npz": ({"samples": np.array([{}, {}], dtype=object)}, "cannot be read as an .npz .it has objects"),
    "f.jsonl": (b"", "is empty"),
    "g.jsonl": (b"{", "line 1: is not JSON"),
    "h.jsonl": (b'{"winner": [1]}', "line 1: has no loser"),
    "i.jsonl": (b'{"sample": "nowhere.png"}', "line 1: sample: .*is no picture that can be read"),
    "j.jsonl": (b'{"sample": [1]}\n{"sample": [1, 2]}', "must have one shape"),
    "k.jsonl": (b'{"sample": [1], "prompt": "a"}\n{"sample": [1]}', "lines with a prompt and lines without"),
    "l.txt": (b"", "must be an .npz, a .jsonl or a folder"),
    "m.npz": (None, "is not there"),
    "n.npz": ({"samples": np.zeros((2, 2)), "prompts": np.array("a")}, "prompts of .* must be one for each sample"),
    "o.npz": (b"PK\x03\x04 and no more", "is no .npz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_data_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    """Twin: an npz of samples."""
    content, why = WRONG[name]
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)

    def refused(path: Path) -> None:
        with pytest.raises(UserError, match=f"^data.path: .*{why}") as caught:
            read_data(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / name)
    np.savez(tmp_path / "right.npz", samples=np.zeros((2, 2)))
    with pytest.raises(pytest.fail.Exception):
        refused(tmp_path / "right.npz")


def test_folders_that_do_not_match_are_refused(tmp_path: Path) -> None:
    grey(tmp_path / "winner" / "1.png", 0)
    grey(tmp_path / "loser" / "2.png", 0)
    with pytest.raises(UserError, match=r"^data.path: 1.png is in one of .* only"):
        read_data(tmp_path)
    grey(tmp_path / "winner" / "a" / "2.png", 0)
    with pytest.raises(UserError, match=r"^data.path: .*in subfolders and beside them"):
        read_data(tmp_path / "winner")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^data.path: .* holds no pictures"):
        read_data(tmp_path / "empty")


def fit(data: Any, algorithm: Algorithm, prompts: list[str] | None = None, model: sa.Model | None = None) -> Any:
    return settled(data, algorithm, model or sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), prompts)


ZEROS, ONES = torch.zeros(2, 2), torch.ones(2, 2)
MISFITS = [
    (sa.Pairs(ONES, ZEROS), sa.DDPO(), None, "ddpo learns from rewards and takes none"),
    (None, sa.DPO(), None, "dpo learns from pairs; give data"),
    (sa.Samples(ONES), sa.DPO(), None, "learns from pairs and these are samples; set algorithm.name to spin"),
    (sa.Pairs(ONES, ZEROS), sa.SPIN(), None, "learns from samples and these are pairs; set algorithm.name to dpo"),
    (sa.Pairs(ONES, torch.zeros(3, 2)), sa.DPO(), None, "must be of one length"),
    (sa.Pairs(ONES, ONES), sa.DPO(), None, "pair 0 has two equal samples, as have 1 more"),
    (sa.Pairs(torch.ones(2, 3), torch.zeros(2, 3)), sa.DPO(), None, r"become \(3,\), and the model's are \(2,\)"),
    (sa.Samples(ONES / 0), sa.SPIN(), None, "must be finite"),
    (sa.Samples(ONES, ["a", "b"]), sa.SPIN(), None, "the data has prompts and the run none"),
    (sa.Samples(ONES), sa.SPIN(), ["a"], "the run has prompts and the data none"),
    (sa.Samples(ONES, ["a", "c"]), sa.SPIN(), ["a", "b"], "its prompt 'c' is none of the run's"),
    (sa.Samples(ONES, ["a", "a"]), sa.SPIN(), ["a", "b"], "no sample for the prompt 'b'"),
    (sa.Samples(ONES, ["a"]), sa.SPIN(), ["a"], "1 prompts for 2 examples"),
    ([(ONES[0], ZEROS[0])], sa.DPO(), None, r"learns from sa.Pairs\(winner, loser\), of tensors \(got list\)"),
    (ONES, sa.SPIN(), None, r"learns from sa.Samples\(samples\), of tensors \(got Tensor\)"),
    (sa.Samples(ONES.numpy()), sa.SPIN(), None, r"must be tensors \(got ndarray\); torch.tensor"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("case", range(len(MISFITS)))
def test_data_that_do_not_fit_are_refused(case: int) -> None:
    data, algorithm, prompts, why = MISFITS[case]
    with pytest.raises(ValueError, match=f"^data: .*{why}") as caught:
        fit(data, algorithm, prompts)
    assert "\n" not in str(caught.value)


def test_data_that_fit_have_the_numbers_of_their_prompts() -> None:
    """Prompts of one text have one number; a prompt without pairs may be one of the run's; unread data are none."""
    found = fit(sa.Pairs(ONES, ZEROS, ["b", "a"]), sa.DPO(), ["a", "b", "b", "c"])
    same(found.prompt, torch.tensor([1, 0]), by_place=torch.tensor([0, 1]))
    same(found.first, torch.tensor([0, 1, 1, 3]), every=torch.arange(4))
    assert fit(Unread(), sa.DPO()) is None
    assert fit(None, sa.DDPO()) is None


def test_pictures_become_what_the_network_sees() -> None:
    """Digits: [0, 1] to [-1, 1]. Shapes: latents, whose picture is near. Twin: pictures of another size."""
    model = digits.build(digits.Config())
    pictures = torch.rand(2, 1, 16, 16)
    close(model.clean(pictures), 2 * pictures - 1, atol=1e-6, as_they_are=pictures)
    with pytest.raises(ValueError, match=r"^data: images must have values in \[0, 1\]"):
        fit(sa.Samples(2 * pictures, ["3", "7"]), sa.SPIN(), ["3", "7"], model)
    latent = shapes.build(shapes.Config())
    with torch.no_grad():
        drawn = latent.decode(torch.randn(2, *latent.shape, generator=torch.Generator().manual_seed(0)))
        again = latent.decode(latent.clean(drawn))
    close((again - drawn).square().mean().sqrt(), 0.0, atol=0.1, unrelated=(again - drawn.flip(0)).square().mean().sqrt())
    with pytest.raises(ValueError, match="the model's are"):
        latent.clean(torch.rand(2, 3, 16, 16))


def test_a_model_that_cannot_go_back_says_so() -> None:
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    one_way = sa.Model(
        copy.deepcopy(model.net), process=model.process, predicts=model.predicts, shape=(2,), decode=lambda x0: x0
    )
    with pytest.raises(ValueError, match=r"^data: the model decodes its samples and cannot go back; give Model\(invert="):
        fit(sa.Samples(ONES), sa.SPIN(), None, one_way)


def test_tokens_are_whole_numbers_below_the_vocabulary() -> None:
    model = build(load_recipe("markov_chain", ["model.length=2"])).model
    same(model.clean(torch.tensor([[0.0, 3.0]])), torch.tensor([[0, 3]]), exchanged=torch.tensor([[3, 0]]))
    assert model.clean(torch.tensor([[0.0, 3.0]])).dtype == torch.int64
    for wrong in ([[0, 4]], [[-1, 0]], [[0.5, 0]]):
        with pytest.raises(ValueError, match="whole numbers from 0 to 3"):
            model.clean(torch.tensor(wrong))


def test_labels_are_those_of_bradley_and_terry() -> None:
    """Truth: sigmoid(gap/T), in standard errors. Twins: T = 1, and the chance of the loser."""
    rewards = torch.tensor([[0.6], [0.2]]).expand(-1, 20000)
    first = prefers_first(rewards, 0.5, torch.Generator().manual_seed(0)).double().mean()
    chance = torch.sigmoid(torch.tensor(0.8))
    close(first, chance, atol=0.012, of_one=torch.sigmoid(torch.tensor(0.4)), of_the_loser=1 - chance)
    even = prefers_first(torch.zeros(2, 20000), 0.0, torch.Generator().manual_seed(0)).double().mean()
    close(even, 0.5, atol=0.012, always=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixture", "markov_chain"])
def test_pairs_are_drawn_labelled_and_learned_from(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run needs no file of pairs once it is trained, and none but one that learns from them takes one."""
    monkeypatch.chdir(tmp_path)
    small = ["evaluation.n=16"] if recipe == "markov_chain" else ["evaluation.n=16", "evaluation.steps=4", "sampler.steps=4"]
    assert main(["pairs", recipe, *small, "--n", "40", "--temperature", "0", "--output", "p.npz"]) == 0
    same("80 rewards" in capsys.readouterr().out, True, none=False)
    with np.load("p.npz") as file:
        assert (file["reward_winner"] >= file["reward_loser"]).all()
        assert len(file["winner"]) <= 40
    learned = ["algorithm.name=dpo", "data.path=p.npz", "train.iterations=1", "train.batch=8", *small]
    assert main(["train", recipe, *learned, "--output", "run"]) == 0
    (tmp_path / "p.npz").rename("other.npz")
    assert main(["sample", "run", "--n", "2"]) == 0
    assert sa.load("run").average is not None
    assert main(["train", recipe, *learned, "--output", "more"]) == 2
    assert "data.path" in capsys.readouterr().err
    assert main(["train", recipe, "data.path=other.npz", *small, "--output", "more"]) == 2
    assert capsys.readouterr().err.startswith("data: score_action learns from rewards")
    assert not (tmp_path / "more").exists()


def test_a_recipe_keeps_the_path_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is here becomes absolute, so that a run is read from anywhere."""
    monkeypatch.chdir(tmp_path)
    np.savez("p.npz", samples=np.zeros((2, 2)))
    recipe = load_recipe("mixture", ["algorithm.name=spin", "data.path=p.npz", "reward={name: none}"])
    assert recipe.data is not None
    same(recipe.data.path, tmp_path / "p.npz", as_written=Path("p.npz"))
    Path("again.yaml").write_text(dump(recipe))
    assert load_recipe("again.yaml").data == recipe.data
