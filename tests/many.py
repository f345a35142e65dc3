"""Runs that one process and many must train alike: `torchrun --nproc_per_node N tests/many.py FILE NAME ...` writes them.

A name is that of a case, or `TWIN: CASE`, the case in a world with that fault.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import scoreaction as sa
from scoreaction.diffusion.noise import RowNoise
from scoreaction.networks.labels import plain
from scoreaction.rewards._weighted import Part, WeightedSum
from scoreaction.rewards.keep_clusters import KeptShares
from scoreaction.tasks.clusters import Clusters
from scoreaction.world import World

PROMPTS = ["a", "b", "c", "d"]
ITERATIONS = 2


class Net(nn.Module):
    """A network with conditions; who builds it does not seed it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.body = nn.Sequential(nn.Linear(11, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x, t, cond):
        c = self.embed(torch.full((len(x),), 4) if cond is None else cond)
        return self.body(torch.cat([x, t[:, None], c], 1))


def conditional(lora_rank=None, labels=None):
    torch.manual_seed(5 + World.current().rank)  # each process begins elsewhere
    net, encode, null = Net(), lambda prompts: torch.tensor([PROMPTS.index(prompt) for prompt in prompts]), torch.tensor([4])
    if labels is not None:
        net = sa.LabelAdapter(net, at="body.0", labels=labels)
        encode, null = net.encode(encode), net.null(null)
    return sa.Model(net, process=sa.VP(), predicts="v", shape=(2,), null=null, lora_rank=lora_rank, encode=encode)


def mixture():
    torch.manual_seed(5 + World.current().rank)
    return sa.models.gaussian_mixture.build(sa.models.gaussian_mixture.Config())


def linear(x, prompts):
    return x[:, 0] + 0.5 * x[:, 1]


def prompted(x, prompts):
    texts = [plain(prompt) for prompt in prompts]
    scale = torch.tensor([(1.0 if text in ("a", "b") else -1.0) * (1.0 + PROMPTS.index(text)) for text in texts])
    return scale * x[:, 0] - 0.1 * (x**2).sum(1)


def one_by_one(x, prompts):
    """The linear reward of code that cannot score no sample at all."""
    return torch.stack([linear(row[None], None)[0] for row in x])


def rare(x, prompts):
    return (x[:, 0] > 1.2).float()


SMOOTH = sa.Reward(linear, differentiable=True)


def clusters(prompts=None):
    """Three clusters of points that every process draws alike."""
    points = 2 * torch.randn(120, 2, generator=torch.Generator().manual_seed(4))
    return Clusters.fit(points, 3, prompts=None if prompts is None else prompts * 30)


def clusters_file():
    """A file of them, in a folder of this process."""
    path = Path(tempfile.mkdtemp()) / "clusters.npz"
    clusters().write(path)
    return path


def case(
    algorithm, *, reward=linear, steps=10, prompts=None, lora=None, held_out=None, online=None, train=None, data=None,
    clustered=False, evaluation=None, **sampler
):  # fmt: skip
    """A run as a function of its folder, of settings of its training and, for those that must fail, of its reward."""
    settings = {"iterations": ITERATIONS, "batch": 64, "lr": 2e-3, "device": "cpu", **(train or {})}
    path = clusters_file if clustered else lambda: None
    return lambda output=None, other=None, **more: sa.Finetuner(
        mixture() if prompts is None else conditional(lora),
        reward=other or reward, algorithm=algorithm, sampler=sa.Sampler(steps=steps, **sampler),
        train=sa.Train(**settings | more), prompts=prompts, held_out=held_out, online=online,
        output=output, data=data,
        evaluation=sa.Evaluation(
            **{"n": 33, "steps": 5, "eta": 0.0 if algorithm.moves_noise else 1.0, "clusters": path()} | (evaluation or {})
        ),
    )  # fmt: skip


def table(algorithm):
    def tuner(output=None, other=None, **more):
        torch.manual_seed(5 + World.current().rank)
        model = sa.models.from_data.build(sa.models.from_data.Config(data="moons"))
        settings = {"iterations": ITERATIONS, "batch": 64, "lr": 2e-3, "device": "cpu"}
        return sa.Finetuner(
            model, reward=other or linear, algorithm=algorithm, sampler=sa.Sampler(steps=6), train=sa.Train(**settings | more),
            output=output,
        )  # fmt: skip

    return tuner


class Experts(nn.Module):
    """A network for early times and one for late ones: of few rows all may be of one, and the other has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = (nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)) for _ in range(2))

    def forward(self, x, t, cond):
        y, states = x.new_zeros(len(x), 2), torch.cat([x, t[:, None]], 1)
        for expert, here in ((self.late, t > 0.5), (self.early, t <= 0.5)):
            if here.any():
                y = y.index_put((here.nonzero().flatten(),), expert(states[here]))
        return y


def experts(output=None, other=None, **more):
    torch.manual_seed(5 + World.current().rank)
    settings = {"iterations": 3, "batch": 16, "lr": 1e-2, "device": "cpu"}
    return sa.Finetuner(
        sa.Model(Experts(), process=sa.VP(), predicts="v", shape=(2,)), reward=other or SMOOTH,
        algorithm=sa.ScoreAction(beta=0.5, rows=3, updates=6, critic_updates=2), sampler=sa.Sampler(steps=8),
        train=sa.Train(**settings | more), output=output,
    )  # fmt: skip


def asked(**more):
    return {"reward": prompted, "prompts": PROMPTS, "steps": 6, **more}


class Filler(nn.Module):
    """Logits of 4 positions and 3 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 12))

    def forward(self, x, t, cond):
        return self.body(nn.functional.one_hot(x, 4).flatten(1).float()).unflatten(1, (4, 3))


def drawn_pairs(shape, prompts, kind="pairs"):
    """Examples of any values, 40 of them: alike in every process."""
    generator = torch.Generator().manual_seed(3)
    better, worse = (torch.randn(40, *shape, generator=generator) for _ in range(2))
    if shape == (4,):
        better, worse = torch.arange(40)[:, None] % torch.tensor([3, 2, 3, 2]), (torch.arange(160) // 2 % 3).reshape(40, 4)
        worse[(better == worse).all(1)] = torch.tensor([2, 1, 0, 2])
    own = None if prompts is None else (prompts * 10)[:40]
    return sa.Samples(better, own) if kind == "samples" else sa.Pairs(better, worse, own)


def of_tokens(algorithm, data=None, **sampler):
    def tuner(output=None, other=None, **more):
        torch.manual_seed(5 + World.current().rank)
        model = sa.MaskedModel(Filler(), process=sa.Masking(3), length=4)
        settings = {"iterations": ITERATIONS, "batch": 64, "lr": 2e-3, "device": "cpu"}
        return sa.Finetuner(
            model, reward=other or (lambda x, prompts: (x[:, 0] == x[:, 1]).float() + 0.3 * x.sum(1)), algorithm=algorithm,
            sampler=sa.Sampler(**model.sampling | sampler), train=sa.Train(**settings | more), output=output, data=data,
        )  # fmt: skip

    return tuner


SUM = WeightedSum(
    [Part(SMOOTH, 1.0, True), Part(sa.Reward(lambda x, c: -((x[:, 0] - 1) ** 2), differentiable=True), 0.5, True)]
)
ONLINE = sa.Online(rounds=(64, 97), noise_std=0.1, members=3, hidden=8, proxy="ucb")
CASES = {
    "score_action": case(sa.ScoreAction(beta=0.5), reward=SMOOTH),
    "score_action, surrogate": case(sa.ScoreAction(beta=0.5)),
    "score_action, zeroth_order": case(sa.ScoreAction(beta=0.5, look_ahead="zeroth_order")),
    "score_action, likelihood_ratio": case(sa.ScoreAction(beta=0.5, estimator="likelihood_ratio", look_ahead="none")),
    "score_action, eta 0": case(sa.ScoreAction(beta=0.5, exploration=0.1), reward=SMOOTH, eta=0.0),
    "score_action, off below a time": case(sa.ScoreAction(beta=0.5), reward=SMOOTH, off_below=0.2),
    "score_action, prompts in parts": case(
        sa.ScoreAction(beta=0.5, kl_target=0.3), **asked(guidance=2.0, train={"max_rows": 7, "samples_per_prompt": 4})
    ),
    "score_action, taken back": case(sa.ScoreAction(beta=0.5), reward=SMOOTH, train={"lr": 0.3}),
    "score_action, experts": experts,
    "score_action, forward": case(sa.ScoreAction(beta=0.5, estimator="forward", averaging=0.5)),
    "ddpo": case(sa.DDPO(epochs=2)),
    "ddpo, few samples": case(
        sa.DDPO(),
        reward=one_by_one,
        train={"held_out_rows": 2, "batch": 16},
        held_out={"one_by_one": one_by_one},
        evaluation={"n": 2, "certificate": True, "beta": 0.5},
    ),
    "ddpo, prompts": case(sa.DDPO(baseline="prompt"), **asked(held_out={"linear": linear})),
    "ddpo, groups and lora": case(sa.DDPO(baseline="group"), **asked(lora=2, train={"samples_per_prompt": 8})),
    "dpok": case(sa.DPOK(beta=0.1), **asked()),
    "hrf": case(sa.HRF(branches=8), **asked(train={"samples_per_prompt": 16})),
    "hrf, signal": case(sa.HRF(branches=4, window={"kind": "signal"})),
    "score_action, windows": case(
        sa.ScoreAction(beta=0.5, estimator="likelihood_ratio", look_ahead="none", branches=4, window={"kind": "random"})
    ),
    "ddpo, hinted": case(
        sa.DDPO(baseline="group", ineffective={"do": "hint", "guidance": 6.0, "tries": 2}),
        **asked(reward=rare, train={"samples_per_prompt": 8}),
    ),
    "dpok, branched": case(
        sa.DPOK(baseline="group", ineffective={"do": "hint", "hint": "branch"}),
        **asked(reward=rare, train={"samples_per_prompt": 8, "iterations": 5}),
    ),
    "sqdf": case(sa.SQDF(beta=0.5), reward=SMOOTH),
    "sqdf, corrected": case(sa.SQDF(beta=0.5, correction=True, critic_rows=320), reward=SMOOTH),
    "sqdf, replay": case(
        sa.SQDF(beta=0.5, weights="chain", gamma=0.95, buffer=192, max_age=2, priority=0.6, importance=0.5), reward=SMOOTH
    ),
    "vard": case(sa.VARD(beta=0.5, critic_updates=16)),
    "q_learning": case(sa.QLearning(beta=0.5, critic_updates=16)),
    "q_learning, points": table(sa.QLearning(beta=0.5, critic_updates=16, points=64)),
    "pi_ft": case(sa.PIFT(beta=0.5), reward=SMOOTH),
    # at a larger rate it is chaotic: one process whose weights begin 1e-7 elsewhere is far away after ten iterations
    "adjoint_matching": case(sa.AdjointMatching(beta=0.5), reward=SMOOTH, train={"lr": 2e-4}),
    "a weighted sum": case(sa.ScoreAction(beta=0.5), reward=SUM),
    "draft": case(sa.DRaFT(beta=0.5, last=2), reward=SMOOTH),
    "draft, low variance": case(sa.DRaFT(low_variance=2), reward=SMOOTH),
    "ram": case(sa.RAM(beta=0.5), **asked(solver="dpmpp_2m", eta=0.0)),
    "nft": case(sa.NFT(), **asked(solver="dpmpp_2m", eta=0.0)),
    "awm": case(sa.AWM(), **asked(solver="dpmpp_2m", eta=0.0)),
    "refl": case(sa.ReFL(beta=0.5), reward=SMOOTH),
    "dpo": case(sa.DPO(rows=33, times=2), **asked(data=drawn_pairs((2,), PROMPTS))),
    "dpo, published": case(sa.DPO(weight="published", beta=20.0), data=drawn_pairs((2,), None)),
    "dpo, tokens": of_tokens(sa.DPO(rows=33), data=drawn_pairs((4,), None)),
    "spin": case(sa.SPIN(round=1, times=2, updates=4), **asked(data=drawn_pairs((2,), PROMPTS, "samples"))),
    "spin, tokens": of_tokens(sa.SPIN(round=1, updates=2), data=drawn_pairs((4,), None, "samples")),
    "hypernoise": case(sa.Hypernoise(), **asked(eta=0.0) | {"reward": sa.Reward(prompted, differentiable=True)}),
    "hypernoise, frobenius and lora": case(
        sa.Hypernoise(penalty="frobenius"),
        **asked(eta=0.0, lora=2, guidance=2.0, train={"max_rows": 7}) | {"reward": sa.Reward(prompted, differentiable=True)},
    ),
    "prompt_loop": case(
        sa.PromptLoop(menu={p: PROMPTS for p in PROMPTS}, at=[1.0, 0.5, 0.2], hidden=16), **asked(train={"max_rows": 7})
    ),
    "ddpp": of_tokens(sa.DDPP(rows=64)),
    "ddpp, weighted": of_tokens(sa.DDPP(rows=64, loss="weighted")),
    "ddpp, kl": of_tokens(sa.DDPP(rows=64, loss="kl")),
    "score_action, tokens": of_tokens(sa.ScoreAction()),
    "score_action, tokens by ratios": of_tokens(sa.ScoreAction(estimator="likelihood_ratio")),
    "dpok, late rewards": case(sa.DPOK(beta=0.1), **asked(train={"reward_delay": 1, "iterations": 3})),
    "hrf, tokens": of_tokens(sa.HRF(branches=4)),
    "dpok, tokens": of_tokens(sa.DPOK(), solver="ancestral", steps=3),
    "clusters": case(sa.DPOK(beta=0.1), reward=KeptShares(linear, clusters()), clustered=True),
    "clusters, prompts": case(sa.DPOK(beta=0.1), **asked(reward=KeptShares(prompted, clusters(PROMPTS)), clustered=True)),
    "online": case(sa.ScoreAction(beta=0.5), **asked(online=ONLINE)),
    "online, a weighted sum": case(sa.ScoreAction(beta=0.5), reward=WeightedSum(SUM.parts), online=ONLINE),
}


def repeated(world, own, total=None):
    """The own rows in the place of all processes'."""
    return own.repeat_interleave(world.size, 0)[:total]


def summed(world, parameters, figures, right=World.average_gradients):
    """Gradients that are the sum over processes."""
    parameters = list(parameters)
    figures = right(world, parameters, figures)
    for p in parameters:
        if p.grad is not None:
            p.grad *= world.size
    return figures


def by_place(noise, seed, rows, right=RowNoise.__init__):
    """Noise of a row's place in its process: the same on all of them."""
    right(noise, seed, torch.arange(len(rows)))


TWINS = {
    "own rows for all": lambda: patch.object(World, "gather", repeated),
    "own gradients": lambda: patch.object(World, "average_gradients", lambda world, parameters, figures: figures),
    "summed gradients": lambda: patch.object(World, "average_gradients", summed),
    "the same noise": lambda: patch.object(RowNoise, "__init__", by_place),
    "own figures": lambda: patch.object(World, "reduced", lambda world, values, how="mean": list(values)),
    "own weights": lambda: patch.object(World, "share", lambda world, tensors: None),
}


TEN = "ten iterations"


def trained(name):
    """The metrics and weights of a case; with `TWINS` or `TEN` before its name in such a world, or for so long."""
    before, _, known = name.rpartition(": ")
    with TWINS[before]() if before in TWINS else nullcontext():
        tuner = CASES[known](iterations=10) if before == TEN else CASES[known]()
        metrics = [{key: value for key, value in row.items() if key != "seconds"} for row in tuner]
    weights = torch.cat([p.detach().flatten() for p in tuner.model.parameters.values()])
    return {"metrics": metrics, "weights": weights.tolist()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    World.joined("cpu")
    runs = {name: trained(name) for name in sys.argv[2:]}
    if World.current().leads:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(runs, file)
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter is taken down, once in hundreds of runs
