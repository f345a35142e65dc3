"""Coloured shapes with captions: scenes, a tiny Stable Diffusion, its scorer and an exact reader."""
