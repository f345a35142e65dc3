"""scoreaction: fine-tune diffusion and flow models with reinforcement learning in continuous time."""

from scoreaction import models
from scoreaction.algorithms.ddpo import DDPO
from scoreaction.algorithms.dpok import DPOK
from scoreaction.algorithms.score_action import ScoreAction
from scoreaction.consistency import load_consistency
from scoreaction.distillation import Distill, Distiller
from scoreaction.evaluation import Evaluation, sample
from scoreaction.finetuner import Finetuner, Train
from scoreaction.loading import load
from scoreaction.model import Model
from scoreaction.models import gaussian_mixture
from scoreaction.processes import VE, VP, CosineVP, Flow, TableVP
from scoreaction.rewards import Reward
from scoreaction.rollout import Sampler

__all__ = [
    "DDPO",
    "DPOK",
    "VE",
    "VP",
    "CosineVP",
    "Distill",
    "Distiller",
    "Evaluation",
    "Finetuner",
    "Flow",
    "Model",
    "Reward",
    "Sampler",
    "ScoreAction",
    "TableVP",
    "Train",
    "gaussian_mixture",
    "load",
    "load_consistency",
    "models",
    "sample",
]
