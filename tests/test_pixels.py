"""Truth: the shipped classifiers, which were trained on other pictures of the same digits; closed forms of the losses."""

import math

import pytest
import torch
from twins import accepts, close, same
from typer.testing import CliRunner

import scoreaction as sa
from scoreaction.models import pixels
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import legibility
from scoreaction.tasks.digits.networks import judge, reward_classifier
from scoreaction.tasks.digits.pixels import (
    LENGTH,
    LEVELS,
    LOSSES,
    NETWORKS,
    NO_CLASS,
    PixelsNet,
    command,
    to_images,
    tokens_and_labels,
)


@pytest.mark.slow
def test_four_levels_are_read_as_the_digits_are():
    """By the reward's classifier and the judge, 99 % and 96 %. Twins: two levels; a picture on its side."""
    tokens, labels = tokens_and_labels()
    same((tuple(tokens.shape), int(tokens.max())), ((1797, LENGTH), LEVELS - 1), sixteen=((1797, LENGTH), 16))
    tokens, labels = tokens[::4], labels[::4]

    def reads(tokens):
        with torch.no_grad():
            images = to_images(tokens)
            assert 0 <= float(images.min()) <= float(images.max()) <= 1
            right = [(net(images).argmax(1) == labels).float().mean() for net in (reward_classifier(), judge())]
        assert float(right[0]) > 0.985, right
        assert float(right[1]) > 0.95, right

    turned = tokens.view(-1, 8, 8).transpose(1, 2).flatten(1)
    accepts(reads, tokens, two_levels=(tokens > 1) * 3, on_its_side=turned)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_losses_of_even_tokens_are_log_4(loss):
    """And half of it where the net gives the right token probability 1/2. Twins: a sum over positions; one level more."""
    tokens = tokens_and_labels()[0][:32]

    class Knows(torch.nn.Module):
        def __init__(self, right):
            super().__init__()
            self.logits = torch.nn.functional.one_hot(tokens, LEVELS) * math.log(3 * right / (1 - right))

        def forward(self, x, t, cond):
            assert x.shape == tokens.shape
            assert bool((x == LEVELS).any(1).all()), "a row without a mask teaches nothing"
            return self.logits

    def of(right):
        return float(loss(Knows(right), tokens, torch.zeros(32, dtype=torch.long), torch.Generator().manual_seed(0)))

    close(of(0.25), math.log(4), atol=1e-5, summed=LENGTH * math.log(4), five=math.log(5))
    close(of(0.5), math.log(2), atol=1e-5, even=of(0.25))


def test_the_network_takes_classes_and_none():
    net = PixelsNet()
    torch.nn.init.normal_(net.body.last.weight, std=0.1)
    x = torch.full((3, LENGTH), LEVELS)
    out = net(x, torch.ones(3), torch.tensor([1, 2, NO_CLASS]))
    close(net(x, torch.ones(3), None), out[2].expand(3, -1, -1), atol=1e-6, of_a_class=out[:1].expand(3, -1, -1))


@pytest.mark.slow
def test_the_shipped_samples_are_legible():
    """Half of them are read as their prompt, by a judge that also knows "not a digit". Twins: other prompts; even tokens."""
    model = pixels.build(pixels.Config())
    prompts = [str(digit) for digit in range(10)] * 8
    images = sa.sample(model, n=80, prompts=prompts)
    score = legibility.build(legibility.Config(correct=True))

    def reads(images, prompts=prompts):
        assert float(score(images, prompts).mean()) > 0.5, float(score(images, prompts).mean())

    even = to_images(torch.randint(0, LEVELS, (80, LENGTH), generator=torch.Generator().manual_seed(0)))
    accepts(reads, images, of_other_prompts=images.roll(1, 0), even=even)


@pytest.mark.slow
def test_the_recipe_trains_and_reports_what_nobody_trains_on(tmp_path):
    small = ["train.iterations=1", "train.batch=10", "evaluation.n=10", "algorithm.rows=16", "algorithm.updates=1"]
    tuner = build(load_recipe("pixels", small), tmp_path / "run")
    list(tuner)
    summary = tuner.summary()
    assert {"reward_tuned", "diversity_tuned", "kl_nats"} <= summary.keys()
    assert any("legibility" in key for key in summary), summary.keys()
    same((tuner.sampler.solver, tuner.sampler.steps), ("one_by_one", 64), continuous=("ddim", 50))


@pytest.mark.long
def test_the_retraining_command_writes_what_the_model_loads(tmp_path):
    """Of both networks, and the causal one is sampled from left to right. Twin: the other network's file."""
    for name in NETWORKS:
        done = CliRunner().invoke(command, ["--output", str(tmp_path), "--network", name, "--batches", "2"])
        assert done.exit_code == 0, done.output
    config = pixels.Config(network="causal", path=tmp_path)
    model = pixels.build(config)
    same(pixels.suited(config)["sampler"]["solver"], "left_to_right", random="one_by_one")
    assert sa.sample(model, n=2, prompts=["3", "4"]).shape == (2, 1, 16, 16)
    (tmp_path / "causal.safetensors").write_bytes((tmp_path / "masked.safetensors").read_bytes())
    with pytest.raises(ValueError, match="^path: .* has no causal.safetensors of this network; write one"):
        pixels.build(config)


REFUSED = {
    "path: no weights of a causal network are shipped": {"network": "causal"},
    "path: /nowhere has no masked.safetensors": {"path": "/nowhere"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_missing_weights_are_refused_with_the_command_that_makes_them(message):
    with pytest.raises(ValueError, match=f"^{message}.*write one with python -m scoreaction.tasks.digits.pixels"):
        pixels.build(pixels.Config(**REFUSED[message]))
