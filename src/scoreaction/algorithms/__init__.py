"""Algorithms: a file each on the shelf, and what one of your own is made of."""

from scoreaction.algorithms._learner import Algorithm, Learner, Regularised, Setting, Update

__all__ = ["Algorithm", "Learner", "Regularised", "Setting", "Update"]
