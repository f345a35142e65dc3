"""scoreaction: fine-tune diffusion and flow models with reinforcement learning in continuous time."""

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
from scoreaction.evaluation import Evaluation, sample
from scoreaction.finetuner import Finetuner, Train
from scoreaction.loading import load
from scoreaction.model import Model
from scoreaction.models import gaussian_mixture
from scoreaction.online import Online
from scoreaction.processes import VE, VP, CosineVP, Flow, TableVP
from scoreaction.rewards import Reward
from scoreaction.rollout import Sampler
from scoreaction.types import Prompt

__all__ = [
    "DDPO",
    "DPOK",
    "PIFT",
    "SQDF",
    "VARD",
    "VE",
    "VP",
    "AdjointMatching",
    "CosineVP",
    "DRaFT",
    "Distill",
    "Distiller",
    "Evaluation",
    "Finetuner",
    "Flow",
    "Model",
    "Online",
    "Prompt",
    "ReFL",
    "Reward",
    "Sampler",
    "ScoreAction",
    "TableVP",
    "Train",
    "examine",
    "gaussian_mixture",
    "load",
    "load_consistency",
    "models",
    "sample",
]
