"""Pretraining a model of the data that a recipe names: the loop with its progress, checkpoints, and the folder it leaves."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from scoreaction.commands.signals import Signals
from scoreaction.disk import check_writable, whole, write_whole
from scoreaction.errors import Failed, Interrupted, UserError, missing
from scoreaction.models.pretrained import is_pretrained
from scoreaction.networks.model import Model
from scoreaction.sampling.draw import draw
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.checkpoints import load_newest, prune, save_tree
from scoreaction.training.checks import check_device
from scoreaction.training.pretraining import Pretrain, Pretrainer
from scoreaction.training.run_folder import RunFolder
from scoreaction.types import Values

LINES = 20
"""Lines of progress at most."""


def pretrain(settings: Pretrain, folder: Path, *, resume: bool) -> Values:
    """Trains the network, or goes on with it, and writes the model; its figures.

    UserError where the input is wrong, before anything is trained; Interrupted after a checkpoint.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("pretrain: runs in one process; start it without torchrun, and share the fine-tuning instead")
    if settings.device != "auto":
        check_device(settings.device, key="pretrain.device")
    try:
        pretrainer = Pretrainer(settings, device=Accelerator().device if settings.device == "auto" else settings.device)
    except ImportError as error:
        raise UserError(f"pretrain.data: {missing(error.name or str(error))}") from error
    except ValueError as error:
        raise UserError(f"pretrain.{error}") from error
    place = RunFolder(folder)
    if (place.exists or is_pretrained(folder)) and not resume:
        raise UserError(f"--output: {folder} already holds a model or a run; name another folder, or go on with --resume")
    if resume and not place.exists:
        raise UserError(f"--resume: there is no checkpoint in {folder}; leave it out to begin")
    check_writable(folder, "--output")
    with place.locked():
        if resume:
            newest = load_newest(place.saved_checkpoints(), pretrainer.identity())
            if newest is not None:
                pretrainer.load_state(newest[1])
        _train(pretrainer, place)
        model = pretrainer.model()
        figures = pretrainer.figures(model)
        _save_samples(model, place, settings.seed)
        pretrainer.save(folder, figures)
    return figures


class _Progress:
    """Lines about a training, some twenty of them: the mean loss since the line before, the held-out loss, the time left."""

    def __init__(self, pretrainer: Pretrainer) -> None:
        settings, weights = pretrainer.settings, sum(p.numel() for p in pretrainer.fit.net.parameters())
        self.total, self.first, self.began = settings.batches, pretrainer.fit.batch, time.monotonic()
        self.every = settings.check_every * math.ceil(settings.batches / settings.check_every / LINES)
        self.losses: list[float] = []
        rows = f"{len(pretrainer.data):,} samples, {len(pretrainer.left_out):,} left out"
        print(f"pretraining  {rows}, {weights:,} weights, on {pretrainer.device}", flush=True)

    def show(self, metrics: Values) -> None:
        """Prints a line where it is time."""
        self.losses.append(metrics["loss"])
        batch, judged = metrics["batch"], metrics.get("held_out_loss")
        if judged is None or (batch % self.every and batch < self.total):
            return
        left = (time.monotonic() - self.began) / (batch - self.first) * (self.total - batch)
        mean = sum(self.losses) / len(self.losses)
        print(f"{batch}/{self.total}  loss {mean:.4f}  held out {judged:.4f} of 1  {left:.0f} s left", flush=True)
        self.losses.clear()


def _train(pretrainer: Pretrainer, place: RunFolder) -> None:
    """Runs it to its end with progress, log and checkpoints; Interrupted after a signal, with a checkpoint."""
    settings, progress = pretrainer.settings, _Progress(pretrainer)
    try:
        with Signals(waiting="this batch") as signals:
            for metrics in pretrainer:
                progress.show(metrics)
                batch, stops = metrics["batch"], signals.requested and metrics["batch"] < settings.batches
                if "held_out_loss" in metrics:
                    write_whole(place.metrics_path, "".join(json.dumps(line) + "\n" for line in pretrainer.log))
                if stops or batch % settings.checkpoint_every == 0 or batch == settings.batches:
                    _checkpoint(pretrainer, place)
                if stops:
                    raise Interrupted(f"stopped after batch {batch} of {settings.batches}")
    except KeyboardInterrupt:
        raise Interrupted("stopped at once, and what came after the newest checkpoint is lost") from None
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        raise Failed(f"pretraining: {error}") from error


def _checkpoint(pretrainer: Pretrainer, place: RunFolder) -> None:
    run = pretrainer.identity()
    save_tree(place.checkpoints / f"{pretrainer.fit.batch:08d}", pretrainer.state(), run)
    prune(place.saved_checkpoints(), run)


def _save_samples(model: Model, place: RunFolder, seed: int) -> None:
    from scoreaction.report.sample_figures import save_samples

    n = 1000 if len(model.shape) == 1 else 64
    samples: Any = draw(model, Sampler(steps=50), n, None, seed, reference=True).cpu().numpy()
    with whole(place.samples / "base.npz") as file:
        np.savez_compressed(file, samples=samples)
    save_samples(place.samples / "base.png", samples, None)
