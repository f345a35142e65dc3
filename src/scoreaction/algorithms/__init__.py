"""Algorithms: a file each on the shelf, and the parts that one of your own is made of."""

from scoreaction.algorithms._learner import Algorithm, Learner, Regularised, State
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Largest, Term, Update, Updates
from scoreaction.networks.conditions import take

__all__ = ["Algorithm", "Largest", "Learner", "Regularised", "Setting", "State", "Term", "Update", "Updates", "take"]
