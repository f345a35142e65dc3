"""scoreaction: fine-tune diffusion and flow models with reinforcement learning in continuous time."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scoreaction import models
    from scoreaction.algorithms.adjoint_matching import AdjointMatching
    from scoreaction.algorithms.ddpo import DDPO
    from scoreaction.algorithms.dpok import DPOK
    from scoreaction.algorithms.draft import DRaFT
    from scoreaction.algorithms.pi_ft import PIFT
    from scoreaction.algorithms.refl import ReFL
    from scoreaction.algorithms.score_action import ScoreAction
    from scoreaction.algorithms.sqdf import SQDF
    from scoreaction.algorithms.vard import VARD
    from scoreaction.consistency import load_consistency
    from scoreaction.distillation import Distill, Distiller
    from scoreaction.doctor import examine
    from scoreaction.evaluation import Evaluation
    from scoreaction.finetuner import Finetuner
    from scoreaction.loading import load
    from scoreaction.model import Model
    from scoreaction.models import gaussian_mixture
    from scoreaction.online import Online
    from scoreaction.optimising import Train
    from scoreaction.processes import VE, VP, CosineVP, Flow, TableVP
    from scoreaction.rewards import Reward
    from scoreaction.rollout import Sampler
    from scoreaction.sampling import sample
    from scoreaction.types import Prompt

_HOMES = {
    "AdjointMatching": "algorithms.adjoint_matching",
    "CosineVP": "processes",
    "DDPO": "algorithms.ddpo",
    "DPOK": "algorithms.dpok",
    "DRaFT": "algorithms.draft",
    "Distill": "distillation",
    "Distiller": "distillation",
    "Evaluation": "evaluation",
    "Finetuner": "finetuner",
    "Flow": "processes",
    "Model": "model",
    "Online": "online",
    "PIFT": "algorithms.pi_ft",
    "Prompt": "types",
    "ReFL": "algorithms.refl",
    "Reward": "rewards",
    "SQDF": "algorithms.sqdf",
    "Sampler": "rollout",
    "ScoreAction": "algorithms.score_action",
    "TableVP": "processes",
    "Train": "optimising",
    "VARD": "algorithms.vard",
    "VE": "processes",
    "VP": "processes",
    "examine": "doctor",
    "gaussian_mixture": "models.gaussian_mixture",
    "load": "loading",
    "load_consistency": "consistency",
    "models": "models",
    "sample": "sampling",
}
"""Where each name is from: it is imported when it is first asked for, so that the command line answers before torch does."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    try:
        module = import_module(f"scoreaction.{_HOMES.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != f"scoreaction.{name}":
            raise
        raise AttributeError(f"module 'scoreaction' has no attribute {name!r}") from error
    found = getattr(module, name, module)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
