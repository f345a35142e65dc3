"""Rewards: one file a reward."""

from scoreaction.rewards._reward import CountedReward, Reward, RewardError, as_reward, begin_scores

__all__ = ["CountedReward", "Reward", "RewardError", "as_reward", "begin_scores"]
