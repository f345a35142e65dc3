"""Clustering a recipe's samples, or data: the clusters' file and how even they are."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoreaction.commands.progress import SECONDS, say
from scoreaction.disk import check_writable
from scoreaction.errors import UserError, nearest
from scoreaction.networks.features import Features
from scoreaction.networks.model import Model
from scoreaction.recipes.build import build
from scoreaction.recipes.data_files import read_data
from scoreaction.recipes.recipe import Recipe
from scoreaction.rewards._images import check_range, is_images
from scoreaction.sampling.draw import spread_prompts, x0_in_parts
from scoreaction.tasks.clusters import Clusters, cluster_entropy
from scoreaction.tasks.files import read_arrays
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Pairs, Values
from scoreaction.world import World

ROWS = 256
"""Samples that are drawn and decoded at a time."""
METHODS = ("kmeans", "sinkhorn")
KEYS = ("k", "at", "time", "noises", "features")
"""Settings of clusters that refusals name, which are options here."""


@dataclass(frozen=True)
class Source:
    """The samples that are clustered, n of the model's own or those of a file, and the features they are compared in."""

    n: int = 2000
    data: Path | None = None
    features: str = "samples"
    at: str | None = None
    time: float = 0.05
    noises: int = 4

    def chosen(self) -> Features:
        """The features; ValueError where the settings do not go together."""
        return Features(self.features, self.at, self.time, self.noises)  # type: ignore[arg-type]


def find_clusters(recipe: Recipe, path: Path, source: Source, *, k: int, method: str, seed: int, title: str) -> Values:
    """Writes k clusters of the source's samples into an .npz, and gives their figures. UserError for whatever is wrong.

    The model's samples are drawn by the sampler of the evaluation, with the recipe's prompts.
    """
    if path.suffix != ".npz":
        raise UserError(f"--output: {path} must be the name of an .npz file")
    if method not in METHODS:
        raise UserError(f"--method: unknown method {method!r}; {nearest(method, METHODS)}")
    check_writable(path.parent, "--output")
    world = World.joined(recipe.train.device)
    try:
        features = source.chosen()
        run = build(recipe, rewards=False) if source.data is None or features.kind != "samples" else None
        if run is not None:
            features.check(run.model)
        samples, x0, prompts = _drawn(run, source.n, seed, title) if source.data is None and run else _read(source, run)
        say(title, f"clustering {len(samples):,} samples by {method}")
        clusters = Clusters.fit(
            samples, k, features=features, model=None if run is None else run.model, x0=x0, method=method, seed=seed,
            drawn=source.data is None, prompts=prompts,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(_as_option(str(error))) from error
    if world.leads:
        clusters.write(path)
    return figures_of(clusters, source) | {"method": method}


def _as_option(message: str) -> str:
    return f"--{message}" if message.partition(":")[0] in KEYS else message


def _drawn(run: Finetuner, n: int, seed: int, title: str) -> tuple[Tensor, Tensor, list[str] | None]:
    """Samples of the pretrained model, the same before decoding, and their prompts."""
    say(title, f"drawing {n:,} samples")
    prompts, sampler, own, last = spread_prompts(run.prompts, n), run.evaluation.sampler(run.sampler), [], time.monotonic()
    with torch.no_grad():
        rows = run.world.stripe(n)
        for part, x0 in x0_in_parts(run.model, sampler, prompts, seed, rows, reference=True, chunk=ROWS):
            own.append(x0)
            if time.monotonic() - last >= SECONDS:
                last = time.monotonic()
                say(title, f"drawing: {int(part[-1]) + 1:,} of {n:,}")
        x0 = run.world.gather(torch.cat(own), n)
        samples = torch.cat([run.model.decode(part) for part in x0.split(ROWS)])
    return samples.cpu(), x0, None if prompts is None else [str(prompt) for prompt in prompts]


def _read(source: Source, run: Finetuner | None) -> tuple[Tensor, Tensor | None, list[str] | None]:
    """Samples of the file, before decoding where the network is asked, and their prompts."""
    assert source.data is not None
    data = read_data(source.data, key="--data")
    if isinstance(data, Pairs):
        raise UserError(f"--data: {source.data} holds pairs; give samples")
    samples = data.samples.float() if data.samples.is_floating_point() else data.samples
    if samples.dtype == torch.uint8 and samples.ndim == 4:
        samples = samples.float() / 255
    if is_images(samples):
        check_range(samples, where="--data")
    model: Model | None = None if run is None else run.model
    x0 = model.clean(samples) if model is not None and source.features == "net" else None
    return samples, x0, None if data.prompts is None else [str(prompt) for prompt in data.prompts]


def figures_of(clusters: Clusters, source: Source) -> Values:
    """Shares of the clusters and their entropy; of data with labels also their agreement."""
    entropy, error = cluster_entropy(clusters.counts)
    shares = (clusters.counts / clusters.counts.sum()).tolist()
    figures: Values = {"k": len(clusters), "samples": len(clusters.samples), "features": clusters.features.kind}
    figures |= {"shares": shares, "cluster_entropy": entropy, "cluster_entropy_se": error}
    if source.data is not None and source.data.suffix == ".npz":
        labels = read_arrays(source.data, "labels").get("labels")
        if labels is not None and labels.shape == (len(clusters.samples),):
            numbers = {label: number for number, label in enumerate(sorted(set(labels.tolist())))}
            figures |= agreement(clusters.labels, torch.tensor([numbers[label] for label in labels.tolist()]))
    return figures


def agreement(clusters: Tensor, labels: Tensor) -> Values:
    """`purity`, the share of samples that have the commonest label of their cluster, and `nmi`, `2 I/(H + H)`; (n,) each.

    >>> agreement(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
    {'purity': 1.0, 'nmi': 1.0}
    """
    table = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    table.index_put_((clusters, labels), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    joint, own, other = (cluster_entropy(counts)[0] for counts in (table.flatten(), table.sum(1), table.sum(0)))
    both = own + other
    return {"purity": float(table.amax(1).sum() / table.sum()), "nmi": 2 * (both - joint) / both if both else 1.0}


def lines_of(figures: Values) -> str:
    """The figures in two lines, three where labels are known.

    >>> known = {"k": 2, "samples": 40, "method": "kmeans", "features": "samples", "shares": [0.25, 0.75]}
    >>> print(lines_of(known | {"cluster_entropy": 0.5623, "cluster_entropy_se": 0.07}))
    2 clusters of 40 samples by kmeans, compared as samples: shares from 25 % to 75 %
    entropy 0.562 ± 0.070 nats of at most 0.693: 1.75 effective clusters
    """
    shares, entropy = figures["shares"], figures["cluster_entropy"]
    lines = [
        f"{figures['k']} clusters of {figures['samples']:,} samples by {figures['method']}, compared as {figures['features']}:"
        f" shares from {100 * min(shares):.3g} % to {100 * max(shares):.3g} %",
        f"entropy {entropy:.3f} ± {figures['cluster_entropy_se']:.3f} nats of at most {math.log(figures['k']):.3f}:"
        f" {math.exp(entropy):.3g} effective clusters",
    ]
    if "purity" in figures:
        lines.append(f"with the labels of the data: purity {figures['purity']:.3f}, NMI {figures['nmi']:.3f}")
    return "\n".join(lines)
