"""Mathematics of diffusion on tensors: processes, predictions, solver steps with densities, KL, Gaussian mixtures."""
