"""The shapes: captions and scenes, the program that reads pictures, the rewards and prompts, and what is shipped."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from twins import accepts, close

from scoreaction.catalog import prompt_sets
from scoreaction.rewards import shapes, shapes_scorer
from scoreaction.tasks.shapes import scorer as nets
from scoreaction.tasks.shapes.reader import Detection, judge, read, score
from scoreaction.tasks.shapes.scenes import COLOURS, HELD_OUT, Scene, Thing, all_scenes, coverage, draw, parse_caption

SCENES = [*all_scenes()[:36], *all_scenes()[36::8]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return draw(SCENES, seeded(0))


def neighbours(scene: Scene) -> list[Scene]:
    """The scenes that differ from this one in a single attribute: a colour, a shape, the count or the relation."""

    def near(thing: Thing) -> list[Thing]:
        others = [scene_.things[0] for scene_ in all_scenes()[:12]]
        return [other for other in others if (other[0] == thing[0]) != (other[1] == thing[1])]

    if scene.relation is None:
        first, count = scene.things[0], len(scene.things)
        return [*(Scene((t,) * count) for t in near(first)), *(Scene((first,) * n) for n in (1, 2, 3) if n != count)]
    first, second = scene.things
    pairs = [*((t, second) for t in near(first)), *((first, t) for t in near(second))]
    relations = [r for r in ("above", "below", "left of", "right of") if r != scene.relation]
    return [*(Scene(p, scene.relation) for p in pairs if p[0] != p[1]), *(Scene(scene.things, r) for r in relations)]


# Captions and drawing


def test_every_caption_is_parsed_back() -> None:
    """Truth: the scene itself. There are 36 of equal things and 4 x 12 x 11 pairs."""
    assert len(set(all_scenes())) == 36 + 4 * 132

    def check(parse) -> None:
        assert all(parse(scene.caption) == scene for scene in all_scenes())

    turned = {"above": "below", "below": "above"}
    accepts(
        check,
        parse_caption,
        upside_down=lambda text: parse_caption(" ".join(turned.get(word, word) for word in text.split())),
        one_each=lambda text: Scene(parse_caption(text).things[:1], parse_caption(text).relation),
    )
    assert parse_caption("  A red  circle ") == Scene((("red", "circle"),))


@pytest.mark.parametrize(
    "text",
    ["", "red circle", "a pink circle", "two red circle", "a red circles", "four red circles",
     "two red circles above a blue square", "a red circle near a blue square", "a red circle above a red circle"],
)  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no scene"):
        parse_caption(text)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_a_shape_covers_its_area_around_its_centre(shape: str) -> None:
    """Truth: area pi r^2 and the centroid at the centre, to the width of an edge."""
    cover = coverage(shape, torch.tensor([[15.3, 17.8]]), torch.tensor([6.0]))[0]
    at = torch.arange(32) + 0.5
    got = torch.stack([cover.sum(), (cover.sum(0) * at).sum() / cover.sum(), (cover.sum(1) * at).sum() / cover.sum()])
    close(got / torch.tensor([torch.pi * 36, 15.3, 17.8]), 1.0, atol=0.02, swapped=got[[0, 2, 1]] / got, shrunk=got * 0.9 / got)


# The program


def right(pictures: Tensor, scenes: list[Scene]) -> float:
    """Share of pictures that are their scene."""
    return sum(value == 1 for value in judge(pictures, scenes)) / len(scenes)


@pytest.mark.slow
def test_the_program_reads_what_was_drawn(pictures: Tensor) -> None:
    """Truth: the scene that was drawn; no scene that differs from it in one attribute passes for it."""
    g = seeded(1)

    def check(scenes: list[Scene]) -> None:
        assert right(pictures, scenes) >= 0.99

    def pick(scene: Scene) -> Scene:
        others = neighbours(scene)
        return others[int(torch.randint(len(others), (), generator=g))]

    accepts(check, SCENES, altered=[pick(scene) for scene in SCENES], shifted=SCENES[1:] + SCENES[:1])
    found = [read(picture) for picture in pictures.numpy()]
    assert all(score(f, other) < 1 for f, scene in zip(found, SCENES, strict=True) for other in neighbours(scene))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["noise", "blur", "pale"])
def test_the_program_reads_imperfect_pictures(pictures: Tensor, damage: str) -> None:
    """Truth: the scene that was drawn; pictures of nothing, or smeared beyond recognition, are no scene."""
    wide = F.avg_pool2d(pictures, 9, stride=1, padding=4, count_include_pad=False)
    damaged = {
        "noise": (pictures + 0.12 * torch.randn(pictures.shape, generator=seeded(2))).clamp(0, 1),
        "blur": F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False),
        "pale": 0.8 * pictures + 0.2,
    }[damage]

    def check(images: Tensor) -> None:
        assert right(images, SCENES) >= 0.95

    accepts(
        check, damaged, white=torch.ones_like(pictures), smeared=wide, static=torch.rand(pictures.shape, generator=seeded(3))
    )


def test_credit_for_parts() -> None:
    """Truth: the rule by hand: (1/2 colour + 1/2 shape) over the larger count; in a pair 3/4 of that, 1/4 for the relation."""
    circle, square = Detection("red", "circle", (16.0, 8.0), 80.0), Detection("blue", "square", (16.0, 24.0), 80.0)
    lump = Detection("red", None, (16.0, 24.0), 80.0)
    cases = [
        ([], "a red circle", 0.0),
        ([circle], "a red circle", 1.0),
        ([circle], "a blue circle", 0.5),
        ([circle], "a blue square", 0.0),
        ([lump], "a red circle", 0.5),
        ([circle, square], "a red circle", 0.5),
        ([circle], "three red circles", 1 / 3),
        ([circle, circle], "two red squares", 0.5),
        ([circle, square], "a red circle above a blue square", 1.0),
        ([square, circle], "a blue square below a red circle", 1.0),
        ([circle, square], "a red circle below a blue square", 0.75),
        ([circle, lump], "a red circle above a blue square", 0.375),
        ([circle, square, lump], "a red circle above a blue square", 0.75 * 2 / 3 + 0.25),
    ]
    got = torch.tensor([score(found, parse_caption(text)) for found, text, _ in cases])
    strict = (got == 1).float()
    close(
        got,
        [value for *_, value in cases],
        strict=strict,
        blind=torch.tensor([score([circle], parse_caption(t)) for _, t, _ in cases]),
    )


# Rewards and prompts


@pytest.mark.slow
def test_the_reward_is_the_program_and_may_be_strict(pictures: Tensor) -> None:
    """Truth: `judge`, and whether it is 1."""
    prompts = [scene.caption for scene in SCENES[1:] + SCENES[:1]]
    truth = torch.tensor(judge(pictures, [parse_caption(p) for p in prompts]))
    partial, strict = shapes.build(shapes.Config()), shapes.build(shapes.Config(correct=True))
    close(partial(pictures, prompts), truth, strict=strict(pictures, prompts))
    close(strict(pictures, prompts), (truth == 1).float(), partial=partial(pictures, prompts))
    assert not partial.differentiable


@pytest.mark.parametrize("build", [lambda: shapes.build(shapes.Config()), lambda: shapes_scorer.build(shapes_scorer.Config())])
@pytest.mark.parametrize(
    ("samples", "prompts", "said"),
    [
        (torch.zeros(1, 1, 32, 32), ["a red circle"], "expected floating images"),
        (torch.zeros(1, 3, 16, 16), ["a red circle"], "32x32"),
        (torch.full((1, 3, 32, 32), -1.0), ["a red circle"], r"\[0, 1\]"),
        (torch.zeros(1, 3, 32, 32), None, "give prompts"),
        (torch.zeros(2, 3, 32, 32), ["a red circle"], "each of the 2 samples"),
        (torch.zeros(1, 3, 32, 32), ["a cat"], "a cat"),
    ],
)
def test_rewards_refuse_what_they_cannot_judge(build, samples: Tensor, prompts: list[str] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build()(samples, prompts)


def test_the_prompt_sets_are_apart() -> None:
    """Truth: no trained prompt asks for a held-out thing, every unseen one does; together they have every colour."""
    sets = {
        name: [parse_caption(line) for line in prompt_sets()[name].read_text().splitlines()]
        for name in ("shapes", "shapes_unseen")
    }
    assert all(len(set(scenes)) == len(scenes) == 48 for scenes in sets.values())
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)

    def check(pair: tuple[list[Scene], list[Scene]]) -> None:
        seen, unseen = pair
        assert not any(set(scene.things) & set(HELD_OUT) for scene in seen)
        assert all(set(scene.things) & set(HELD_OUT) for scene in unseen)

    accepts(check, (sets["shapes"], sets["shapes_unseen"]), swapped=(sets["shapes_unseen"], sets["shapes"]))


# What is shipped


def test_only_small_safetensors_are_shipped() -> None:
    """No pickle, at most 6 MB, and how to make it again."""
    files = [path for path in nets.shipped().rglob("*") if path.is_file()]

    def small_and_safe(found: list[tuple[str, float]]) -> None:
        assert {suffix for suffix, _ in found} == {".safetensors", ".json", ".md"}
        assert sum(size for _, size in found) < 6e6

    found = [(path.suffix, float(path.stat().st_size)) for path in files]
    accepts(small_and_safe, found, pickle=[*found, (".pt", 1.0)], large=[*found, (".safetensors", 6e6)], no_readme=found[:1])
    assert "scoreaction.tasks.shapes.pretrain" in (nets.shipped() / "README.md").read_text(encoding="utf-8")


def test_each_of_our_words_is_one_token() -> None:
    """Truth: the words of a caption, between begin and end."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(nets.shipped() / "tokenizer")
    captions = [scene.caption for scene in all_scenes()]
    tokens = tokenizer(captions).input_ids

    def check(ids: list[list[int]]) -> None:
        assert all(len(row) == len(text.split()) + 2 for row, text in zip(ids, captions, strict=True))
        assert len({tuple(row) for row in ids}) == len(captions)

    accepts(check, tokens, spelt=tokenizer([" ".join(text.replace(" ", "")) for text in captions]).input_ids)


def in_plain_diffusers(prompts: list[str], *, guidance: float) -> Tensor:
    """What diffusers' own pipeline draws, in [0, 1]."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(nets.shipped(), torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompts, num_inference_steps=20, guidance_scale=guidance, output_type="pt", generator=seeded(0)).images


@pytest.mark.slow
def test_plain_diffusers_draws_what_prompts_ask_for_about_half_the_time() -> None:
    """Truth: the program. The base is made to follow 40 to 60 % of prompts; 96 pictures measure it to 5 %."""
    prompts = prompt_sets()["shapes"].read_text().splitlines() * 2
    scenes = [parse_caption(prompt) for prompt in prompts]
    drawn = in_plain_diffusers(prompts, guidance=1.0)

    def check(images: Tensor) -> None:
        assert 0.3 < right(images, scenes) < 0.7

    accepts(check, drawn, other_prompts=drawn.roll(1, 0), perfect=draw(scenes, seeded(0)))


def test_the_scorer_tells_right_from_wrong_but_not_always(pictures: Tensor) -> None:
    """Truth: the drawn scene outscores one that differs in a single attribute, most often; and its gradient reaches pixels."""
    reward = shapes_scorer.build(shapes_scorer.Config())
    g = seeded(5)
    wrong = [others[int(torch.randint(len(others), (), generator=g))] for others in map(neighbours, SCENES)]
    right_, wrong_ = (reward(pictures, [scene.caption for scene in scenes]) for scenes in (SCENES, wrong))
    assert float(right_.max()) <= 0

    def check(preferred: Tensor) -> None:
        assert 0.7 < float(preferred.float().mean()) < 1

    accepts(check, right_ > wrong_, swapped=right_ < wrong_, perfect=right_ <= 0)
    x = pictures[:2].clone().requires_grad_(True)
    reward(x, [scene.caption for scene in SCENES[:2]]).sum().backward()
    assert x.grad is not None
    assert bool((x.grad.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.slow
def test_the_scorer_can_be_exploited_and_the_program_is_not_fooled(pictures: Tensor) -> None:
    """Truth: the program. Climbing the scorer by its gradient makes wrong pictures right in its eyes, and in no others."""
    learned, exact = shapes_scorer.build(shapes_scorer.Config()), shapes.build(shapes.Config(correct=True))
    start = pictures[:16].clone()
    captions = [scene.caption for scene in SCENES[:16]]
    captions = captions[1:] + captions[:1]
    assert float(exact(start, captions).sum()) == 0

    x = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([x], lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        (-learned(x.clamp(0, 1), captions).sum()).backward()
        optimiser.step()

    def check(pictures: Tensor) -> None:
        assert float(learned(pictures, captions).median()) > -0.1
        assert float(exact(pictures, captions).mean()) < 0.2

    accepts(check, x.detach().clamp(0, 1), untouched=start, truly_right=pictures[:16].roll(-1, 0))


@pytest.mark.long
def test_training_repeats_itself(tmp_path: Path) -> None:
    """The same seed gives the same files, another seed does not."""
    from scoreaction.tasks.shapes.pretrain import main

    def digests(folder: str, seed: int) -> dict[str, str]:
        main(tmp_path / folder, seed=seed, vae_batches=1, batches=(1,) * 5, scorer_batches=1, pictures=64, scorer_pictures=64)
        found = sorted((tmp_path / folder).rglob("*.safetensors"))
        return {str(path.relative_to(tmp_path / folder)): sha256(path.read_bytes()).hexdigest() for path in found}

    first = digests("first", 0)
    assert len(first) == 4

    def check(again: dict[str, str]) -> None:
        assert again == first

    accepts(check, digests("again", 0), other_seed=digests("other", 1))


def test_captions_are_wrong_as_often_as_said() -> None:
    """Truth: a thing alone keeps its caption where colour, shape and count all stay: (1 - 0.25)^3, to 4 standard errors."""
    from scoreaction.tasks.shapes.pretrain import altered

    scene, n, g = parse_caption("two red circles"), 2000, seeded(0)

    def kept(chance: float) -> float:
        return sum(altered(scene, chance, g) == scene for _ in range(n)) / n

    p = 0.75**3
    close(kept(0.25), p, atol=4 * (p * (1 - p) / n) ** 0.5, each_alone=0.75, never=kept(0.0), more=kept(0.35))
