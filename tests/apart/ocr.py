"""ocr with rapidocr's own networks: what it reads in pictures that are drawn, and in those of the shipped model."""

from __future__ import annotations

import pytest
import torch
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.models import glyphs
from scoreaction.recipes.build import build_reward
from scoreaction.recipes.prompts import prompt_list
from scoreaction.rewards import ocr
from scoreaction.tasks.glyphs.drawing import draw

TEXTS = [*(prompt_list("glyphs") or []), *(prompt_list("glyphs_unseen") or [])]


def drawn() -> torch.Tensor:
    return draw(TEXTS, torch.Generator().manual_seed(0))


def test_drawn_texts_are_read() -> None:
    """At least 97 % of the characters, in grey and in colour. Twins: other texts; pictures upside down; white paper."""
    pictures, reward = drawn(), ocr.build(ocr.Config())

    def read(scores: torch.Tensor) -> None:
        assert float(scores.mean()) > 0.97, scores.mean()

    others = {"other_texts": reward(pictures.roll(1, 0), TEXTS), "upside_down": reward(pictures.flip(2, 3), TEXTS)}
    accepts(read, reward(pictures, TEXTS), white=reward(torch.ones_like(pictures), TEXTS), **others)
    accepts(read, reward(pictures.expand(-1, 3, -1, -1), TEXTS), **others)


def test_letters_are_read_with_colours_and_spaces() -> None:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (320, 48), "white")
    ImageDraw.Draw(picture).text((8, 4), "Hello world", fill=(160, 0, 40), font=ImageFont.load_default(32))
    pixels = torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(1, 48, 320, 3).permute(0, 3, 1, 2) / 255
    reward = ocr.build(ocr.Config())
    close(reward(pixels, ["Hello world"]), [1.0], other=reward(pixels, ["Hallo world"]))
    close(reward(pixels, ["Hallo world"]), [0.9], atol=1e-6, right=[1.0])


def test_correct_is_one_where_all_is_right() -> None:
    pictures = drawn()[:8]
    texts = [TEXTS[0], TEXTS[1], *("99999" for _ in range(6))]
    reward, correct = ocr.build(ocr.Config()), build_reward("ocr", ["correct=true"])
    same(correct(pictures, texts).tolist(), [1.0, 1.0] + [0.0] * 6, in_part=reward(pictures, texts).tolist())


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_shipped_model_misspells(guidance: float) -> None:
    """It writes most characters and few of the texts; guided, more. Twins: of other prompts."""
    model, reward = glyphs.build(glyphs.Config()), ocr.build(ocr.Config())
    pictures = sa.sample(model, n=len(TEXTS), prompts=TEXTS, steps=20, guidance=guidance, seed=0)
    low, high = {1.0: (0.55, 0.9), 2.0: (0.8, 1.0)}[guidance]

    def between(scores: torch.Tensor) -> None:
        assert low < float(scores.mean()) < high, scores.mean()

    accepts(between, reward(pictures, TEXTS), other_prompts=reward(pictures, TEXTS[1:] + TEXTS[:1]))
