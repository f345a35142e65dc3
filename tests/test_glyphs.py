"""Truth: Pillow's drawing of the same text at a larger size, edit distances by definition, and a stand-in for rapidocr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from twins import accepts, close, same
from typer.testing import CliRunner

import scoreaction as sa
from scoreaction.errors import UserError
from scoreaction.models import glyphs
from scoreaction.recipes.build import build_reward
from scoreaction.recipes.prompts import prompt_list
from scoreaction.rewards import ocr
from scoreaction.tasks.glyphs import pretrain
from scoreaction.tasks.glyphs.drawing import BLANK, HEIGHT, LONGEST, WIDTH, draw, ids_of, random_ids, texts_of_ids
from scoreaction.tasks.glyphs.network import GlyphsNet


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_texts_are_ids_by_place() -> None:
    same(ids_of(["407", "11235"]).tolist(), [[4, 0, 7, 10, 10], [1, 1, 2, 3, 5]], padded_before=[[10, 10, 4, 0, 7]])
    texts = texts_of_ids(random_ids(2000, seeded()))
    same(texts_of_ids(ids_of(texts)), texts, in_another_order=texts[::-1])
    shares = [sum(len(text) == n for text in texts) / 2000 for n in (3, 4, 5)]
    close(shares, [0.6, 0.25, 0.15], atol=0.03, alike=[1 / 3] * 3)
    for wrong in ("12", "123456", "12a", "", "1 2 3"):
        with pytest.raises(ValueError, match="is no text of 3 to 5 digits: write for example '4071'"):
            ids_of([wrong])


def test_a_drawn_text_is_pillows_in_the_middle() -> None:
    """Truth: the same font at four times the size, without a shift, made smaller. Twins: another text; its negative."""
    from PIL import Image, ImageDraw, ImageFont

    for text in ("407", "39916"):
        fine = Image.new("L", (WIDTH * 4, HEIGHT * 4), 255)
        ImageDraw.Draw(fine).text((WIDTH * 2, HEIGHT * 2), text, fill=0, font=ImageFont.load_default(48), anchor="mm")
        truth = torch.tensor(np.asarray(fine.resize((WIDTH, HEIGHT), Image.Resampling.BOX)) / 255)
        many = draw([text] * 200, seeded())
        assert tuple(many.shape) == (200, 1, HEIGHT, WIDTH)
        assert 0 <= float(many.min()) < 0.3 < float(many.max()) <= 1

        def like(pictures: torch.Tensor, truth: torch.Tensor = truth) -> None:
            nearest = min(float((picture - truth).square().mean()) for picture in pictures[:, 0])
            assert nearest < 0.01, nearest

        accepts(like, many, another=draw(["".join("4" if c != "4" else "1" for c in text)] * 200, seeded()), negative=1 - many)
    same(
        torch.equal(draw(["407"], seeded()), draw(["407"], seeded())),
        True,
        moved=torch.equal(draw(["407"], seeded(1)), many[:1]),
    )


def test_a_misspelt_caption_keeps_its_length() -> None:
    """Each character is another in 9 of 10 draws anew. Twins: the chance itself; blanks drawn anew."""
    ids = random_ids(4000, seeded())
    new = pretrain.misspelt(ids, 0.25, seeded(1))
    same(torch.equal(new == BLANK, ids == BLANK), True, of_others=torch.equal(new.flip(0) == BLANK, ids == BLANK))
    close(float((new != ids)[ids != BLANK].float().mean()), 0.225, atol=0.01, always_another=0.25)


def test_the_network_takes_texts_and_none() -> None:
    """Each place tells it something, and nothing is all blanks. Twin: some text."""
    torch.manual_seed(0)
    net = GlyphsNet()
    torch.nn.init.normal_(net.last.weight, std=0.1)
    x, t = torch.randn(6, 1, HEIGHT, WIDTH, generator=seeded()), torch.full((6,), 0.5)
    texts = ids_of(["12345", "92345", "19345", "12945", "12395", "12349"])
    with torch.no_grad():
        blank, out = net(x, t, torch.full((6, LONGEST), BLANK)), net(x[:1].expand(6, -1, -1, -1), t, texts)
        close(net(x, t, None), blank, atol=1e-6, some_text=net(x, t, texts))
    apart = [float((row - out[0]).abs().max()) > 1e-4 for row in out]
    same(apart, [False] + [True] * 5, deaf=[False] * 6)


def test_the_shipped_pictures_look_like_their_texts() -> None:
    """Guided, most are nearer to a drawing of their prompt than to one of any other. Twins: of the next prompt; negatives."""
    texts = (prompt_list("glyphs_unseen") or [])[:8]
    model = glyphs.build(glyphs.Config())
    pictures = sa.sample(model, n=16, prompts=texts * 2, steps=12, guidance=3.0, seed=0)
    drawn = [draw([text] * 150, seeded()) for text in texts]
    distance = torch.stack([(pictures[:, None, 0] - one[None, :, 0]).square().mean((2, 3)).amin(1) for one in drawn], 1)
    nearest = distance.argmin(1).tolist()

    def right(numbers: list[int]) -> None:
        assert sum(a == b for a, b in zip(nearest, numbers, strict=True)) >= 12, nearest

    accepts(right, list(range(8)) * 2, next_one=[(i + 1) % 8 for i in range(8)] * 2)


def test_the_command_writes_what_the_model_loads(tmp_path: Path) -> None:
    """Twins: the shipped weights; a folder without any, which is refused."""
    command = pretrain.typer.Typer(add_completion=False)
    command.command()(pretrain.main)
    run = CliRunner().invoke(
        command, ["--output", str(tmp_path), "--batches", "2", "1", "--pictures", "64"], catch_exceptions=False
    )
    assert run.exit_code == 0, run.output
    made, shipped = (glyphs.build(glyphs.Config(path=path, lora_rank=None)).net.state_dict() for path in (tmp_path, None))
    fresh = pretrain.train(0, (2, 1), 64, pretrain.Console(quiet=True)).state_dict()
    for name in ("first.weight", "characters.weight"):
        close(made[name], fresh[name].half().float(), atol=0, shipped=shipped[name])
    with pytest.raises(ValueError, match=r"path: .*nowhere has no glyphs.safetensors .*tasks\.glyphs\.pretrain"):
        glyphs.build(glyphs.Config(path=tmp_path / "nowhere"))


def test_the_prompt_sets_are_apart() -> None:
    seen, unseen = prompt_list("glyphs") or [], prompt_list("glyphs_unseen") or []
    assert [len(set(texts)) for texts in (seen, unseen)] == [128, 48]
    same(set(seen) & set(unseen), set(), themselves=set(seen))
    assert (len(ids_of(seen)), len(ids_of(unseen))) == (128, 48)


def by_definition(a: str, b: str) -> int:
    """Levenshtein's distance as it is defined, by the last characters."""

    @cache
    def of(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        return min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return of(len(a), len(b))


def test_the_edit_distance_is_the_defined_one() -> None:
    """Twins: characters that differ place by place; the difference of the lengths."""
    draws = np.random.default_rng(0)
    words = ["".join(draws.choice(list("012"), size)) for size in draws.integers(0, 7, 60)]
    pairs = list(zip(words[:30], words[30:], strict=True))
    by_place = [sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b)) for a, b in pairs]
    truth = [by_definition(a, b) for a, b in pairs]
    same(
        [ocr.edit_distance(a, b) for a, b in pairs], truth, by_place=by_place, lengths=[abs(len(a) - len(b)) for a, b in pairs]
    )


class Reader:
    """A stand-in for rapidocr: it reads the brightness of a line, 8 bits, of the first pixel's blue, green and red."""

    def __init__(self, params: dict[str, Any]) -> None:
        assert params["Rec.rec_img_shape"] == [3, 48, 48]

    def __call__(self, picture: np.ndarray, *, use_det: bool, use_cls: bool, use_rec: bool) -> Any:
        assert (use_det, use_cls, use_rec) == (False, False, True)
        assert picture.dtype == np.uint8
        assert picture.shape == (48, 96, 3)
        text = " ".join(f"{value:03d}" for value in picture[0, 0])
        return SimpleNamespace(txts=None if text == "000 000 000" else (text,))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("rapidocr")
    module.RapidOCR = Reader  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    ocr._reader.cache_clear()
    yield
    ocr._reader.cache_clear()


def test_a_reading_counts_by_its_edits(package: None) -> None:
    """Blue comes first, white space does not count, and a picture without text has an edit for each character."""
    reward = ocr.build(ocr.Config())
    colours = torch.tensor([[1.0, 0.0, 0.4], [1.0, 0.0, 0.4], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    pictures = colours[:, :, None, None].expand(-1, -1, 6, 12)
    prompts = ["102 000 255", "102000250 | large", "123", "1"]
    close(
        reward(pictures, prompts),
        [1.0, 8 / 9, 0.0, 0.0],
        atol=1e-6,
        red_first=[1 / 3, 1 / 3, 0.0, 0.0],
        below=[1, 8 / 9, 0, -7],
    )
    correct = ocr.build(ocr.Config(correct=True))
    same(correct(pictures, prompts).tolist(), [1.0, 0.0, 0.0, 0.0], in_part=reward(pictures, prompts).tolist())
    for wrong, said in ((None, "needs a prompt for each"), (["", "1", "1", "1"], "one has none; write one")):
        with pytest.raises(ValueError, match=said):
            reward(pictures, wrong)


@pytest.mark.parametrize("name", ["rapidocr", "onnxruntime"])
def test_without_its_packages_it_says_what_to_install(name: str, package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: with both it is built."""
    same(isinstance(build_reward("ocr", []), sa.Reward), True, none=isinstance(None, sa.Reward))
    ocr._reader.cache_clear()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"reward: ocr needs the package {name}: pip install rapidocr onnxruntime"):
        build_reward("ocr", [])
