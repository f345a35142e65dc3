"""Shipped tasks, digits and shapes: their data, networks, pretraining, and the programs and classifiers that judge samples."""
