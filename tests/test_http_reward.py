"""Truth: the same reward in process, and the run that was never cut off. What comes back over HTTP is what the reward says."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import IMAGES, pretending, remote, serving
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.commands.train import run
from scoreaction.errors import Failed
from scoreaction.recipes.build import build_reward
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import CountedReward, Reward, RewardError, _wire, ink
from scoreaction.rewards import http as client
from scoreaction.types import Prompt

# The way there and back


@pytest.mark.parametrize("batch", [3, 10, 64])
def test_npy_is_exact_and_png_is_to_8_bits(batch: int) -> None:
    """Truth: the same reward in process. Mean brightness in 8 bits is off by at most half a step."""
    local = ink.build(ink.Config(unit=1.0))
    with serving(local) as server:
        exact = remote(server.url, batch=batch)(IMAGES, None)
        rounded = remote(server.url, batch=batch, format="png")(IMAGES, None)
        gray = remote(server.url, batch=batch, format="png")(IMAGES[:, :1], None)
    truth = local(IMAGES, None)
    close(exact, truth, atol=0.0, order=exact.flip(0), eight_bits=local((IMAGES * 255).round() / 255, None))
    close(rounded, truth, atol=0.5 / 255, order=rounded.flip(0), seven_bits=local((IMAGES * 127).floor() / 127, None))
    close(gray, local(IMAGES[:, :1], None), atol=0.5 / 255, colour=rounded)


def test_any_samples_prompts_and_metadata_reach_the_reward() -> None:
    """Truth: what a reward here is given."""
    seen: list[Any] = []

    def reward(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append([(str(p), p.metadata if isinstance(p, Prompt) else None) for p in prompts] if prompts else prompts)
        return samples.double().sum(1)

    vectors = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat", Prompt("zwei Hünde", metadata={"count": 2}), "a cat", "x"]
    with serving(reward) as server:
        close(remote(server.url)(vectors, prompts), vectors.sum(1), atol=1e-5, halved=vectors.sum(1) / 2)
        remote(server.url)(vectors, ["a", "b", "c", "d"])
        remote(server.url)(vectors, None)
    assert seen == [[("a cat", {}), ("zwei Hünde", {"count": 2}), ("a cat", {}), ("x", {})], [(p, None) for p in "abcd"], None]


@pytest.mark.slow
def test_questions_are_in_flight_while_later_samples_are_decoded() -> None:
    """Truth: a clock. Six parts, each decoded and then scored for 0.1 s, take half as long as one after the other."""

    def slow(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        time.sleep(0.1)
        return samples.sum(1)

    def decode(x0: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return 2 * x0

    def took(reward: Any) -> float:
        began = time.perf_counter()
        close(CountedReward(reward).begin_decoded(x, decode, None)(), 2 * x.sum(1), undecoded=x.sum(1) + 1)
        return time.perf_counter() - began

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    with serving(slow) as server:
        background = remote(server.url, batch=2)
        apart = took(Reward(lambda s, c: torch.cat([background(decode(part) / 2, None) for part in s.split(2)])))
        assert apart > 1.2

        def check(seconds: float) -> None:
            assert seconds < 0.75 * apart

        accepts(check, took(background), in_a_row=apart)


def test_questions_are_in_flight_while_later_trajectories_are_drawn() -> None:
    """Truth: the order of events, and the scores of the same samples in process. Four pieces of two trajectories."""
    events: list[str] = []

    def score(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        events.append("asked")
        return samples.sum(1)

    def collected(reward: Any) -> tuple[list[str], Any]:
        events.clear()
        model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
        predict = model.predict

        def slowly(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            events.append("predicted")
            return predict(*args, **kwargs)

        model.predict = slowly  # type: ignore[method-assign]
        tuner = sa.Finetuner(
            model, reward=reward, algorithm=sa.DDPO(), sampler=sa.Sampler(steps=3), train=sa.Train(iterations=1, batch=8)
        )
        rollout, _ = tuner._collect()
        return list(events), rollout

    with serving(score) as server:
        background = remote(server.url, batch=2)
        afterwards, _ = collected(lambda samples, prompts: background(samples, None))
        meanwhile, rollout = collected(background)
    x0 = rollout.x0
    close(rollout.rewards, x0.sum(1), atol=1e-5, in_another_order=x0.flip(0).sum(1))
    assert rollout.x.shape == (4, 8, 2)
    assert x0.unique(dim=0).shape == (8, 2), "each piece has noise of its own"

    def check(found: list[str]) -> None:
        last = max(i for i, event in enumerate(found) if event == "predicted")
        assert found[:last].count("asked") == 3

    accepts(check, meanwhile, afterwards=afterwards)


def test_every_row_is_counted_once() -> None:
    with serving(ink.build(ink.Config())) as server:
        counted = CountedReward(remote(server.url, batch=3))
        counted.begin_decoded(IMAGES, lambda x: x, None)()
    close(counted.queries, 10, atol=0, questions=4, padded=12, twice=20)


def test_parts_are_cut_to_what_the_server_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: the scores in process, and the sizes that arrive. Twin: a server that does not tell what it takes."""
    pictures = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    prompts = ["a" * (i % 5) for i in range(16)]
    size = len(_wire.question(pictures, prompts, form="npy"))
    truth = pictures.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

    def sizes(url: str, seen: list[int], **settings: Any) -> list[int]:
        seen.clear()
        close(remote(url, **settings)(pictures, prompts), truth, order=truth.flip(0))
        return sorted(seen)

    seen: list[int] = []

    def bright(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        seen.append(len(samples))
        return samples.mean((1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

    with serving(bright, max_bytes=size) as server:
        same(sizes(server.url, seen), [16], halves=[8, 8])
    with serving(bright, max_bytes=size - 1) as server:
        same(sizes(server.url, seen), [8, 8], whole=[16], single=[1] * 16)
        same(sizes(server.url, seen, batch=3), [1, 3, 3, 3, 3, 3], halves=[1] * 6 + [2] * 5)
        reward = remote(server.url)
        reward.servers[0].report = {}
        with pytest.raises(RewardError, match=r"bytes are too many, .* \(HTTP 413\)"):
            reward(pictures, prompts)
    with serving(bright, max_images=5) as server:
        same(sizes(server.url, seen), [4, 4, 4, 4], largest=[1, 5, 5, 5])
    monkeypatch.setattr(_wire, "LARGEST_QUESTION", pictures[:8].numel() - 1)
    with serving(ink.build(ink.Config())) as server:
        with pytest.raises(RewardError, match="16 pictures of 16 x 16 at once are too large"):
            remote(server.url, format="png")(pictures, None)
        monkeypatch.setattr(client, "LARGEST_QUESTION", pictures[:8].numel() - 1)
        assert remote(server.url, format="png")(pictures, None).shape == (16,)


# As a user has it


@pytest.mark.slow
def test_a_run_whose_server_goes_away_saves_its_state_and_goes_on(tmp_path: Path) -> None:
    """Truth: the run that was never cut off, line for line."""
    sizes = ["train.iterations=4", "train.batch=8", "evaluation.n=8", "evaluation.steps=2", "sampler.steps=3"]
    local = build_reward("linear", ["direction=[1, 0.5]"])
    dies: dict[str, int | None] = {"after": 2}

    def serve(i: int, body: bytes) -> tuple[int, bytes]:
        if dies["after"] is not None and i > dies["after"]:
            return 500, b'{"error": "the machine is gone"}'
        return 200, _wire.answer(local(*_wire.read_question(body, most=100)))

    def trained(folder: Path, *, resume: bool = False) -> list[dict[str, Any]]:
        with pretending(serve) as url:
            recipe = load_recipe("mixture", ["algorithm.name=ddpo", *sizes, f"reward={{name: http, url: '{url}', retries: 0}}"])
            _move(folder, url)
            run(recipe, folder, resume=resume)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Failed, match=r"the machine is gone \(HTTP 500\); the state after iteration 2 is saved"):
        trained(tmp_path / "cut")
    dies["after"] = None
    went_on, whole = trained(tmp_path / "cut", resume=True), trained(tmp_path / "whole")
    for metrics in (*went_on, *whole):
        del metrics["seconds"]
    assert went_on == whole
    assert went_on[2] != whole[3]


def test_a_reward_over_http_is_held_out_and_measured_like_any_other() -> None:
    """Truth: the same reward in process; measuring in parts, drawn while the ones before are scored, changes nothing."""
    from scoreaction.training.evaluation import measure

    model, local = sa.gaussian_mixture.build(sa.gaussian_mixture.Config()), build_reward("linear", ["direction=[1, 0.5]"])
    with serving(local) as server:
        far = remote(server.url, batch=7)

        def measured(judge: Any, chunk: int, seed: int = 0) -> list[float]:
            held_out = {"same": CountedReward(judge)}
            sampler = sa.Sampler(steps=3)
            found, _ = measure(model, sampler, CountedReward(judge), held_out, n=20, prompts=None, seed=seed, chunk=chunk)
            return [found[key] for key in ("reward", "reward_se", "held_out.same", "held_out.same_se")]

        truth = measured(local, 6)
        close(measured(far, 6), truth, atol=1e-5, other_samples=measured(far, 6, seed=1))
        close(measured(far, 20), measured(local, 20), atol=1e-5, other_samples=measured(far, 6, seed=1))


def _move(folder: Path, url: str) -> None:
    """The server has another port now: a recipe that is resumed is otherwise unchanged."""
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        recipe.write_text(re.sub(r"http://127.0.0.1:\d+", url, recipe.read_text()))
