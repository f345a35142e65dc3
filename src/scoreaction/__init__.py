"""scoreaction: fine-tune diffusion and flow models with reinforcement learning in continuous time."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoreaction import models
    from scoreaction.algorithms._writer import Writer, write_menu
    from scoreaction.algorithms.adjoint_matching import AdjointMatching
    from scoreaction.algorithms.awm import AWM
    from scoreaction.algorithms.ddpo import DDPO
    from scoreaction.algorithms.ddpp import DDPP
    from scoreaction.algorithms.dpo import DPO
    from scoreaction.algorithms.dpok import DPOK
    from scoreaction.algorithms.draft import DRaFT
    from scoreaction.algorithms.hrf import HRF
    from scoreaction.algorithms.hypernoise import Hypernoise
    from scoreaction.algorithms.nft import NFT
    from scoreaction.algorithms.pi_ft import PIFT
    from scoreaction.algorithms.prompt_loop import PromptLoop
    from scoreaction.algorithms.q_learning import QLearning
    from scoreaction.algorithms.ram import RAM
    from scoreaction.algorithms.refl import ReFL
    from scoreaction.algorithms.score_action import ScoreAction
    from scoreaction.algorithms.spin import SPIN
    from scoreaction.algorithms.sqdf import SQDF
    from scoreaction.algorithms.vard import VARD
    from scoreaction.commands.doctor.checkup import examine
    from scoreaction.diffusion.processes import VE, VP, CosineVP, Flow, Masking, TableVP
    from scoreaction.models import gaussian_mixture
    from scoreaction.networks.causal import CausalTransformer
    from scoreaction.networks.consistency import load_consistency
    from scoreaction.networks.labels import LabelAdapter
    from scoreaction.networks.masked import MaskedModel
    from scoreaction.networks.model import Model
    from scoreaction.recipes.build import load
    from scoreaction.rewards import Reward
    from scoreaction.sampling.draw import sample
    from scoreaction.sampling.known import Known
    from scoreaction.sampling.sampler import Sampler
    from scoreaction.sampling.steering import Steering
    from scoreaction.training.control import DelayedController
    from scoreaction.training.distillation import Distill, Distiller
    from scoreaction.training.evaluation import Evaluation
    from scoreaction.training.finetuner import Finetuner
    from scoreaction.training.online import Online
    from scoreaction.training.optimizer import Train
    from scoreaction.training.pretraining import Pretrain, Pretrainer
    from scoreaction.training.runge_kutta import RungeKutta
    from scoreaction.training.steering import steer
    from scoreaction.training.students import Student, StudentDistiller
    from scoreaction.types import Pairs, Prompt, Samples

_HOMES = {
    "AWM": "algorithms.awm",
    "AdjointMatching": "algorithms.adjoint_matching",
    "CausalTransformer": "networks.causal",
    "CosineVP": "diffusion.processes",
    "DDPO": "algorithms.ddpo",
    "DDPP": "algorithms.ddpp",
    "DPO": "algorithms.dpo",
    "DPOK": "algorithms.dpok",
    "DRaFT": "algorithms.draft",
    "DelayedController": "training.control",
    "Distill": "training.distillation",
    "Distiller": "training.distillation",
    "Evaluation": "training.evaluation",
    "Finetuner": "training.finetuner",
    "Flow": "diffusion.processes",
    "Hypernoise": "algorithms.hypernoise",
    "Known": "sampling.known",
    "LabelAdapter": "networks.labels",
    "MaskedModel": "networks.masked",
    "Masking": "diffusion.processes",
    "Model": "networks.model",
    "HRF": "algorithms.hrf",
    "NFT": "algorithms.nft",
    "Online": "training.online",
    "PIFT": "algorithms.pi_ft",
    "Pairs": "types",
    "Pretrain": "training.pretraining",
    "Pretrainer": "training.pretraining",
    "Prompt": "types",
    "PromptLoop": "algorithms.prompt_loop",
    "QLearning": "algorithms.q_learning",
    "RAM": "algorithms.ram",
    "ReFL": "algorithms.refl",
    "Reward": "rewards",
    "RungeKutta": "training.runge_kutta",
    "SPIN": "algorithms.spin",
    "SQDF": "algorithms.sqdf",
    "Sampler": "sampling.sampler",
    "Samples": "types",
    "ScoreAction": "algorithms.score_action",
    "Steering": "sampling.steering",
    "Student": "training.students",
    "StudentDistiller": "training.students",
    "TableVP": "diffusion.processes",
    "Train": "training.optimizer",
    "VARD": "algorithms.vard",
    "VE": "diffusion.processes",
    "VP": "diffusion.processes",
    "Writer": "algorithms._writer",
    "examine": "commands.doctor.checkup",
    "gaussian_mixture": "models.gaussian_mixture",
    "load": "recipes.build",
    "load_consistency": "networks.consistency",
    "models": "models",
    "sample": "sampling.draw",
    "steer": "training.steering",
    "write_menu": "algorithms._writer",
}
"""Home of each name: it is imported when it is first used, so that the command line answers before torch does."""

__all__ = [*_HOMES]


_MOVED = {"scoreaction.predictions": "scoreaction.diffusion.predictions", "scoreaction.pretraining": "scoreaction.tasks"}


class _Moved(MetaPathFinder):
    """Names the new home of a module that pages named and that has moved."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname in _MOVED:
            raise ModuleNotFoundError(f"{fullname} has moved to {_MOVED[fullname]}", name=fullname)


sys.meta_path.append(_Moved())  # after all others: it is called for what they do not know


def __getattr__(name: str) -> Any:
    try:
        module = import_module(f"scoreaction.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != f"scoreaction.{name}":
            raise
        raise AttributeError(f"module 'scoreaction' has no attribute {name!r}") from error
    return globals().setdefault(name, getattr(module, name, module))


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
