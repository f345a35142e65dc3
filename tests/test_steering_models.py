"""Truth: counts of evaluations and queries, and a reward that rises: digits, pipelines with guidance by prompts, servers."""

import pytest
import torch
from servers import remote, serving
from twins import accepts, same

import scoreaction as sa
from scoreaction.rewards import Reward, ink


def brightness(samples, prompts):
    return samples.flatten(1).mean(1)


BRIGHT = Reward(brightness, differentiable=True)


def brighter(model, **options):
    """Mean brightness of steered samples, and what they took."""
    result = sa.steer(model, BRIGHT, seed=0, **options)
    with torch.no_grad():
        return float(brightness(model.decode(result.x0), None).mean()), result.figures


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_pipelines_are_steered_under_guidance_by_prompts(name):
    """Each prompt's own particles, both halves of guidance counted, and gradients through the decoder.

    Stable Diffusion's table ends above sigma = 0: its last step has noise, and svdd chooses there too.
    """
    tiny = pytest.importorskip("tiny_pipelines")
    from scoreaction.models.pipelines.assemble import build_from_pipeline

    model = build_from_pipeline(tiny.build(name))
    model.prompts, halves = tiny.PROMPTS[:2], 2
    run = {"n": 2, "steps": 4, "guidance": 3.0, "beta": 0.002, "reference": True}
    plain = sa.sample(model, n=2, steps=4, guidance=3.0, seed=0, reference=True)
    for method, forward, backward, queries in (
        ("smc", 8, 0, 10),
        ("svdd", 7, 0, 8 if name == "sd" else 6),
        ("twisted", 8, 8, 10),
    ):
        _, figures = brighter(model, method=method, particles=2, **run)
        costs = [figures[f"{key}_per_sample"] for key in ("evaluations", "backward", "queries")]
        same(costs, [forward * halves, backward * halves, queries], half=[forward, backward, queries + 1])
    value, figures = brighter(model, method="guidance", **run)

    def rises(now):
        assert now > float(brightness(plain, None).mean())

    accepts(rises, value, darker=-value)
    same(figures["queries_per_sample"], 4.0, particles=8.0)


@pytest.mark.slow
def test_digits_and_a_reward_behind_a_server():
    """The same samples as with the reward at hand; the server is asked for a batch at a time, never for one sample."""
    from scoreaction.models import digits

    model = digits.build(digits.Config())
    local = ink.build(ink.Config(unit=1.0))
    options = {
        "n": 3,
        "method": "smc",
        "particles": 4,
        "beta": 0.02,
        "steps": 4,
        "prompts": ["3"],
        "reference": True,
    }
    asked = []

    class Counted:
        differentiable = False

        def __call__(self, samples, prompts):
            asked.append(len(samples))
            return local(samples, prompts)

    truth = sa.steer(model, local, seed=1, **options)
    with serving(Counted()) as server:
        served = sa.steer(model, remote(server.url, batch=6), seed=1, **options)

    def equal(found):
        assert torch.allclose(found.x0, truth.x0, atol=1e-5)

    accepts(equal, served, other_seed=sa.steer(model, local, seed=2, **options))
    same(sorted(set(asked[1:])), [6], one_by_one=[1])
