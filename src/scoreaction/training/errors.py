"""Errors of training: no gradient, a number that is not finite, a policy that is not the one that sampled."""

from __future__ import annotations

import math

from scoreaction.errors import Failed

FAR = 1e12
"""Spread of rewards beyond which, or below the inverse of which, squares of theirs leave single precision."""


class TrainingError(Failed):
    """Training cannot go on: no gradient reaches the trained parameters, or a number is not finite."""

    shared = True
    """It is raised in every process alike."""


class GradientError(TrainingError):
    """Training cannot go on because a number is not finite, or a gradient is zero; rewards of an odd size do either."""

    def __init__(self, fault: str, remedy: str = "lower train.lr") -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault

    def explained(self, spread: float) -> GradientError:
        """The same error, with the remedy for rewards of this standard deviation.

        >>> print(GradientError("iteration 1: the gradient of the policy is not finite").explained(1e30))
        iteration 1: the gradient of the policy is not finite; rewards spread by 1e+30: scale the reward to a spread near 1
        """
        if spread == 0 or 1 / FAR < spread < FAR:
            return self
        return GradientError(self.fault, f"rewards spread by {spread:.2g}: scale the reward to a spread near 1")


def check_first_ratio(log_ratio: float, kl_floor: float, iteration: int) -> None:
    """TrainingError where the policy that trains is not the one that sampled: a log-ratio above `1 + K + 6 sqrt(2 K)`.

    Of two Gaussian laws K nats apart it is N(K, 2 K), and no law of a step is further apart than rounding's whole path,
    `kl_floor`. In fp32, where K is 0, rounding alone is far below 1.

    >>> check_first_ratio(3.0, 0.1, 0)
    >>> check_first_ratio(3.0, 0.0, 0)
    Traceback (most recent call last):
    ...
    scoreaction.training.errors.TrainingError: iteration 1: the policy that trains is not the one that sampled: ...
    """
    if not log_ratio <= 1 + kl_floor + 6 * math.sqrt(2 * kl_floor):
        raise TrainingError(
            f"iteration {iteration + 1}: the policy that trains is not the one that sampled: before the first update their"
            f" log-ratio is {log_ratio:.2g}, and must be 0; something in the network draws noise, mixes rows, or depends on"
            " whether gradients are on (scoreaction doctor says more)"
        )
