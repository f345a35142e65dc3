"""`scoreaction doctor`: checks of model, reward and training."""
