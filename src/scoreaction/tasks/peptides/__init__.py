"""Antimicrobial peptides: their letters, networks, data and pretraining."""
