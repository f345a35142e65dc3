"""Pretraining: a small diffusion model of a user's own table or pictures, by denoising score matching."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from scoreaction.diffusion.kernel_density import KernelDensity, bandwidth
from scoreaction.diffusion.predictions import from_prediction
from scoreaction.diffusion.processes import PROCESSES
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.disk import staged
from scoreaction.errors import check_kind
from scoreaction.models.pretrained import DESCRIPTION, WEIGHTS, Description
from scoreaction.networks.model import Model
from scoreaction.sampling.draw import draw_x0
from scoreaction.sampling.sampler import Sampler
from scoreaction.settings import Settings
from scoreaction.tasks.data_files import read_data
from scoreaction.tasks.fitting import DenoiserFunction, Fit, denoised_share, noisy
from scoreaction.training.exact_task import sliced_w2
from scoreaction.training.identity import flattened
from scoreaction.types import Values

COMPARED = 1_000_000
"""Numbers of a table up to which a kernel density is compared with."""
TABLE_BATCH, PICTURE_BATCH = 512, 64
JUDGED = 1024
"""Noised held-out samples that the loss is measured on, always the same; a quarter of them for pictures."""


class Pretrain(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings of pretraining: the data, the size of the network, and how long it is trained.

    data: a table as .csv or .npz whose rows are samples, pictures in an .npz or a folder, or a table that ships (moons).
    array: which one of an .npz. size: pictures of a folder become squares of so many pixels. width: of the perceptron's layers
    for a table (256), or channels of the UNet for pictures (32); depth: layers of the perceptron. batch: by default 512 rows of
    a table or 64 pictures. held_out: share of the data that is never trained on; the weights with the lowest loss there are
    kept.
    """

    data: Path
    array: str | None = None
    size: int = Field(32, ge=4, le=1024, multiple_of=4)
    process: Literal["vp", "cosine", "flow"] = "vp"
    width: int | None = Field(None, ge=8, le=4096)
    depth: int = Field(3, ge=1, le=100)
    batches: int = Field(5000, ge=1)
    batch: int | None = Field(None, ge=1)
    lr: float = Field(2e-3, gt=0)
    ema: float = Field(0.998, ge=0, lt=1)
    held_out: float = Field(0.1, gt=0, le=0.5)
    check_every: int = Field(100, ge=1, description="batches between measurements of the held-out loss")
    checkpoint_every: int = Field(500, ge=1, description="batches between checkpoints")
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"


class Pretrainer:
    """Trains a model of data on `E ||v - net(alpha x0 + sigma eps, t)||^2`, `v = alpha eps - sigma x0`, t uniform in (0, 1].

    That is denoising score matching (Ho et al. 2020, arXiv 2006.11239) with the weight of v (Salimans and Ho 2022, arXiv
    2202.00512). Iterate over it, one dict of metrics a batch: `loss`, and every `check_every` batches `held_out_loss`, of
    the averaged weights on data that is never trained on, as a share of the mean square of v: 1 is a network that knows
    nothing. A table's columns are brought to mean 0 and deviation 1, pictures to [-1, 1]. ValueError for data that is none.

    >>> pretrainer = Pretrainer(Pretrain(data="moons", batches=2, width=8, check_every=2))
    >>> [sorted(metrics) for metrics in pretrainer]
    [['batch', 'loss'], ['batch', 'held_out_loss', 'loss']]
    >>> pretrainer.model().shape
    (2,)
    """

    def __init__(self, settings: Pretrain, *, device: torch.device | str = "cpu") -> None:
        check_kind("settings", settings, Pretrain, "sa.Pretrain(data='table.csv')")
        self.settings, self.device = settings, torch.device(device)
        data = read_data(settings.data, settings.array, settings.size)
        self.digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        self.generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(data), generator=self.generator)
        count = max(1, round(settings.held_out * len(data)))
        self.decode = Rescale.of(self._varied(data[order[count:]])) if data.ndim == 2 else None
        x0 = (2 * data - 1 if self.decode is None else self.decode.inverse(data)).float()
        self.left_out, self.data = x0[order[:count]], x0[order[count:]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.described = self._description(tuple(x0.shape[1:]))
            net = self.described.network().to(self.device)
        self.batch = settings.batch or (TABLE_BATCH if self.decode is not None else PICTURE_BATCH)
        self.process = PROCESSES[settings.process]()
        self.fit = Fit(net, batches=settings.batches, lr=settings.lr, decay=settings.ema)
        self.best, self.best_loss, self.best_batch = self.fit.average, math.inf, 0
        self.log: list[Values] = []
        rows = torch.arange(JUDGED if self.decode is not None else JUDGED // 4) % count
        self.judged = noisy(self.process, self.left_out[rows].to(self.device), torch.Generator().manual_seed(settings.seed + 1))

    @staticmethod
    def _varied(table: Tensor) -> Tensor:
        """The rows that are trained on; ValueError where a column has one value in all of them."""
        constant = (table == table[0]).all(0).nonzero().flatten().tolist()
        if constant:
            raise ValueError(f"data: column {constant[0]} has one value in every row that is trained on; leave the column out")
        return table

    def _description(self, shape: tuple[int, ...]) -> Description:
        settings = self.settings
        return Description(
            shape=shape,
            process=settings.process,
            width=settings.width,
            depth=settings.depth,
            scale=None if self.decode is None else self.decode.scale.tolist(),
            shift=None if self.decode is None else self.decode.shift.tolist(),
            pretrain=settings.model_dump(mode="json"),
        )

    def __iter__(self) -> Iterator[Values]:
        settings, net = self.settings, self.fit.net
        while self.fit.batch < settings.batches:
            net.train()
            rows = torch.randint(len(self.data), (self.batch,), generator=self.generator)
            t, x, v = noisy(self.process, self.data[rows].to(self.device), self.generator)
            loss = self.fit.step((net(x, t, None) - v).square().mean())
            if not math.isfinite(loss):
                raise ValueError(f"pretrain.lr: the loss is not finite at batch {self.fit.batch}; lower it")
            metrics: Values = {"batch": self.fit.batch, "loss": loss}
            if self.fit.batch % settings.check_every == 0 or self.fit.batch == settings.batches:
                metrics["held_out_loss"] = self._judge()
                self.log.append(metrics)
            yield metrics

    def _judge(self) -> float:
        """The held-out loss of the averaged weights, which are kept where it is the lowest so far."""
        loss = denoised_share(self.fit.average.eval(), self.judged)
        if loss < self.best_loss:
            self.best, self.best_loss, self.best_batch = copy.deepcopy(self.fit.average), loss, self.fit.batch
        return loss

    def identity(self) -> Values:
        """The settings that make the result, with the data's checksum in the place of its name."""
        free = ("data", "array", "device", "checkpoint_every")
        settings = {key: value for key, value in self.settings.model_dump(mode="json").items() if key not in free}
        return flattened({"pretrain": {**settings, "data": self.digest}})

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on."""
        best = {"weights": self.best.state_dict(), "loss": self.best_loss, "batch": self.best_batch}
        return {"fit": self.fit.state(), "generator": self.generator.get_state(), "best": best, "log": self.log}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.fit.load_state(state["fit"])
        self.generator.set_state(state["generator"])
        best = state["best"]
        self.best, self.best_loss, self.best_batch = copy.deepcopy(self.fit.average), best["loss"], best["batch"]
        self.best.load_state_dict(best["weights"])
        self.log = list(state["log"])

    def model(self) -> Model:
        """The model of the weights with the lowest held-out loss."""
        return self.described.model(copy.deepcopy(self.best).eval().cpu().requires_grad_(True))

    def figures(self, model: Model, *, n: int = 1000, steps: int = 50) -> Values:
        """The lowest held-out loss and its batch; of a table also what a kernel density of the same rows reaches.

        And the sliced W2 of samples to the rows that were left out, `distance`, beside that of rows trained on, in standard
        deviations of the columns.
        """
        figures: Values = {"held_out_loss": self.best_loss, "batch": self.best_batch, "rows": len(self.data)}
        if self.decode is None:
            return figures
        if self.data.numel() <= COMPARED:
            figures["held_out_loss_density"] = denoised_share(self._density(), self.judged)
        n = min(n, len(self.left_out), len(self.data))
        x0 = draw_x0(model, Sampler(steps=steps), n, None, self.settings.seed, reference=True)
        truth, known = self.left_out[:n], self.data[:n]
        return figures | {"distance": sliced_w2(x0, truth), "distance_floor": sliced_w2(known, truth)}

    def _density(self) -> DenoiserFunction:
        """The exact prediction of v by a kernel density of the rows trained on."""
        points, counts = torch.unique(self.data.double(), dim=0, return_counts=True)
        law = KernelDensity.at(points, std=bandwidth(points, counts.double()), weights=counts.double())
        return lambda x, t, cond: from_prediction(self.process, "v", t, law.prediction(self.process, x, t))

    def save(self, folder: Path, figures: Values) -> None:
        """Writes the model into a folder, which `model: {name: pretrained, path: FOLDER}` and `load` read."""
        with staged(folder, last=DESCRIPTION) as part:
            tensors: dict[str, Tensor] = {
                name: value.cpu().contiguous().clone() for name, value in self.best.state_dict().items()
            }
            save_file(tensors, part / WEIGHTS)
            text = self.described.model_copy(update={"metrics": figures}).model_dump_json(indent=2)
            (part / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
