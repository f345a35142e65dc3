"""Coloured shapes with captions: scenes, a tiny Stable Diffusion, a learned scorer, and an exact reader of pictures."""
