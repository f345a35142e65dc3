"""Control with delay on Pendulum-v1 of gymnasium: a model of recorded windows, trained as any table, beside a predictor.

    python -m benchmarks.control         # results/control.csv and its table; some fifteen minutes on one core

The policy that records swings the pendulum up by its energy and holds it by feedback. It sees states 8 steps late and adds
noise, so that within a window of 8 steps or fewer no action depends on a state after the first. One recording makes all: a
model of windows of the delay, by what `scoreaction pretrain` runs; a one-step predictor, by least squares; a critic Q(s, a), by
fitted Q-iteration. Each controller acts in five episodes of 200 steps with the same starts. Nothing is seen in the first d
steps of an episode, and the torque is 0 there, for all. Two seeds, each with a recording and starts of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _harness import Figures, arguments, run_jobs
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Act = Callable[[Tensor, list[float], int], float]
"""The torque for a state (cos, sin, speed) of d steps ago, the d torques since, and the number of the step."""

DELAYS, LATEST, LIMIT = (0, 1, 2, 4, 8), 8, 2.0
EPISODES, STEPS, SEEDS = 5, 200, 2
RECORDED, LENGTH, NOISE, PERSISTS = 2500, 40, 1.5, 0.8
"""Episodes of the recording, from any angle and speed, and the deviation and correlation of the torque's noise."""
WINDOWS: dict[str, Any] = {"process": "cosine", "width": 128, "check_every": 500}
STEERING: dict[str, Any] = {"std": 0.05, "choices": 32, "bounds": (-LIMIT, LIMIT)}
COSTS = {0: (256, 20), 1: (128, 20), 2: (256, 20), 4: (512, 50), 8: (512, 50)}
"""Particles and steps by delay."""
FEWER = ((64, 5), (512, 5), (64, 20))
"""Particles and steps that leave fewer actions to choose from, tried at a delay of 0."""
BATCHES = {0: 2000, 1: 2000, 2: 2000, 4: 4000, 8: 8000}
"""Of training by delay: the longer a window, the longer until its states follow from its torques."""
DISCOUNT, SWEEPS, TORQUES, DRAWN = 0.97, 120, 9, 500


def swing_up(state: Tensor) -> float:
    """Energy where the pendulum hangs, feedback where it stands."""
    cos, sin, speed = state.tolist()
    angle = math.atan2(sin, cos)
    if abs(angle) < 0.6:
        torque = -10 * angle - 2.5 * speed
    else:
        torque = -speed * (speed**2 / 6 + 5 * cos - 5) if abs(speed) > 0.01 else LIMIT
    return min(max(torque, -LIMIT), LIMIT)


class Pendulum:
    """Pendulum-v1 with states as tensors and torques as numbers."""

    def __init__(self) -> None:
        import gymnasium

        self.env: Any = gymnasium.make("Pendulum-v1").unwrapped

    def reset(self, seed: int, **options: float) -> Tensor:
        """The first state; options: the largest angle and speed, x_init and y_init."""
        return torch.as_tensor(self.env.reset(seed=seed, options=options)[0]).float()

    def step(self, torque: float) -> tuple[Tensor, float]:
        """The next state, and the reward."""
        state, reward, *_ = self.env.step(np.array([torque]))
        return torch.as_tensor(state).float(), float(reward)


def recording(seed: int) -> tuple[Tensor, Tensor]:
    """Pairs of states and torques (episodes, LENGTH, 4) by the policy that sees LATEST steps late, and rewards."""
    env, noise = Pendulum(), np.random.default_rng(seed)
    pairs, rewards = torch.empty(RECORDED, LENGTH, 4), torch.empty(RECORDED, LENGTH)
    for episode in range(RECORDED):
        state, extra = env.reset(1_000_000 * (seed + 1) + episode, x_init=math.pi, y_init=8.0), 0.0
        for step in range(LENGTH):
            extra = PERSISTS * extra + NOISE * math.sqrt(1 - PERSISTS**2) * noise.standard_normal()
            late = swing_up(pairs[episode, step - LATEST, :3]) if step >= LATEST else 0.0
            torque = min(max(late + extra, -LIMIT), LIMIT)
            pairs[episode, step] = torch.tensor([*state.tolist(), torque])
            state, rewards[episode, step] = env.step(torque)
    return pairs, rewards


def windows(pairs: Tensor, delay: int, seed: int) -> Any:
    """The model of windows, as `scoreaction pretrain` makes it of an .npz."""
    from scoreaction.training.pretraining import Pretrain, Pretrainer

    rows = pairs.unfold(1, delay + 1, 1).transpose(2, 3).flatten(2).flatten(0, 1)  # each first step of each episode
    with TemporaryDirectory() as folder:
        data = Path(folder) / "windows.npz"
        np.savez(data, rows=rows.numpy())
        pretrainer = Pretrainer(Pretrain(data=data, seed=seed, batches=BATCHES[delay], **WINDOWS))
    for _ in pretrainer:
        pass
    return pretrainer.model()


class Scaled(nn.Module):
    """A perceptron of states and torques in units of their spread, its outputs in units of the targets'."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        super().__init__()
        sizes = [inputs.shape[1], 64, 64, targets.shape[1]]
        layers = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*layers[:-1])
        self.units = nn.ParameterList([inputs.mean(0), inputs.std(0), targets.mean(0), targets.std(0)]).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        centre, spread, mean, scale = self.units
        return mean + scale * self.body((x - centre) / spread)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean square error in units of the targets' spread."""
        return ((self(x) - y) / self.units[3]).square().mean()


def transitions(pairs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States and torques (n, 4), the states after (n, 3), the rewards (n, 1)."""
    return pairs[:, :-1].flatten(0, 1), pairs[:, 1:, :3].flatten(0, 1), rewards[:, :-1].reshape(-1, 1)


def predictor(x: Tensor, after: Tensor) -> nn.Module:
    """The change of the state in a step, by least squares."""
    from scoreaction.tasks.fitting import Fit

    y = after - x[:, :3]
    fit = Fit(Scaled(x, y), batches=1500, lr=3e-3, decay=0.998)
    for _ in range(fit.batches):
        rows = torch.randint(len(x), (512,))
        fit.step(fit.net.loss(x[rows], y[rows]))
    return fit.average


def best(critic: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
    """The largest Q over a grid of torques at states (n, 3), and the torque, (n,) each."""
    grid = torch.linspace(-LIMIT, LIMIT, TORQUES)
    every = torch.cat([states.repeat_interleave(TORQUES, 0), grid.repeat(len(states))[:, None]], 1)
    value, index = critic(every).view(len(states), TORQUES).max(1)
    return value, grid[index]


def fitted_q(x: Tensor, after: Tensor, rewards: Tensor) -> nn.Module:
    """Q(s, a) of the best policy: `Q <- r + discount max_b Q(s', b)`, b of a grid, by sweeps over parts of the recording."""
    critic = Scaled(x, rewards / (1 - DISCOUNT))
    optimizer = torch.optim.Adam(critic.body.parameters(), lr=1e-3)
    for sweep in range(SWEEPS):
        rows = torch.randperm(len(x))[:20480]
        with torch.no_grad():
            later = best(critic, after[rows])[0][:, None] if sweep else torch.zeros(len(rows), 1)
        y = rewards[rows] + DISCOUNT * later
        for part in torch.cat([torch.randperm(len(rows)), torch.randperm(len(rows))]).split(512):
            optimizer.zero_grad()
            critic.loss(x[rows[part]], y[part]).backward()
            optimizer.step()
    return critic.requires_grad_(False)


def episode(act: Act, delay: int, start: int, *, late: bool = True) -> tuple[float, float]:
    """The return of 200 steps, and the CPU seconds of an action; with late=False the present state is seen."""
    env = Pendulum()
    states, torques, total, seconds = [env.reset(start)], [0.0] * delay, 0.0, 0.0
    for step in range(STEPS):
        torque = 0.0
        if step >= delay:
            began = time.process_time()
            torque = act(states[step - delay], torques[step:], step) if late else act(states[step], [], step)
            seconds += time.process_time() - began
        torques.append(torque)
        state, reward = env.step(torque)
        states.append(state)
        total += reward
    return total, seconds / (STEPS - delay)


def miss(rows: Tensor, present: Callable[[Tensor, list[float]], Tensor], spread: Tensor) -> float:
    """The root mean square, in deviations, from the last states of windows to what a predictor makes of their first ones."""
    ends = torch.stack([present(row[0, :3].float(), row[:-1, 3].tolist()) for row in rows])
    return float(((rows[:, -1, :3] - ends) / spread).square().sum(1).mean().sqrt())


def controlled(delay: int, seed: int, particles: int | None = None, steps: int | None = None) -> Figures:
    """Returns of every controller in each episode, the CPU time of an action, and how good windows and candidates are."""
    import scoreaction as sa

    torch.manual_seed(seed)
    pairs, rewards = recording(seed)
    x, after, r = transitions(pairs, rewards)
    critic, change = fitted_q(x, after, r), predictor(x, after)

    distinct: list[int] = []

    def judge(states: Tensor, actions: Tensor) -> Tensor:
        distinct.append(len(actions[:: len(actions) // STEERING["choices"]].unique()))
        return critic(torch.cat([states, actions], 1).float())[:, 0].double()

    def present(state: Tensor, torques: list[float]) -> Tensor:
        for torque in torques:
            with torch.no_grad():
                state = state + change(torch.cat([state, torch.tensor([torque])]))
        return state

    forms: dict[str, Act] = {
        "stale": lambda state, torques, step: swing_up(state),
        "predictor": lambda state, torques, step: swing_up(present(state, torques)),
        "predictor_critic": lambda state, torques, step: float(best(critic, present(state, torques)[None])[1]),
    }
    model = windows(pairs, delay, seed)
    many, often = (particles, steps) if particles and steps else COSTS[delay]
    controller = sa.DelayedController(model, judge, delay=delay, state=3, particles=many, steps=often, **STEERING)
    forms["windows"] = lambda state, torques, step: float(controller.act(state, torques, seed=step))
    drawn = sa.sample(model, n=DRAWN, steps=50, seed=seed).view(DRAWN, delay + 1, 4)
    recorded = pairs[:: RECORDED // DRAWN, LATEST : LATEST + delay + 1]
    figures = {name: miss(rows, present, x[:, :3].std(0)) for name, rows in (("drawn", drawn), ("recorded", recorded))}
    curve = []
    for start in range(1000 * seed, 1000 * seed + EPISODES):
        seen, _ = episode(lambda state, torques, step: swing_up(state), delay, start, late=False)
        point: Figures = {"delay": delay, "start": start, "present": seen}
        distinct.clear()
        for name, act in forms.items():
            point[name], seconds = episode(act, delay, start)
            point[f"{name}_ms"] = 1000 * seconds
        curve.append(point | {"distinct": sum(distinct) / len(distinct)})
    return {f"{name}_miss": value for name, value in figures.items()} | {"curve": curve}


if __name__ == "__main__":
    jobs = {f"d{delay}-seed{seed}": {"delay": delay, "seed": seed} for seed in range(SEEDS) for delay in DELAYS}
    jobs |= {f"d0-{many}x{often}": {"delay": 0, "seed": 0, "particles": many, "steps": often} for many, often in FEWER}
    run_jobs(controlled, jobs, arguments(__doc__ or "", "control").parse_args())
