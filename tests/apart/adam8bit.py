"""train.optimizer adam8bit with bitsandbytes: its states are bytes, it learns as Adam does, and a run resumes exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from twins import accepts, close

import scoreaction as sa


class Net(nn.Module):
    """Large enough that bitsandbytes keeps 8 bits: it leaves tensors under 4,096 numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.body(torch.cat([x, t[:, None]], 1))


def tune(optimizer: str, output: Path | None = None, iterations: int = 4) -> sa.Finetuner:
    model = sa.Model(Net(), process=sa.VP(), predicts="eps", shape=(2,))
    train = sa.Train(iterations=iterations, batch=64, lr=3e-3, optimizer=optimizer, device="cpu", checkpoint_every=2)
    return sa.Finetuner(
        model, reward=lambda samples, _: samples[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(steps=4), train=train,
        output=output,
    )  # fmt: skip


def weights(tuner: sa.Finetuner) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in tuner.model.parameters.values()])


def test_its_states_are_bytes_and_it_learns_as_adam_does() -> None:
    """Truth: where 32-bit Adam goes from the same start; another learning rate is the twin."""
    runs = {name: tune(name, iterations=10) for name in ("adam", "adam8bit")}
    start = weights(runs["adam"]).clone()
    for tuner in runs.values():
        list(tuner)
    moved = {name: weights(tuner) - start for name, tuner in runs.items()}

    def check(states: list[dict[str, Any]]) -> None:
        assert any(value.dtype == torch.uint8 for state in states for value in state.values() if torch.is_tensor(value))

    states = {name: list(tuner.optimisation.optimisers["policy"].state.values()) for name, tuner in runs.items()}
    accepts(check, states["adam8bit"], plain=states["adam"])
    length = float(moved["adam"].norm())
    close((moved["adam8bit"] - moved["adam"]).norm() / length, 0.0, atol=0.35, opposite=2.0, still=1.0)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = tune("adam8bit", tmp_path / "whole")
    list(whole)
    for metrics in tune("adam8bit", tmp_path / "cut"):
        if metrics["iteration"] == 3:
            break
    second = tune("adam8bit", tmp_path / "cut")
    assert second.resume()
    assert second.iteration == 2
    list(second)
    close(weights(second), weights(whole), atol=0, moments_lost=weights(fresh(tmp_path / "cut2")))


def fresh(folder: Path) -> sa.Finetuner:
    """The same run whose optimiser forgets its moments after two iterations."""
    tuner = tune("adam8bit", folder)
    for metrics in tuner:
        if metrics["iteration"] == 2:
            tuner.optimisation.optimisers["policy"].state.clear()
    return tuner
