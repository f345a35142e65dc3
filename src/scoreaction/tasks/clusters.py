"""Clusters of samples: a file of them, the cluster of any sample, and how evenly samples fall into clusters."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoreaction.disk import whole
from scoreaction.networks.features import Features
from scoreaction.networks.model import Model
from scoreaction.tasks.clustering import balanced, kmeans
from scoreaction.tasks.files import read_arrays

LEAST = 20
"""Samples that each cluster must have on average."""
ARRAYS = ("samples", "labels", "centres", "offsets", "shift", "scale", "features", "drawn", "prompts")


def cluster_entropy(counts: Tensor) -> tuple[float, float]:
    """`H = -sum p_c log p_c` in nats of the shares p of counts (clusters,), and its standard error.

    The error is `sqrt((sum p log^2 p - H^2)/n)`, by the delta method; H of n samples is low by about (clusters - 1)/(2n).

    >>> round(cluster_entropy(torch.tensor([25, 25, 25, 25]))[0], 6)
    1.386294
    """
    n = int(counts.sum())
    p = counts.double() / n
    log = p.clamp(min=1e-300).log()
    entropy = -float((p * log).sum())
    return entropy, math.sqrt(max(float((p * log**2).sum()) - entropy**2, 0.0) / n)


@dataclass(frozen=True, eq=False)
class Clusters:
    """K clusters of samples (N, *shape): the cluster of x is `argmin_c ||(f(x) - shift)/scale - centre_c||^2 - offset_c`.

    f are `features`; centres (K, D), shift and scale (D,), and offsets (K,), 0 but for balanced clusters. labels (N,) are the
    clusters of the samples that they were made of, prompts (N,) theirs or None; drawn: these are draws of a model, not data.
    """

    samples: Tensor
    labels: Tensor
    centres: Tensor
    offsets: Tensor
    shift: Tensor
    scale: Tensor
    features: Features = Features()
    drawn: bool = True
    prompts: list[str] | None = None

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        k: int,
        *,
        features: Features | None = None,
        model: Model | None = None,
        x0: Tensor | None = None,
        method: str = "kmeans",
        seed: int = 0,
        drawn: bool = True,
        prompts: list[str] | None = None,
    ) -> Clusters:
        """k clusters of samples (N, *shape) as rewards see them, by `kmeans`, or of equal shares by `sinkhorn`.

        Features are brought to mean 0 and deviation 1, but those of pictures' own pixels and of tokens, which have one scale.
        ValueError for k below 2 or above N/20, samples that are not finite, and clusters that stay empty.

        >>> noise = torch.randn(80, 1, generator=torch.Generator().manual_seed(0))
        >>> Clusters.fit(noise + torch.tensor([[9.0], [-9.0], [9.0], [9.0]]).repeat(20, 1), 2).counts.sort().values.tolist()
        [20, 60]
        """
        if k < 2 or k * LEAST > len(samples):
            most = f"2 to {len(samples) // LEAST}, a {LEAST}th of the {len(samples)} samples"
            raise ValueError(f"k: must be {most} (got {k}); take more samples for more clusters")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("samples must be finite numbers")
        features = features or Features()
        if features.kind == "samples" and not samples.is_floating_point():
            features = Features(vocabulary=int(samples.max()) + 1)
        x = features.of(samples, model, x0).cpu()
        one_scale = features.kind == "samples" and (samples.ndim == 4 or not samples.is_floating_point())
        shift, scale = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        if not one_scale:
            shift, scale = x.mean(0), x.std(0)
            scale = torch.where(scale > 1e-6 * shift.abs().clamp(min=1e-6), scale, 1.0)
        x = (x - shift) / scale
        centres, offsets = (kmeans if method == "kmeans" else balanced)(x, k, seed=seed)
        clusters = cls(samples.cpu(), torch.empty(0), centres, offsets, shift, scale, features, drawn, prompts)
        return Clusters(**{**vars(clusters), "labels": clusters._nearest(x)})

    def __len__(self) -> int:
        return len(self.centres)

    @property
    def counts(self) -> Tensor:
        """Samples of each cluster, (K,), of those that the clusters were made of."""
        return self.labels.bincount(minlength=len(self))

    def check(self, samples: Tensor, model: Model) -> None:
        """ValueError where samples of that model, as rewards see them, have no such clusters."""
        if samples.shape[1:] != self.samples.shape[1:] or samples.is_floating_point() != self.samples.is_floating_point():
            own, got = tuple(self.samples.shape[1:]), tuple(samples.shape[1:])
            raise ValueError(f"clusters: are of samples of shape {own}, the model's are {got}; make them of this model's")
        self.features.check(model)

    @torch.no_grad()
    def assign(self, samples: Tensor, model: Model | None = None, x0: Tensor | None = None) -> Tensor:
        """The cluster of each sample (batch, *shape), (batch,); the model and x0 are needed for features of its own."""
        x = self.features.of(samples, model, x0)
        return self._nearest((x - self.shift.to(x)) / self.scale.to(x))

    def _nearest(self, x: Tensor) -> Tensor:
        parts = [torch.cdist(part, self.centres.to(x)).square() - self.offsets.to(x) for part in x.split(4096)]
        return torch.cat([part.argmin(1) for part in parts]) if len(x) else x.new_zeros(0, dtype=torch.long)

    def write(self, path: Path) -> None:
        """Writes an .npz, of numbers and texts alone; its `samples` and `labels` are what the reward `label` reads."""
        arrays: dict[str, NDArray[Any]] = {
            name: getattr(self, name).cpu().numpy() for name in ("samples", "labels", "centres", "offsets", "shift", "scale")
        }
        arrays |= {"features": np.array(json.dumps(asdict(self.features))), "drawn": np.array(self.drawn)}
        if self.prompts is not None:
            arrays["prompts"] = np.array(self.prompts)
        with whole(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Clusters:
        """The clusters of a file; ValueError, with the remedy, where it holds none."""
        try:
            arrays = read_arrays(path, *ARRAYS)
        except ValueError as error:
            raise ValueError(f"clusters: {error}") from error
        try:
            return _read(arrays)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"clusters: {path} holds no clusters; make them with scoreaction cluster") from error


def _read(arrays: dict[str, NDArray[Any]]) -> Clusters:
    """The clusters of a file's arrays; ValueError or KeyError where they do not go together."""
    numbers = {name: torch.from_numpy(arrays[name]) for name in ("centres", "offsets", "shift", "scale")}
    samples, labels, prompts = torch.from_numpy(arrays["samples"]), torch.from_numpy(arrays["labels"]), arrays.get("prompts")
    (k, d), n = numbers["centres"].shape, len(samples)
    shapes = {"offsets": (k,), "shift": (d,), "scale": (d,)}
    if any(tuple(numbers[name].shape) != shape for name, shape in shapes.items()) or labels.shape != (n,) or not n:
        raise ValueError("shapes")
    if not all(bool(value.isfinite().all()) and value.is_floating_point() for value in numbers.values()):
        raise ValueError("numbers")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= k:
        raise ValueError("labels")
    if prompts is not None and (prompts.shape != (n,) or prompts.dtype.kind != "U"):
        raise ValueError("prompts")
    features = Features(**cast("dict[str, Any]", json.loads(str(arrays["features"]))))
    texts = None if prompts is None else prompts.tolist()
    return Clusters(samples, labels.long(), **numbers, features=features, drawn=bool(arrays["drawn"]), prompts=texts)
