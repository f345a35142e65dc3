"""Truth: counting by hand what each algorithm asks; every one on the shelf runs, stays finite and moves its parameters."""

import math

import pytest
import torch
from twins import close

import scoreaction as sa
from scoreaction.catalog import files, find
from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.models import digits, gaussian_mixture
from scoreaction.rewards import ink
from scoreaction.rewards._closed_form import QuadraticReward

SMALL = {
    "score_action": {"updates": 2, "rows": 16, "critic_updates": 2},
    "ddpo": {},
    "dpok": {},
    "hrf": {"branches": 2},
    "sqdf": {"updates": 2, "rows": 16, "buffer": 12},
    "q_learning": {"updates": 2, "rows": 16, "critic_updates": 2},
    "vard": {"updates": 2, "rows": 16, "critic_updates": 2},
    "pi_ft": {"stages": 2, "rows": 16, "critic_updates": 2},
    "adjoint_matching": {"updates": 2, "rows": 16},
    "draft": {"last": 2, "beta": 0.1, "rows": 16},
    "refl": {"beta": 0.1, "rows": 16},
    "ram": {"each": 2, "minibatches": 2},
    "nft": {"minibatches": 2},
    "awm": {"each": 2, "minibatches": 2},
    "dpo": {"times": 2, "updates": 2, "rows": 16},
    "spin": {"times": 2, "updates": 1, "round": 1},
    "hypernoise": {},
    "prompt_loop": {"menu": {"3": ["3", "8"], "a handwritten seven": ["7", "1"]}, "at": [1.0, 0.5]},
}
OF_PROMPTS = {"prompt_loop"}
"""Those that need them."""
SAMPLED = {"hypernoise": {"eta": 0.0}}
"""What an algorithm needs of its sampler."""


OF_TOKENS = {"ddpp"}
"""Those that learn nothing else."""


def test_every_algorithm_on_the_shelf_is_here():
    assert SMALL.keys() == files("algorithm").keys() - OF_TOKENS


def examples(algorithm, shape, prompts):
    """Data of any values in [0, 1] for what learns from it."""
    better, worse = torch.rand(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    own = None if prompts is None else (prompts * 2)[:4]
    return {"pairs": sa.Pairs(better, worse, own), "samples": sa.Samples(better, own)}.get(algorithm.learns_from)


def tuner(name, kind, *, off_below=0.0, **config):
    algorithm = find("algorithm", name, key="algorithm.name").Config(**SMALL[name] | config)
    train = sa.Train(iterations=2, batch=8, device="cpu", max_rows=10, lr=1e-3)
    sampling = {"off_below": off_below, **SAMPLED.get(name, {})}
    if kind.startswith("digits"):
        model = digits.build(digits.Config(lora_rank=2 if kind == "digits_lora" else None))
        reward, prompts = ink.build(ink.Config()), ["3", "a handwritten seven"]
        sampler = sa.Sampler(steps=3, guidance=2.0, **sampling)
    else:
        model = gaussian_mixture.build(gaussian_mixture.Config(process=kind))
        reward, prompts, sampler = QuadraticReward(Quadratic.linear([1.0, 0.5])), None, sa.Sampler(steps=4, **sampling)
    data = examples(algorithm, model.shape, prompts)
    return sa.Finetuner(model, reward=reward, algorithm=algorithm, sampler=sampler, train=train, prompts=prompts, data=data)


def runs(made):
    """Two iterations: all logged numbers finite, trained parameters moved, reference untouched."""
    before = {name: p.detach().clone() for name, p in made.model.parameters.items()}
    trained = {id(p) for p in made.model.parameters.values()}
    still = [p for p in made.model.reference_net.parameters() if id(p) not in trained]
    frozen = [p.detach().clone() for p in still]
    for metrics in made:
        numbers = [value for value in metrics.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers), metrics
        assert "skipped" not in metrics
    moved = [not torch.equal(before[name], p) for name, p in made.model.parameters.items()]
    assert sum(moved) > 0.5 * len(moved)
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters.values())
    assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))
    return metrics


@pytest.mark.parametrize("kind", ["vp", "flow", "ve"])
@pytest.mark.parametrize("name", [name for name in SMALL if name not in OF_PROMPTS])
def test_it_runs_on_a_mixture(name, kind):
    """ve: its last step has noise; flow: its first begins where alpha is 0."""
    runs(tuner(name, kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "digits") for name in SMALL] + [(name, "digits_lora") for name in ("sqdf", "adjoint_matching", "draft")],
)
def test_it_runs_on_digits_with_prompts(name, kind):
    """Guided, in pieces of ten rows, all weights or LoRA."""
    runs(tuner(name, kind))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("sqdf", {"weights": "chain", "gamma": 0.9, "x0_steps": 2, "priority": 1.0, "importance": 1.0, "max_age": 1}),
        ("sqdf", {"correction": True, "critic_updates": 2, "critic_rows": 32, "kl_target": 0.1}),
        ("vard", {"kl_to_go": False, "kl_target": 0.1}),
        ("score_action", {"estimator": "forward", "each": 2, "kl_target": 0.1, "averaging": 0.5, "errors": "own"}),
        ("dpo", {"weight": "published", "beta": 5000.0, "kl_target": 0.1}),
        ("draft", {"last": None, "gradient_checkpointing": True}),
        ("draft", {"last": 1, "low_variance": 2, "beta": 0.0}),
        ("adjoint_matching", {"trust": 1.0, "kl_target": 0.1}),
    ],
    ids=["published", "corrected", "vard", "forward", "constant", "checkpointed", "low_variance", "trust"],
)
@pytest.mark.parametrize("kind", ["vp", "flow"])
def test_its_options_run(name, config, kind):
    runs(tuner(name, kind, **config))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("ddpo", "dpok", "hrf", *OF_PROMPTS)])
def test_bfloat16_networks(name):
    made = tuner(name, "vp")
    made.model.autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    runs(made)


@pytest.mark.slow
def test_what_is_counted_is_what_was_asked():
    """8 trajectories of 4 steps: forward rows, backward rows and queries of one iteration, by hand."""
    B, N = 8, 4
    rolled = 2 * B * N  # the rollout, and the reference at all of its states
    logged = B * N + min(2, B) * N  # the reference at two states a step, for the log
    chain = {"weights": "chain", "buffer": 0}
    truths = {
        # an update of 16: reference, policy and soft Q; of the critic's eight: nothing but its own network
        ("sqdf", *chain.items()): (logged + 2 * 3 * 16, 2 * 2 * 16, B + 2 * 16),
        ("vard",): (rolled + 32, 32, B),
        ("adjoint_matching",): (rolled + 32, B * N + 32, B),  # the reference's own pass gives the adjoint
        ("draft", ("beta", 0.0)): (logged, 2 * B, B),  # the last two have their graph as they are drawn
        ("draft", ("beta", 0.0), ("last", 1), ("low_variance", 3)): (logged + 3 * B, 4 * B, B + 3 * B),
        ("draft", ("beta", 0.1)): (rolled + 16 + 2 * B, 16 + 3 * B, B),  # local KL; the reference of two steps
        ("refl", ("beta", 0.0)): (logged + B, B, 2 * B),
        # of the noised samples: policy and reference; the lagged policy too; policy before and after, and its average
        ("ram",): (logged + 2 * 2 * B, 2 * B, B),
        # the policy that sampled, its reference, and the policy as it is
        ("score_action", ("estimator", "forward"), ("each", 2)): (rolled + 3 * 2 * B, 2 * B, B),
        ("nft",): (logged + 3 * N * B, N * B, B),
        ("awm",): (logged + 3 * 2 * B, 2 * B, B),
        # of both samples of a pair, at two times: policy and reference, and the policy again
        ("dpo",): (logged + 2 * 3 * 4 * 16, 2 * 4 * 16, B),
        ("spin",): (logged + 3 * 4 * B, 4 * B, B),
        # f is two calls: to sample, with its Jacobian for the log, and to learn from; the generator once more, to differentiate
        ("hypernoise",): (2 * B + B * N + B * N + 2 * B + 2 * B, B * N + 2 * B + 2 * B, B),
        ("hypernoise", ("penalty", "frobenius")): (2 * B + 2 * B * N + 2 * B + 3 * 2 * B, B * N + 2 * B + 3 * 2 * B, B),
    }
    for (name, *config), truth in truths.items():
        made = tuner(name, "vp", **dict(config))
        found = next(iter(made))
        asked = [found[key] for key in ("model_evaluations", "model_backward_rows", "reward_queries")]
        close(asked, truth, atol=0, twice=[2 * n for n in truth])
    found = next(iter(tuner("pi_ft", "vp")))  # of a stage: two looks ahead with a gradient, then target and skip of the fit
    close(found["reward_queries"], B + 2 * (2 * 16 + 2 * 16), atol=0, one_stage=B + 4 * 16)
    # of a stage: the reference; twice a step ahead, its soft Q and two updates; a step ahead and its soft Q; none at the data
    stages, at_data = 2 * 16 * (1 + 2 * 4 + 2), 3 * 8
    close(found["model_evaluations"], logged + stages - at_data, atol=0, no_reference=logged + stages - at_data - 2 * 16)
    close(found["model_backward_rows"], 2 * 16 * 2 * 3 - 2 * 8, atol=0, policy_alone=2 * 16 * 2 * 2)
