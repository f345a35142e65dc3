"""Prompts chosen on the way: coloured shapes and a line where the best choice is known, at equal queries.

    python -m benchmarks.prompt_loop           # results/prompt_loop.csv and its table; some six minutes on one core

line: data N(m, 1.2) for each of four prompts, the reward -(x - 0.4)^2/2, the prompt of m = -0.5 with all four as its menu,
decisions at t = 1, 0.5 and 0.2, beta 0.05; 15,360 queries. blind: x0_hat is hidden. shapes: the 48 prompts of the set with
four texts each (itself; the other way round, or twice where it is of one kind; without its relation, or without its count; its
shapes named twice), decisions at t = 1, 0.55, 0.36 and 0.2, beta 0.02; 1,024 queries. fixed: the text of the best mean reward
for as many queries, told from the start; fixed by prompt: that of each prompt. Three seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, run_jobs
from torch import Tensor, nn

MEANS, VARIANCE, TARGET, OWN, LINE_STEPS, LINE_N = (-1.5, -0.5, 0.5, 1.5), 1.2, 0.4, "-0.5", 24, 16_384
LINE_ITERATIONS, LINE_BATCH = 60, 256
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
STEPS, BATCH, QUERIES, N = 12, 64, 1024, 192
SHAPES = ("circle", "square", "triangle", "circles", "squares", "triangles")


class Line(nn.Module):
    """The exact v of N(m, 1.2), m the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        import scoreaction as sa

        alpha, sigma = sa.VP().alpha(t.double())[:, None], sa.VP().sigma(t.double())[:, None]
        p, rest = alpha**2 * VARIANCE + sigma**2, x.double() - alpha * cond.double()[:, None]
        x0, eps = cond.double()[:, None] + alpha * VARIANCE * rest / p, sigma * rest / p
        return (alpha * eps - sigma * x0).to(x)


def on_a_line(seed: int) -> Figures:
    """The prompt itself, the best fixed one, and the policy with and without a look at x0_hat: mean reward and KL."""
    import scoreaction as sa

    prompts = [str(mean) for mean in MEANS]
    points: list[Figures] = []

    def model(looks: bool = True) -> Any:
        return sa.Model(
            Line(), process=sa.VP(), predicts="v", shape=(1,), encode=lambda texts: torch.tensor([float(p) for p in texts]),
            features=None if looks else lambda samples: 0 * samples,
        )  # fmt: skip

    def reward(x: Tensor, texts: Any) -> Tensor:
        return -0.5 * (x[:, 0] - TARGET) ** 2

    def drawn(made: Any, n: int, seed: int, prompt: str = OWN) -> Tensor:
        return reward(sa.sample(made, n=n, steps=LINE_STEPS, prompts=[prompt], seed=seed), None).double()

    plain = model()
    spent = LINE_ITERATIONS * LINE_BATCH // len(prompts)
    best = max(prompts, key=lambda prompt: float(drawn(plain, spent, seed, prompt).mean()))
    for form, rewards in (("plain", drawn(plain, LINE_N, 99)), ("fixed", drawn(plain, LINE_N, 99, best))):
        points.append({"task": "line", "form": form, "reward": float(rewards.mean()), "kl_choice_nats": None})
    for form in ("prompt_loop, blind", "prompt_loop"):
        tuner = sa.Finetuner(
            model(form == "prompt_loop"), reward=reward, prompts=[OWN],
            algorithm=sa.PromptLoop(menu={OWN: prompts}, at=[1.0, 0.5, 0.2], beta=0.05, hidden=32),
            sampler=sa.Sampler(steps=LINE_STEPS),
            train=sa.Train(iterations=LINE_ITERATIONS, batch=LINE_BATCH, lr=0.03, seed=seed, device="cpu"),
        )  # fmt: skip
        list(tuner)
        points.append(
            {"task": "line", "form": form, "reward": float(drawn(tuner.model, LINE_N, 99).mean()), **_kl(tuner, 4096)}
        )
    return {"curve": points}


def _kl(tuner: Any, n: int) -> Figures:
    from scoreaction.training.evaluation import measure_kl

    return {"kl_choice_nats": measure_kl(tuner.model, tuner.sampler, n, tuner.prompts, 7)["kl_choice_nats"]}


def texts_of(prompt: str) -> list[str]:
    """The menu of a prompt of the set."""
    from scoreaction.tasks.shapes.scenes import Scene, parse_caption

    scene = parse_caption(prompt)
    doubled = " ".join(f"{word} {word}" if word in SHAPES else word for word in prompt.split())
    if scene.relation is None:
        return [prompt, f"{prompt} {prompt}", prompt.split(" ", 1)[1], doubled]
    first, second = scene.things
    return [
        prompt,
        Scene((second, first), OPPOSITE[scene.relation]).caption,
        f"a {' '.join(first)} a {' '.join(second)}",
        doubled,
    ]


class Shapes:
    """The coloured shapes with the menu of each prompt, and the reward of what is drawn."""

    def __init__(self) -> None:
        from scoreaction.models import shapes
        from scoreaction.recipes.prompts import prompt_list
        from scoreaction.rewards import shapes as program

        self.prompts: list[Any] = prompt_list("shapes") or []
        self.menu = {str(prompt): texts_of(prompt) for prompt in self.prompts}
        self.reward, self.model = program.build(program.Config()), shapes.build(shapes.Config())

    def scored(self, n: int, seed: int, entry: int | None = None) -> Tensor:
        """Rewards (n,) of the model, whose policy chooses, or which is told an entry of the menu."""
        import scoreaction as sa

        asked = [self.prompts[i % len(self.prompts)] for i in range(n)]
        texts = asked if entry is None else [self.menu[str(prompt)][entry] for prompt in asked]
        return torch.as_tensor(self.reward(sa.sample(self.model, n=n, steps=STEPS, prompts=texts, seed=seed), asked)).double()


def fixed_texts(seed: int) -> Figures:
    """Shapes: the prompt itself, and the best text of all prompts and of each."""
    task, count = Shapes(), 4
    tried = torch.stack([task.scored(QUERIES // count, seed, entry) for entry in range(count)])
    fresh = torch.stack([task.scored(N, 99, entry) for entry in range(count)])
    number = torch.arange(max(N, QUERIES // count)) % len(task.prompts)
    sums = torch.stack([torch.zeros(len(task.prompts)).double().index_add(0, number[: tried.shape[1]], row) for row in tried])
    best = sums.argmax(0)[number[:N]]
    forms = {"plain": fresh[0], "fixed": fresh[int(tried.mean(1).argmax())], "fixed by prompt": fresh[best, torch.arange(N)]}
    return {"curve": [_point(form, rewards) for form, rewards in forms.items()]}


def chosen_texts(seed: int) -> Figures:
    """Shapes: the policy before and after training."""
    import scoreaction as sa

    task = Shapes()
    tuner = sa.Finetuner(
        task.model, reward=task.reward, prompts=task.prompts, sampler=sa.Sampler(steps=STEPS),
        algorithm=sa.PromptLoop(menu=task.menu, at=[1.0, 0.55, 0.36, 0.2], beta=0.02, epochs=8),
        train=sa.Train(
            iterations=QUERIES // BATCH, batch=BATCH, samples_per_prompt=8, lr=3e-3, seed=seed, device="cpu", max_rows=256
        ),
    )  # fmt: skip
    before = _point("prompt_loop, untrained", task.scored(N, 99))
    list(tuner)
    return {"curve": [before, _point("prompt_loop", task.scored(N, 99)) | _kl(tuner, 48)]}


def _point(form: str, rewards: Tensor) -> Figures:
    share = float((rewards > 0.999).double().mean())
    return {"task": "shapes", "form": form, "reward": float(rewards.mean()), "followed": share}


PARTS = {"line": on_a_line, "shapes-fixed": fixed_texts, "shapes-loop": chosen_texts}


def measured(part: str, seed: int) -> Figures:
    """One part of the benchmark at one seed."""
    return PARTS[part](seed)


if __name__ == "__main__":
    jobs = {f"{part}-seed{seed}": {"part": part, "seed": seed} for seed in range(3) for part in PARTS}
    run_jobs(measured, jobs, arguments(__doc__ or "", "prompt_loop").parse_args())
