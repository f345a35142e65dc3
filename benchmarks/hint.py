"""Groups without a reward, skipped, drawn again or hinted, at equal queries and evaluations.

    python -m benchmarks.hint                    # results/hint.csv and its tables; some 25 minutes on one core
    python -m benchmarks.hint --only modes       # some two minutes

modes: the four modes of the mixture, a prompt each; the reward is 1 further outwards than 1.6 standard deviations of the mode,
else 0. DDPO compares groups of 8 samples, 8 groups an iteration, 10 steps, until 1,920 rewards and 40,000 evaluations; the
share of 4,096 samples that have the reward is measured at both. shapes: the reward is 1 for a picture that is its prompt's
scene, as the program reads it; groups of 8 of the 48 prompts, 12 steps, 640 rewards and 18,000 evaluations, the share of 480
pictures. Three seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs
from torch import nn

NAMES, FAR = ["east", "west", "north", "south"], " and far"
MEANS, STD, BEYOND = [[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]], 0.3, 1.6
N, STEPS, PICTURES = 4096, 10, 480
BUDGETS = {
    "modes": {"reward_queries": 1_920, "model_evaluations": 40_000},
    "shapes": {"reward_queries": 640, "model_evaluations": 18_000},
}
FORMS: dict[str, dict[str, Any]] = {
    "skip": {},
    "resample": {"do": "resample"},
    "guidance": {"do": "hint", "hint": "guidance"},
    "prompt": {"do": "hint", "hint": "prompt"},
    "prompt, no weight": {"do": "hint", "hint": "prompt", "weight": "none"},
    "branch": {"do": "hint", "hint": "branch"},
}
ON_SHAPES = ("skip", "resample", "guidance")
SHAPES = ["algorithm={name: ddpo, baseline: group, minibatches: 4}", "sampler.grid=scheduler", "reward.correct=true",
          "train.samples_per_prompt=8", "train.batch=64", "train.lr=3e-3", "train.iterations=400", "train.schedule=constant",
          "sampler.guidance=1"]  # fmt: skip


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
    """1 beyond 1.6 standard deviations outwards from the middle of the prompt's mode."""
    means = samples.new_tensor([MEANS[NAMES.index(str(prompt))] for prompt in prompts])
    outwards = means / means.norm(dim=1, keepdim=True)
    return ((samples * outwards).sum(1) > 2.0 + BEYOND * STD).float()


def trained(task: str, seed: int) -> Figures:
    """Every form at one seed, and the untrained model: a point each, at the budget of queries and at that of evaluations."""
    tuner_of, measured = (_tuner, _measured) if task == "modes" else (_on_shapes, _followed)
    points: list[Figures] = [{"form": "base", "budget": "", **measured(tuner_of("skip", seed))}]
    for form in FORMS if task == "modes" else ON_SHAPES:
        tuner, hints, left = tuner_of(form, seed), [], dict(BUDGETS[task])
        for metrics in tuner:
            hints += [metrics[key] for key in ("hint_kl_nats",) if key in metrics]
            for budget in [key for key, value in left.items() if metrics[key] >= value]:
                del left[budget]
                costs = {"hint_kl_nats": sum(hints) / len(hints) if hints else None, "dead_groups": metrics["dead_groups"]}
                points.append({"form": form, "budget": budget, **measured(tuner), **costs})
            if not left:
                break
    return {"task": task, "curve": points}


def _tuner(form: str, seed: int) -> Any:
    """A run of a form, which nothing has been drawn of yet."""
    import scoreaction as sa

    torch.manual_seed(seed)
    null = torch.tensor([2 * len(NAMES)])
    model = sa.Model(Conditional(), process=sa.VP(), predicts="v", shape=(2,), encode=encode, null=null)
    train = sa.Train(iterations=400, batch=64, samples_per_prompt=8, lr=1e-3, seed=seed, device="cpu", schedule="constant")
    algorithm, sampler = sa.DDPO(baseline="group", ineffective=FORMS[form]), sa.Sampler(steps=STEPS)
    prompts = [sa.Prompt(name, metadata={"hint": name + FAR}) for name in NAMES]
    return sa.Finetuner(model, reward=beyond, algorithm=algorithm, sampler=sampler, train=train, prompts=prompts)


def _measured(tuner: Any) -> Figures:
    """The share of samples with the reward, and the KL to the pretrained model."""
    import scoreaction as sa
    from scoreaction.training.evaluation import measure_kl

    samples = sa.sample(tuner.model, n=N, steps=STEPS, prompts=tuner.prompts, seed=99)
    share = beyond(samples, tuner.prompts * (N // len(NAMES))).mean()
    return {"success": float(share), "kl_nats": measure_kl(tuner.model, tuner.sampler, 512, tuner.prompts, 7)["kl_nats"]}


def _on_shapes(form: str, seed: int) -> Any:
    """The same of shapes."""
    ineffective = [f"algorithm.ineffective.{key}={value}" for key, value in FORMS[form].items()]
    return built("shapes", *SHAPES, *ineffective, f"train.seed={seed}")


def _followed(tuner: Any) -> Figures:
    """The share of pictures that are their prompt's scene, and the KL to the pretrained model."""
    from scoreaction.training.evaluation import measure, measure_kl

    figures, _ = measure(tuner.model, tuner.sampler, tuner.reward, {}, n=PICTURES, prompts=tuner.prompts, seed=99)
    kl = measure_kl(tuner.model, tuner.sampler, PICTURES // 2, tuner.prompts, 7)
    return {"success": figures["reward"], "kl_nats": kl["kl_nats"]}


if __name__ == "__main__":
    jobs: dict[str, Figures] = {f"{task}/seed{seed}": {"task": task, "seed": seed} for task in BUDGETS for seed in range(3)}
    run_jobs(trained, jobs, arguments(__doc__ or "", "hint").parse_args())
