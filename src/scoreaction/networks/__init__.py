"""Networks around the one that is tuned: the model with its reference, LoRA, the critic, the surrogate, consistency models."""
