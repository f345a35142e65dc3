"""Groups without a reward, skipped, drawn again or hinted: four prompts of a rare reward, at equal queries and evaluations.

    python -m benchmarks.hint           # results/hint.csv and its table; some ten minutes on one core

The four modes of the mixture, a prompt each. The reward is 1 further outwards than 2.2 standard deviations of the mode, else 0.
DDPO compares groups of 8 samples, 8 groups an iteration, 20 steps, until 8,000 rewards and 300,000 evaluations; the share of
4,096 samples that have the reward is measured at both. Three seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, run_jobs
from torch import nn

NAMES, FAR = ["east", "west", "north", "south"], " and far"
MEANS, STD, BEYOND = [[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]], 0.3, 2.2
QUERIES, EVALUATIONS = 8_000, 300_000
FORMS: dict[str, dict[str, Any]] = {
    "skip": {},
    "resample": {"do": "resample"},
    "guidance": {"do": "hint", "hint": "guidance"},
    "prompt": {"do": "hint", "hint": "prompt"},
    "prompt, no weight": {"do": "hint", "hint": "prompt", "weight": "none"},
    "branch": {"do": "hint", "hint": "branch"},
}


class Conditional(nn.Module):
    """The exact v of a prompt's mode (or of one further out, or of all four), plus a perceptron that begins at 0."""

    def __init__(self) -> None:
        import scoreaction as sa
        from scoreaction.diffusion.mixtures import Mixture
        from scoreaction.networks.layers import VectorNet

        super().__init__()
        self.process = sa.VP()
        means = torch.tensor(MEANS, dtype=torch.float64)
        covariance = STD**2 * torch.eye(2, dtype=torch.float64)
        laws = [mean[None] for mean in [*means, *(1.2 * means)]] + [means]
        self.laws = [Mixture(torch.ones(len(law)), law, covariance.expand(len(law), 2, 2)) for law in laws]
        self.change = VectorNet(self.process, 2, 2, hidden=64, condition=len(laws))
        nn.init.zeros_(self.change.last.weight)
        nn.init.zeros_(self.change.last.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        from scoreaction.diffusion.predictions import expand, from_prediction

        t, exact = t.double(), torch.zeros_like(x)
        for number in cond.unique().tolist():
            rows = cond == number
            prediction = self.laws[number].prediction(self.process, x[rows], t[rows])
            exact[rows] = from_prediction(self.process, "v", t[rows], prediction).to(x)
        one_hot = nn.functional.one_hot(cond, len(self.laws)).to(x)
        return exact - expand(self.process.sigma(t), x) * self.change(x, t, one_hot)


def encode(prompts: list[Any]) -> torch.Tensor:
    """The numbers of the laws: a mode's, and that further out."""
    return torch.tensor([NAMES.index(str(p).removesuffix(FAR)) + 4 * str(p).endswith(FAR) for p in prompts])


def beyond(samples: torch.Tensor, prompts: list[Any]) -> torch.Tensor:
    """1 beyond 2.2 standard deviations outwards from the middle of the prompt's mode."""
    means = samples.new_tensor([MEANS[NAMES.index(str(prompt))] for prompt in prompts])
    outwards = means / means.norm(dim=1, keepdim=True)
    return ((samples * outwards).sum(1) > 2.0 + BEYOND * STD).float()


def trained(form: str, seed: int) -> Figures:
    """A run of a form, and the share of samples with the reward at the budget of queries and at that of evaluations."""
    import scoreaction as sa
    from scoreaction.training.evaluation import measure_kl

    torch.manual_seed(seed)
    model = sa.Model(
        Conditional(), process=sa.VP(), predicts="v", shape=(2,), encode=encode, null=torch.tensor([8])
    )  # fmt: skip
    prompts = [sa.Prompt(name, metadata={"hint": name + FAR}) for name in NAMES]
    tuner = sa.Finetuner(
        model, reward=beyond, algorithm=sa.DDPO(baseline="group", ineffective=FORMS[form]), sampler=sa.Sampler(steps=20),
        train=sa.Train(iterations=400, batch=64, samples_per_prompt=8, lr=5e-4, seed=seed, device="cpu", schedule="constant"),
        prompts=prompts, evaluation=sa.Evaluation(n=4096, steps=20),
    )  # fmt: skip

    def measured(metrics: dict[str, Any]) -> Figures:
        drawn = sa.sample(model, n=4096, steps=20, prompts=prompts, seed=99)
        share = beyond(drawn, prompts * 1024).mean()
        kl = measure_kl(model, tuner.sampler, 1024, prompts, 7)["kl_nats"]
        costs = {"queries": metrics["reward_queries"], "evaluations": metrics["model_evaluations"]}
        return {"success": float(share), "kl_nats": kl, **costs}

    base = beyond(sa.sample(model, n=4096, steps=20, prompts=prompts, seed=99), prompts * 1024).mean()
    out: Figures = {"success_base": float(base), "by_queries": {}, "by_evaluations": {}}
    dead, hints, curve = [], [], []
    for metrics in tuner:
        dead.append(metrics["dead_groups"])
        hints += [metrics[key] for key in ("hint_kl_nats",) if key in metrics]
        curve.append({"queries": metrics["reward_queries"], "reward": metrics["reward_mean"], "dead": dead[-1]})
        if not out["by_queries"] and metrics["reward_queries"] >= QUERIES:
            out["by_queries"] = measured(metrics)
        if not out["by_evaluations"] and metrics["model_evaluations"] >= EVALUATIONS:
            out["by_evaluations"] = measured(metrics)
        if out["by_queries"] and out["by_evaluations"]:
            break
    first = sum(dead[:10]) / len(dead[:10])
    return {**out, "dead_first": first, "hint_kl_nats": sum(hints) / len(hints) if hints else None, "curve": curve}


if __name__ == "__main__":
    run_jobs(
        trained,
        {f"{form}/seed{seed}": {"form": form, "seed": seed} for form in FORMS for seed in range(3)},
        arguments(__doc__ or "", "hint").parse_args(),
    )
