"""The training loop: collecting, optimising, evaluating, checkpoints and export."""
