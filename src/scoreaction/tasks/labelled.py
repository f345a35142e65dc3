"""Labelled samples of a user's own, and a calibrated classifier that is fitted on half of them."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scoreaction.tasks.files import array_names, read_arrays, read_picture
from scoreaction.tasks.fitting import convolutions

LEAST = 20
"""Samples that a label must have: ten to fit it on and ten to measure."""
BATCHES, ROWS, EVERY = 600, 256, 25
SIDE = 32
"""The most pixels a side that a classifier reads: fitting takes seconds for pictures of any size."""


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Samples (N, *shape) as rewards see them, the number of each one's label (N,), and the labels' names."""

    samples: Tensor
    labels: Tensor
    names: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> LabelledData:
        """Reads `samples` (N, *shape) and `labels` (N,) of an .npz, or the pictures of a folder with a labels.csv.

        labels are names, or integers from 0 on. labels.csv has the columns file and label. ValueError for whatever is wrong.
        """
        try:
            samples, labels = _pictures(path) if path.is_dir() else _arrays(path)
        except ValueError as error:
            raise ValueError(f"data: {error}") from error
        if labels.dtype.kind in "iu":
            names = [str(number) for number in range(int(labels.max(initial=-1)) + 1)]
            labels = labels.astype(str)
        else:
            names = sorted(set(labels.tolist()))
        number = {name: i for i, name in enumerate(names)}
        if unknown := sorted(set(labels.tolist()) - set(names)):
            raise ValueError(f"data: {path}: labels must be names, or integers from 0 on (got {unknown[0]})")
        data = cls(torch.from_numpy(samples).float(), torch.tensor([number[label] for label in labels.tolist()]), tuple(names))
        data.check()
        return data

    def check(self) -> None:
        """ValueError for fewer than two labels, and for a label with fewer than 20 samples."""
        if len(self.names) < 2:
            raise ValueError(f"data: must have two labels or more (got {list(self.names)})")
        for name, count in zip(self.names, torch.bincount(self.labels, minlength=len(self.names)).tolist(), strict=True):
            if count < LEAST:
                raise ValueError(f"data: label {name!r} has {count} samples; a label needs at least {LEAST}")

    def halves(self) -> tuple[LabelledData, LabelledData]:
        """Two halves with the same shares of the labels, always the same ones."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0))
        order = order[self.labels[order].argsort(stable=True)]
        return self._rows(order[::2]), self._rows(order[1::2])

    def _rows(self, rows: Tensor) -> LabelledData:
        return LabelledData(self.samples[rows], self.labels[rows], self.names)


def _arrays(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    arrays = read_arrays(path, "samples", "labels")
    if len(arrays) < 2:
        names = ", ".join(array_names(path)) or "none"
        raise ValueError(f"{path} must have the arrays samples (N, ...) and labels (N,) (has {names})")
    samples, labels = arrays["samples"], arrays["labels"]
    if samples.ndim < 2 or labels.shape != samples.shape[:1] or samples.dtype.kind not in "fiu":
        raise ValueError(f"{path}: samples {samples.shape} and labels {labels.shape} must have the same N")
    if labels.dtype.kind not in "iuU":
        raise ValueError(f"{path}: labels must be names or integers (got {labels.dtype})")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: samples must be finite")
    bytes_of_pictures = samples.ndim == 4 and samples.dtype == np.uint8
    return samples.astype(np.float32) / 255 if bytes_of_pictures else samples, labels


def _pictures(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    table = path / "labels.csv"
    if not table.is_file():
        raise ValueError(f"{path} has no labels.csv; write one with the columns file and label")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{table}: must be a table in UTF-8, with commas between its cells ({error})") from error
    if not rows or any(row.get(name) is None for row in rows for name in ("file", "label")):
        raise ValueError(f"{table}: must have the columns file and label, and both cells in the line of a picture")
    pictures = [read_picture(path / row["file"]) for row in rows]
    for row, picture in zip(rows, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise ValueError(f"{table}: {row['file']} is {picture.shape}, the first {pictures[0].shape}; make them alike")
    return np.stack(pictures), np.array([row["label"] for row in rows])


class LabelClassifier(nn.Module):
    """`p(y|x)` of samples (batch, *shape), vectors or pictures: a small network, and a temperature fitted apart from it.

    Pictures of more than 32 pixels a side are averaged down to 32.
    """

    mean: Tensor
    spread: Tensor
    temperature: Tensor

    def __init__(self, samples: Tensor, labels: int) -> None:
        super().__init__()
        samples = averaged_down(samples)
        axes = [0] if samples.ndim == 2 else [0, *range(2, samples.ndim)]
        self.register_buffer("mean", samples.mean(axes, keepdim=True))
        self.register_buffer("spread", samples.std(axes, keepdim=True).clamp(min=1e-6))
        self.register_buffer("temperature", torch.ones(()))
        if samples.ndim == 4:
            strides = [1 if max(samples.shape[2:]) <= 16 else 2, 2, 2]
            layers = [*convolutions([samples.shape[1], 32, 64, 64], strides), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
            width = 64 * 16
        else:
            width = samples[0].numel()
            layers = [nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, labels))

    def forward(self, samples: Tensor) -> Tensor:
        """`log p(y|x)`, (batch, labels), differentiable."""
        return (self.net((averaged_down(samples) - self.mean) / self.spread) / self.temperature).log_softmax(1)


def averaged_down(samples: Tensor) -> Tensor:
    """Pictures (batch, C, height, width) averaged down to at most 32 x 32; other samples, and smaller ones, as they are."""
    if samples.ndim != 4 or max(samples.shape[2:]) <= SIDE:
        return samples
    height, width = samples.shape[2:]
    return nn.functional.adaptive_avg_pool2d(samples, (min(SIDE, height), min(SIDE, width)))


def fitted(data: LabelledData, other: LabelledData) -> LabelClassifier:
    """A classifier fitted on `data`, stopped where the other half's log loss was least, and calibrated on that half.

    The temperature T divides the logits and minimises that loss (Guo et al. 2017, arXiv 1706.04599). Always the same one.
    """
    data, other = (replace(half, samples=averaged_down(half.samples)) for half in (data, other))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = LabelClassifier(data.samples, len(data.names))
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    generator, best = torch.Generator().manual_seed(0), (math.inf, net.state_dict())
    for batch in range(1, BATCHES + 1):
        rows = torch.randint(len(data.labels), (min(ROWS, len(data.labels)),), generator=generator)
        loss = nn.functional.nll_loss(net(data.samples[rows]), data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if batch % EVERY == 0:
            value = log_loss(net, other)
            if value < best[0]:
                best = value, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(best[1])
    net.temperature.copy_(temperature(net, other))
    return net.requires_grad_(False).eval()


@torch.no_grad()
def log_loss(net: LabelClassifier, data: LabelledData) -> float:
    """`-mean log p(y|x)` in nats."""
    every = torch.cat([net(part) for part in data.samples.split(1024)])
    return float(nn.functional.nll_loss(every, data.labels))


def temperature(net: LabelClassifier, data: LabelledData) -> Tensor:
    """The T > 0 that minimises the log loss of logits divided by it."""
    with torch.no_grad():
        logits = torch.cat([net(part) for part in data.samples.split(1024)]).double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits / log_t.exp(), data.labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_t.detach().exp().float()
