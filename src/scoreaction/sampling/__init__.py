"""Trajectories of the sampler, what is learned from them, and drawing samples."""
